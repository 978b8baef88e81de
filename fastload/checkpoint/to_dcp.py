"""A checkpoint as torch's own distributed checkpoints have it (`.metadata` and `.distcp`), written by torch itself.

Tensors are fetched when its writer comes to them, so that it holds one at a time.
"""

from __future__ import annotations

import warnings
from pathlib import Path as FilePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from fastload.checkpoint.attempts import Place
from fastload.checkpoint.exporting import OnProgress, check_free
from fastload.checkpoint.flattening import Path, unflatten
from fastload.checkpoint.gathering import size_of, wanted
from fastload.checkpoint.reading import read
from fastload.checkpoint.records import Contents
from fastload.checkpoint.values import array_of, decoded, dtype_of, paths_of
from fastload.errors import CheckpointError, FastloadError


def to_dcp(
    place: Place,
    there: Contents,
    part: str,
    path: FilePath,
    on_progress: OnProgress,
    *,
    overwrite: bool,
    allow_pickle: bool,
) -> None:
    """All that is below `part`, which is left out of the names; "" is all of it."""
    check_free(path / ".metadata", overwrite)
    names: dict[int, str] = {}
    leaves: list[tuple[Path, Any]] = []
    for name, whole in paths_of(there, place.folder).items():
        below = _below(whole, part)
        if below is None:
            continue
        if name in there.tensors:
            dtype, shape = there.tensors[name]
            leaf: Any = torch.empty(shape, dtype=dtype_of(dtype, place.folder, name), device="meta")
            names[id(leaf)] = name
        else:
            leaf = decoded(*there.values[name], place.folder + name, allow_pickle)
        leaves.append((below, leaf))
    if not leaves:
        raise CheckpointError(f"{place.folder} has nothing below {part!r}; `fastload checkpoint show` lists it")
    total, done = sum(size_of(there, name) for name in names.values()), 0

    class Fetching(DefaultSavePlanner):
        def lookup_object(self, index: MetadataIndex) -> Any:
            nonlocal done
            found = super().lookup_object(index)
            name = names.get(id(found))
            if name is None:
                return found
            tensor = torch.empty(found.shape, dtype=found.dtype)
            read(place.store, place.folder, [wanted(piece, array_of(tensor)) for piece in there.places(name)])
            done += tensor.nbytes
            on_progress(done, total)
            return tensor

    writer = FileSystemWriter(path, thread_count=1)
    with warnings.catch_warnings():
        # Both are meant.
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        try:
            save(unflatten(leaves), storage_writer=writer, planner=Fetching(), no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from error


def _cause(error: CheckpointException) -> BaseException:
    """What the store or the disk has answered, which torch's writer may hide; `error` itself if it is neither."""
    for failed, _ in error.failures.values():
        cause: BaseException | None = failed
        while cause is not None:
            if isinstance(cause, FastloadError | OSError):
                return cause
            cause = cause.__cause__ or cause.__context__
    return error


def _below(path: Path, part: str) -> Path | None:
    """What of a path is below `part`; all of it where that is "". None: it is elsewhere."""
    if not part:
        return path
    names = [str(each[0] if isinstance(each, list) else each) for each in path]
    for count in range(1, len(path) + 1):
        if ".".join(names[:count]) == part:
            return path[count:] or path[-1:]
    return None
