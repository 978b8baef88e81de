"""The plan: which samples, in which order, for which rank. Pure functions; no I/O, and torch only if it is
there.
"""

from fastload.plan.cursor import EpochCursor, Split
from fastload.plan.lookahead import first_objects, objects_in_use_order
from fastload.plan.manifest import Manifest
from fastload.plan.order import (
    EpochOrder,
    OrderOptions,
    OrderWish,
    Shuffle,
    WindowKey,
    epoch_order,
    epoch_orders,
    fitting_window_bytes,
    lanes_of_node,
    ram_bytes_for,
)
from fastload.plan.position import Place, Position
from fastload.plan.ranks import (
    Ranks,
    Tail,
    batch_count_of_rank,
    default_partitions,
    resolve_ranks,
    sample_count_of_rank,
    turn_of,
)
from fastload.plan.samples import BatchEntry

__all__ = [
    "BatchEntry",
    "EpochCursor",
    "EpochOrder",
    "Manifest",
    "OrderOptions",
    "OrderWish",
    "Place",
    "Position",
    "Ranks",
    "Shuffle",
    "Split",
    "Tail",
    "WindowKey",
    "batch_count_of_rank",
    "default_partitions",
    "epoch_order",
    "epoch_orders",
    "first_objects",
    "fitting_window_bytes",
    "lanes_of_node",
    "objects_in_use_order",
    "ram_bytes_for",
    "resolve_ranks",
    "sample_count_of_rank",
    "turn_of",
]
