"""What lies at a URL: a checkpoint of ours, or what other tools have written."""

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
    path = os.fspath(url)
    with opened(path, storage_options) as place:
        if path.endswith(ENDING):
            folder, _, name = place.folder.rstrip("/").rpartition("/")
            place = Place(place.store, folder + "/")
            yield place, contents_of_file(place, name)
        else:
            yield place, contents(place)


def contents(place: Place) -> Contents:
    try:
        return attempts.contents(place)
    except ObjectMissingError:
        there = contents_of_folder(place)
        if there is None:
            raise
        return there
