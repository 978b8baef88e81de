"""What a disk tier's directory holds: the table that is made when the tier is opened.

One pass over the 256 directories of chunks and the one of blobs. A file counts by its name and size alone;
its content is verified whenever it is read. A chunk file of a size that no chunk has (cut by a crash, usually
to nothing) and a temp file whose writer is dead are removed. Whatever else lies there is somebody else's and
is left alone, uncounted.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fastload.cache import chunkfile, owner, syscalls
from fastload.cache.key import ChunkKey

CHUNKS, INDEX = "chunks", "index"
CHUNK_ENDING, BLOB_ENDING = ".chunk", ".blob"
BLOB_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")

_FAN_OUT = re.compile(r"[0-9a-f]{2}")


@dataclass(slots=True)
class Inventory:
    """What was found. `error` is the last system call that failed; then there may be more than was found."""

    held: list[tuple[int, ChunkKey | str, int]] = field(default_factory=list)  # mtime_ns, name, allocated bytes
    swept: int = 0
    damaged: int = 0
    errors: int = 0
    error: OSError | None = None


def path_of(directory: Path, name: ChunkKey | str) -> Path:
    """Where the tier in `directory` keeps a chunk, or the blob of that name."""
    if isinstance(name, str):
        return directory / INDEX / f"{name}{BLOB_ENDING}"
    return directory / CHUNKS / name.fan_out / f"{name.name}{CHUNK_ENDING}"


def take(directory: Path) -> Inventory:
    """The inventory of the tier in `directory`, sorted by the time when each was written. Raises nothing."""
    found = Inventory()
    folders = [entry.name for entry in _entries(directory / CHUNKS, found) if _FAN_OUT.fullmatch(entry.name)]
    for folder in sorted(folders):
        for entry in _entries(directory / CHUNKS / folder, found):
            _take_entry(entry, _chunk_key(entry.name, folder), found)
    for entry in _entries(directory / INDEX, found):
        _take_entry(entry, _blob_name(entry.name), found)
    found.held.sort(key=lambda item: item[0])
    return found


def _entries(directory: Path, found: Inventory) -> list[os.DirEntry[str]]:
    try:
        return syscalls.scandir(directory)
    except (FileNotFoundError, NotADirectoryError):  # nothing was written yet; a file that is not ours
        return []
    except OSError as error:
        _note(error, found)
        return []


def _take_entry(entry: os.DirEntry[str], name: ChunkKey | str | None, found: Inventory) -> None:
    try:
        if name is not None:
            _take_file(entry, name, found)
        elif owner.is_stale(entry.name):
            syscalls.unlink(entry.path)
            found.swept += 1
    except FileNotFoundError:  # removed meanwhile by somebody's hand
        pass
    except OSError as error:
        _note(error, found)


def _take_file(entry: os.DirEntry[str], name: ChunkKey | str, found: Inventory) -> None:
    status = syscalls.entry_stat(entry)
    if not stat.S_ISREG(status.st_mode):
        return
    if isinstance(name, ChunkKey) and chunkfile.layout_of_file(status.st_size) is None:
        syscalls.unlink(entry.path)
        found.damaged += 1
        return
    found.held.append((status.st_mtime_ns, name, chunkfile.allocated_bytes(status)))


def _chunk_key(file_name: str, folder: str) -> ChunkKey | None:
    key = ChunkKey.from_name(file_name.removesuffix(CHUNK_ENDING)) if file_name.endswith(CHUNK_ENDING) else None
    return key if key is not None and key.fan_out == folder else None


def _blob_name(file_name: str) -> str | None:
    name = file_name.removesuffix(BLOB_ENDING)
    return name if name != file_name and BLOB_NAME.fullmatch(name) else None


def _note(error: OSError, found: Inventory) -> None:
    found.errors += 1
    found.error = error
