"""`fastload.Cache`, as users see it, and the handle behind it, which the rest of fastload works with.

A handle is settings, and what was made from them in this process: consumers, and with `service="inprocess"` the
service. Pickling takes the settings only, and a forked child starts from the settings too, so that worker processes
reach the same service through the directory.

Wherever a cache is taken, its directory is taken too. All callers that name one directory share a handle, which is kept
for the life of the process.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, get_args

from fastload import callers
from fastload.arguments import checked_urls
from fastload.cache import CacheDirectory, url_without_credentials
from fastload.callers import public
from fastload.client.connector import Connector, ServiceMode
from fastload.client.consumer import Consumer
from fastload.client.loader import Loader
from fastload.client.saver import Saver
from fastload.config import CacheLimits, default_cache_dir, format_bytes, parse_bytes, parse_seconds
from fastload.errors import CacheError, ConfigError, ServiceError
from fastload.lifecycle import keep_forever, on_fork, reset_on_fork
from fastload.store import normalise
from fastload.store.logins import apart
from fastload.waiting import Waits

if TYPE_CHECKING:
    from fastload.formats import Format

Shared = TypeVar("Shared")

_IDLE_S = 30.0
_PIN_NAME_MAX = 500
_ANY_ENDING = ("",)


class Cache:
    """A node's cache: a directory, and the service that the first consumer starts there.

    `ram_bytes`, `disk_bytes`, `chunk_bytes` and `disk_write_bytes_per_s` (ints, or strings such as `"8GiB"`) belong to
    the directory: None takes what it has, or in a new directory the defaults; a value that differs changes it, with a
    warning. A running service follows a change of `disk_bytes` and of `disk_write_bytes_per_s` at the first connection;
    the others hold from its next start on. `disk_bytes=0` keeps everything in RAM. `disk_write_bytes_per_s` spares
    flash: what would be written above it, on average, is not cached on disk this time; 0 is no bound.
    `requests_in_flight` belongs to the directory as well: so many requests at a time to each endpoint of a store, where
    0, the default, is as many as measuring finds. `history_bytes` bounds what is kept of what runs read (64 MiB), by
    which a later run that reads alike is fetched ahead; 0 keeps and uses none. `checkpoint_ram_bytes` bounds the memory
    of checkpoints that are being saved (0: half of the machine's), and `checkpoint_disk_bytes` (256 GiB) what is kept
    of them on disk, beside `disk_bytes`. `service="inprocess"` runs the service in threads of this process, where none
    may be started; not in one that was forked after its parent had used a store, since the store's threads do not
    survive that.

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
        checkpoint_ram_bytes: int | str | None = None,
        checkpoint_disk_bytes: int | str | None = None,
        service: ServiceMode = "auto",
    ) -> None:
        """Open the directory; CacheError where it cannot be used, ConfigError where an argument cannot."""
        self._handle = Handle(
            directory,
            service=service,
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            chunk_bytes=chunk_bytes,
            disk_write_bytes_per_s=disk_write_bytes_per_s,
            requests_in_flight=requests_in_flight,
            history_bytes=history_bytes,
            checkpoint_ram_bytes=checkpoint_ram_bytes,
            checkpoint_disk_bytes=checkpoint_disk_bytes,
        )

    @property
    def directory(self) -> Path:
        """The directory, absolute."""
        return self._handle.directory

    @property
    def chunk_bytes(self) -> int:
        """The unit of fetching, as the directory has it."""
        return self._handle.limits.chunk_bytes

    @property
    def ram_bytes(self) -> int:
        """The size of the arena, as the directory has it."""
        return self._handle.limits.ram_bytes

    @property
    def disk_bytes(self) -> int:
        """The quota of the disk tier, as the directory has it."""
        return self._handle.limits.disk_bytes

    @public
    def clear(self, *, history: bool = False, pins: bool = False) -> int:
        """Empty the cache, RAM and disk, save for what is in use just now and what is pinned; with `history`, forget
        what runs read too, and with `pins`, end all pins first, so that what they kept goes as well.

        Jobs that use it go on, and fetch again what they need. Returns how many bytes that freed. CacheError where the
        disk does not answer, CacheError or ServiceError where the service cannot be reached.
        """
        return self._handle.clear(history=history, pins=pins)

    @public
    def pin(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        name: str | None = None,
        ttl: float | str | None = None,
        quota: int | str | None = None,
        format: Format = "auto",  # noqa: A002  # as a data set calls it
        storage_options: Mapping[str, Any] | None = None,
    ) -> int:
        """Keep these objects on disk, whatever other jobs read: no plan of another displaces them, warm or live.

        `urls` are brace patterns, prefixes that end in "/" (all that lies under them) or single objects, as they are in
        the store now. A pin fetches nothing: what it names is kept once a job or `fastload warm` has fetched it, and
        has its room until then. It needs no process, and lasts through ends of the service, until it is unpinned, is
        set anew under its `name` (by default the URLs; also the name of the data set in what `fastload cache` and
        `status` show), or none of its objects was used for `ttl` (seconds, or such as "14d"; a use is noted within five
        minutes). `quota`, such as "1TiB", is the most that it may name. `format` is the data set's: large files of some
        are kept in pieces, as those are read. Packed files are kept packed; see docs/formats.md.

        Returns how many bytes it names. CacheError where they are more than the quota, or than `disk_bytes` can hold
        beside other pins, and where the cache has no disk tier; the store's errors come as they are.
        """
        return self._handle.pin(urls, name=name, ttl=ttl, quota=quota, how=format, storage_options=storage_options)

    @public
    def unpin(self, name: str | Sequence[str]) -> int:
        """End a pin by its name, or take URLs, brace patterns and prefixes that end in "/" out of all pins.

        What was kept stays in the cache as long as nothing else needs its room. Returns how many bytes no pin names any
        more; 0 where none was called so. CacheError or ServiceError where the service cannot be reached.
        """
        return self._handle.unpin([name] if isinstance(name, str) else list(name))

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


class Handle:
    """What a `fastload.Cache` stands for, in this process; its arguments are described there.

    `close()` ends what was made through it; it may be used again afterwards. Safe to use from several threads.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        service: ServiceMode = "auto",
        **limits: int | str | None,
    ) -> None:
        """Open the directory; CacheError where it cannot be used, ConfigError where an argument cannot."""
        if service not in get_args(ServiceMode):
            raise ConfigError(f'service={service!r} must be "auto" or "inprocess"')
        path = self.path_of(default_cache_dir() if directory is None else directory)
        explicit: dict[str, Any] = {
            name: value if name == "requests_in_flight" else parse_bytes(value, name)
            for name, value in limits.items()
            if value is not None
        }
        self._begin(path, service, _idle_s(), explicit)

    def _begin(
        self,
        path: Path,
        service: ServiceMode,
        idle_s: float,
        explicit: dict[str, int],
        otherwise: CacheLimits | None = None,
    ) -> None:
        directory = _open(path, explicit, otherwise)
        self._connector = Connector(directory, service, idle_s, explicit, in_use=otherwise is not None)
        self._consumers: weakref.WeakSet[Consumer] = weakref.WeakSet()
        self._loaders: weakref.WeakSet[Loader] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._shared: dict[Hashable, Any] = {}
        reset_on_fork(self, Handle._forget_after_fork)
        for message in directory.warnings:
            if self._connector.is_new_warning(message):
                callers.warn(message, RuntimeWarning)

    @staticmethod
    def path_of(directory: str | os.PathLike[str]) -> Path:
        """The directory, absolute. Raises `ConfigError` for what is none."""
        return Path(os.path.abspath(_checked(directory)))

    @property
    def directory(self) -> Path:
        """The directory, absolute."""
        return self._connector.directory.path

    def has_other_chunks(self) -> bool:
        """Whether the directory has chunks of another size by now, because others made it again or changed that: then
        this handle could only reach a stand-in once a service with those runs.
        """
        return self._connector.directory.has_other_chunks()

    @property
    def limits(self) -> CacheLimits:
        """The sizes that the directory has."""
        return self._connector.directory.limits

    def consumer(
        self, storage_options: Mapping[str, Any] | None = None, name: str = "", *, waits: Waits | None = None
    ) -> Consumer:
        """A new connection to the service, which is started where there is none; the caller closes it.

        CacheError, ConfigError or ServiceError where that fails.
        """
        consumer = Consumer(self._connector, storage_options, name, waits=waits)
        self._consumers.add(consumer)
        return consumer

    def saver(self, storage_options: Mapping[str, Any] | None, name: str) -> Saver:
        """A connection that hands a checkpoint over; errors as `consumer`."""
        for each in [each for each in self._consumers if isinstance(each, Saver)]:
            each.close_when_over()
        saver = Saver(self._connector, storage_options, name)
        self._consumers.add(saver)
        return saver

    def loader(self, storage_options: Mapping[str, Any] | None, name: str) -> Loader:
        """A connection that loads checkpoints; errors as `consumer`."""
        loader = Loader(self._connector, storage_options, name)
        self._loaders.add(loader)
        return loader

    def shared(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """What all users of this handle in this process share under `key`; made if it is not there. A forked child
        begins without, and so does the handle once it was closed.
        """
        with self._lock:
            if key not in self._shared:
                self._shared[key] = make()
            value: Shared = self._shared[key]
            return value

    def clear(self, *, history: bool = False, pins: bool = False) -> int:
        """See `Cache.clear`."""
        with self._own_service("clear", "cleared") as consumer:
            return consumer.clear(history=history, pins=pins)

    def pin(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        name: str | None = None,
        ttl: float | str | None = None,
        quota: int | str | None = None,
        how: Format = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> int:
        """See `Cache.pin`."""
        from fastload.formats import checked_format, is_cut
        from fastload.formats.pieces import in_pieces

        how = checked_format(how)
        ttl_s = 0.0 if ttl is None else parse_seconds(ttl, "ttl")
        quota_bytes = 0 if quota is None else parse_bytes(quota, "quota")
        if ttl is not None and not ttl_s:
            raise ConfigError(f'ttl={ttl!r} would end the pin at once; give a time such as "14d", or None for no end')
        names, options = apart(checked_urls(urls), storage_options)
        called = name if name is not None else pin_name(names)
        if not isinstance(called, str) or not 0 < len(called) <= _PIN_NAME_MAX:
            raise ConfigError(f"name={name!r} must be a text of 1 to {_PIN_NAME_MAX} letters")
        with self._own_service("pin", "pinned in", options) as consumer:
            consumer.attach(in_pieces(consumer.resolve(names, _ANY_ENDING), lambda url: is_cut(url, how)))
            return consumer.pin(called, ttl_s, quota_bytes)

    def unpin(self, what: Sequence[str]) -> int:
        """See `Cache.unpin`."""
        with self._own_service("unpin", "unpinned in") as consumer:
            return consumer.unpin(named(what))

    @contextmanager
    def _own_service(
        self, name: str, done: str, storage_options: Mapping[str, Any] | None = None
    ) -> Iterator[Consumer]:
        """A consumer of the directory's own service, for the block; ServiceError where a stand-in serves."""
        with self.consumer(storage_options, name) as consumer:
            if consumer.beside:
                raise ServiceError(f"the cache {self.directory} cannot be {done}: {consumer.beside}")
            yield consumer

    def close(self) -> None:
        """End all consumers made through this handle in this process, and the service if it runs in this process."""
        for consumer in list(self._consumers):
            consumer.close()
        for loader in list(self._loaders):
            loader.close()
        with self._lock:
            self._shared.clear()
        self._connector.close_services()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        limits = self.limits
        sizes = (
            f"ram_bytes={format_bytes(limits.ram_bytes)!r}, disk_bytes={format_bytes(limits.disk_bytes)!r}, "
            f"chunk_bytes={format_bytes(limits.chunk_bytes)!r}"
        )
        return f"Cache({str(self.directory)!r}, {sizes}, service={self._connector.mode!r})"

    def __getstate__(self) -> dict[str, Any]:
        # The limits are settled and in the directory; another process takes them from there, unless it was emptied.
        return {
            "path": self.directory,
            "service": self._connector.mode,
            "idle_s": self._connector.idle_s,
            "limits": self.limits,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["path"], state["service"], state["idle_s"], {}, state["limits"])

    def _forget_after_fork(self) -> None:
        keep_forever(self._shared)
        self._lock = threading.Lock()
        self._shared = {}
        self._consumers = weakref.WeakSet(self._consumers)
        self._loaders = weakref.WeakSet()


def named(what: Sequence[str]) -> list[str]:
    """Names of pins and data sets, URLs and prefixes, as the service knows them: brace patterns are written out."""
    from fastload.store.listing import expand

    found = dict.fromkeys(what)  # as they are, too: a pin may be called like a pattern
    for each in what:
        if "/" in each:
            found |= dict.fromkeys(map(url_without_credentials, expand(each)))
    return list(found)


def pin_name(urls: Sequence[str]) -> str:
    """What a pin of these is called that is given no name: the same for the same data only, wherever it is named."""
    text = ", ".join(map(normalise, urls))
    if len(text) <= _PIN_NAME_MAX:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return f"{text[: _PIN_NAME_MAX - len(digest) - 1]}-{digest}"


def _open(path: Path, explicit: dict[str, int], otherwise: CacheLimits | None) -> CacheDirectory:
    """A directory that can no longer be used is no error in a process that joins a job: it connects without."""
    try:
        return CacheDirectory.open(path, otherwise=otherwise, **explicit)
    except CacheError:
        if otherwise is None:
            raise
        return CacheDirectory(path, otherwise, ())


def _checked(directory: object) -> Path:
    """A folder of this machine: not "", which would be the working directory, and no URL, which would be one in it."""
    text = os.fspath(directory) if isinstance(directory, str | os.PathLike) else None
    # A Path that was made of a URL has lost a slash.
    is_url = isinstance(text, str) and ("://" in text or re.match(r"(s3a?|gs|az|https?):/", text))
    if not isinstance(text, str) or not text or is_url or "\0" in text:
        raise ConfigError(
            f"the cache directory {directory!r} is not a local directory; give a path, such as /nvme/fastload"
        )
    return Path(text).expanduser()


def _idle_s() -> float:
    text = os.environ.get("FASTLOAD_IDLE_S", "")
    try:
        return float(text) if text else _IDLE_S
    except ValueError:
        raise ConfigError(f"FASTLOAD_IDLE_S={text!r} is not a number of seconds") from None


AnyCache: TypeAlias = "Cache | Handle | str | os.PathLike[str] | None"


def handle_of(cache: AnyCache) -> Handle:
    """The handle of a cache; for its directory, and for None the default one, a handle shared by this process.

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


def directory_of(cache: AnyCache) -> Path:
    """The directory of a cache, of which nothing is made or opened. Raises `ConfigError` as `handle_of`."""
    if isinstance(cache, Cache | Handle):
        return cache.directory
    if cache is not None and not isinstance(cache, str | os.PathLike):
        return handle_of(cache).directory
    return Handle.path_of(default_cache_dir() if cache is None else cache)


_handles: dict[Path, Handle] = {}
_lock = threading.Lock()


@on_fork
def _renew_lock() -> None:  # the thread that held it may be gone
    global _lock
    _lock = threading.Lock()
