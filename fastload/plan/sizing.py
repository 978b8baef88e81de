"""From what the user said of the order to the order: how many partitions, and windows that fit in memory.

A node has one window live in each lane that it reads, and two while a lane goes on from one to the next. All of them
have to fit in half of the arena, the *transit* budget (the other half is for what is kept and what is on its way):
otherwise parts of a window are dropped before they are used and read again. So a window that is too large is made
smaller, to a power of two, so that few different orders come of many different machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastload.errors import ConfigError
from fastload.plan.deal import Deal
from fastload.plan.order import DEFAULT_WINDOW_BYTES, OrderOptions, Shuffle
from fastload.plan.ranks import Ranks, default_partitions

_LIVE_WINDOWS_OF_LANE = 2
_TRANSIT_SHARE = 2  # one part in so many of the arena


@dataclass(frozen=True, slots=True)
class OrderWish:
    """What the user said of the order; None: left to us."""

    seed: int = 0
    shuffle: Shuffle = "none"
    window_bytes: int | None = None
    partitions: int | None = None

    def adopted(self, saved: OrderOptions) -> OrderWish:
        """The wish, where it leaves something open, as a saved run settled it."""
        return replace(
            self,
            window_bytes=self.window_bytes or saved.window_bytes,
            partitions=self.partitions or saved.partitions,
        )

    def partition_count(self, ranks: Ranks) -> int:
        """How many partitions there will be. Raises `ConfigError` where that is left to us and nodes are not alike."""
        if self.partitions is None and ranks.world_size % ranks.local_world_size:
            # Each node would find another number of nodes, and deal the data otherwise than the others.
            raise ConfigError(
                f"world_size={ranks.world_size} is not a multiple of local_world_size={ranks.local_world_size}: nodes "
                "have different numbers of ranks, so that none can say how many nodes there are; give every rank "
                "partitions=1, with which nodes do not matter, or as many ranks to each node"
            )
        return self.partitions or default_partitions(ranks)

    def settled(self, ranks: Ranks, ram_bytes: int) -> OrderOptions:
        """The order beside an arena of `ram_bytes`, the smallest of all nodes. Raises `ConfigError`."""
        partitions = self.partition_count(ranks)
        fitting = fitting_window_bytes(len(lanes_of_node(ranks, partitions)), ram_bytes)
        wanted = self.window_bytes or DEFAULT_WINDOW_BYTES
        return OrderOptions(self.seed, self.shuffle, min(wanted, max(1, fitting)), partitions)


def lanes_of_node(ranks: Ranks, partitions: int) -> Sequence[int]:
    """The lanes that a node reads at a time. Raises `ConfigError` where ranks do not fit partitions."""
    return Deal(ranks, partitions, ranks.world_size).home


def fitting_window_bytes(lanes: int, ram_bytes: int) -> int:
    """The largest power of two of which the live windows of `lanes` fit in the transit of the arena."""
    return _power_below(ram_bytes // (_TRANSIT_SHARE * _LIVE_WINDOWS_OF_LANE * lanes))


def ram_bytes_for(lanes: int, window_bytes: int) -> int:
    """The arena in which windows of this size fit."""
    return _TRANSIT_SHARE * _LIVE_WINDOWS_OF_LANE * lanes * window_bytes


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)
