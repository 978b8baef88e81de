"""An iteration as its user sees it: an iterator that ends what it started.

It ends when it is exhausted, when it fails, when it is closed, when the interpreter exits, and, which is the usual
case (`break` out of a for loop), when it is dropped. The last is done in another thread, soon (see `deferred`); the
other ends are complete when the call that brings them returns.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from fastload import callers
from fastload.engine.deferred import call_later, finish
from fastload.engine.pool import end_all
from fastload.engine.run import InlineRun, RunClosedError, ThreadedRun
from fastload.errors import FastloadError, ServiceError

Run = ThreadedRun | InlineRun

# How long the end of a script waits for work that was dropped, and for threads.
_END_S = 10.0

# What is made of an entry that has nothing for the user.
NOTHING: Any = object()


class Iteration(Iterator[Any]):
    """Yields what `run` makes, after `deliver`, if it is given, has had it. `delivered(entry)` is called for each,
    `exhausted()` at the end of the epoch.

    While `interrupted()` is entered, whoever waits for bytes in the run gives up, so that it ends at once. `release()`
    is called once, when the run has ended in whatever way; it may be called in another thread.
    """

    def __init__(
        self,
        run: Run,
        interrupted: Callable[[], AbstractContextManager[None]],
        release: Callable[[], None],
        delivered: Callable[[Any], None] = lambda entry: None,
        exhausted: Callable[[], None] = lambda: None,
        deliver: Callable[[Any], Any] = lambda made: made,
    ) -> None:
        self._run, self._delivered, self._exhausted, self._deliver = run, delivered, exhausted, deliver
        self._is_over, self._pid = False, os.getpid()
        self._dropped = weakref.finalize(self, call_later, _finish, run, interrupted, release, os.getpid())
        self._dropped.atexit = False
        _live.add(self)

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        if os.getpid() != self._pid:  # the threads that make its batches are not here, and its socket is the parent's
            raise ServiceError(
                f"this iteration was begun by process {self._pid}, from which this one was forked; iterate anew"
            )
        made = NOTHING
        try:
            while made is NOTHING:
                made = self._next()
        except FastloadError as error:
            raise callers.shortened(error)  # noqa: B904  # it is the same error
        return made

    def _next(self) -> Any:
        try:
            entry, made = next(self._run)
            if made is not NOTHING:
                made = self._deliver(made)
        except RunClosedError:
            raise
        except BaseException as error:
            self._is_over = True
            if isinstance(error, StopIteration):
                self._exhausted()
            self.close()
            raise
        self._delivered(entry)
        return made

    def close(self) -> None:
        """End it, and wait for that. May be called twice, and by any thread."""
        finish = self._dropped.detach()
        if finish is not None:
            _, _, (function, *arguments), _ = finish
            function(*arguments)


def _finish(
    run: Run, interrupted: Callable[[], AbstractContextManager[None]], release: Callable[[], None], pid: int
) -> None:
    """End a run and let go of what it used; in a forked child both are the parent's."""
    if os.getpid() != pid:
        return
    try:
        with interrupted():
            run.close()
    finally:
        release()


_live: weakref.WeakSet[Iteration] = weakref.WeakSet()


def _finish_all() -> None:
    """A script has ended: give up the work, so that no thread is in the middle of any, or of letting go of tensors."""
    for iteration in list(_live):
        iteration.close()
    finish(_END_S)
    end_all(_END_S)


atexit.register(_finish_all)
