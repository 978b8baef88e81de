"""The trainer's time in an epoch: its own work, and its waits by cause. The parts add up, by construction.

The trainer's thread works, or it is in the loader. What it spends there blocked is a *wait*, and each wait is divided
among causes in the proportion in which the threads that make batches spent that very time, by their accounts
(`fastload.timing.activity`), what they are in the midst of included:

- While the batch that comes next is with the pool, its threads count: with batches ahead, that one is due as soon as
  their work allows. What the feeder does meanwhile is ahead of need, and counts nothing.
- While nothing is with the pool, the feeder counts.
- What the trainer's thread does itself (beginning the epoch, making batches without threads, moving one to its device)
  counts as what it is.

A wait counts once its batch is delivered, like the time up to there, so waits and work are those of the same span:
`work = elapsed - waits` is never negative, and no part is counted twice. Weights of causes that err by a moment, since
threads go on while they are read, move seconds from one cause to another and never change their sum.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastload.timing import activity, trace
from fastload.timing.activity import CAUSES, Account, Cause, Waiting
from fastload.timing.histogram import Histogram

Seconds = dict[str, float]
Made = TypeVar("Made")


class Stalls:
    """Of one iteration. `feeder`, `trainer` and those of `account()` are the accounts of its threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.began_s = now()
        self._waiting = Waiting()
        self.feeder, self.trainer = activity.new_account(self._waiting), activity.new_account(Waiting())
        self._makers: dict[int, Account] = {}
        self._span: _Span | None = None  # the part of a wait that goes on
        # Waits for the makers and the feeder; and the same, and those of the trainer's own, up to the last delivery.
        self._ended: Seconds = dict.fromkeys(CAUSES, 0.0)
        self._settled = self._ended.copy(), self.trainer.seconds.copy()
        self._wait_s = 0.0  # for the batch that comes next
        self.made_s = 0.0  # how long `next` took the last time
        self._is_changed = False
        self._trace, self._row = trace.trace(), 0
        self.waits = Histogram()  # for each batch that was waited for
        self.settled_s = 0.0  # the time up to the last delivery

    # Threads of the pool

    def account(self) -> Account:
        """The calling thread's, which makes batches."""
        found = self._makers.get(threading.get_ident())
        if found is None:
            found = self._makers[threading.get_ident()] = activity.new_account(self._waiting)
        return found

    def filtered(self) -> int:
        """Samples that filters have left out of the batches that were made."""
        return sum(account.filtered for account in (self.trainer, *list(self._makers.values())))

    # The trainer's thread

    @contextmanager
    def own(self, cause: Cause) -> Iterator[None]:
        """Within the block the trainer's thread does itself what a batch, or all of them, need."""
        with activity.entered(self.trainer, cause):
            yield
        self._is_changed = True

    def next(self, make: Callable[[], Made], cause: Cause = "index") -> Made:
        """What the trainer's thread makes itself, with `cause` at first, while it waits for it."""
        outer = activity.enter(self.trainer, cause)
        began_s = self.trainer.since_s
        try:
            return make()
        finally:
            activity.leave(self.trainer, outer)
            self.made_s = self.trainer.since_s - began_s
            self._wait_s += self.made_s
            self._is_changed = True

    def begin(self, *, has_task: bool) -> bool:
        """The trainer begins to wait for the next batch. False where it waits already, in another thread."""
        if self._span is not None:
            return False
        if self._trace is not None:
            self._row = threading.get_native_id()
        now_s = self._waiting.since_s = self._now()
        self._span = now_s, has_task
        return True

    def tasked(self) -> None:
        """The batch that comes next is with the pool from now on."""
        span = self._span
        if span is not None and not span[1]:
            now_s = self._now()
            self._close(span, now_s)
            self._waiting.since_s = now_s
            self._span = now_s, True

    def end(self) -> None:
        """The wait is over."""
        span = self._span
        if span is not None:
            self._close(span, self._now())
            self._span, self._waiting.since_s = None, math.inf

    def delivered(self) -> float:
        """A batch has reached the user: what was waited counts from now on. Returns how long the epoch has taken."""
        self.settled_s = self._now() - self.began_s
        if self._is_changed:
            self._is_changed = False
            if self._wait_s:
                self.waits.add(self._wait_s)
                self._wait_s = 0.0
            self._settled = self._ended.copy(), self.trainer.seconds.copy()
        return self.settled_s

    # Figures

    def seconds(self) -> Seconds:
        """The trainer's waits by cause, up to the last delivery."""
        ended, own = self._settled
        return {cause: seconds + own[cause] for cause, seconds in ended.items()}

    def seconds_until_now(self) -> tuple[Seconds, float]:
        """The same up to now, with the wait that goes on; and how long the epoch has taken. For any thread.

        Sums are read before what is under way, so what ends meanwhile is left out and never counted twice.
        """
        found = {cause: seconds + self.trainer.seconds[cause] for cause, seconds in self._ended.items()}
        span, cause, since_s = self._span, self.trainer.cause, self.trainer.since_s
        now_s = self._now()
        if span is not None:
            _add(found, self._divided(span, now_s))
        elif cause is not None:
            found[cause] += max(0.0, now_s - since_s)
        return found, now_s - self.began_s

    def busy(self) -> Seconds:
        """What the threads that make batches have done, or the trainer's where it makes them itself."""
        accounts = list(self._makers.values()) or [self.trainer]
        return {cause: sum(each.seconds[cause] for each in accounts) for cause in CAUSES}

    def map_cpu_s(self) -> float:
        """The processor time that the user's functions took of theirs."""
        return sum(each.map_cpu_s for each in list(self._makers.values()) or [self.trainer])

    def _close(self, span: _Span, now_s: float) -> None:
        divided = self._divided(span, now_s)
        _add(self._ended, divided)
        if self._trace is not None:
            self._trace.row_span(self._row, "wait for a batch", span[0], now_s, **divided)
        self._wait_s += now_s - span[0]
        self._is_changed = True

    def _divided(self, span: _Span, now_s: float) -> Seconds:
        """The span, by what was done in it."""
        began_s, has_task = span
        weights: Seconds = {}
        for account in list(self._makers.values()) if has_task else (self.feeder,):
            if account.waited_since_s == began_s:
                for cause, seconds in account.waited.copy().items():
                    weights[cause] = weights.get(cause, 0.0) + seconds
            going_on = account.cause
            if going_on is not None:
                since_s = account.since_s if account.since_s > began_s else began_s
                weights[going_on] = weights.get(going_on, 0.0) + max(0.0, now_s - since_s)
        total = sum(weights.values())
        if total <= 0.0:
            return {"other": now_s - began_s}
        share = (now_s - began_s) / total
        return {cause: weight * share for cause, weight in weights.items()}


# A wait of the trainer, or the part of one before or since its batch is with the pool: when it began, and which part.
_Span = tuple[float, bool]


def _add(sums: Seconds, more: Seconds) -> None:
    for cause, seconds in more.items():
        sums[cause] += seconds
