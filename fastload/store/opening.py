"""From a URL to the store that serves it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from typing_extensions import Buffer

from fastload.errors import ConfigError, StoreUnavailableError
from fastload.store import fsspecstore, httpstore, local, objectstore
from fastload.store.options import StoreOptions
from fastload.store.types import ObjectInfo, Store
from fastload.store.urls import scheme, store_root
from fastload.store.wrappers import Counted, Counters, Limited, Retrying, RetryOptions, SecondLook, Watched


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What stands around a store. `counters` may be shared by several stores.

    64 requests in flight are more than the fetching threads of a service: a limit for what lists and reads
    besides.
    """

    requests_max: int = 64
    retry: RetryOptions | None = None
    counters: Counters = field(default_factory=Counters)


def open_store(url: str, options: StoreOptions, requests: RequestOptions | None = None) -> Store:
    """A store for `store_root(url)`, with retries, limit and counting around it. The caller closes it.

    Patience is `requests.retry`, or else `options.deadline_s`. Raises `ConfigError` for a scheme or
    settings that cannot be used; nothing is asked of the store yet.
    """
    requests = requests or RequestOptions()
    retry = requests.retry or RetryOptions(deadline_s=options.deadline_s)
    counted = Counted(Watched(_now_or_later(store_root(url), options)), requests.counters)
    limited = Limited(SecondLook(counted), requests.requests_max)
    return Retrying(limited, retry, counters=requests.counters)


def _now_or_later(root: str, options: StoreOptions) -> Store:
    """A store; where this process lacks descriptors to open it, one that is opened when it is used."""
    try:
        return _bare(root, options)
    except (ConfigError, OSError):
        if not _lacks_descriptors():
            raise
        return _OpenedLater(root, options)


class _OpenedLater:
    """What cannot be opened just now. Without descriptors, certificates or files of credentials seem not to be there,
    which says nothing of the settings: it is tried again as a request is.
    """

    def __init__(self, root: str, options: StoreOptions) -> None:
        self._root, self._options = root, options
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._is_closed = False

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        return self._opened().list(prefix_url)

    def head(self, url: str) -> ObjectInfo:
        return self._opened().head(url)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        self._opened().read_into(info, start, out)

    def put(self, url: str, data: Buffer) -> str | None:
        return self._opened().put(url, data)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return self._opened().put_if_absent(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        return self._opened().put_if_match(url, data, etag)

    def delete(self, url: str) -> None:
        self._opened().delete(url)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._store is not None:
                self._store.close()

    def _opened(self) -> Store:
        with self._lock:
            if self._is_closed:
                raise StoreUnavailableError(f"{self._root}: this store is closed")
            if self._store is None:
                try:
                    self._store = _bare(self._root, self._options)
                except (ConfigError, OSError) as error:
                    if not _lacks_descriptors():
                        raise
                    raise StoreUnavailableError(
                        f"{self._root}: this process has no descriptors left to open it; allow it more (ulimit -n)"
                    ) from error
            return self._store


def _lacks_descriptors() -> bool:
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _bare(root: str, options: StoreOptions) -> Store:
    kind = scheme(root)
    if kind in local.SCHEMES:
        return local.LocalStore()
    if kind in httpstore.SCHEMES:
        return httpstore.HttpStore(root, options.of_scheme(kind))
    if kind in objectstore.SCHEMES:
        return objectstore.ObjectStore(root, options.of_scheme(kind))
    return fsspecstore.FsspecStore(root, options)
