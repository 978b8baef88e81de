"""Whether the trainer is still there, asked in a worker's process.

torch's workers ask whether their parent is. For one that came from a fork server that is the server, which lives as
long as its children do, so that they outlive a trainer that was killed. What such a worker knows the trainer by is the
end of a pipe that closes with it; for others that is not enough, as processes forked after them hold its other end.
"""

from __future__ import annotations

import multiprocessing
import os
import select


class Watchdog:
    """In the place of torch's `ManagerWatchdog`; made in the worker, as its process begins."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        trainer = multiprocessing.parent_process()
        self._trainer = select.poll()
        if trainer is not None and trainer.pid != self._parent:
            self._trainer.register(trainer.sentinel, select.POLLIN)

    def is_alive(self) -> bool:
        """Whether the trainer is."""
        return os.getppid() == self._parent and not self._trainer.poll(0)
