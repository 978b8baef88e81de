"""A rank's consumer: the real one, whose messages go to a core in the same thread, and whose waits are callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fastload import protocol
from fastload.cache import ArenaView
from fastload.client.connection import Connection, ConnectionEvents
from fastload.client.connector import Connector
from fastload.client.consumer import Consumer
from fastload.client.handshake import Welcomed
from fastload.client.leases import Waiter
from fastload.errors import ServiceError
from fastload.service.core import Core
from fastload.service.state import ConsumerState
from fastload.simulate.clock import VirtualLoop

Got = Callable[[set[int]], None]


class _NoView:
    """A mapping of nothing."""

    array = np.empty(0, np.uint8)

    def close(self) -> None:
        """Nothing to unmap."""


class _DirectConnection:
    """In place of `client.Connection`: messages go both ways without delay, behind what else is due at the time."""

    was_refused = False

    def __init__(self, core: Core, loop: VirtualLoop, events: ConnectionEvents, name: str) -> None:
        self._core, self._loop, self._events = core, loop, events
        self.state: ConsumerState = core.connect(protocol.Hello(protocol.VERSION, 0, name, {}), self._receive)
        self.on_received: Callable[[protocol.FromService], None] = lambda message: None

    def start(self) -> None:
        """Connected from the beginning."""
        core = self._core
        welcome = protocol.Welcome(protocol.VERSION, b"", 0, core.chunk_bytes, core.arena.buffer_count, [])
        welcomed = Welcomed(cast(Any, None), welcome, cast(ArenaView, _NoView()), protocol.FrameReader())
        self._events.connected(cast(Connection, self), welcomed)

    def adopt(self, welcomed: Welcomed) -> None:
        """There is no socket."""

    def send(self, message: protocol.FromConsumer) -> None:
        """See `Connection.send`."""
        self._loop.call_soon(self._core.receive, self.state, message)

    def _receive(self, message: protocol.Message) -> None:
        self._loop.call_soon(self._deliver, message)

    def _deliver(self, message: protocol.FromService) -> None:
        self._events.message(message)
        self.on_received(message)

    def was_served(self) -> None:
        """It never restarts."""

    def close(self) -> None:
        self._core.disconnect(self.state)

    def abandon(self) -> None:
        """Nothing is shared with a forked child."""


class _NoService:
    """In place of a connector, which is never asked to connect."""

    log_hint = ""  # no thread really waits

    def connect(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """Never called."""
        raise ServiceError("a simulated consumer is connected to its core from the beginning")

    def is_new_warning(self, message: str) -> bool:
        """A simulation has nothing to warn of."""
        return False


@dataclass(slots=True, eq=False)
class _Waiting:
    waiter: Waiter
    got: Got


class SimulatedConsumer:
    """See the module's text."""

    def __init__(self, core: Core, loop: VirtualLoop, name: str) -> None:
        self._waiting: list[_Waiting] = []

        def connection(events: ConnectionEvents, lock: threading.Condition, name: str) -> Connection:
            self._connection = _DirectConnection(core, loop, events, name)
            self._connection.on_received = self._look_again
            return cast(Connection, self._connection)

        self.consumer = Consumer(cast(Connector, _NoService()), name=name, make_connection=connection)

    @property
    def state(self) -> ConsumerState:
        """What the core knows of it."""
        return self._connection.state

    def acquire_later(self, chunks: Iterable[int], got: Got) -> None:
        """As `acquire`, and released at once: `got` is called with those that are here, at least one, now or later."""
        waiter = self.consumer.begin_acquire(list(chunks))
        if waiter.got:
            self._serve(waiter, got)
        else:
            self._waiting.append(_Waiting(waiter, got))

    def _serve(self, waiter: Waiter, got: Got) -> None:
        with self.consumer.end_acquire(waiter) as held:
            chunks = set(held.chunk_nos.tolist())
        got(chunks)

    def _look_again(self, message: protocol.FromService) -> None:
        """Serve those whose wait is over. The others ask again where they have to, which no grant is a reason for."""
        served = [each for each in self._waiting if each.waiter.got]
        self._waiting = [each for each in self._waiting if not each.waiter.got]
        if not isinstance(message, protocol.Grants):
            for each in self._waiting:
                self.consumer.look_again(each.waiter)
        for each in served:
            self._serve(each.waiter, each.got)
