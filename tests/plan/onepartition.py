"""The cursor where all ranks share one partition, as tests of that case drive it: windows are plain numbers, and come
in their order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.plan import BatchEntry, EpochOrder, Position, Ranks, Split, Tail, WindowKey, epoch_cursor


class RankCursor:
    """A cursor over the one partition of `order`, in which windows are plain numbers and all are opened
    in their order.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        order: EpochOrder,
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: Position | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        if order.options.partitions != 1:
            raise ConfigError(
                f"partitions={order.options.partitions} must be 1: all ranks share one partition's samples"
            )
        self.order = order
        self._cursor = epoch_cursor(
            (order,), ranks, batch_size, drop_last=drop_last, tail=tail, start=start, worker=worker, split=split
        )
        self._next_window = self.start.sources[0].places[0].window

    @property
    def start(self) -> Position:
        """Where the cursor started."""
        return self._cursor.start

    @property
    def windows(self) -> range:
        """The windows that are still to be added, in order."""
        return range(self._next_window, self.order.window_count)

    @property
    def oldest_window(self) -> int:
        """The oldest window that a batch still to come may need; if none of those added, the next."""
        return min((key.window for key in self._cursor.needed), default=self._next_window)

    def window_objects(self, window: int) -> NDArray[np.int32]:
        """The object numbers of a window, int32; `add_window` wants one count for each."""
        return self.order.window_objects(window)

    def add_window(self, window: int, counts: NDArray[np.int64]) -> list[BatchEntry]:
        """The batches that are settled by the sample counts of a window's objects, int64[objects].

        Windows come in the order of `windows`. Raises `StateError` where the start lies beyond the window's
        samples.
        """
        assert window == self._next_window, f"window {window} out of turn; next is {self._next_window}"
        entries = self._cursor.add(WindowKey(0, self.order.epoch, 0, window), counts)
        while more := self._cursor.settled():
            entries += more
        self._next_window += 1
        return entries

    def finish(self) -> list[BatchEntry]:
        """After the last window: what the tail leaves, at most one batch. Called once."""
        assert not self.windows, f"windows {self.windows} have not been added"
        return self._cursor.finish()

    def position(self, entry: BatchEntry | None) -> Position:
        """The position after `entry` was delivered; for None, where the cursor started."""
        return self._cursor.position(entry)
