"""What is behind a `fastload.Cache`: which cache directory to use, with which limits, served how.

A handle is settings, and what was made from them in this process: consumers, and with `service="inprocess"` the
service. Pickling takes the settings only, and a forked child starts from the settings too, so that worker processes
reach the same service through the directory.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import msgspec

from fastload import callers, protocol
from fastload.cache import CacheDirectory
from fastload.client import election
from fastload.client.consumer import Consumer
from fastload.client.handshake import Welcomed
from fastload.config import CacheLimits, default_cache_dir, default_ram_bytes, exact_bytes, format_bytes, parse_bytes
from fastload.errors import CacheError, ConfigError, FastloadError, ServiceError
from fastload.lifecycle import keep_forever, reset_on_fork
from fastload.rendezvous import ServiceLocation, StandIn
from fastload.service.launch import StartError, start_process
from fastload.waiting import Waits

if TYPE_CHECKING:
    from fastload.service.inprocess import InProcessService

Shared = TypeVar("Shared")

ServiceMode = Literal["auto", "inprocess"]

_IDLE_S = 30.0
# A directory whose service did not answer is left alone for so long: each try may take as long as the deadlines allow.
_AVOID_S = 60.0

log = logging.getLogger("fastload")


class Handle:
    """What a `fastload.Cache` stands for, in this process; its arguments are described there.

    `close()` ends what was made through it; it may be used again afterwards. Safe to use from several threads.
    """

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
        if service not in get_args(ServiceMode):
            raise ConfigError(f'service={service!r} must be "auto" or "inprocess"')
        path = self.path_of(default_cache_dir() if directory is None else directory)
        given = {
            "ram_bytes": ram_bytes,
            "disk_bytes": disk_bytes,
            "chunk_bytes": chunk_bytes,
            "disk_write_bytes_per_s": disk_write_bytes_per_s,
            "history_bytes": history_bytes,
        }
        explicit = {name: parse_bytes(value, name) for name, value in given.items() if value is not None}
        if requests_in_flight is not None:
            explicit["requests_in_flight"] = requests_in_flight
        self._begin(path, service, _idle_s(), explicit)

    def _begin(
        self,
        path: Path,
        service: ServiceMode,
        idle_s: float,
        explicit: dict[str, int],
        otherwise: CacheLimits | None = None,
    ) -> None:
        self._path, self._service_mode, self._idle_s = path, service, idle_s
        self._explicit_ram = "ram_bytes" in explicit
        self._to_tell = explicit  # once: by a later connection somebody else may have changed them again
        self._in_use = otherwise is not None  # by a job that has begun
        self._avoided, self._avoid_until_s = "", -math.inf
        self._stand_ins: tuple[StandIn, StandIn] | None = None
        self._kinds: dict[str, str] = {}  # of warnings of which one is enough
        self._directory = _open(path, explicit, otherwise)
        self._consumers: weakref.WeakSet[Consumer] = weakref.WeakSet()
        self._forget_service()
        reset_on_fork(self, Handle._forget_after_fork)
        for message in self._directory.warnings:
            if self.warn(message):
                callers.warn(message, RuntimeWarning)

    def _forget_service(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[ServiceLocation, InProcessService] = {}
        self._shared: dict[Hashable, Any] = {}

    @staticmethod
    def path_of(directory: str | os.PathLike[str]) -> Path:
        """The directory, absolute. Raises `ConfigError` for what is none."""
        return Path(os.path.abspath(_checked(directory)))

    @property
    def directory(self) -> Path:
        """The directory, absolute."""
        return self._path

    def has_other_chunks(self) -> bool:
        """Whether the directory has chunks of another size by now, because others made it again or changed that: then
        this handle could only reach a stand-in once a service with those runs.
        """
        return self._directory.has_other_chunks()

    @property
    def chunk_bytes(self) -> int:
        """The unit of fetching, as the directory has it."""
        return self._directory.limits.chunk_bytes

    @property
    def ram_bytes(self) -> int:
        """The size of the arena, as the directory has it."""
        return self._directory.limits.ram_bytes

    @property
    def disk_bytes(self) -> int:
        """The quota of the disk tier, as the directory has it."""
        return self._directory.limits.disk_bytes

    def consumer(
        self, storage_options: Mapping[str, Any] | None = None, name: str = "", *, waits: Waits | None = None
    ) -> Consumer:
        """A new connection to the service, which is started where there is none; the caller closes it.

        CacheError, ConfigError or ServiceError where that fails.
        """
        consumer = Consumer(self, storage_options, name, waits=waits)
        self._consumers.add(consumer)
        return consumer

    def opener(self, storage_options: Mapping[str, Any] | None = None, name: str = "") -> Consumer:
        """A new connection as `consumer` makes one, for objects that are opened one by one. It does not keep this
        handle, without which it cannot reconnect.
        """
        consumer = Consumer(_Weakly(self), storage_options, name)
        self._consumers.add(consumer)
        return consumer

    def shared(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """What all who use this handle in this process share under `key`; made if it is not there. A child that is
        forked begins without, and so does the handle once it was closed.
        """
        with self._lock:
            if key not in self._shared:
                self._shared[key] = make()
            value: Shared = self._shared[key]
            return value

    def clear(self, *, history: bool = False) -> int:
        """Empty the cache, RAM and disk, save for what is in use just now; with `history`, forget what runs read too.

        Jobs that use it go on, and fetch again what they need. Returns how many bytes that freed. CacheError where the
        disk does not answer, CacheError or ServiceError where the service cannot be reached.
        """
        with self.consumer(name="clear") as consumer:
            if consumer.beside:
                raise ServiceError(f"the cache {self._path} cannot be cleared: {consumer.beside}")
            return consumer.clear(history=history)

    def close(self) -> None:
        """End all consumers made through this handle in this process, and the service if it runs in this process."""
        for consumer in list(self._consumers):
            consumer.close()
        with self._lock:
            self._shared.clear()
            services, self._services = self._services, {}
        for service in services.values():
            service.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        limits = self._directory.limits
        sizes = (
            f"ram_bytes={format_bytes(limits.ram_bytes)!r}, disk_bytes={format_bytes(limits.disk_bytes)!r}, "
            f"chunk_bytes={format_bytes(limits.chunk_bytes)!r}"
        )
        return f"Cache({str(self._path)!r}, {sizes}, service={self._service_mode!r})"

    def __getstate__(self) -> dict[str, Any]:
        # The limits are settled and in the directory; another process takes them from there, unless it was emptied.
        limits = self._directory.limits
        return {"path": self._path, "service": self._service_mode, "idle_s": self._idle_s, "limits": limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["path"], state["service"], state["idle_s"], {}, state["limits"])

    # For consumers

    def connect(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """A connection to the directory's service, started where there is none; gives up when `stop` is set.

        A job goes on where that service cannot be had, or where `avoid` says why it should not: another one, which has
        no disk tier, stands in for it. Only for its first connection a directory that cannot be used is an error.
        """
        try:
            return self._connect_to_own(hello, stop, avoid)
        except FastloadError as error:
            if stop.is_set() or not (self._in_use or isinstance(error, ServiceError)):
                raise
            return self._connect_beside(hello, stop, error)

    def _connect_to_own(self, hello: protocol.Hello, stop: threading.Event, avoid: str) -> Welcomed:
        if time.monotonic() < self._avoid_until_s:
            avoid = avoid or self._avoided
        if avoid:
            raise ServiceError(avoid)
        try:
            connection = self._connect_to(self._directory, msgspec.structs.replace(hello, limits=self._to_tell), stop)
        except ServiceError as error:
            if not stop.is_set():
                self._avoided, self._avoid_until_s = str(error), time.monotonic() + _AVOID_S
            raise
        self._compare_limits(connection)
        self._to_tell, self._in_use = {}, True
        return connection

    def _connect_beside(self, hello: protocol.Hello, stop: threading.Event, error: FastloadError) -> Welcomed:
        message = (
            f"the cache {self._path} cannot be used for now: {error}. The job goes on without what is there, and "
            "fetches into RAM; its next connection tries again"
        )
        for place in self._make_stand_ins():
            try:
                connection = self._connect_to(place, hello, stop)
            except FastloadError as again:
                if stop.is_set():
                    raise
                log.warning("%s: %s", message, again)
                continue
            connection.beside = str(error)
            self._trouble(connection, "beside", message)
            return connection
        raise error

    def _connect_to(self, place: ServiceLocation, hello: protocol.Hello, stop: threading.Event) -> Welcomed:
        here = self._service_mode == "inprocess" or (isinstance(place, StandIn) and place.is_alone)
        connection = self._elect(place, hello, stop, here=here)
        welcome = connection.welcome
        if welcome.chunk_bytes != self.chunk_bytes:
            connection.close()
            raise ServiceError(
                f"the running cache service (process {welcome.pid}) has "
                f"chunk_bytes={exact_bytes(welcome.chunk_bytes)}, and this job {exact_bytes(self.chunk_bytes)}; "
                "let its jobs end, or give that size"
            )
        return connection

    def _elect(self, place: ServiceLocation, hello: protocol.Hello, stop: threading.Event, *, here: bool) -> Welcomed:
        if here:
            return election.connect(place, hello, lambda stop: self._start_here(place), stop)
        try:
            return election.connect(place, hello, lambda stop: start_process(place, self._idle_s, stop), stop)
        except StartError as error:
            connection = self._elect(place, hello, stop, here=True)
            self._trouble(connection, "here", f"{error}. The cache service runs in threads of a job's process")
            return connection

    def _trouble(self, connection: Welcomed, kind: str, message: str) -> None:
        """Its user is warned once of each kind, whatever the cause; the log has all."""
        log.warning("%s", message)
        self._kinds[message] = kind
        connection.troubles.append(message)

    def _make_stand_ins(self) -> tuple[StandIn, StandIn]:
        """One for all processes of the directory, and one for this handle alone."""
        with self._lock:
            if self._stand_ins is None:
                limits = self._directory.limits
                ram_bytes = max(2 * limits.chunk_bytes, min(limits.ram_bytes, default_ram_bytes()))
                limits = replace(limits, ram_bytes=ram_bytes, disk_bytes=0, history_bytes=0)
                self._stand_ins = StandIn(self._path, limits), StandIn(self._path, limits, alone=True)
            return self._stand_ins

    @property
    def reading(self) -> str:
        """Where to read why something takes long."""
        return f"the service's log may say why: {self._directory.log_path}"

    def warn(self, message: str) -> bool:
        """Whether `message` has yet to be raised as a warning in this process; from now on it has been."""
        mine = object()
        key = str(self._path), self._kinds.get(message, message)
        return _warned.setdefault(key, mine) is mine  # which is atomic

    def _start_here(self, place: ServiceLocation) -> None:
        from fastload.service.inprocess import InProcessService  # all of the service, which is mostly elsewhere

        with self._lock:
            service = self._services.get(place)
            if service is not None and not service.alive:
                service.close()
                del self._services[place]
            renewed = place.renewed()
            if place not in self._services and renewed.try_lock():
                self._services[place] = InProcessService(renewed)

    def _compare_limits(self, connection: Welcomed) -> None:
        """A service that runs already keeps the arena that it has."""
        limits, welcome = self._directory.limits, connection.welcome
        arena_bytes = welcome.buffer_count * welcome.chunk_bytes
        if self._explicit_ram and arena_bytes != limits.ram_bytes // limits.chunk_bytes * limits.chunk_bytes:
            connection.troubles.append(
                f"the running cache service (process {welcome.pid}) keeps its arena of {format_bytes(arena_bytes)}; "
                f"ram_bytes={exact_bytes(limits.ram_bytes)} holds from its next start on"
            )

    def _forget_after_fork(self) -> None:
        keep_forever(self._shared)
        self._forget_service()
        # The same file, but the lock and its descriptor stay the parent's.
        self._consumers = weakref.WeakSet(self._consumers)


class _Weakly:
    """What a consumer needs of a handle, as long as somebody else keeps that."""

    def __init__(self, cache: Handle) -> None:
        self._cache = weakref.ref(cache)
        self._path = cache.directory

    def connect(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """As the handle does."""
        return self._get().connect(hello, stop, avoid)

    @property
    def reading(self) -> str:
        """As the handle has it."""
        return self._get().reading

    def warn(self, message: str) -> bool:
        """As the handle does."""
        return self._get().warn(message)

    def _get(self) -> Handle:
        cache = self._cache()
        if cache is None:
            raise ServiceError(f"the Cache({str(self._path)!r}) that this connection was made through is gone; keep it")
        return cache


def _open(path: Path, explicit: dict[str, int], otherwise: CacheLimits | None) -> CacheDirectory:
    """A directory that cannot be used any more is no error in a process that joins a job: it connects without."""
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


_warned: dict[tuple[str, str], object] = {}
