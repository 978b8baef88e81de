"""The disk tier: a directory of chunk files with a quota.

It is a cache of remote data, so it may forget anything and must never stop the training: whatever the disk
does, the worst answer is "not here". A file that is damaged is put out of use, removed and counted, and
its reader fetches it again. What a failing disk does to the tier is `health`'s to say.

    chunks/xx/<key>.chunk   one chunk (see `chunkfile`), in one of 256 directories
    index/<name>.blob       one small named value (see `blobfile`)
    .tmp-...                a file being written, beside where it will be (see `owner`)

The directory is the truth, and the table in memory is made from it at the start (see `inventory`): a file
appears under its final name by rename, whole, so there is nothing to recover.

What is held, and in how many allocated bytes, is known here only. Room is reserved before a byte is written,
so writers in several threads cannot overrun the quota together; what a file really took replaces the
reservation. Which chunk has to go when there is no room is the caller's decision: `write` says no, `remove`
makes room.

No system call is made while the lock is held: `contains` and the counts answer at once, even when the disk
stalls. A name leaves the table before its file goes, and enters after its file has come. So threads that
write and remove one key at once may leave a name without a file, which the next read finds out, and never a
file without a name, which would take room that is not counted.

What a disk tier's directory holds: the table that is made when the tier is opened.

One pass over the 256 directories of chunks and the one of blobs. A file counts by its name and size alone;
its content is verified whenever it is read. A chunk file of a size that no chunk has (cut by a crash, usually
to nothing) and a temp file whose writer is dead are removed. Other files there are not the cache's and
is left alone, uncounted.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fastload.cache import blobfile, chunkfile, syscalls, tempfiles
from fastload.cache.directory import LastingRoot
from fastload.cache.health import Health
from fastload.cache.key import ChunkKey
from fastload.config import GIB

_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One file that is held; another file under the same name is another entry."""

    allocated_bytes: int


class DiskTier:
    """Chunks and blobs under `directory`, at most `quota_bytes` of them.

    May be called from several threads. No method raises for what the disk does.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        chunk_bytes: int,
        *,
        root: LastingRoot | None = None,
        on_trouble: Callable[[str], None] | None = None,
        margin_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the tier and take stock of what it holds; with `quota_bytes` 0 it stays off, and off the disk.

        `root` is where the directory is reached, if not by its name (see `CacheDirectory.lasting_root`). `margin_bytes`
        of the file system are left free (default: 2 % of it, at most 4 GiB). `on_trouble` gets each kind of trouble
        once, as a sentence, from whichever thread met it.
        """
        self.directory = directory
        self.chunk_bytes = chunk_bytes
        self._reached, self._root = root, directory if root is None else root.path
        self._on_trouble = on_trouble or (lambda message: None)
        self._health = Health(directory, self._tell, clock)
        self._margin_bytes = margin_bytes
        self._lock = threading.Lock()
        self._quota_bytes = 0
        self._held: dict[ChunkKey | str, _Entry] = {}  # a str is a blob's name
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._temp_names = tempfiles.temp_names()
        self.set_quota(quota_bytes)

    # What is there

    @property
    def readable(self) -> bool:
        """Whether chunks are looked for here at all."""
        return self._health.readable

    @property
    def writable(self) -> bool:
        """Whether `write` may succeed, given room; False once the disk has failed or is switched off."""
        return self._health.writable

    @property
    def used_bytes(self) -> int:
        """The allocated bytes of all that is held."""
        return self._used_bytes

    @property
    def quota_bytes(self) -> int:
        """How many allocated bytes may be held."""
        return self._quota_bytes

    @property
    def free_bytes(self) -> int:
        """What the quota has left beside writes under way; negative after the quota was lowered."""
        with self._lock:
            return self._quota_bytes - self._used_bytes - self._reserved_bytes

    @property
    def counters(self) -> dict[str, int]:
        """A copy of the `DiskCounters` by name."""
        return self._health.counters()

    @staticmethod
    def file_bytes(length: int) -> int:
        """The room that a chunk of `length` bytes takes."""
        return chunkfile.layout(length).file_bytes

    def contains(self, key: ChunkKey) -> bool:
        """Whether the chunk is held, as far as is known. Never blocks."""
        return self._health.readable and key in self._held

    def keys(self) -> list[ChunkKey]:
        """The chunks held, those written first in front."""
        with self._lock:
            return [key for key in self._held if isinstance(key, ChunkKey)]

    def blob_names(self) -> list[str]:
        """The names of the blobs held, those written first in front."""
        with self._lock:
            return [name for name in self._held if isinstance(name, str)]

    # Chunks

    def read_into(self, key: ChunkKey, out: memoryview) -> int | None:
        """Fill the start of `out` with the chunk, verified; returns its length, or None for no chunk.

        `out` takes a whole chunk (`chunk_bytes`); where it starts on a page, as the arena's buffers do, the
        read is direct. After None it holds nothing of use.
        """
        assert len(out) >= self.chunk_bytes, f"a buffer of {len(out)} bytes for chunks of {self.chunk_bytes}"
        return self._get(key, lambda path: chunkfile.read_into(path, key, out), lambda length: length)

    def verify(self, key: ChunkKey, scratch: memoryview, *, repair: bool) -> bool | None:
        """Whether the chunk's file is what was written, found out by reading it into `scratch`, which takes a whole
        chunk; None where it is not there, or cannot be read for a reason that is not its own. With `repair`, a damaged
        one is removed.
        """
        entry = self._held.get(key)
        if not self._health.readable or entry is None:
            return None
        path = path_in(self._root, key)
        try:
            chunkfile.read_into(path, key, scratch)
        except FileNotFoundError:
            self._forget(key, entry)
            return None
        except chunkfile.ChunkDamagedError as error:
            if repair:
                self._condemn(key, entry, path)
                self._health.read_damaged(path, str(error))
            return False
        except OSError as error:
            is_its_own = self._health.read_failed(path, error)
            if is_its_own and repair:
                self._condemn(key, entry, path)
            return False if is_its_own else None
        return True

    def write(self, key: ChunkKey, buffer: memoryview, length: int) -> bool:
        """Keep the first `length` bytes of `buffer` as the chunk; False where there is no room, or no disk.

        The buffer must not change meanwhile. A chunk that is held already is not written again.
        """
        if self.contains(key):
            return True
        data = buffer[:length]
        return self._put(key, self.file_bytes(length), lambda path: chunkfile.write(path, key, data), length)

    def remove(self, key: ChunkKey) -> bool:
        """Drop the chunk and its room; False where it was not held, or the disk does not let go of it."""
        return self._remove(key)

    # Blobs

    def get_blob(self, name: str) -> bytes | None:
        """The value under `name`, verified, or None where it is not to be had."""
        return self._get(_checked(name), lambda path: blobfile.read(path, name), len)

    def has_blob(self, name: str) -> bool:
        """Whether there is a value under `name`, as far as is known. Never blocks."""
        return self._health.readable and name in self._held

    def get_blob_head(self, name: str, head_bytes: int) -> tuple[bytes, int] | None:
        """The first bytes of the value under `name`, and how long all of it is; None where it is not to be had.

        The head itself is not verified: see `blobfile.read_head`.
        """
        return self._get(_checked(name), lambda path: blobfile.read_head(path, name, head_bytes), lambda _: head_bytes)

    def put_blob(self, name: str, data: bytes) -> bool:
        """Keep `data` under `name`, in place of what was there; False where there is no room, or no disk."""
        need = blobfile.file_bytes(len(data))
        return self._put(_checked(name), need, lambda path: blobfile.write(path, name, data), len(data))

    def remove_blob(self, name: str) -> bool:
        """Drop the value under `name`; False as in `remove`."""
        return self._remove(_checked(name))

    # Limits

    def set_quota(self, quota_bytes: int) -> None:
        """Change the quota while running. Lowering it removes nothing by itself: the caller evicts.

        A tier that had stopped writing tries again, since a change of quota is also how one answers a full
        disk. One that was off altogether takes stock anew, which blocks for as long as that takes.
        """
        with self._lock:
            self._quota_bytes = quota_bytes
        if self._health.off and quota_bytes:
            self._take_stock()
        else:
            self._health.switch(quota_bytes > 0)

    # A disk that hangs, as seen by the watchdog that times the calls made here

    def stalled(self, seconds: float) -> None:
        """A call has not returned for `seconds`: look for nothing and write nothing until `answered`."""
        self._health.stalled(seconds)

    def answered(self) -> None:
        """The calls that hung have returned: use the disk again, unless it has stalled too often."""
        self._health.answered()

    # Inside

    def _tell(self, message: str) -> None:
        """Trouble in files, by the names that people know."""
        self._on_trouble(message.replace(str(self._root), str(self.directory)))

    def _take_stock(self) -> None:
        """Make the table, and only then switch on. What a write still under way has entered meanwhile stays."""
        with self._lock:
            self._held.clear()
            self._used_bytes = 0
        found = take_inventory(self._root)
        with self._lock:
            held = {name: _Entry(took) for _, name, took in found.held} | self._held
            self._held = held
            self._used_bytes = sum(entry.allocated_bytes for entry in held.values())
        self._health.switch(True)
        self._health.count(swept=found.swept, damaged=len(found.cut))
        if found.error is not None:
            self._health.scan_failed(found.error, found.errors)

    def _get(self, name: ChunkKey | str, read: Callable[[Path], _Read], size: Callable[[_Read], int]) -> _Read | None:
        entry = self._held.get(name)
        if not self._health.readable or entry is None:
            return None
        path = path_in(self._root, name)
        try:
            found = read(path)
        except FileNotFoundError:  # removed meanwhile, by another thread or by hand
            self._forget(name, entry)
        except chunkfile.ChunkDamagedError as error:
            self._condemn(name, entry, path)
            self._health.read_damaged(path, str(error))
        except OSError as error:
            if self._health.read_failed(path, error):
                self._condemn(name, entry, path)
        else:
            self._health.read_well(size(found))
            return found
        return None

    def _put(self, name: ChunkKey | str, need: int, write: Callable[[Path], int], length: int) -> bool:
        if not self._reserve(need):
            self._health.count(refused=1)
            return False
        took = None
        try:
            took = self._publish(path_in(self._root, name), write)
        except OSError as error:
            self._health.write_failed(error)
        finally:
            self._settle(name, need, took)
        if took is None:
            return False
        self._health.count(writes=1, written_bytes=length)
        return True

    def _reserve(self, need: int) -> bool:
        if not self._health.writable or not self._leaves_margin(need):
            return False
        with self._lock:
            if self._used_bytes + self._reserved_bytes + need > self._quota_bytes:
                return False
            self._reserved_bytes += need
        return True

    def _settle(self, name: ChunkKey | str, need: int, took: int | None) -> None:
        """Give the reservation back and, where something was written, enter what it took."""
        with self._lock:
            self._reserved_bytes -= need
            if took is not None:
                before = self._held.pop(name, None)
                self._used_bytes += took - (before.allocated_bytes if before else 0)
                self._held[name] = _Entry(took)

    def _leaves_margin(self, need: int) -> bool:
        """Whether the file system has room for `need` more bytes, besides the margin that is everybody's."""
        try:
            status = syscalls.statvfs(self._root)
        except OSError as error:
            self._health.write_failed(error)
            return False
        margin = self._margin_bytes
        if margin is None:
            margin = min(status.f_blocks * status.f_frsize // 50, 4 * GIB)
        free = status.f_bavail * status.f_frsize
        if free - self._reserved_bytes - need >= margin:
            return True
        self._health.margin_reached(free, margin)
        return False

    def _publish(self, path: Path, write: Callable[[Path], int]) -> int:
        """Write beside `path`, rename to it; returns the allocated bytes. Nothing stays behind an error."""
        temp = path.with_name(next(self._temp_names))
        try:
            try:
                took = write(temp)
            except FileNotFoundError:  # the first file here
                self._make_directories(path.parent)
                took = write(temp)
            syscalls.rename(temp, path)
        except BaseException:
            self._discard(temp)
            raise
        return took

    def _make_directories(self, directory: Path) -> None:
        """`directory` and what lacks above it, down from the tier's own, which has to be there."""
        for missing in (directory.parent, directory):
            if self._root in missing.parents:
                with contextlib.suppress(FileExistsError):
                    syscalls.mkdir(missing)

    def _remove(self, name: ChunkKey | str) -> bool:
        entry = self._held.get(name)
        if entry is None or not self._forget(name, entry):
            return False
        try:
            syscalls.unlink(path_in(self._root, name))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._health.write_failed(error)
            self._restore(name, entry)
            return False
        return True

    def _condemn(self, name: ChunkKey | str, entry: _Entry, path: Path) -> None:
        """Put a file out of use: first out of the table, so that it is not read again, then off the disk."""
        if self._forget(name, entry):
            self._discard(path)

    def _forget(self, name: ChunkKey | str, entry: _Entry) -> bool:
        """Take a file out of the table; False where it is not there, or another file has replaced it."""
        with self._lock:
            if self._held.get(name) is not entry:
                return False
            del self._held[name]
            self._used_bytes -= entry.allocated_bytes
        return True

    def _restore(self, name: ChunkKey | str, entry: _Entry) -> None:
        with self._lock:
            if name not in self._held:
                self._held[name] = entry
                self._used_bytes += entry.allocated_bytes

    def _discard(self, path: Path) -> None:
        """Remove a file that may be there. A temp file that stays is swept once its writer is gone."""
        try:
            syscalls.unlink(path)
        except FileNotFoundError:
            pass
        except OSError:
            self._health.count(errors=1)


def _checked(name: str) -> str:
    if BLOB_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no name for a blob: up to 200 letters, digits, '_', '-' and '.'")
    return name


CHUNKS, INDEX = "chunks", "index"
CHUNK_ENDING, BLOB_ENDING = ".chunk", ".blob"
BLOB_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")


@dataclass(slots=True)
class Inventory:
    """What was found. `error` is the last system call that failed; then there may be more than was found."""

    held: list[tuple[int, ChunkKey | str, int]] = field(default_factory=list)  # mtime_ns, name, allocated bytes
    cut: list[ChunkKey] = field(default_factory=list)  # files of a size that no chunk has
    swept: int = 0
    errors: int = 0
    error: OSError | None = None


def path_in(directory: Path, name: ChunkKey | str) -> Path:
    """Where the tier in `directory` keeps a chunk, or the blob of that name."""
    if isinstance(name, str):
        return directory / INDEX / f"{name}{BLOB_ENDING}"
    return directory / CHUNKS / name.fan_out / f"{name.name}{CHUNK_ENDING}"


def take_inventory(directory: Path, *, sweep: bool = True) -> Inventory:
    """The inventory of the tier in `directory`, sorted by the time when each was written. Raises nothing. Without
    `sweep` no file is removed.
    """
    found = Inventory()
    folders = [entry.name for entry in _files(directory / CHUNKS, found) if _FAN_OUT.fullmatch(entry.name)]
    for folder in sorted(folders):
        for entry in _files(directory / CHUNKS / folder, found):
            _take_entry(entry, _chunk_key(entry.name, folder), found, sweep=sweep)
    for entry in _files(directory / INDEX, found):
        _take_entry(entry, _blob_name(entry.name), found, sweep=sweep)
    found.held.sort(key=lambda item: item[0])
    return found


def _files(directory: Path, found: Inventory) -> list[os.DirEntry[str]]:
    try:
        return syscalls.scandir(directory)
    except (FileNotFoundError, NotADirectoryError):  # nothing was written yet; a file that is not ours
        return []
    except OSError as error:
        _note(error, found)
        return []


def _take_entry(entry: os.DirEntry[str], name: ChunkKey | str | None, found: Inventory, *, sweep: bool) -> None:
    try:
        if name is not None:
            _take_file(entry, name, found, sweep=sweep)
        elif sweep and tempfiles.is_stale(entry.name):
            syscalls.unlink(entry.path)
            found.swept += 1
    except FileNotFoundError:  # removed meanwhile by hand
        pass
    except OSError as error:
        _note(error, found)


def _take_file(entry: os.DirEntry[str], name: ChunkKey | str, found: Inventory, *, sweep: bool) -> None:
    status = syscalls.entry_stat(entry)
    if not stat.S_ISREG(status.st_mode):
        return
    if isinstance(name, ChunkKey) and chunkfile.layout_of_file(status.st_size) is None:
        if sweep:
            syscalls.unlink(entry.path)
        found.cut.append(name)
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
