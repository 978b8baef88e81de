"""The plan: which samples, in which order, for which rank. Pure functions; no I/O, and torch only if it is
there.

`manifest` is the list of shards, `order` what follows from it for an epoch, by `permutation`. The samples stand in one
sequence (`sample_sequence`: what a cursor asks of it): `lanes` says how partitions share it, `sequence` builds it as
counts become known (`epoch_counts`), and `samples` are rows of it. `ranks` is where this process stands, `assignment`
which positions are its own, and `cursor` cuts these into batches. `weights`, `blend`, `rounds` and `mixture` give the
sequence of several data sets read as one. `position` is what is saved, `lookahead` what will be read.

`mixture_cursor` and `sample_count` are imported from `mixture`: most jobs read one data set, and start the sooner
without.
"""

from fastload.plan.cursor import Cursor, Split, epoch_cursor
from fastload.plan.lookahead import first_objects, objects_in_use_order
from fastload.plan.manifest import Manifest, next_version
from fastload.plan.order import (
    DEFAULT_WINDOW_BYTES,
    EpochOrder,
    OrderOptions,
    RequestedOrder,
    Shuffle,
    SourcePlan,
    WindowKey,
    check_shuffle,
    epoch_order,
    epoch_orders,
    fitting_window_bytes,
    lanes_of_node,
    ram_bytes_for,
)
from fastload.plan.position import Place, Position, SourcePosition
from fastload.plan.ranks import (
    Ranks,
    Tail,
    batch_count_of_rank,
    check_tail,
    default_partitions,
    resolve_ranks,
    sample_count_of_rank,
    turn_of,
)
from fastload.plan.sample_sequence import Batch
from fastload.plan.samples import BatchEntry, MixtureEntry
from fastload.plan.weights import MixtureOptions, Schedule, Stop, Weights, check_stop, check_weights

__all__ = [
    "DEFAULT_WINDOW_BYTES",
    "Batch",
    "BatchEntry",
    "Cursor",
    "EpochOrder",
    "Manifest",
    "MixtureEntry",
    "MixtureOptions",
    "OrderOptions",
    "Place",
    "Position",
    "Ranks",
    "RequestedOrder",
    "Schedule",
    "Shuffle",
    "SourcePlan",
    "SourcePosition",
    "Split",
    "Stop",
    "Tail",
    "Weights",
    "WindowKey",
    "batch_count_of_rank",
    "check_shuffle",
    "check_stop",
    "check_tail",
    "check_weights",
    "default_partitions",
    "epoch_cursor",
    "epoch_order",
    "epoch_orders",
    "first_objects",
    "fitting_window_bytes",
    "lanes_of_node",
    "next_version",
    "objects_in_use_order",
    "ram_bytes_for",
    "resolve_ranks",
    "sample_count_of_rank",
    "turn_of",
]
