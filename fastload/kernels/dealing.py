"""Dealing shards to partitions and cutting them into windows: loops whose every step depends on the one before.

In Python a million shards took 0.8 s to deal to 64 partitions, and up to 0.5 s to cut; here 40 ms and 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.jit import array_in, array_out, boolean, helper, int32, int64, kernel, void

__all__ = ["cut", "deal"]

Int64s = NDArray[np.int64]


@kernel(void(array_in(int64), array_out(int64), array_out(int64), array_out(int64), array_out(int32)))
def deal(sizes: Int64s, heap: Int64s, load_bytes: Int64s, load_counts: Int64s, partitions: NDArray[np.int32]) -> None:
    """Give each shard, one after the other, to the partition with the fewest bytes so far, then the fewest shards, then
    the lowest number: `partitions`, int32[shards].

    What each has so far, `load_bytes` and `load_counts`, int64[partitions], is brought up to date; `heap` holds all
    partitions in the order that is meant, at first and, as a heap, at the end.
    """
    for shard in range(sizes.size):
        moved, place = heap[0], 0
        partitions[shard] = moved
        load_bytes[moved] += sizes[shard]
        load_counts[moved] += 1
        while 2 * place + 1 < heap.size:
            child = 2 * place + 1
            if child + 1 < heap.size and _has_less(heap[child + 1], heap[child], load_bytes, load_counts):
                child += 1
            if _has_less(moved, heap[child], load_bytes, load_counts):
                break
            heap[place] = heap[child]
            place = child
        heap[place] = moved


@helper(boolean(int64, int64, array_out(int64), array_out(int64)))
def _has_less(one: int, other: int, load_bytes: Int64s, load_counts: Int64s) -> bool:
    """Whether partition `one` comes before `other`."""
    if load_bytes[one] != load_bytes[other]:
        return bool(load_bytes[one] < load_bytes[other])
    if load_counts[one] != load_counts[other]:
        return bool(load_counts[one] < load_counts[other])
    return one < other


@kernel(int64(array_in(int64), int64, array_out(int64)))
def cut(sizes: Int64s, window_bytes: int, starts: Int64s) -> int:
    """Windows of as many shards as fit in `window_bytes`, at least one and at most 1, 2, 4, ... in the first windows:
    where each begins, and last the number of shards, in `starts`, int64[shards + 1]. Returns how many it filled.
    """
    start, filled, shards_max = 0, 1, 1
    starts[0] = 0
    while start < sizes.size:
        total, stop = sizes[start], start + 1
        while stop < min(start + shards_max, sizes.size) and total + sizes[stop] <= window_bytes:
            total += sizes[stop]
            stop += 1
        starts[filled] = start = stop
        filled += 1
        shards_max = min(2 * shards_max, sizes.size)
    return filled
