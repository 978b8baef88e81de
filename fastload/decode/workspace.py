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

from fastload.decode import native
from fastload.decode.view import Span
from fastload.kernels.resize import fill_table, taps_max

__all__ = ["KEPT_BYTES_MAX", "Table", "Workspace", "workspace"]

KEPT_BYTES_MAX = 64 << 20
"""16 megapixels: most cameras' largest pictures."""

_ALIGNMENT = 64
_OFFSET = 8
"""How far behind a multiple of 64 pixels begin. libjpeg-turbo writes rows that begin at a multiple of 16 or 32 bytes
around the cache, which costs their next reader 50 us a picture of 500 x 375."""


class Table:
    """Weights of one axis; see `fastload.kernels.resize.fill_table`."""

    def __init__(self) -> None:
        self._made_for: tuple[Span, int] | None = None
        self._room = np.empty(0, np.float64)
        self.first = np.empty(0, np.int64)
        self.count = np.empty(0, np.int64)
        self.weights = np.empty((0, 0), np.float64)
        self.bits = 0

    def make(self, span: Span, length: int) -> None:
        """Fill the table for `length` outputs, unless that is what it holds."""
        if self._made_for == (span, length):
            return
        taps = taps_max(span.step)
        if len(self.first) != length:
            self.first = np.empty(length, np.int64)
            self.count = np.empty(length, np.int64)
        if len(self._room) < length * taps:
            self._room = np.empty(_grown(length * taps), np.float64)
        self.weights = self._room[: length * taps].reshape(length, taps)
        self.bits = fill_table(
            span.origin, span.step, span.low, span.high, span.is_mirrored, self.first, self.count, self.weights
        )
        self._made_for = (span, length)


class Workspace(threading.local):
    """One thread's; attributes differ from thread to thread."""

    def __init__(self) -> None:
        self.rows = Table()
        self.columns = Table()
        self._pixels = np.empty(0, np.uint8)
        self._row = np.empty(0, np.float64)
        self._sums = np.empty(0, np.float32)
        self._columns = np.empty((3, 0), np.float64)
        self._planes = np.empty((3, 0, 0), np.float32)
        self._context: native.Context | None = None

    def context(self) -> native.Context | None:
        """The thread's means to call the C unit, where there is one."""
        unit = native.c_unit()
        if unit is None:
            return None
        if self._context is None:
            self._context = native.Context(unit)
        return self._context

    def pixels(self, byte_count: int) -> npt.NDArray[np.uint8]:
        """Room for `byte_count` bytes of pixels, and padding behind them; valid until the next call."""
        needed = byte_count + native.ROW_PADDING + 2 * _ALIGNMENT
        if byte_count > KEPT_BYTES_MAX:
            return _placed(np.empty(needed, np.uint8), byte_count)
        if needed > len(self._pixels):
            self._pixels = np.empty(_grown(needed), np.uint8)
        return _placed(self._pixels, byte_count)

    def row(self, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Room for `count` sums of the vertical pass, and for as many values; valid until the next call."""
        if count > len(self._row):
            self._row = np.empty(_grown(count), np.float64)
            self._sums = np.empty(_grown(count), np.float32)
        return self._sums[:count], self._row[:count]

    def planes(self, rows: int, columns: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """Room for a row of sums, and for three planes of `rows` x `columns`; valid until the next call."""
        if self._planes.shape[1:] != (rows, columns):
            self._planes = np.empty((3, rows, columns), np.float32)
            self._columns = np.empty((3, columns), np.float64)
        return self._columns, self._planes


def _placed(room: npt.NDArray[np.uint8], byte_count: int) -> npt.NDArray[np.uint8]:
    """`byte_count` bytes of `room` that begin where libjpeg-turbo writes through the cache."""
    start = -room.ctypes.data % _ALIGNMENT + _OFFSET
    return room[start : start + byte_count]


def _grown(count: int) -> int:
    """`count` and a quarter, so that slowly growing pictures do not make new memory each time."""
    return count + count // 4


workspace = Workspace()
