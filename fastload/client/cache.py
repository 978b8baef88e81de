"""`fastload.Cache`, as users see it, and the handle behind it, which the rest of fastload works with.

Wherever a cache is taken, its directory is taken too. All who name one directory share a handle, which is kept for the
life of the process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from fastload.callers import public
from fastload.client.handle import Handle, ServiceMode
from fastload.config import default_cache_dir
from fastload.errors import ConfigError
from fastload.lifecycle import on_fork


class Cache:
    """A node's cache: a directory, and the service that the first consumer starts there.

    `ram_bytes`, `disk_bytes`, `chunk_bytes` and `disk_write_bytes_per_s` (ints, or strings such as `"8GiB"`) belong to
    the directory: None takes what it has, or in a new directory the defaults; a value that differs changes it, with a
    warning. A running service follows a change of `disk_bytes` and of `disk_write_bytes_per_s` at the first connection;
    the others hold from its next start on. `disk_bytes=0` keeps everything in RAM. `disk_write_bytes_per_s` spares
    flash: what would be written above it, on average, is not cached on disk this time; 0 is no bound.
    `requests_in_flight` belongs to the directory as well: so many requests at a time to each endpoint of a store, where
    0, the default, is as many as measuring finds. `history_bytes` bounds what is kept of what runs read (64 MiB), by
    which a later run that reads alike is fetched ahead; 0 keeps and uses none. `service="inprocess"` runs the service
    in threads of this process, where none may be started.

    `close()` ends what was made through it; it may be used again afterwards. Safe to use from several threads.
    """

    @public
    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        ram_bytes: int | str | None = None,
        disk_bytes: int | str | None = None,
        chunk_bytes: int | str | None = None,
        disk_write_bytes_per_s: int | str | None = None,
        requests_in_flight: int | None = None,
        history_bytes: int | str | None = None,
        service: ServiceMode = "auto",
    ) -> None:
        """Open the directory; CacheError where it cannot be used, ConfigError where an argument cannot."""
        self._handle = Handle(
            directory,
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            chunk_bytes=chunk_bytes,
            disk_write_bytes_per_s=disk_write_bytes_per_s,
            requests_in_flight=requests_in_flight,
            history_bytes=history_bytes,
            service=service,
        )

    @property
    def directory(self) -> Path:
        """The directory, absolute."""
        return self._handle.directory

    @property
    def chunk_bytes(self) -> int:
        """The unit of fetching, as the directory has it."""
        return self._handle.chunk_bytes

    @property
    def ram_bytes(self) -> int:
        """The size of the arena, as the directory has it."""
        return self._handle.ram_bytes

    @property
    def disk_bytes(self) -> int:
        """The quota of the disk tier, as the directory has it."""
        return self._handle.disk_bytes

    @public
    def clear(self, *, history: bool = False) -> int:
        """Empty the cache, RAM and disk, save for what is in use just now; with `history`, forget what runs read too.

        Jobs that use it go on, and fetch again what they need. Returns how many bytes that freed. CacheError where the
        disk does not answer, CacheError or ServiceError where the service cannot be reached.
        """
        return self._handle.clear(history=history)

    @public
    def stats(self) -> dict[str, Any]:
        """What its service has done since it began, for all its users: bytes fetched, from disk, and the like.

        docs/protocol.md lists the figures. Where a stand-in serves instead of the directory's own service, they are
        the stand-in's, and `"beside"` says why; else that is "". CacheError or ServiceError where the service cannot be
        reached.
        """
        with self._handle.consumer(name="stats") as consumer:
            node: dict[str, Any] = consumer.stats()["node"]
            return node

    def close(self) -> None:
        """End all connections made through it in this process, and the service if it runs in this process."""
        self._handle.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._handle)


AnyCache: TypeAlias = "Cache | Handle | str | os.PathLike[str] | None"


def handle_of(cache: AnyCache) -> Handle:
    """The handle of a cache; of its directory, and for None of the default one, that of all who name it here.

    Raises `ConfigError` for what is none of these, and what making a `Cache` does.
    """
    if isinstance(cache, Cache):
        return cache._handle
    if isinstance(cache, Handle):
        return cache
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise ConfigError(f"cache={cache!r} must be a fastload.Cache, or the directory of one, such as /nvme/fastload")
    path = Handle.path_of(default_cache_dir() if cache is None else cache)
    with _lock:
        handle = _handles.get(path)
        # One whose directory was removed makes it again when it connects, with the limits that it has.
        if handle is None or handle.has_other_chunks():
            handle = _handles[path] = Handle(path)
        return handle


_handles: dict[Path, Handle] = {}
_lock = threading.Lock()


@on_fork
def _renew_lock() -> None:  # the thread that held it may be gone
    global _lock
    _lock = threading.Lock()
