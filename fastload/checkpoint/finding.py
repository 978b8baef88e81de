"""What lies at a URL: a checkpoint of fastload, or what other tools have written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place, opened
from fastload.checkpoint.foreign import ENDING, contents_of_file, contents_of_folder
from fastload.checkpoint.records import Contents
from fastload.errors import ObjectMissingError


@contextlib.contextmanager
def found(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[Place, Contents]]:
    """Where it is, and all that it holds. Raises `ObjectMissingError` where there is none, and `CheckpointError`."""
    with opened(url, storage_options) as place:
        yield at(place)


def at(place: Place) -> tuple[Place, Contents]:
    """The same of a place that is named as the checkpoint is."""
    path = place.folder.rstrip("/")
    if path.endswith(ENDING):
        folder, _, name = path.rpartition("/")
        above = Place(place.store, folder + "/")
        return above, contents_of_file(above, name)
    try:
        return place, attempts.contents(place)
    except ObjectMissingError:
        there = _contents_of_torch(place) or contents_of_folder(place)
        if there is None:
            raise
        return place, there


def _contents_of_torch(place: Place) -> Contents | None:
    try:
        place.store.head(place.folder + ".metadata")
    except ObjectMissingError:
        return None
    from fastload.checkpoint import distcp  # and torch, which nothing else here takes

    return distcp.contents(place)
