"""Files of this machine, or of what is mounted on it. What a version is of: `localversion`.

Which version of a local file is there: beside size and modification time, its inode and when its status changed.

A copy of a file may get the modification time of another (`cp -p`, `rsync -t`, `os.utime`), and where the size
is the same as well, nothing distinguishes them but the inode and the status-change time, which no program
can set. They stand in `ObjectInfo.etag`, as a weak ETag: `W/"<inode>-<ctime in ns>"`.

They hold on this node only. Lists of shards go to other nodes, which may have copies of the files, and to jobs that go
on next week, on files that were copied anew; so there they are left out, and put in again where a node begins to read
(`with_version_tags`). From then on a change is a change. Also a change of mode, owner, name or links counts as one,
since the file system does not distinguish them from a write.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from fastload.errors import AccessDeniedError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.store.answers import changed, truncated
from fastload.store.table import ObjectTable, Texts
from fastload.store.types import ObjectInfo
from fastload.store.urls import folder_without_slash, how_to_name, normalise

SCHEMES = frozenset({"file"})


class LocalStore:
    """All files that this process may read. See `Store` for the contract."""

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """All files whose path starts with `prefix_url`, folders below included, in the order of their
        paths.
        """
        prefix = normalise(prefix_url)
        paths = []
        for folder, _, names in os.walk(os.path.dirname(prefix), onerror=_refuse_unless_missing):
            paths += [path for name in names if (path := os.path.join(folder, name)).startswith(prefix)]
        for path in sorted(paths):
            yield self.head(path)

    def head(self, url: str) -> ObjectInfo:
        """The file at `url`."""
        path = normalise(url)
        try:
            stat = os.stat(path)
        except OSError as error:
            raise _explain(error, path) from error
        if os.path.isdir(path):
            raise ObjectMissingError(folder_without_slash(path))
        if not os.path.isfile(path):
            raise ObjectMissingError(f"{path}: neither a file nor a folder; name one of these")
        return _info(path, stat)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `start`."""
        try:
            descriptor = os.open(info.url, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _explain(error, info.url) from error
        try:
            before = _info(info.url, os.fstat(descriptor))
            if info != (before if info.etag is not None else replace(before, etag=None)):
                raise changed(info.url, _differences(info, before))
            got = _fill(descriptor, start, out)
            # Again, since it may have been written to in the meantime.
            if (after := _info(info.url, os.fstat(descriptor))) != before:
                raise changed(info.url, _differences(before, after))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise _explain(error, info.url) from error
        finally:
            os.close(descriptor)
        if got != len(out):
            raise truncated(info.url, got, len(out), start)

    def close(self) -> None:
        """Nothing is kept open."""


def _fill(descriptor: int, start: int, out: memoryview) -> int:
    got = 0
    while got < len(out):
        count = os.preadv(descriptor, [out[got:]], start + got)
        if count == 0:
            break
        got += count
    return got


def _info(path: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, stat.st_size, version_tag(stat), stat.st_mtime_ns)


def _differences(was: ObjectInfo, now: ObjectInfo) -> str:
    if was.size != now.size:
        return f"it was {was.size} bytes and is {now.size}"
    if was.mtime_ns != now.mtime_ns:
        return "it was written again"
    return "size and time are the same, but it was written to or replaced, or got another mode, owner or name"


def _refuse_unless_missing(error: OSError) -> None:
    """os.walk hides errors; a folder that is not there has no files, one that cannot be read is an error."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise _explain(error, str(error.filename)) from error


def _explain(error: OSError, path: str) -> StoreError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectMissingError(f"{path}: there is no such file; {how_to_name(path)}")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"{path}: this user may not read it; change its mode or owner")
    return StoreUnavailableError(f"{path}: {error.strerror or error}; it is retried until the deadline")


_TAG = re.compile(r'W/"([0-9]{1,20})-(-?[0-9]{1,20})"')
# File systems that give a file another inode number when they have forgotten the last one.
_NUMBERED_ANEW = frozenset({"fuse", "cifs", "smb3"})
_AT_ONCE, _THREADS = 256, 16


def version_tag(stat: os.stat_result) -> str:
    """What goes into `ObjectInfo.etag`. The inode is 0 on file systems where it says nothing."""
    inode = stat.st_ino if _keeps_inodes(stat.st_dev) else 0
    return f'W/"{inode}-{stat.st_ctime_ns}"'


def parse_version_tag(url: str, etag: str | None) -> tuple[int, int] | None:
    """Inode and status-change time in ns; None where `etag` is not that of a local file."""
    match = _TAG.fullmatch(etag) if etag is not None and url.startswith("/") else None
    return (int(match[1]), int(match[2])) if match else None


def with_version_tags(objects: ObjectTable) -> ObjectTable:
    """The same objects with what this node's files say now. A read of a file that is not there raises."""
    local = np.flatnonzero(_is_local(objects))
    if not len(local):
        return objects
    etags = objects.etags.to_list()
    untold = local[objects.etags.missing[local]]
    for number, tag in zip(untold.tolist(), _tags(objects.urls.take(untold).to_list()), strict=True):
        etags[number] = tag
    return objects.with_etags(Texts.of(etags))


def _tags(paths: Sequence[str | None]) -> list[str | None]:
    """A file of a network file system takes a request each, so of many several are looked at side by side."""
    parts = [paths[at : at + _AT_ONCE] for at in range(0, len(paths), _AT_ONCE)]
    if len(parts) <= 1:
        return [tag for part in parts for tag in _tags_of(part)]
    with ThreadPoolExecutor(_THREADS, "fastload-stat") as pool:
        return [tag for part in pool.map(_tags_of, parts) for tag in part]


def _tags_of(paths: Sequence[str | None]) -> list[str | None]:
    found: list[str | None] = []
    for path in paths:
        try:
            found.append(None if path is None else version_tag(os.stat(path)))
        except (OSError, ValueError):
            found.append(None)
    return found


def without_version_tags(objects: ObjectTable) -> ObjectTable:
    """The same objects without what only this node knows of them."""
    is_local = _is_local(objects)
    if not is_local.any():
        return objects
    etags = [None if local else etag for local, etag in zip(is_local, objects.etags.to_list(), strict=True)]
    return objects.with_etags(Texts.of(etags))


def _is_local(objects: ObjectTable) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """bool[n]: a path, which begins with a slash as no URL does."""
    starts, ends = objects.urls.starts[:-1], objects.urls.starts[1:]
    found = np.zeros(len(objects), np.bool_)
    some = np.flatnonzero(ends > starts)
    found[some] = np.frombuffer(objects.urls.data, np.uint8)[starts[some]] == ord("/")
    return found


@functools.lru_cache(maxsize=256)
def _keeps_inodes(device: int) -> bool:
    place = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            lines = [line for line in mounts if line.split(" ", 3)[2:3] == [place]]
    except OSError:
        return True
    # "fuse.sshfs" is one of "fuse".
    return _NUMBERED_ANEW.isdisjoint(line.partition(" - ")[2].split(" ")[0].partition(".")[0] for line in lines)
