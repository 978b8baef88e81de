"""What each thread that makes batches does now, and how long it has done what.

A thread has an *account* while it works for an iteration. It does one thing at any time: `switch` ends that and begins
the next, so its seconds add up to the time that has passed, whatever was called in between. The account is ambient, as
a logger is: what waits or decodes, deep below, asks for `current()`, and gets one that counts nothing in all other
threads.

An account has the seconds of all its time by cause, and of the part of the trainer's present wait that is over
(`Waiting`, which all accounts of an iteration share). The second is what that wait is divided by: see
`fastload.timing.stalls`. Only its thread writes an account; others read it, and the trainer's thread says when a wait
begins.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic, thread_time
from typing import Literal, get_args

from fastload.timing import trace

Cause = Literal[
    "startup",  # connecting, starting threads and processes, and until the feeder plans
    "listing",  # which shards there are
    "index",  # planning, and where in the shards the samples lie
    "fetch",  # chunks that come from the object store
    "disk",  # chunks that come from the local disk
    "service",  # answers of the cache service, and chunks that it has in RAM
    "decompress",
    "decode",
    "map",  # the user's functions on samples and batches; of other data sets, all their own code
    "collate",  # bytes and samples are put together into a batch
    "transfer",  # between processes, into pinned memory and to the device
    "other",  # no thread had begun with the batch
]
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Waiting:
    """Since when the trainer waits; infinite while it does not."""

    __slots__ = ("since_s",)

    def __init__(self) -> None:
        self.since_s = math.inf


class Account:
    """Of one thread and one iteration; see the module's text."""

    __slots__ = (
        "_cpu_began_s",
        "_waiting",
        "cause",
        "filtered",
        "map_cpu_s",
        "map_s",
        "maps_slowly",
        "seconds",
        "since_s",
        "waited",
        "waited_since_s",
    )

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.cause: Cause | None = None  # None: nothing, for this iteration
        self.since_s = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self.waited: dict[str, float] = {}  # of the wait that began at `waited_since_s`
        self.waited_since_s = math.inf
        # Functions of the user that take microseconds would not bear two switches each. So of the time since the last
        # switch, this is what they took; where they have taken long, they are switched to.
        self.map_s = 0.0
        self.maps_slowly = False
        self.map_cpu_s = self._cpu_began_s = 0.0  # processor time of the user's functions
        self.filtered = 0  # samples that the user's filters have left out

    def switch(self, cause: Cause | None, was: Cause | None = None) -> Cause | None:
        """Begin with `cause`; returns what ends. That was `was`, where it is known only now."""
        if self.map_s and self.cause is not None:
            self.divide({"map": self.map_s}, self.cause)
        now_s = monotonic()
        before, since_s, began_s = self.cause, self.since_s, self._waiting.since_s
        self.cause, self.since_s = cause, now_s
        if before == "map":
            self.map_cpu_s += thread_time() - self._cpu_began_s
        if cause == "map":
            self._cpu_began_s = thread_time()
        if before is not None:
            booked = was or before
            self.seconds[booked] += now_s - since_s
            if now_s > began_s:
                self._wait(booked, now_s - (since_s if since_s > began_s else began_s), began_s)
        return before

    def divide(self, parts: Mapping[str, float], rest: Cause) -> None:
        """What was done since the last switch took these seconds, as another process says that did it, and `rest` the
        others. The same goes on.
        """
        now_s, since_s, began_s = monotonic(), self.since_s, self._waiting.since_s
        self.since_s, self.map_s = now_s, 0.0
        taken_s, said_s = now_s - since_s, sum(parts.values())
        scale = min(1.0, taken_s / said_s) if said_s > 0 else 0.0
        awaited = (now_s - max(since_s, began_s)) / taken_s if now_s > began_s and taken_s > 0 else 0.0
        for cause, seconds in (*parts.items(), (rest, None)):
            part_s = max(0.0, taken_s - scale * said_s) if seconds is None else scale * seconds
            self.seconds[cause] += part_s
            if awaited:
                self._wait(cause, awaited * part_s, began_s)

    def _wait(self, cause: str, seconds: float, began_s: float) -> None:
        if self.waited_since_s != began_s:
            self.waited, self.waited_since_s = {}, began_s
        self.waited[cause] = self.waited.get(cause, 0.0) + seconds


class _TracedAccount(Account):
    """One whose changes go to the trace."""

    __slots__ = ("_trace",)

    def __init__(self, waiting: Waiting, to: trace.Trace) -> None:
        super().__init__(waiting)
        self._trace = to

    def switch(self, cause: Cause | None, was: Cause | None = None) -> Cause | None:
        began_s = self.since_s
        before = super().switch(cause, was)
        if before is not None and self.since_s > began_s:
            self._trace.span(was or before, began_s, self.since_s)
        return before

    def divide(self, parts: Mapping[str, float], rest: Cause) -> None:
        began_s = self.since_s
        super().divide(parts, rest)
        for cause, seconds in parts.items():  # in the order in which they are said
            self._trace.span(cause, began_s, began_s + seconds, where="worker process")
            began_s += seconds


class _NoAccount(Account):
    """Of threads that work for no iteration."""

    __slots__ = ()

    def switch(self, cause: Cause | None, was: Cause | None = None) -> Cause | None:
        return None

    def divide(self, parts: Mapping[str, float], rest: Cause) -> None:
        pass


def new_account(waiting: Waiting) -> Account:
    """An account, which is traced if that is asked for."""
    found = trace.trace()
    return Account(waiting) if found is None else _TracedAccount(waiting, found)


class _ThisThread(threading.local):
    account: Account = _NoAccount(Waiting())


_this_thread = _ThisThread()


def current() -> Account:
    """The calling thread's account."""
    return _this_thread.account


def enter(account: Account, cause: Cause) -> Account:
    """From now on the calling thread works for this account, with `cause` at first. Returns the one of before, which
    is to be passed to `leave`.
    """
    outer = _this_thread.account
    _this_thread.account = account
    account.switch(cause)
    return outer


def leave(account: Account, outer: Account) -> None:
    """The calling thread works for `outer` again."""
    account.switch(None)
    _this_thread.account = outer


@contextmanager
def entered(account: Account, cause: Cause) -> Iterator[None]:
    """`enter`, for the length of the block."""
    outer = enter(account, cause)
    try:
        yield
    finally:
        leave(account, outer)
