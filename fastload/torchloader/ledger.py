"""What the trainer tells its worker processes about their memory: a page of counters that only the trainer writes.

A worker has no other way to hear from the trainer than torch's queue of indexes, which is torch's. So the trainer makes
a small anonymous file before it starts them, which they inherit. It has, for each worker: whether its descriptors can
be opened by the trainer; and for each slot of that worker, how often the trainer has mapped it, how often it has let go
of a buffer in it, and how often of one that it had when it was forked, which its child may look at still. Counters only
grow (modulo 2^32), so a worker that looks late has missed nothing.
"""

from __future__ import annotations

import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.transport.mapping import map_shared

Counters = npt.NDArray[np.uint32]

# Slots that one worker can have: the kernel maps no more into a process (vm.max_map_count). The file is sparse.
SLOTS_MAX = 1 << 16
_HEAD = 16
_ROW = _HEAD + 3 * SLOTS_MAX


class Ledger:
    """See the module. Made by the trainer; a copy that was pickled for a worker sees the same page."""

    def __init__(self, workers: int) -> None:
        """Raises `OSError` where the kernel has no anonymous files."""
        self._workers = workers
        self._fd = os.memfd_create("fastload-ledger", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, workers * _ROW * 4)
            self._table = self._mapped()
        except BaseException:
            self.close_fd()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # Only while a process is being started: this is how its arguments carry descriptors.
        return {"workers": self._workers, "fd": reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._workers, self._fd = state["workers"], state["fd"].detach()
        try:
            self._table = self._mapped()
        finally:
            self.close_fd()

    def close_fd(self) -> None:
        """No more workers are started. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def is_open(self, worker: int) -> bool:
        """Whether the trainer can open what the worker has open."""
        return bool(self._table[worker, 0])

    def set_open(self, worker: int) -> None:
        """It can."""
        self._table[worker, 0] = 1

    def mapped(self, worker: int) -> Counters:
        """For each slot, how often the trainer has mapped it."""
        return self._of(worker, 0)

    def released(self, worker: int) -> Counters:
        """For each slot, how many buffers in it the trainer has let go of."""
        return self._of(worker, 1)

    def forked(self, worker: int) -> Counters:
        """For each slot, how many of those it had when it was forked."""
        return self._of(worker, 2)

    def _of(self, worker: int, kind: int) -> Counters:
        begin = _HEAD + kind * SLOTS_MAX
        return self._table[worker, begin : begin + SLOTS_MAX]

    def _mapped(self) -> Counters:
        table: Counters = map_shared(self._fd, self._workers * _ROW * 4).view(np.uint32).reshape(self._workers, _ROW)
        return table
