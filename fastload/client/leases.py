"""The consumer's table of leases: what it may read, what it waits for, and what it has to give back.

A pure state machine without a socket or a lock of its own: `Consumer` calls it under its lock and sends what it
returns, in that order. The life of a chunk:

    nothing --want--> wanted --grant--> leased <--> pinned
       ^                 |                 |           |
       +---- release / failure / recall ---+           +-- (recall while pinned: leaves on the last unpin)

Leases are kept after use, since the next batch may need the chunk again, until they are released or recalled.

Why nothing deadlocks: a thread never waits here while it holds a pin, so every pin ends; a recalled lease takes no new
pins, so it leaves; and a grant for which a thread waits is pinned for it on arrival, before a recall can take it away,
so a thread that waits for some chunks gets at least one of them.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fastload.cache import ArenaView
from fastload.errors import FastloadError


@dataclass(slots=True)
class MappedArena:
    """One service's arena, as long as leases lie in it."""

    view: ArenaView
    chunk_bytes: int
    lease_count: int = 0
    current: bool = True  # its service is the one that we are connected to
    lost: bool = False  # its service lives, and our leases with it have ended
    link: socket.socket | None = None  # to a service of the past that may live: while it is open, our leases hold

    def close_if_idle(self) -> None:
        """Unmap an arena of the past whose last lease has gone."""
        if not self.current and self.lease_count == 0:
            self.view.close()
            self.hang_up()

    def hang_up(self) -> None:
        """End the leases with a service of the past."""
        link, self.link = self.link, None
        if link is not None:
            link.close()


@dataclass(slots=True)
class Lease:
    """The right to read one chunk, in buffer `buffer` of `arena`."""

    arena: MappedArena
    buffer: int
    source: int
    pins: int = 0
    recalled: bool = False


@dataclass(slots=True, eq=False)
class Waiter:
    """A caller of `acquire`: what it asks for, in order, and what was pinned for it meanwhile."""

    asked: Sequence[int]
    chunks: frozenset[int]
    got: dict[int, Lease] = field(default_factory=dict)


@dataclass(slots=True)
class Asking:
    """A want that has not been answered."""

    serial: int
    urgent: bool


class LeaseTable:
    """See the module's text. Methods that return chunk numbers return what has to be sent as `Release`."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._asking: dict[int, Asking] = {}
        self._failed: dict[int, FastloadError] = {}
        self._waiters: list[Waiter] = []
        self._serial = 0
        self.granted_count: Counter[int] = Counter()  # by source
        self.recalled_count = 0

    # Asking

    def to_ask(self, chunks: Iterable[int], *, urgent: bool) -> tuple[list[int], int]:
        """Mark as wanted those of `chunks` that have to be asked for; returns them and the serial to ask with."""
        ask = [chunk for chunk in chunks if self._must_ask(chunk, urgent)]
        if ask:
            self._serial += 1
            for chunk in ask:
                self._asking[chunk] = Asking(self._serial, urgent)
        return ask, self._serial

    def _must_ask(self, chunk: int, urgent: bool) -> bool:
        if chunk in self._leases or chunk in self._failed:
            return False
        asking = self._asking.get(chunk)
        return asking is None or (urgent and not asking.urgent)

    def ask_again(self) -> list[tuple[list[int], int, bool]]:
        """All unanswered wants with new serials, for a new service: (chunks, serial, urgent)."""
        again = []
        for urgent in (True, False):
            chunks = [chunk for chunk, asking in self._asking.items() if asking.urgent is urgent]
            if chunks:
                self._serial += 1
                for chunk in chunks:
                    self._asking[chunk] = Asking(self._serial, urgent)
                again.append((chunks, self._serial, urgent))
        return again

    # Answers

    def grant(self, chunk: int, serial: int, arena: MappedArena, buffer: int, source: int) -> bool:
        """Take a grant; False where it answers a want that is no longer ours."""
        asking = self._asking.get(chunk)
        if asking is None or asking.serial != serial:
            return False
        del self._asking[chunk]
        lease = self._leases[chunk] = Lease(arena, buffer, source)
        arena.lease_count += 1
        self.granted_count[source] += 1
        for waiter in self._waiters:
            if chunk in waiter.chunks and not waiter.got:
                self._pin(waiter, chunk, lease)
        return True

    def fail(self, chunk: int, serial: int, error: FastloadError) -> bool:
        """Take a failure; False where it answers a want that is no longer ours."""
        asking = self._asking.get(chunk)
        if asking is None or asking.serial != serial:
            return False
        del self._asking[chunk]
        self._failed[chunk] = error
        return True

    def recall(self, chunks: Iterable[int]) -> tuple[list[int], list[int]]:
        """Give up what is not pinned; returns the released and the pinned ones."""
        released, pinned = [], []
        for chunk in chunks:
            lease = self._leases.get(chunk)
            if lease is None or not lease.arena.current:
                continue
            lease.recalled = True
            self.recalled_count += 1
            if lease.pins:
                pinned.append(chunk)
            else:
                self._drop(chunk)
                released.append(chunk)
        return released, pinned

    # Use

    def add_waiter(self, chunks: Sequence[int]) -> Waiter:
        """A thread begins to wait; `remove_waiter` must follow."""
        waiter = Waiter(chunks, frozenset(chunks))
        self._waiters.append(waiter)
        self.pin_available(waiter)
        return waiter

    def remove_waiter(self, waiter: Waiter) -> None:
        """The thread no longer waits; what it got stays pinned."""
        self._waiters.remove(waiter)

    def pin_available(self, waiter: Waiter) -> None:
        """Pin everything that the waiter asked for and that is leased now."""
        leases, got = self._leases, waiter.got
        # Done for every chunk of every batch, so without a call for any of them.
        for chunk in waiter.chunks & leases.keys():
            lease = leases[chunk]
            if not lease.recalled and chunk not in got:
                lease.pins += 1
                got[chunk] = lease

    def _pin(self, waiter: Waiter, chunk: int, lease: Lease) -> None:
        lease.pins += 1
        waiter.got[chunk] = lease

    def take_failure(self, chunks: Iterable[int]) -> FastloadError | None:
        """The error of one of `chunks`, forgotten here so that a later try asks again."""
        for chunk in chunks:
            error = self._failed.pop(chunk, None)
            if error is not None:
                return error
        return None

    def unpin(self, held: dict[int, Lease]) -> list[int]:
        """End the pins of `held`."""
        released = []
        for chunk, lease in held.items():
            lease.pins -= 1
            if lease.pins == 0 and lease.recalled and self._leases.get(chunk) is lease:
                self._drop(chunk)
                if lease.arena.current:
                    released.append(chunk)
        return released

    def release(self, chunks: Iterable[int]) -> list[int]:
        """No longer hold or want `chunks`, except for those that another thread holds or waits for.

        Pinned ones leave with their last pin.
        """
        awaited = {chunk for waiter in self._waiters if not waiter.got for chunk in waiter.chunks}
        released = []
        for chunk in chunks:
            if chunk in awaited and chunk not in self._leases:
                continue
            self._failed.pop(chunk, None)
            asked = self._asking.pop(chunk, None) is not None
            lease = self._leases.get(chunk)
            if lease is not None and lease.pins:
                lease.recalled = True
            elif lease is not None:
                self._drop(chunk)
                asked |= lease.arena.current
            if asked:
                released.append(chunk)
        return released

    def _drop(self, chunk: int) -> None:
        lease = self._leases.pop(chunk)
        lease.arena.lease_count -= 1
        lease.arena.close_if_idle()

    # The connection's life

    def leave(self, arena: MappedArena, *, lost: bool, link: socket.socket | None = None) -> list[int]:
        """The connection has gone. The arena's leases stay good if its service is dead, else (`lost`) they end.

        With a `link` to a service that may live, those that are pinned are good while that is open, which is until
        their pins end. Returns what to release there.
        """
        arena.current = False
        arena.lost, arena.link = lost, link
        released = []
        for chunk, lease in list(self._leases.items()):
            if lease.arena is arena and (lost or link is not None):
                lease.recalled = True
                if not lease.pins:
                    self._drop(chunk)
                    released.append(chunk)
        arena.close_if_idle()
        return released + list(self._asking)

    def clear(self) -> None:
        """Forget everything: another set of objects, or the end."""
        for lease in self._leases.values():
            lease.recalled = True
            lease.arena.lease_count -= 1
            lease.arena.close_if_idle()
        self._leases.clear()
        self._asking.clear()
        self._failed.clear()

    def hang_up(self) -> None:
        """In a forked child: the links to services of the past are the parent's."""
        for lease in self._leases.values():
            lease.arena.hang_up()

    def counts(self) -> dict[str, int]:
        pinned = sum(lease.pins > 0 for lease in self._leases.values())
        return {"leased": len(self._leases), "pinned": pinned, "asked": len(self._asking)}


class Held:
    """Chunks pinned for the length of a `with` block.

    `chunk_nos` (int64[n]) are those that are here, some or all of the ones asked for. `groups` holds (arena, chunk_nos
    int64[k], offsets int64[k]): read-only uint8 arrays of a whole arena, and where in it each chunk begins. One group,
    or two for a while after the service was replaced.
    """

    def __init__(self, unpin: Callable[[dict[int, Lease]], None], held: dict[int, Lease]) -> None:
        self._unpin = unpin
        self._held = held
        self.chunk_nos: npt.NDArray[np.int64] = np.fromiter(held, np.int64, len(held))
        self.groups: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = [
            (arena.view.array, np.array(chunks, np.int64), np.array(offsets, np.int64))
            for arena, chunks, offsets in _offsets_by_arena(held)
        ]

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the pins. ServiceError where the service took the chunks back meanwhile: what was read is void."""
        held, self._held = self._held, {}
        self.groups = []
        if held:
            self._unpin(held)


def _offsets_by_arena(held: dict[int, Lease]) -> Sequence[tuple[MappedArena, list[int], list[int]]]:
    """`held`, split by arena: (arena, chunk numbers, byte offsets)."""
    groups = []
    while held:
        arena = next(iter(held.values())).arena
        mine = {chunk: lease for chunk, lease in held.items() if lease.arena is arena}
        groups.append((arena, list(mine), [lease.buffer * arena.chunk_bytes for lease in mine.values()]))
        held = {chunk: lease for chunk, lease in held.items() if lease.arena is not arena}
    return groups
