"""A read in flight, for its caller: how each attempt went, and a way to cancel it from outside.

A store's interface says neither when the first byte came nor through which socket. So a thread that is about to read
may be given a *watch*, for the length of `Watch.over()`, and the layer that speaks to the server notifies it, by the
functions of this module. That is ambient, as a logger is: neither stores nor the wrappers around them pass it on, and
in a thread without a watch that does nothing. A store that says nothing is still timed as a whole (`wrappers.Watched`).

A thread that has no core cannot look at the clock, so what it measures of a store is too long by the time for which it
waited for one. Linux counts that for each thread (`waited_for_core_s`), and an attempt says it beside the times.

Ending a read means ending its connection: the thread that waits for bytes sees the end of them, and its error.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from fastload.errors import StoreError, StoreUnavailableError
from fastload.store.answers import ThrottledError


def waited_for_core_s() -> float:
    """For how many seconds the calling thread has been ready to run without a core, since it began; 0 where the system
    does not say (other than Linux; sandboxes without /proc). Takes 2 us.
    """
    try:
        counts = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return 0.0
    try:
        return int(os.read(counts, 64).split()[1]) / 1e9
    finally:
        os.close(counts)


class Outcome(enum.Enum):
    """What came of an attempt."""

    GOOD = "good"
    THROTTLED = "throttled"  # the store wants to be asked less
    TIMED_OUT = "timed out"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and its answer. Times are those of the monotonic clock; `byte_count` is 0 unless it was good.

    `first_byte_s` counts from `began_s`; None where the store does not say. `queued_s` is what passed between the
    decision to send the request and `began_s`. `waited_s` and `first_waited_s` are for how much of its time, and of the
    time to its first byte, the thread waited for a core.
    """

    began_s: float
    ended_s: float
    byte_count: int = 0
    first_byte_s: float | None = None
    outcome: Outcome = Outcome.GOOD
    queued_s: float = 0.0
    waited_s: float = 0.0
    first_waited_s: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took; never zero."""
        return max(1e-6, self.ended_s - self.began_s)


class Watch:
    """Of one read. `cancel` may be called from any thread, everything else by the one that reads."""

    def __init__(
        self,
        ended: Callable[[Attempt], None],
        now: Callable[[], float] = time.monotonic,
        waited_for_core: Callable[[], float] = waited_for_core_s,
    ) -> None:
        """`ended(attempt)` is called in the thread that reads, after each attempt."""
        self._ended, self._now, self._waited_for_core = ended, now, waited_for_core
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._asked_s: float | None = now()  # until the first attempt
        self._began_s, self._queued_s = self._asked_s, 0.0
        self._first_byte_s: float | None = None
        self._waited_s = self._first_waited_s = 0.0  # the thread, before the attempt, and until its first byte
        self.cancelled = False

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """For the length of the block, what this thread reads is watched."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def cancel(self) -> None:
        """End the read, at once where it waits for a connection that the watch knows, else at its next step."""
        with self._lock:
            self.cancelled = True
            if self._socket is not None:
                # Not TLS's own shutdown, which takes the session apart under the thread that reads.
                with contextlib.suppress(OSError):  # it is no longer connected
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def attempt_begins(self) -> None:
        """A request is about to be sent."""
        self._began_s, self._first_byte_s = self._now(), None
        self._queued_s = 0.0 if self._asked_s is None else self._began_s - self._asked_s
        self._asked_s = None
        self._waited_s, self._first_waited_s = self._waited_for_core(), 0.0

    def attempt_ended(self, byte_count: int, outcome: Outcome) -> None:
        """Its answer has come, or none will."""
        now, waited_s = self._now(), self._waited_for_core() - self._waited_s
        times = self._queued_s, waited_s, self._first_waited_s
        self._ended(Attempt(self._began_s, now, byte_count, self._first_byte_s, outcome, *times))

    def through(self, connection: socket.socket | None) -> None:
        """What it waits for comes through this socket; None: through none any more, which others may use now."""
        with self._lock:
            self._socket = connection
            if connection is not None and self.cancelled:
                raise given_up()

    def first_byte(self) -> None:
        """The answer has begun."""
        self._first_byte_s = self._now() - self._began_s
        self._first_waited_s = self._waited_for_core() - self._waited_s


_current: ContextVar[Watch | None] = ContextVar("watch", default=None)


def current() -> Watch | None:
    return _current.get()


def through(connection: socket.socket | None) -> None:
    """`Watch.through`, where there is a watch."""
    if (watch := _current.get()) is not None:
        watch.through(connection)


def first_byte() -> None:
    """`Watch.first_byte`, where there is a watch."""
    if (watch := _current.get()) is not None:
        watch.first_byte()


def cancelled() -> bool:
    """Whether this read was cancelled."""
    watch = _current.get()
    return watch is not None and watch.cancelled


def given_up() -> StoreUnavailableError:
    """The error of a read that was cancelled; only its canceller sees it."""
    return StoreUnavailableError("the read was given up")


def outcome_of(error: StoreError) -> Outcome:
    """What kind of an end this is."""
    if cancelled():
        return Outcome.CANCELLED
    if isinstance(error, ThrottledError):
        return Outcome.THROTTLED
    return Outcome.TIMED_OUT if isinstance(error.__cause__, TimeoutError) else Outcome.FAILED
