"""The lanes of an epoch's sequence of samples: partitions side by side, made equally long.

Position q of the sequence belongs to *lane* q mod P, of P lanes, one a partition, and is number q // P there; so
every run of positions takes an equal share from each lane, at most one sample more from some than from others,
whatever its length. With N samples in all, lane p is as long as there are positions of it below N: its *quota*.

Partitions are dealt by bytes and do not hold equally many samples. A lane is the first samples of its own
partition, as many as its quota; where the partition has fewer, the lane goes on with samples that other
partitions have beyond their quotas. These stand in one row, by partition, and the short lanes take their parts
of it one after the other. So all lanes end together, and a lane passes through at most one window at a time and
few that another lane passes through too. A lane's first samples are the same for any N above them, which is
what lets an epoch begin before samples are counted: position q is settled once N is known to be above q and the
partition of its lane to reach it.

Rejected: dealing the samples of the partitions that are left, sample by sample, to all nodes. Every node would
then read all that is left, and hold a window of every partition at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def lane_length(lane: int, position: int, partitions: int) -> int:
    """How many positions below `position` are of `lane`."""
    return (position - lane + partitions - 1) // partitions


def lane_lengths(position: int, partitions: int) -> NDArray[np.int64]:
    """`lane_length` of every lane, int64[partitions]."""
    return (position - np.arange(partitions, dtype=np.int64) + partitions - 1) // partitions


class PartitionRange(NamedTuple):
    """Samples of a partition, from `start` up to `stop` in its order."""

    partition: int
    start: int
    stop: int


class LaneQuotas:
    """How lanes are made equally long, once every partition's number of samples is known.

    `total` samples in all; `quota` is the length of each lane, `own` how much of it its partition gives.
    """

    def __init__(self, totals: NDArray[np.int64]) -> None:
        self.total = int(totals.sum())
        self.quota = lane_lengths(self.total, len(totals))
        self.own = np.minimum(totals, self.quota)
        self._surplus = totals - self.own
        self._row_end = np.cumsum(self._surplus)
        lacking = self.quota - self.own
        self._row_start_of_lane = np.cumsum(lacking) - lacking

    def ranges(self, lane: int, start: int, stop: int) -> list[PartitionRange]:
        """What `lane` holds from number `start` up to `stop`."""
        own = int(self.own[lane])
        found = [PartitionRange(lane, start, min(stop, own))] if start < min(stop, own) else []
        at = int(self._row_start_of_lane[lane]) + max(start, own) - own
        row_stop = int(self._row_start_of_lane[lane]) + stop - own
        while at < row_stop:
            partition = int(np.searchsorted(self._row_end, at, side="right"))
            end = min(row_stop, int(self._row_end[partition]))
            shift = int(self.own[partition]) - int(self._row_end[partition] - self._surplus[partition])
            found.append(PartitionRange(partition, at + shift, end + shift))
            at = end
        return found
