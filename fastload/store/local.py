"""Files of this machine, or of what is mounted on it. What a version is of: `localversion`.

Which version of a local file is there: beside size and modification time, its inode and when its status changed.

A copy of a file may get the modification time of another (`cp -p`, `rsync -t`, `os.utime`), and where the size
is the same as well, nothing distinguishes them but the inode and the status-change time, which no program
can set. They stand in `ObjectInfo.etag`, as a weak ETag: `W/"<inode>-<ctime in ns>"`.

They hold on this node only. Lists of shards go to other nodes, which may have copies of the files, and to jobs that go
on next week, on files that were copied anew; so there they are left out, and put in again where a node begins to read
(`with_version_tags`). From then on a change is a change. Also a change of mode, owner, name or links counts as one,
since the file system does not distinguish them from a write.

Writes go into a file beside, are synced to the disk with it, and get their name at once: by a rename that replaces, or
by one that refuses to, so that of several creators one wins, on other nodes of a shared file system too. To replace one
version and no other takes a lock of the folder, which all who do so respect. What lies beside after a crash is listed
like any object.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from typing_extensions import Buffer

from fastload.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
    WriteConflictError,
)
from fastload.store.answers import changed, truncated
from fastload.store.table import ObjectTable, Texts
from fastload.store.types import ObjectInfo
from fastload.store.urls import folder_without_slash, how_to_name, normalise

SCHEMES = frozenset({"file"})
# Folders are made as they are needed, and go with the last file that is deleted in them: who writes meanwhile makes his
# anew.
_FOLDER_ATTEMPTS = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


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
            try:
                yield self.head(path)
            except ObjectMissingError:
                if os.path.lexists(path):
                    raise
                # Deleted or renamed since the folder was read.

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

    def put(self, url: str, data: Buffer) -> str | None:
        """Store `data` as the file at `url`, in folders that are made where they are not there."""
        return _write(normalise(url), data, os.replace)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return _write(normalise(url), data, _rename_to_new)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        """Atomic among those that do the same; `put` and `delete` do not look at the lock."""
        path = normalise(url)
        with _locked(os.path.dirname(path), path):
            try:
                now = self.head(path).etag
            except ObjectMissingError as error:
                raise _lost(path, "it is gone") from error
            if now != etag:
                raise _lost(path, f"its version was to be {etag} and is {now}")
            return _write(path, data, os.replace)

    def delete(self, url: str) -> None:
        """Delete the file at `url`, and its folder where that is empty then, as object stores have no such thing."""
        path = normalise(url)
        folder = os.path.dirname(path)
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
                _sync(folder)
        except OSError as error:
            raise _explain_write(error, path) from error
        with contextlib.suppress(OSError):  # others are in it, or it is a mount or not ours to remove
            os.rmdir(folder)

    def close(self) -> None:
        """Nothing is kept open."""


def _write(path: str, data: Buffer, publish: Callable[[str, str], None]) -> str:
    """Write a file beside `path`, and give it that name by `publish`. The version tag of it then."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".tmp-put-{secrets.token_hex(8)}")
    try:
        descriptor = _create(temporary)
        try:
            _write_all(descriptor, memoryview(data).cast("B"))
            os.fsync(descriptor)
            publish(temporary, path)
            tag = version_tag(os.fstat(descriptor))  # a rename changes it
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # it has its name
                os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        _sync(folder)
    except FileExistsError as error:
        raise _lost(path, "it is there already") from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise _explain_write(error, path) from error
    return tag


def _create(path: str) -> int:
    for _ in range(_FOLDER_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _make_folder(os.path.dirname(path))
    raise FileNotFoundError(errno.ENOENT, "its folder is deleted as often as it is made")


def _make_folder(folder: str) -> None:
    """With those above it, each of them synced."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(os.path.dirname(folder))
        return  # the caller tries again
    _sync(os.path.dirname(folder))


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_new(temporary: str, path: str) -> None:
    """Raises FileExistsError where `path` is there. Where the file system's rename cannot do that (NFS), by a link: the
    file's version tag changes once more when its first name goes.
    """
    try:
        if not _renamed_to_new(temporary, path):
            _link(temporary, path)
    except FileExistsError:
        _sync(os.path.dirname(path))  # an earlier attempt may have written it and failed before this
        raise


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        raise ConfigError(
            f"{path}: this file system has neither hard links nor a rename that replaces nothing, so that of two "
            "writers neither would notice the other; write to another one, or to an object store"
        ) from error
    os.unlink(temporary)


def _renamed_to_new(temporary: str, path: str) -> bool:
    """By RENAME_NOREPLACE; False where that is not to be had."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    here = -100  # AT_FDCWD; both paths are absolute
    if rename(here, os.fsencode(temporary), here, os.fsencode(path), 1) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), path)


@contextlib.contextmanager
def _locked(folder: str, path: str) -> Iterator[None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _lost(path, "it is gone") from error
    except OSError as error:
        raise _explain_write(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreUnavailableError(f"{path}: another replaces a file of this folder now; it is retried") from error
    except OSError as error:
        if isinstance(error, StoreError) or error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"{path}: this file system has no locks (flock), so that of two writers who replace it neither would "
            "notice the other; write under another name, to another file system, or to an object store"
        ) from error
    finally:
        os.close(descriptor)


def _lost(path: str, reason: str) -> WriteConflictError:
    return WriteConflictError(f"{path}: another has written it: {reason}")


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


def _explain_write(error: OSError, path: str) -> StoreError:
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return AccessDeniedError(f"{path}: this user may not write it; change the mode or owner of its folder")
    if isinstance(error, IsADirectoryError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG:
        return StoreError(f"{path}: no file can have this name: {error.strerror}; choose another")
    return StoreUnavailableError(
        f"{path}: cannot be written: {error.strerror or error}; it is retried until the deadline"
    )


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
