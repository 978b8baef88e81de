"""What a thread needs to decode images: pixels, one row of sums, and tables, made once and grown as pictures
ask for it.

Fresh memory costs more than decoding into it: the system clears each page at first touch. So every thread
keeps its own workspace for good, with one exception: pixels beyond `KEPT_BYTES_MAX` are given back, so that
one huge picture does not hold memory in every thread for the rest of a run.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from fastload.kernels.resize import taps_max, triangle

__all__ = ["KEPT_BYTES_MAX", "Table", "Workspace", "workspace"]

KEPT_BYTES_MAX = 64 << 20
"""16 megapixels: most cameras' largest pictures."""


class Table:
    """Weights of one axis; see `fastload.kernels.resize.triangle`."""

    def __init__(self) -> None:
        self._made_for: tuple[int, int, float] | None = None
        self._room = np.empty(0, np.float32)
        self.first = np.empty(0, np.int64)
        self.count = np.empty(0, np.int64)
        self.weights = np.empty((0, 0), np.float32)

    def make(self, source_length: int, length: int, level: float) -> None:
        """Fill the table for this pair of lengths, unless that is what it holds."""
        if self._made_for == (source_length, length, level):
            return
        taps = taps_max(source_length, length)
        if len(self.first) != length:
            self.first = np.empty(length, np.int64)
            self.count = np.empty(length, np.int64)
        if len(self._room) < length * taps:
            self._room = np.empty(_grown(length * taps), np.float32)
        self.weights = self._room[: length * taps].reshape(length, taps)
        triangle(source_length, level, self.first, self.count, self.weights)
        self._made_for = (source_length, length, level)


class Workspace(threading.local):
    """One thread's; attributes differ from thread to thread."""

    def __init__(self) -> None:
        self.rows = Table()
        self.columns = Table()
        self._pixels = np.empty(0, np.uint8)
        self._sums = np.empty(0, np.float32)

    def pixels(self, byte_count: int) -> npt.NDArray[np.uint8]:
        """Room for `byte_count` bytes of pixels, valid until the next call."""
        if byte_count > KEPT_BYTES_MAX:
            return np.empty(byte_count, np.uint8)
        if byte_count > len(self._pixels):
            self._pixels = np.empty(_grown(byte_count), np.uint8)
        return self._pixels[:byte_count]

    def sums(self, count: int) -> npt.NDArray[np.float32]:
        """Room for `count` sums, valid until the next call."""
        if count > len(self._sums):
            self._sums = np.empty(_grown(count), np.float32)
        return self._sums[:count]


def _grown(count: int) -> int:
    """`count` and a quarter, so that slowly growing pictures do not make new memory each time."""
    return count + count // 4


workspace = Workspace()
