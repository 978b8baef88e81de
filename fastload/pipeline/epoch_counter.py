"""Which epoch an iteration is, agreed on by all worker processes of a loader.

Each `iter()` begins the next epoch unless `set_epoch` was called since. In one process that is a number. In torch's own
DataLoader the iterations happen in worker processes, which are started again for each epoch, each with a copy of the
data set: a number of their own would always say epoch 0. So the number lives in a small anonymous file that every
copy of the data set shares, and the first worker of an epoch moves it on. All workers of one epoch know each other by
torch's base seed, and by how many iterations each of them has begun; once all of them have joined an epoch, the next
to come begins another, also where the seed is the same again.

The file holds 4 + 3·16 int64: the next epoch, the number of `set_epoch` calls, the row to write next, the epoch that
was begun or set last, and then the last sixteen beginnings as (base seed mixed with the iteration's number, epoch,
workers that have joined). It is read and written under a POSIX record lock, which the kernel drops with its process.
"""

from __future__ import annotations

import fcntl
import multiprocessing.context
import multiprocessing.reduction
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastload.lifecycle import on_drop

_ROWS = 16
_HEAD = 4
_FORMAT = struct.Struct(f"<{_HEAD + 3 * _ROWS}q")


class EpochCounter:
    """Shared by fork and by the pickling that starts a spawned worker; any other copy stands alone."""

    def __init__(self, epoch: int = 0) -> None:
        self._own(os.memfd_create("fastload-epoch", os.MFD_CLOEXEC))
        self._begun = 0
        with self._values() as values:
            values[0] = values[3] = epoch

    def set(self, epoch: int) -> None:
        """The next iteration is `epoch`."""
        with self._values() as values:
            values[0] = values[3] = epoch
            values[1] += 1

    def go_on_after(self, epoch: int) -> None:
        """An iteration goes on in `epoch`, which a saved state says; the next begins the one after. All workers of an
        epoch say the same, so it is no call of `set_epoch`.
        """
        with self._values() as values:
            values[0], values[3] = epoch + 1, epoch

    def next(self) -> int:
        with self._values() as values:
            return values[0]

    def current(self) -> int:
        """The epoch of the iteration that began last; before the first, and after `set`, of the next."""
        with self._values() as values:
            return values[3]

    def begin(self, base_seed: int | None = None, workers: int = 1) -> int:
        """The epoch of an iteration that begins now; in one of torch's `workers`, `base_seed` is theirs."""
        self._begun += 1
        with self._values() as values:
            if base_seed is None:
                return self._advance(values)
            token = (base_seed * 0x9E3779B1 + self._begun + (values[1] << 40)) % (1 << 62) + 1
            rows = range(_HEAD, _HEAD + 3 * _ROWS, 3)
            for row in rows:
                if values[row] == token and values[row + 2] < workers:
                    values[row + 2] += 1
                    return values[row + 1]
            epoch = self._advance(values)
            row = rows[values[2] % _ROWS]
            values[2] += 1
            values[row : row + 3] = token, epoch, 1
            return epoch

    @staticmethod
    def _advance(values: list[int]) -> int:
        values[3] = values[0]
        values[0] += 1
        return values[3]

    @contextmanager
    def _values(self) -> Iterator[list[int]]:
        """The file's numbers, locked; written back at the end."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            data = os.pread(self._fd, _FORMAT.size, 0)
            values = list(_FORMAT.unpack(data.ljust(_FORMAT.size, b"\0")))
            yield values
            os.pwrite(self._fd, _FORMAT.pack(*values), 0)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _own(self, fd: int) -> None:
        self._fd = fd
        on_drop(self, os.close, fd)

    def __getstate__(self) -> dict[str, Any]:
        if multiprocessing.context.get_spawning_popen() is not None:
            return {"fd": multiprocessing.reduction.DupFd(self._fd)}
        return {"epoch": self.next()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "fd" in state:
            self._own(state["fd"].detach())
            self._begun = 0
        else:
            self.__init__(state["epoch"])  # type: ignore[misc]  # a copy is made as the first one was
