"""The trainer's time in an epoch: its own work, and its waits by cause. The parts add up, by construction.

The trainer's thread works, or it is in the loader. What it spends there blocked is a *wait*, and each wait is divided
among causes in the proportion in which the threads that make batches spent that very time, by their accounts
(`fastload.activity`), what they are in the midst of included:

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fastload import activity, trace
from fastload.activity import CAUSES, Account, Cause, Waiting
from fastload.histogram import Histogram

Seconds = dict[str, float]


class Stalls:
    """Of one iteration. `feeder`, `trainer` and those of `account()` are the accounts of its threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.began_s = now()
        self._waiting = Waiting()
        self.feeder, self.trainer = activity.new_account(self._waiting), activity.new_account(Waiting())
        self._makers: dict[int, Account] = {}
        self._span: _Span | None = None  # the part of a wait that goes on
        self._ended: Seconds = dict.fromkeys(CAUSES, 0.0)  # waits for the makers and the feeder
        self._settled: Seconds = dict.fromkeys(CAUSES, 0.0)  # all that were followed by a delivery
        self._wait_s = 0.0  # for the batch that comes next
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

    @property
    def maker_count(self) -> int:
        return len(self._makers)

    # The trainer's thread

    @contextmanager
    def own(self, cause: Cause, *, is_for_batch: bool = True) -> Iterator[None]:
        """Within the block the trainer's thread does itself what a batch needs."""
        began_s = self._now()
        try:
            with activity.entered(self.trainer, cause):
                yield
        finally:
            self._is_changed = True
            if is_for_batch:
                self._wait_s += self._now() - began_s

    def begin(self, *, has_task: bool) -> bool:
        """The trainer begins to wait for the next batch. False where it waits already, in another thread."""
        if self._span is not None:
            return False
        self._row = threading.get_native_id()
        self._open(self._now(), has_task=has_task)
        return True

    def tasked(self) -> None:
        """The batch that comes next is with the pool from now on."""
        span = self._span
        if span is not None and not span.has_task:
            now_s = self._now()
            self._close(span, now_s)
            self._open(now_s, has_task=True)

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
            own = self.trainer.seconds
            self._settled = {cause: seconds + own[cause] for cause, seconds in self._ended.items()}
        return self.settled_s

    # Figures

    def seconds(self) -> Seconds:
        """The trainer's waits by cause, up to the last delivery."""
        return dict(self._settled)

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

    def _open(self, now_s: float, *, has_task: bool) -> None:
        self._waiting.since_s = now_s
        span = self._span = _Span(now_s, has_task, {})
        for account in self._accounts(span):
            span.before[account] = dict(account.waited)

    def _close(self, span: _Span, now_s: float) -> None:
        divided = self._divided(span, now_s)
        _add(self._ended, divided)
        if self._trace is not None:
            self._trace.row_span(self._row, "wait for a batch", span.began_s, now_s, **divided)
        self._wait_s += now_s - span.began_s
        self._is_changed = True

    def _accounts(self, span: _Span) -> Sequence[Account]:
        return list(self._makers.values()) if span.has_task else [self.feeder]

    def _divided(self, span: _Span, now_s: float) -> Seconds:
        """The span, by what was done in it."""
        weights: Seconds = {}
        for account in self._accounts(span):
            before = span.before.get(account)  # None: a thread that has begun since
            for cause, seconds in account.waited.items():
                weights[cause] = weights.get(cause, 0.0) + seconds - (before[cause] if before else 0.0)
            if account.cause is not None:
                going_on_s = max(0.0, now_s - max(account.since_s, span.began_s))
                weights[account.cause] = weights.get(account.cause, 0.0) + going_on_s
        total = sum(weights.values())
        if total <= 0.0:
            return {"other": now_s - span.began_s}
        return {cause: weight / total * (now_s - span.began_s) for cause, weight in weights.items() if weight > 0.0}


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """A wait of the trainer, or the part of one before or since its batch is with the pool."""

    began_s: float
    has_task: bool
    before: dict[Account, Seconds]  # what each account had waited by then


def _add(sums: Seconds, more: Seconds) -> None:
    for cause, seconds in more.items():
        sums[cause] += seconds
