"""Files of this machine, or of what is mounted on it. What a version is of: `localversion`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from fastload.errors import AccessDeniedError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.store.answers import changed, truncated
from fastload.store.localversion import tag_of
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
    return ObjectInfo(path, stat.st_size, tag_of(stat), stat.st_mtime_ns)


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
