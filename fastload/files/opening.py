"""`fastload.open`: which connection a file goes through.

A process has one for each cache, set of storage options and environment (what variables say of stores), made at the
first file and shared by all threads. It is found again through the cache's handle. A forked child makes its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from fastload.callers import public
from fastload.client.cache import AnyCache, Handle, handle_of
from fastload.errors import ConfigError, ObjectMissingError
from fastload.files.connection import Connection
from fastload.files.file import ObjectFile, RawObject
from fastload.store.environment import fingerprint
from fastload.store.logins import apart
from fastload.store.urls import check_key, check_written, normalise


@public
def open(  # noqa: A001  # as those of gzip and tarfile
    url: str | os.PathLike[str],
    cache: AnyCache = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> ObjectFile:
    """One object as a file that is read through the node's cache: binary, read-only, seekable.

    `url`: of one object, taken as it is (no patterns), or a local path. `cache`: a `fastload.Cache`, or its directory;
    without one, `$FASTLOAD_CACHE` or the user's cache directory. `storage_options`: as for `StreamingDataset`.

    It reads the version of the object that was there when it was opened: `ObjectChangedError` where bytes that are not
    cached are of another by then. A node asks the store for an object's version once an hour at most. Opening costs a
    message to the cache service, and nothing where this process opened the object in the last minute; so a map-style
    data set may open one in each `__getitem__`, also in worker processes, however they are started.

    An object takes whole chunks of the cache's memory, a small one as much as a large one's part. While it is read in
    some order (forward, backward, in steps, several of these at once) what follows is fetched ahead.

    `size` is the object's size, and `url` its URL. Any number of files may be open, in any thread, also of one object.
    Raises `ObjectMissingError`, which is a `FileNotFoundError`, and the other errors of `fastload.errors`.
    """
    handle = handle_of(_checked_cache(cache))
    (name,), storage_options = apart([_checked(url)], storage_options)
    place: _Place = handle.shared(("fastload.open", _options_key(storage_options), fingerprint()), _Place)
    connection = place.connection(handle, storage_options)
    try:
        return ObjectFile(RawObject(connection, connection.open(name)))
    except ObjectMissingError:
        if os.path.isdir(name):
            raise ObjectMissingError(f"{os.fspath(url)} is a folder; name one object in it") from None
        raise


class _Place:
    """Where a handle keeps its connection for one set of options."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def connection(self, cache: Handle, storage_options: Mapping[str, Any] | None) -> Connection:
        """The connection, or another where it is spent; files that are open keep the one they have."""
        with self._lock:
            if self._connection is None or self._connection.is_spent:
                self._connection = Connection(cache, storage_options)
            return self._connection


def _checked(url: str | os.PathLike[str]) -> str:
    if not isinstance(url, str | os.PathLike) or not os.fspath(url):
        raise ConfigError(f"{url!r} is not a URL or path; write s3://bucket/key or /data/file")
    if "\0" in str(os.fspath(url)):
        raise ConfigError(f"{os.fspath(url)!r} has a zero byte in it, which no object's name has")
    check_written(str(os.fspath(url)))
    check_key(str(os.fspath(url)))
    name = normalise(str(os.fspath(url)))
    if name.endswith("/"):
        raise ConfigError(f"{os.fspath(url)}: a folder cannot be opened; name one object in it")
    return name


def _options_key(storage_options: Mapping[str, Any] | None) -> str:
    if not isinstance(storage_options, Mapping):  # what is none either is refused where it is read
        return "" if not storage_options else repr(storage_options)
    return repr(sorted(storage_options.items(), key=repr)) if storage_options else ""


def _checked_cache(cache: AnyCache) -> AnyCache:
    if isinstance(cache, str) and cache in _MODES:  # what `open` of Python takes second would become a directory here
        raise ConfigError(
            f"cache={cache!r} looks like a mode, and none is taken: files are binary and read-only; "
            f"leave it out, or write a cache directory of that name as ./{cache}"
        )
    return cache


_MODES = frozenset({"r", "rb", "rt", "r+", "rb+", "r+b", "w", "wb", "wt", "w+", "wb+", "w+b", "a", "ab", "x", "xb"})
