"""The threads that decode.

They live as long as their loader: thread-local workspaces (decoders, staging memory) are worth keeping, and starting
threads per epoch is not. Jobs are plain callables that handle their own errors. A pool is closed by its owner, at the
latest when the interpreter ends. A pool that was forgotten is told to end when it is collected, which may happen in any
thread and under any lock: nothing is waited for then. Its threads hold no reference to it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from fastload.cpu_priority import take_long_turns
from fastload.errors import ServiceError
from fastload.kernels.yielding import start_giving_way
from fastload.lifecycle import Ending, end_at_exit, join_at_exit

Job = Callable[[], None]

# How long the exit of a script waits for the threads.
_END_S = 10.0


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
            join_at_exit(thread, _END_S)
        self._ending = Ending(self, _stop, self._jobs, thread_count, waits=False, at_exit=True)

    def submit(self, job: Job) -> None:
        """Run `job` in one of the threads. It must not raise, and must not wait for another job.

        ServiceError after `close()`.
        """
        if not self._ending.is_due:
            raise ServiceError("the loader's threads have ended, since it was closed; iterate it again")
        self._jobs.put(job)

    @property
    def is_inherited(self) -> bool:
        """Whether its threads stayed behind in a process that this one was forked from."""
        return self._ending.is_inherited

    def close(self) -> None:
        """End the threads after the jobs that were submitted, and wait for them. May be called twice."""
        self._ending()
        if not self.is_inherited:
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


end_at_exit()
