"""Assignment of the positions of an epoch's sequence to ranks.

Global batch g is the positions from g·B·W up to (g+1)·B·W, for W ranks with batches of B, so that its samples
are the same at every W and B with the same product. Every node gets as many of them, and they are dealt so that
a node's positions lie in few lanes. With K nodes, P lanes and d = gcd(K, P), node k only has lanes p with
p mod d = k mod d.

Where K divides P or P divides K, a rank has a *turn* from 0 to W-1 and the positions that are its turn mod W:

- K divides P: lanes p with p mod K = k are read by node k alone, and its ranks share their samples one by one;
- P divides K: lane k mod P is shared by K/P nodes, sample by sample; with P = 1 the turn is the rank.

Otherwise those P/d lanes are put in a row, and so are the K/d nodes. The part of a global batch that
lies in these lanes, lane by lane, is cut into as many equal pieces as there are nodes; the ranks of a node share
its piece, in the order of the sequence, one by one. So a node has ⌈P/K⌉ + 1 lanes, or one more where the shares of
lanes in a batch differ by a sample, and never reads the rest of the data, but for the ends of short lanes. The
row is in bit-reversed order, since the lanes that have a sample more in some batch follow one another in the
sequence: that keeps pieces within a few samples of the same place in every batch. What is left beyond a multiple of
W at the end of an epoch is dealt by turns everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fastload.plan.lanes import lane_length
from fastload.plan.ranks import Ranks, shared_lanes, turn_of

LaneSpan = tuple[int, int, int]

# Batches that are cut at once: enough to share the cost of the calls, few enough to be small.
_BATCHES_AT_ONCE = 64


class Assignment:
    """One rank's positions, and the lanes that its node reads.

    `lanes` are all that it may ever need of all `partitions`, `home` those that it reads throughout.
    """

    def __init__(self, ranks: Ranks, partitions: int, global_batch: int) -> None:
        self.partitions, self._ranks, self._global_batch = partitions, ranks, global_batch
        self.turn = turn_of(ranks, partitions)
        shared = shared_lanes(ranks, partitions)
        node_count = max(1, ranks.world_size // ranks.local_world_size)
        self.lanes = range(self.turn % shared, partitions, shared)
        self.home: list[int] = list(self.lanes)
        self._pieces = 0  # into how many pieces the lanes' part of a batch is cut; 0: ranks take turns
        if partitions > 1 and shared not in (node_count, partitions):
            self._pieces = node_count // shared
            self._piece = ranks.rank // ranks.local_world_size // shared
            self._row = np.array(self.lanes, np.int64)[_bit_reversed(len(self.lanes))]
            self.home = self._home()

    @property
    def is_cut(self) -> bool:
        """Whether what a node needs of a batch depends on how large it is; otherwise ranks take turns."""
        return self._pieces > 0

    def _home(self) -> list[int]:
        """The lanes of the node's piece of a very large batch."""
        edges = np.arange(len(self._row) + 1) * self._pieces
        low, high = self._piece * len(self._row), (self._piece + 1) * len(self._row)
        return sorted(self._row[(edges[1:] > low) & (edges[:-1] < high)].tolist())

    def needs(self, first: int, stop: int) -> list[LaneSpan]:
        """Per lane that the node needs for the positions from `first` up to `stop`: lane, and from which
        number up to which. Where it depends on the rank, what is left beyond a multiple of `world_size` is left out.
        """
        if not self._pieces:
            ends = (
                (p, lane_length(p, first, self.partitions), lane_length(p, stop, self.partitions)) for p in self.lanes
            )
            return [(lane, start, end) for lane, start, end in ends if start < end]
        low, high = self._cut(first, stop - (stop - first) % self._ranks.world_size)
        spans: list[LaneSpan] = []
        for place in np.flatnonzero((low < high).any(axis=0)).tolist():
            used = low[:, place] < high[:, place]
            spans.append((int(self._row[place]), int(low[used, place].min()), int(high[used, place].max())))
        return spans

    def settled(self, first: int, limit: int, step: int, covered: Mapping[int, int]) -> int:
        """Up to which position, at most `limit`, all is settled, where lanes are covered up to these numbers.

        Where nodes cut batches, it is looked at some batches at a time, but no fewer than `step` positions.
        """
        if not self._pieces:
            return max(first, min(limit, *(covered[lane] * self.partitions + lane for lane in self.lanes)))
        batches = min((limit - first) // self._global_batch, max(_BATCHES_AT_ONCE, step // self._global_batch))
        low, high = self._cut(first, first + batches * self._global_batch)
        reach = np.array([covered[lane] for lane in self._row.tolist()], np.int64)
        is_short = ((low < high) & (high > reach)).any(axis=1)
        return first + self._global_batch * (int(is_short.argmax()) if is_short.any() else batches)

    def positions(self, first: int, stop: int) -> NDArray[np.int64]:
        """The rank's positions from `first`, where a global batch begins, up to `stop`, int64, rising;
        `stop - first` is a multiple of `world_size`.
        """
        if not self._pieces:
            return np.arange(first + self.turn, stop, self._ranks.world_size, dtype=np.int64)
        low, high = self._cut(first, stop)
        sizes = np.maximum(high - low, 0).ravel()
        ends = np.cumsum(sizes)
        numbers = np.repeat(low.ravel() - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
        lanes = np.repeat(np.broadcast_to(self._row, low.shape).ravel(), sizes)
        # Batches follow one another, and each gives every rank of the node as many.
        return np.sort(numbers * self.partitions + lanes)[self._ranks.local_rank :: self._ranks.local_world_size]

    def _cut(self, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """From which number up to which the node needs each lane of the row, int64[batches, lanes] each; none
        where the first is not below the second.
        """
        starts = np.arange(first, stop, self._global_batch, dtype=np.int64)
        stops = np.minimum(starts + self._global_batch, stop)
        begin = _lengths(starts, self._row, self.partitions)
        size = _lengths(stops, self._row, self.partitions) - begin
        before = np.cumsum(size, axis=1) - size
        piece = size.sum(axis=1, keepdims=True) // self._pieces
        low = np.maximum(self._piece * piece - before, 0)
        high = np.minimum((self._piece + 1) * piece - before, size)
        return begin + low, begin + high


def _lengths(positions: NDArray[np.int64], lanes: NDArray[np.int64], partitions: int) -> NDArray[np.int64]:
    """`lane_length` for each position and lane, int64[positions, lanes]."""
    return (positions[:, None] - lanes + partitions - 1) // partitions


def _bit_reversed(count: int) -> list[int]:
    """0 ... count-1, in the order of their binary digits read backwards."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1])
