"""The threads that decode.

They live as long as their loader: thread-local workspaces (decoders, staging memory) are worth keeping, and starting
threads per epoch is not. Jobs are plain callables that handle their own errors. A pool is closed by its owner, at the
latest when the interpreter ends. A pool that was forgotten is told to end when it is collected, which may happen in any
thread and under any lock: nothing is waited for then. Its threads hold no reference to it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

from fastload.errors import ServiceError
from fastload.kernels.yielding import start_giving_way
from fastload.turns import take_long_turns

Job = Callable[[], None]


class DecodePool:
    """`thread_count` threads that run jobs in the order in which they were submitted."""

    def __init__(self, thread_count: int, name: str = "fastload-decode") -> None:
        start_giving_way()
        self.thread_count = thread_count
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name}-{number}", daemon=True)
            for number in range(thread_count)
        ]
        for thread in self._threads:
            thread.start()
            _threads.add(thread)
        self._pid = os.getpid()
        self._stop = weakref.finalize(self, _stop, self._jobs, thread_count)
        _pools.add(self)
        self._stop.atexit = False

    def submit(self, job: Job) -> None:
        """Run `job` in one of the threads. It must not raise, and must not wait for another job.

        ServiceError after `close()`.
        """
        if not self._stop.alive:
            raise ServiceError("the loader's threads have ended, since it was closed; iterate it again")
        self._jobs.put(job)

    @property
    def is_foreign(self) -> bool:
        """Whether its threads stayed behind in a process that this one was forked from."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """End the threads after the jobs that were submitted, and wait for them. May be called twice."""
        self._stop()
        if not self.is_foreign:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    take_long_turns()
    while (job := jobs.get()) is not None:
        job()
        del job  # else the last batch would live until the next one comes


def _stop(jobs: queue.SimpleQueue[Job | None], thread_count: int) -> None:
    for _ in range(thread_count):
        jobs.put(None)


_pools: weakref.WeakSet[DecodePool] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # also of pools that are no more


def end_all(deadline_s: float) -> None:
    """The interpreter ends: no thread is to be in the middle of anything then. Waits for all, or until the deadline."""
    for pool in list(_pools):
        pool._stop()
    end = time.monotonic() + deadline_s
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
