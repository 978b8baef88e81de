"""Which service the consumers of a cache directory get: its own, or one that stands in for it.

A job goes on where the directory's service cannot be had: a stand-in without a disk tier serves it, for all processes
of the directory or, where that fails too, for this process alone. The directory's own is tried again later.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import msgspec

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.client import election
from fastload.client.handshake import Welcomed
from fastload.config import default_ram_bytes, exact_bytes, format_bytes
from fastload.errors import FastloadError, ServiceError
from fastload.lifecycle import on_fork, reset_on_fork
from fastload.rendezvous import ServiceLocation, StandIn
from fastload.service.host.launch import StartError, start_process

if TYPE_CHECKING:
    from fastload.service.host.inprocess import InProcessService

ServiceMode = Literal["auto", "inprocess"]

# A directory whose service did not answer is left alone for so long: each try may take as long as the deadlines allow.
_AVOID_S = 60.0

log = logging.getLogger("fastload")

# obstore's threads do not survive a fork, and calls wait for them without an end.
_has_lost_threads = False


@on_fork
def _notice_lost_threads() -> None:
    global _has_lost_threads
    _has_lost_threads = "obstore" in sys.modules


class Connector:
    """See the module's text. Thread-safe."""

    def __init__(
        self, directory: CacheDirectory, mode: ServiceMode, idle_s: float, explicit: dict[str, int], *, in_use: bool
    ) -> None:
        """`explicit`: limits that this process was given. `in_use`: by a job that has begun."""
        self.directory, self.mode, self.idle_s = directory, mode, idle_s
        self._explicit_ram = "ram_bytes" in explicit
        self._limits_to_send = explicit  # once: by a later connection another process may have changed them again
        self._in_use = in_use
        self._avoided, self._avoid_until_s = "", -math.inf
        self._stand_ins: tuple[StandIn, StandIn] | None = None
        self._kinds: dict[str, str] = {}  # of warnings of which one is enough
        self._forget_services()
        reset_on_fork(self, Connector._forget_services)

    def _forget_services(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[ServiceLocation, InProcessService] = {}

    @property
    def log_hint(self) -> str:
        """Where to read why something takes long."""
        return f"the service's log may say why: {self.directory.log_path}"

    def is_new_warning(self, message: str) -> bool:
        """Whether `message` has yet to be raised as a warning in this process; from now on it has been."""
        mine = object()
        key = str(self.directory.path), self._kinds.get(message, message)
        return _warned.setdefault(key, mine) is mine  # which is atomic

    def close_services(self) -> None:
        """End those that run in this process."""
        with self._lock:
            services, self._services = self._services, {}
        for service in services.values():
            service.close()

    def connect(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """A connection to the directory's service, started where there is none; gives up when `stop` is set.

        A job goes on where that service cannot be had, or where `avoid` says why it should not: another one, which has
        no disk tier, stands in for it. Only for its first connection a directory that cannot be used is an error.
        """
        try:
            return self.connect_to_own(hello, stop, avoid)
        except FastloadError as error:
            if stop.is_set() or not (self._in_use or isinstance(error, ServiceError)):
                raise
            return self._connect_beside(hello, stop, error)

    def connect_to_own(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """A connection to the directory's service and no other; ServiceError also where it did not answer lately."""
        if time.monotonic() < self._avoid_until_s:
            avoid = avoid or self._avoided
        if avoid:
            raise ServiceError(avoid)
        try:
            hello = msgspec.structs.replace(hello, limits=self._limits_to_send)
            connection = self._connect_to(self.directory, hello, stop)
        except ServiceError as error:
            if not stop.is_set():
                self._avoided, self._avoid_until_s = str(error), time.monotonic() + _AVOID_S
            raise
        self._compare_limits(connection)
        self._limits_to_send, self._in_use = {}, True
        return connection

    def _connect_beside(self, hello: protocol.Hello, stop: threading.Event, error: FastloadError) -> Welcomed:
        message = (
            f"the cache {self.directory.path} cannot be used for now: {error}. The job goes on without what is there, "
            "and fetches into RAM; its next connection tries again"
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
            self._add_warning(connection, "beside", message)
            return connection
        raise error

    def _connect_to(self, place: ServiceLocation, hello: protocol.Hello, stop: threading.Event) -> Welcomed:
        here = self.mode == "inprocess" or (isinstance(place, StandIn) and place.is_alone)
        connection = self._elect(place, hello, stop, here=here)
        welcome, ours = connection.welcome, self.directory.limits.chunk_bytes
        if welcome.chunk_bytes != ours:
            connection.close()
            raise ServiceError(
                f"the running cache service (process {welcome.pid}) has "
                f"chunk_bytes={exact_bytes(welcome.chunk_bytes)}, and this job {exact_bytes(ours)}; "
                "let its jobs end, or give that size"
            )
        return connection

    def _elect(self, place: ServiceLocation, hello: protocol.Hello, stop: threading.Event, *, here: bool) -> Welcomed:
        """Connect to the service that runs, or to one that is started: in threads of this process (`here`) where these
        would work, in a process of its own otherwise.
        """
        if here and not _has_lost_threads:
            return election.connect(place, hello, lambda stop: self._start_here(place), stop)
        try:
            return election.connect(place, hello, lambda stop: start_process(place, self.idle_s, stop), stop)
        except StartError as error:
            if _has_lost_threads:
                raise
            connection = self._elect(place, hello, stop, here=True)
            self._add_warning(connection, "here", f"{error}. The cache service runs in threads of a job's process")
            return connection

    def _add_warning(self, connection: Welcomed, kind: str, message: str) -> None:
        """The user is warned once of each kind, whatever the cause; the log has all."""
        log.warning("%s", message)
        self._kinds[message] = kind
        connection.troubles.append(message)

    def _make_stand_ins(self) -> tuple[StandIn, StandIn]:
        """One for all processes of the directory, and one for this object alone."""
        with self._lock:
            if self._stand_ins is None:
                limits = self.directory.limits
                ram_bytes = max(2 * limits.chunk_bytes, min(limits.ram_bytes, default_ram_bytes()))
                limits = replace(limits, ram_bytes=ram_bytes, disk_bytes=0, history_bytes=0)
                self._stand_ins = StandIn(self.directory.path, limits), StandIn(self.directory.path, limits, alone=True)
            return self._stand_ins

    def _start_here(self, place: ServiceLocation) -> None:
        from fastload.service.host.inprocess import InProcessService  # all of the service, which mostly runs elsewhere

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
        limits, welcome = self.directory.limits, connection.welcome
        arena_bytes = welcome.buffer_count * welcome.chunk_bytes
        if self._explicit_ram and arena_bytes != limits.ram_bytes // limits.chunk_bytes * limits.chunk_bytes:
            connection.troubles.append(
                f"the running cache service (process {welcome.pid}) keeps its arena of {format_bytes(arena_bytes)}; "
                f"ram_bytes={exact_bytes(limits.ram_bytes)} holds from its next start on"
            )


_warned: dict[tuple[str, str], object] = {}
