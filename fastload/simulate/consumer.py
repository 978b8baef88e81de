"""A rank's consumer: the real one, whose messages go to a core in the same thread, and whose waits are callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from fastload import protocol
from fastload.cache import ArenaView
from fastload.client.connection import Channel
from fastload.client.consumer import Consumer
from fastload.client.handshake import Welcomed
from fastload.client.leases import Lease, MappedArena, Waiter
from fastload.client.session import Connector
from fastload.errors import ServiceError
from fastload.service.core import Core
from fastload.service.state import ConsumerState
from fastload.simulate.clock import VirtualLoop

Got = Callable[[set[int]], None]


class _NoView:
    """A mapping of nothing."""

    def close(self) -> None:
        """Nothing to let go of."""


class _Line:
    """In place of a channel: what is sent is said to the core, behind what else is due now."""

    def __init__(self, core: Core, loop: VirtualLoop, state: ConsumerState) -> None:
        self._core, self._loop, self._state = core, loop, state

    def send(self, message: protocol.FromConsumer) -> None:
        """See `Channel.send`."""
        self._loop.call_soon(self._core.receive, self._state, message)

    def close(self) -> None:
        """The consumer has gone."""
        self._core.disconnect(self._state)

    def abandon(self) -> None:
        """Nothing is shared with a forked child."""


class _NoService:
    """Nobody connects here."""

    def connect(self, hello: protocol.Hello, stop: object) -> Welcomed:
        """Never called."""
        raise ServiceError("a simulated consumer is connected to its core from the beginning")

    reading = ""  # nobody really waits

    def warn(self, message: str) -> bool:
        """A simulation has no troubles."""
        return False


@dataclass(slots=True, eq=False)
class _Waiting:
    waiter: Waiter
    chunks: list[int]
    got: Got


class SimulatedConsumer(Consumer):
    """See the module's text. Messages go both ways without delay, behind what else is due at the time."""

    def __init__(self, core: Core, loop: VirtualLoop, name: str) -> None:
        self._core, self._loop = core, loop
        self._waiting: list[_Waiting] = []
        super().__init__(cast(Connector, _NoService()), name=name)

    def acquire_later(self, chunks: Iterable[int], got: Got) -> None:
        """As `acquire`, and let go of at once: `got` is called with those that are here, at least one, now or later."""
        numbers = list(chunks)
        with self._changed:
            waiter = self._table.add_waiter(numbers)
            if not waiter.got:
                self._ask_for(numbers, urgent=True)
                self._waiting.append(_Waiting(waiter, numbers, got))
                return
            self._table.remove_waiter(waiter)
        self._serve(waiter, got)

    def _serve(self, waiter: Waiter, got: Got) -> None:
        held: dict[int, Lease] = waiter.got
        chunks = set(held)
        self._unpin(held)
        got(chunks)

    # In place of a channel

    def _read_store_options(self) -> dict[str, Any]:
        return {}

    def _connect(self) -> None:
        hello = protocol.Hello(protocol.VERSION, 0, self.name, {})
        self.state = state = self._core.connect(hello, self._hear)
        self.chunk_bytes, self._buffer_count = self._core.chunk_bytes, self._core.arena.buffer_count
        self._arena = MappedArena(cast(ArenaView, _NoView()), self.chunk_bytes)
        self._channel = cast(Channel, _Line(self._core, self._loop, state))

    def _hear(self, message: protocol.Message) -> None:
        self._loop.call_soon(self._on_message, message)

    def _on_message(self, message: protocol.FromService) -> None:
        with self._changed:
            self._take(message)
            served = self._look(is_grant=isinstance(message, protocol.Grants))
        for each in served:
            self._serve(each.waiter, each.got)

    def _look(self, *, is_grant: bool) -> list[_Waiting]:
        """Those that wait no more; the others ask again where they have to, as `Consumer.acquire` does. A grant gives
        nobody a reason to.
        """
        served, waiting = [], []
        for each in self._waiting:
            if each.waiter.got:
                self._table.pin_available(each.waiter)
                self._table.remove_waiter(each.waiter)
                served.append(each)
                continue
            waiting.append(each)
            if is_grant:
                continue
            failure = self._table.take_failure(each.chunks)
            if failure is not None:
                raise failure
            self._ask_for(each.chunks, urgent=True)
        self._waiting = waiting
        return served
