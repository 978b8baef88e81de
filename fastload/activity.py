"""What each thread that makes batches does now, and how long it has done what.

A thread has an *account* while it works for an iteration. It does one thing at any time: `switch` ends that and begins
the next, so its seconds add up to the time that has passed, whatever was called in between. The account is ambient, as
a logger is: what waits or decodes, deep below, asks for `current()`, and gets one that counts nothing in all other
threads.

Each account has two sums by cause: of all its time, and of the part of it in which the trainer waited (`Waiting`, which
all accounts of an iteration share). The second is what a trainer's wait is divided by: see `fastload.stalls`. Only its
thread writes an account; others read it, and the trainer's thread says when a wait begins.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Literal, get_args

from fastload import trace

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

    __slots__ = ("_waiting", "cause", "seconds", "since_s", "waited")

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.cause: Cause | None = None  # None: nothing, for this iteration
        self.since_s = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self.waited: dict[str, float] = dict.fromkeys(CAUSES, 0.0)

    def switch(self, cause: Cause | None, was: Cause | None = None) -> Cause | None:
        """Begin with `cause`; returns what ends. That was `was`, where it is known only now."""
        now_s = monotonic()
        before, since_s = self.cause, self.since_s
        self.cause, self.since_s = cause, now_s
        if before is not None:
            booked = was or before
            self.seconds[booked] += now_s - since_s
            since_s = max(since_s, self._waiting.since_s)
            if now_s > since_s:
                self.waited[booked] += now_s - since_s
        return before

    def divide(self, parts: Mapping[str, float], rest: Cause) -> None:
        """What was done since the last switch took these seconds, as another process says that did it, and `rest` the
        others. The same goes on.
        """
        now_s, began_s = monotonic(), self.since_s
        self.since_s = now_s
        taken_s, said_s = now_s - began_s, sum(parts.values())
        awaited_s = max(0.0, now_s - max(began_s, self._waiting.since_s))
        scale = min(1.0, taken_s / said_s) if said_s > 0 else 0.0
        divided = [*((cause, scale * seconds) for cause, seconds in parts.items()), (rest, taken_s - scale * said_s)]
        for cause, seconds in divided:
            self.seconds[cause] += max(0.0, seconds)
            self.waited[cause] += max(0.0, seconds) * (awaited_s / taken_s if taken_s > 0 else 0.0)


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


@contextmanager
def entered(account: Account, cause: Cause) -> Iterator[None]:
    """Within the block the calling thread works for this account, with `cause` at first."""
    outer, _this_thread.account = _this_thread.account, account
    before = account.switch(cause)
    try:
        yield
    finally:
        account.switch(before)
        _this_thread.account = outer
