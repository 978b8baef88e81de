"""Which positions of the line are whose.

Global batch g is the positions from g·B·W up to (g+1)·B·W, for W ranks with batches of B, so that its samples
are the same at every W and B with the same product. A rank has a *turn* from 0 to W-1 and gets the positions
that are its turn mod W. Turns are given so that a node's positions lie in few lanes. With K nodes of R ranks and
d = gcd(K, P), node k has the lanes p with p mod d = k mod d:

- K divides P: lanes p with p mod K = k are read by node k alone, and its ranks share their samples one by one;
- P divides K: lane k mod P is shared by K/P nodes, sample by sample; with P = 1 the turn is the rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fastload.plan.lanes import lane_length
from fastload.plan.ranks import Ranks, shared_lanes, turn_of


class Deal:
    """One rank's positions, and the lanes that its node reads."""

    def __init__(self, ranks: Ranks, partitions: int) -> None:
        self._partitions, self._world_size = partitions, ranks.world_size
        self.turn = turn_of(ranks, partitions)
        shared = shared_lanes(ranks, partitions)
        self.lanes = range(self.turn % shared, partitions, shared)

    def needs(self, first: int, stop: int) -> list[tuple[int, int, int]]:
        """Per lane that the node needs for the positions from `first` up to `stop`: lane, and from which
        number up to which.
        """
        spans = ((p, *(lane_length(p, q, self._partitions) for q in (first, stop))) for p in self.lanes)
        return [(lane, start, end) for lane, start, end in spans if start < end]

    def settled(self, first: int, step: int, covered: Mapping[int, int]) -> int:
        """Up to which position all is settled, where lanes are covered up to these numbers; at least `first`."""
        return max(first, min(covered[lane] * self._partitions + lane for lane in self.lanes))

    def positions(self, first: int, stop: int) -> NDArray[np.int64]:
        """The rank's positions from `first` up to `stop`, int64, rising; both are multiples of world_size."""
        return np.arange(first + self.turn, stop, self._world_size, dtype=np.int64)
