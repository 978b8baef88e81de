"""Whether the trainer is still there, asked in a worker's process.

torch's workers ask whether their parent is. For one that came from a fork server that is the server, which may live on
when a trainer was killed, or be killed itself. What such a worker knows the trainer by is the end of a pipe that closes
with it; for others that is not enough, as processes forked after them hold its other end.
"""

from __future__ import annotations

import multiprocessing
import os
import select

__all__ = ["Watchdog", "watchdog_of"]


class Watchdog:
    """In the place of torch's `ManagerWatchdog`; made in the worker, the sooner the better."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._pipe: select.poll | None = None
        trainer = multiprocessing.parent_process()
        if trainer is not None and trainer.pid != self._parent:
            self._pipe = select.poll()
            self._pipe.register(trainer.sentinel, select.POLLIN)

    def is_alive(self) -> bool:
        """Whether the trainer is."""
        return os.getppid() == self._parent if self._pipe is None else not self._pipe.poll(0)


def watchdog_of(process: int) -> Watchdog | None:
    """One that watches this process, if it has started ours, itself or by a fork server; None where it has not."""
    by_server = multiprocessing.parent_process()
    return Watchdog() if process in (os.getppid(), by_server.pid if by_server is not None else None) else None
