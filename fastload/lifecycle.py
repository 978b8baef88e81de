"""Forks, finalizers and the end of the interpreter: the one place that hooks into them.

A forked child has the memory of its parent and only the thread that forked. The parent's other threads are gone, its
sockets and locks are shared or held for ever, and what ends in the child must not end what the parent still uses. So
objects say what they start anew there (`reset_on_fork`), modules what they replace (`on_fork`), locks that must not be
held by a thread that vanishes are taken for the length of a fork (`held_while_forking`), and what was made in the
parent is known by the process that made it (`is_inherited`).

The garbage collector runs finalizers in any thread, in the middle of anything and under any lock. So a finalizer may
not take a lock or wait, not even for `threading` to start a thread, which takes one too. What waits is left to another
thread (`call_later`).

An `Ending` ties these together for objects that own threads or processes: it happens once, by `close()`, when its owner
is dropped, or at exit. The order of an exit: endings that wait, which give up the work that is in flight; calls that
were left for later; endings that only signal threads; and then those threads are joined. So none is in the middle of
any work, or of freeing tensors, when the interpreter goes away: one that is inside of C++ then may crash the process.

`multiprocessing` has hooks of its own, for the exits of its children; what must end with those uses them.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

# How long the exit of a script waits for calls that were left for later.
_CALLS_S = 10.0

Owner = TypeVar("Owner")


def _call_each(calls: Iterable[Callable[[], object]]) -> None:
    """Call all, in this order. What one of them raises is raised at the end."""
    with ExitStack() as stack:
        for call in reversed(list(calls)):
            stack.callback(call)


# Forks


class _Lock(Protocol):
    def acquire(self) -> bool: ...

    def release(self) -> None: ...


Lock = TypeVar("Lock", bound=_Lock)

_resets: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()
_kept: list[object] = []
_forks = 0


def is_inherited(pid: int) -> bool:
    """Whether what was made in process `pid` came into this process by a fork."""
    return pid != os.getpid()


def fork_count() -> int:
    """How many times this process was about to be forked, or just had been: it changes with every fork."""
    return _forks


def reset_on_fork(owner: Owner, reset: Callable[[Owner], object]) -> None:
    """In a forked child, call `reset(owner)` if the owner is still alive: those that came first are reset first."""
    _resets[owner] = reset


def on_fork(function: Callable[[], None]) -> Callable[[], None]:
    """Decorates what a module does first thing in a forked child."""
    os.register_at_fork(after_in_child=function)
    return function


def held_while_forking(lock: Lock) -> Lock:
    """The lock, which must be re-entrant: a fork waits until it is free, and so it is free in the child."""
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


def keep_forever(thing: object) -> None:
    """Never free it: in a forked child, what its finalizers would take apart is the parent's."""
    _kept.append(thing)


def _count_fork() -> None:
    global _forks
    _forks += 1


def _reset_all() -> None:
    _calls.clear()  # their threads are the parent's
    _call_each([functools.partial(reset, owner) for owner, reset in list(_resets.items())])


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_reset_all)


# Finalizers


class _LaterCall:
    """A call that was left for later. It drops its arguments once it is over, even if something still refers to it."""

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._work: list[Any] = [function, arguments]

    def start(self) -> None:
        threading.Thread(target=self._run, name="fastload-finish", daemon=True).start()

    def _run(self) -> None:
        try:
            self._work[0](*self._work[1])
        finally:
            self._work.clear()
            _calls.remove(self)


_calls: deque[_LaterCall] = deque()


def call_later(function: Callable[..., object], *arguments: Any) -> None:
    """Call `function(*arguments)` soon, in another thread; not at all if the interpreter is finalizing. Never waits.

    A finalizer may start a bare thread. That one starts a proper thread, whose traces `threading` removes.
    """
    if sys.is_finalizing():  # no thread can be started, and what it would end ends as well
        return
    call = _LaterCall(function, arguments)
    _calls.append(call)
    _thread.start_new_thread(call.start, ())


def on_drop(owner: object, function: Callable[..., object], *arguments: Any) -> weakref.finalize[..., Any]:
    """Call `function(*arguments)` when the owner is collected, but not at exit. It must not wait or take a lock; give
    `call_later` and what it should call if it does.
    """
    finalizer = weakref.finalize(owner, function, *arguments)
    finalizer.atexit = False
    return finalizer


class Ending:
    """Calls `function(*arguments)` once: when it is called itself, when the owner is dropped, or `at_exit`.

    The arguments must not refer to the owner. A function that `waits` is called in another thread if the owner is
    dropped. A forked child never calls it: what it would end is the parent's.
    """

    def __init__(
        self, owner: object, function: Callable[..., object], *arguments: Any, waits: bool, at_exit: bool
    ) -> None:
        self.pid, self.waits = os.getpid(), waits
        self._finalizer = on_drop(owner, _end, self.pid, waits, function, arguments)
        if at_exit:
            _ends_at_exit.add(self)

    @property
    def is_due(self) -> bool:
        """Whether it has not begun yet."""
        return self._finalizer.alive

    @property
    def is_inherited(self) -> bool:
        """Whether the owner was made in a process that this one was forked from."""
        return is_inherited(self.pid)

    def __call__(self) -> None:
        """End the owner now, unless that was done or is the parent's to do. Thread-safe and idempotent."""
        found = self._finalizer.detach()
        if found is not None:
            _, _, (pid, _, function, arguments), _ = found
            _end(pid, False, function, arguments)


def _end(pid: int, later: bool, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if is_inherited(pid):
        return
    if later:
        call_later(function, *arguments)
    else:
        function(*arguments)


# Exit

_ends_at_exit: weakref.WeakSet[Ending] = weakref.WeakSet()
_joined_at_exit: weakref.WeakKeyDictionary[threading.Thread, float] = weakref.WeakKeyDictionary()


def join_at_exit(thread: threading.Thread, deadline_s: float) -> None:
    """At exit, wait for the thread, which something else asks to end; not longer than `deadline_s`."""
    _joined_at_exit[thread] = deadline_s


@functools.cache
def end_at_exit() -> None:
    """Have the exit of the interpreter end what is left. Modules whose objects end at exit call it when imported.

    Not when this module is imported: exit hooks run in reverse order, and those of `multiprocessing` and torch, which
    end processes that batches may be waiting for, have to be registered before.
    """
    atexit.register(_exit)


def _exit() -> None:
    endings = list(_ends_at_exit)
    waiting, others = ([each for each in endings if each.waits is waits] for waits in (True, False))
    _call_each([*waiting, _finish_calls, *others, _join_threads])


def _finish_calls() -> None:
    end = time.monotonic() + _CALLS_S
    while _calls and time.monotonic() < end:
        time.sleep(0.001)


def _join_threads() -> None:
    began = time.monotonic()
    for thread, deadline_s in list(_joined_at_exit.items()):
        thread.join(max(0.0, began + deadline_s - time.monotonic()))
