"""Where waiting happens: every blocking call of fastload goes through here.

A loader that stalls is only useful to look at when the stall has a name, and a loader that hangs is never useful. So
a wait has a reason, which is where the time is booked, and a deadline, after which it ends with an error that says
what it was waiting for. `Waits` belongs to one loader and may be shared by its threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from fastload.errors import WaitTimeoutError
from fastload.redaction import redact
from fastload.timing import activity
from fastload.timing.activity import Cause

Reason = Literal["chunk", "index", "batch", "queue", "service", "listing", "shutdown"]
REASONS: tuple[Reason, ...] = get_args(Reason)

# What a thread that makes batches does meanwhile; None: what it did.
_CAUSES: dict[Reason, Cause | None] = {
    "chunk": "fetch",
    "index": "index",
    "batch": None,
    "queue": "fetch",
    "service": "service",
    "listing": "listing",
    "shutdown": None,
}

# No wait is longer than this without a sign of life. A store that is retried until its own deadline (retries included)
# answers well before.
DEADLINE_S = 600.0

# After so long a warning says what a thread waits for outside of this process, and where to read more; the next one
# comes after so long again.
_NOTICE_AFTER_S, _NOTICE_EVERY_S = 10.0, 60.0

# How often a waiting main thread looks up, so that Ctrl-C is served: a lock wait without timeout is not interruptible
# on every platform, and one that is costs nothing at this rate.
_LOOK_UP_S = 1.0


log = logging.getLogger("fastload")


class Waits:
    """Seconds spent waiting, by reason. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Reason, float] = dict.fromkeys(REASONS, 0.0)

    def add(self, reason: Reason, seconds: float) -> None:
        """Book `seconds` under `reason`."""
        with self._lock:
            self._seconds[reason] += seconds

    def seconds(self) -> dict[str, float]:
        """A copy of the account."""
        with self._lock:
            return {str(reason): value for reason, value in self._seconds.items()}

    @contextmanager
    def measure(self, reason: Reason) -> Iterator[None]:
        """Book the time of the block: for calls that block by themselves and have their own deadline."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(reason, time.monotonic() - began)


class JointWaits(Waits):
    """An account of its own, which shows what others hold as well: those of a loader with several consumers."""

    def __init__(self, others: Sequence[Waits]) -> None:
        super().__init__()
        self._others = tuple(others)

    def seconds(self) -> dict[str, float]:
        accounts = [super().seconds(), *(each.seconds() for each in self._others)]
        return {reason: sum(account[reason] for account in accounts) for reason in accounts[0]}


def wait(
    condition: threading.Condition,
    ready: Callable[[], bool],
    reason: Reason,
    *,
    what: str,
    waits: Waits | None = None,
    deadline_s: float = DEADLINE_S,
    more: str = "",
    cause: Callable[[], Cause | None] = lambda: None,
) -> None:
    """Block until `ready()` is true; the caller holds `condition`, and each change of the answer notifies it.

    `what` completes the sentence "gave up after 600 s waiting for ..." of the `WaitTimeoutError`, and `more` says where
    to read why it takes so long: then the log has it after ten seconds. `cause()` is what the thread's account books,
    as far as is known when the wait begins, and when it ends; None: what `reason` stands for. Anything that can make
    the wait pointless (a dead worker, a closed socket, close()) has to make `ready()` true, and the caller looks at
    what it got.
    """
    if ready():
        return
    account = activity.current()
    before = account.cause
    account.switch(cause() or _CAUSES[reason] or before)
    began = time.monotonic()
    try:
        while not ready():
            left = began + deadline_s - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(f"gave up after {deadline_s:g} s waiting for {what}")
            condition.wait(min(left, _LOOK_UP_S))
            if more:
                _notices.consider(time.monotonic() - began, f"{what}; {more}")
    finally:
        account.switch(before, cause())
        if waits is not None:
            waits.add(reason, time.monotonic() - began)


class _Notices:
    """What is logged of waits. For all threads, each of which may log once too often."""

    def __init__(self) -> None:
        self._last_s = -_NOTICE_EVERY_S

    def consider(self, waited_s: float, text: str) -> None:
        now_s = time.monotonic()
        if waited_s >= _NOTICE_AFTER_S and now_s - self._last_s >= _NOTICE_EVERY_S:
            self._last_s = now_s
            log.warning("has been waiting for %.0f s for %s", waited_s, redact(text))


_notices = _Notices()
