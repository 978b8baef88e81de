"""What an epoch will read, known before anything is read: the plan of prefetch and of `fastload warm`.

Where a node reads several partitions, batches go through all of them at once; how fast each depends on sample
counts. Before these are known, a partition is taken to hold as many samples a byte everywhere, so that windows
come by the share of their partition's bytes that lies before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastload.plan.assignment import Assignment
from fastload.plan.manifest import Manifest
from fastload.plan.order import EpochOrder, OrderOptions, WindowKey, epoch_orders
from fastload.plan.position import Place, Position
from fastload.plan.ranks import Ranks


def objects_in_use_order(
    manifest: Manifest,
    options: OrderOptions,
    epoch: int,
    start: Position | None = None,
    ranks: Ranks | None = None,
) -> NDArray[np.int32]:
    """Object numbers in the order of their first use from `start` on (None: the whole epoch), int32, each
    once.

    With `ranks`, those of the partitions that their node reads; without, all. The samples of a window are spread
    over all its shards, so a start within a window needs the whole of it. All ranks of a node need the same
    objects in the same order.
    """
    orders = epoch_orders(manifest, options, epoch)
    places = (Place(0, 0),) * len(orders) if start is None else start.sources[0].places
    if len(orders) == 1:
        order = orders[0]
        return order.object_order[order.window_start[min(places[0].window, order.window_count)] :]
    home = range(len(orders)) if ranks is None else Assignment(ranks, len(orders), ranks.world_size).home
    keys = windows_by_bytes(orders, home, places)
    found = [orders[key.partition].window_objects(key.window) for key in keys]
    return np.concatenate(found) if found else np.empty(0, np.int32)


def first_objects(
    manifest: Manifest, options: OrderOptions, epoch: int, ranks: Ranks, byte_count: int
) -> NDArray[np.int32]:
    """The objects with which a node begins an epoch, int32: the first, and as many more as `byte_count` holds."""
    objects = objects_in_use_order(manifest, options, epoch, None, ranks)
    fitting = int(np.searchsorted(np.cumsum(manifest.sizes[objects]), byte_count, side="right"))
    return objects[: max(1, fitting) if byte_count else 0]


def windows_by_bytes(
    orders: Sequence[EpochOrder], partitions: Sequence[int], places: Sequence[Place], source: int = 0
) -> list[WindowKey]:
    """The windows of some partitions from `places` on, as they come if a byte is as many samples everywhere."""
    found = []
    for partition in partitions:
        order = orders[partition]
        before = np.cumsum(order.window_bytes) - order.window_bytes
        share = (before / max(1, int(order.window_bytes.sum()))).tolist()
        found += [
            (share[window], WindowKey(source, order.epoch, partition, window))
            for window in range(min(places[partition].window, order.window_count), order.window_count)
        ]
    return [key for _, key in sorted(found)]
