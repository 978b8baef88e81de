"""What an epoch will read, known before anything is read: the plan of prefetch and of `fastload warm`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.plan.manifest import Manifest
from fastload.plan.order import OrderOptions, epoch_order
from fastload.plan.position import Position


def objects_in_use_order(
    manifest: Manifest, options: OrderOptions, epoch: int, start: Position | None = None
) -> NDArray[np.int32]:
    """Object numbers in the order of their first use from `start` on (None: the whole epoch), int32, each
    once.

    The samples of a window are spread over all its shards, so a start within a window needs the whole of it.
    All ranks need the same objects in the same order.
    """
    order = epoch_order(manifest, options, epoch)
    if start is None:
        return order.object_order
    window = min(start.places[order.partition].window, order.window_count)
    return order.object_order[order.window_start[window] :]
