"""An iteration as its user sees it: an iterator that ends what it started.

It ends when it is exhausted, when it fails, when it is closed, when the interpreter exits, and, which is the usual
case (`break` out of a for loop), when it is dropped. The last is done in another thread, soon (see `lifecycle`); the
other ends are complete when the call that brings them returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from fastload import callers
from fastload.errors import ServiceError
from fastload.lifecycle import Ending, end_at_exit
from fastload.pipeline.run import InlineRun, RunClosedError, ThreadedRun

Run = ThreadedRun | InlineRun

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
        self._is_over = False
        self._ending = Ending(self, _finish, run, interrupted, release, waits=True, at_exit=True)

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        if self._ending.is_inherited:  # the threads that make its batches are not here, and its socket is the parent's
            raise ServiceError(
                f"this iteration was begun by process {self._ending.pid}, from which this one was forked; iterate anew"
            )
        made = NOTHING
        try:
            while made is NOTHING:
                made = self._next()
        except Exception as error:
            if callers.is_for_the_user(error):
                raise callers.shortened(error)  # noqa: B904  # it is the same error
            raise
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
        self._ending()


def _finish(run: Run, interrupted: Callable[[], AbstractContextManager[None]], release: Callable[[], None]) -> None:
    """End a run and let go of what it used."""
    try:
        with interrupted():
            run.close()
    finally:
        release()


end_at_exit()
