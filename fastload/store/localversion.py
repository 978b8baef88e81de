"""Which version of a local file is there: beside size and modification time, its inode and when its status changed.

Whoever copies a file may give it the modification time of another (`cp -p`, `rsync -t`, `os.utime`), and where the size
is the same as well, nothing is left by which to tell them apart but the inode and the status-change time, which nobody
can set. They stand in `ObjectInfo.etag`, as a weak ETag: `W/"<inode>-<ctime in ns>"`.

They are this node's affair. Lists of shards go to other nodes, which may have copies of the files, and to jobs that go
on next week, on files that were copied anew; so there they are left out, and put in again where a node begins to read
(`tagged`). From then on a change is a change. Also a change of mode, owner, name or links counts as one, since the
file system does not tell them from a write.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastload.store.table import ObjectTable, Texts

_TAG = re.compile(r'W/"([0-9]{1,20})-(-?[0-9]{1,20})"')
# File systems that give a file another inode number when they have forgotten the last one.
_NUMBERED_ANEW = frozenset({"fuse", "cifs", "smb3"})

_AT_ONCE, _THREADS = 256, 16


def tag_of(stat: os.stat_result) -> str:
    """What goes into `ObjectInfo.etag`. The inode is 0 on file systems where it says nothing."""
    inode = stat.st_ino if _keeps_inodes(stat.st_dev) else 0
    return f'W/"{inode}-{stat.st_ctime_ns}"'


def parse(url: str, etag: str | None) -> tuple[int, int] | None:
    """Inode and status-change time in ns; None where `etag` is not that of a local file."""
    match = _TAG.fullmatch(etag) if etag is not None and url.startswith("/") else None
    return (int(match[1]), int(match[2])) if match else None


def tagged(objects: ObjectTable) -> ObjectTable:
    """The same objects with what this node's files say now. Who reads a file that is not there is told then."""
    local = np.flatnonzero(_is_local(objects))
    if not len(local):
        return objects
    etags = objects.etags.to_list()
    untold = local[objects.etags.missing[local]]
    for number, tag in zip(untold.tolist(), _tags(objects.urls.take(untold).to_list()), strict=True):
        etags[number] = tag
    return ObjectTable(objects.urls, objects.sizes, Texts.of(etags), objects.mtimes_ns)


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
            found.append(None if path is None else tag_of(os.stat(path)))
        except (OSError, ValueError):
            found.append(None)
    return found


def untagged(objects: ObjectTable) -> ObjectTable:
    """The same objects without what only this node knows of them."""
    is_local = _is_local(objects)
    if not is_local.any():
        return objects
    etags = [None if local else etag for local, etag in zip(is_local, objects.etags.to_list(), strict=True)]
    return ObjectTable(objects.urls, objects.sizes, Texts.of(etags), objects.mtimes_ns)


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
