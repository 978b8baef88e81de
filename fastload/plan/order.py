"""The one order of a data set: a function of (manifest, seed, epoch) that needs no sample counts.

- Shards are dealt to *partitions* by bytes, the same in every epoch, so that what a node caches stays of use
  to it.
- In each epoch a partition shuffles its shards and cuts them into *windows* of whole shards, as many as fit
  in `window_bytes` but at least one. The first windows hold at most 1, 2, 4 ... shards, so that an epoch
  starts at once.
- The samples of a window, those of its shards one after the other, are permuted once its shards are indexed
  and so their number is known (by a bijection, as below, where there are more than 2**22). The order of the
  partition is its windows, one after the other.

Without `shuffle` shards keep their numbers' order, each is a window and its samples stay as they are;
`"shards"` shuffles shards only. With `"global"` a partition is one window, of its shards in their numbers' order, and
its permutation a bijection that is asked place by place, so that neither time nor memory grows with the samples.

Every permutation is keyed by a text such as `fastload order 1 samples seed=0 epoch=3 partition=0 window=7` (see
`permutation`). None depends on another, so that any window of any epoch can be had without those before it. Rejected:
numpy's generators, whose `permutation` may change between versions; one stream for the whole epoch, which would tie a
window to the counts of all before it.

A `RequestedOrder` becomes an order by choosing how many partitions there are, and windows that fit in memory. A node
has one window live in each lane that it reads, and two while a lane goes on from one to the next. All of them have to
fit in the windows' share of the arena (`shares.WINDOWS`; the rest is for what is kept and what is on its way):
otherwise parts of a window are dropped before they are used and read again. So a window that is too large is made
smaller, to a power of two, so that few different orders come of many different machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from fastload import shares
from fastload.cached_attribute import cached_attribute
from fastload.errors import ConfigError
from fastload.kernels.shuffling import cut, deal
from fastload.plan.assignment import Assignment
from fastload.plan.manifest import Manifest
from fastload.plan.permutation import Bijection, Identity, Permutation, keyed_permutation
from fastload.plan.ranks import Ranks, default_partitions

Shuffle = Literal["none", "window", "shards", "global"]


def check_shuffle(shuffle: str) -> Shuffle:
    """`shuffle` if it is one of the four ways. Raises `ConfigError`."""
    if shuffle not in get_args(Shuffle):
        raise ConfigError(f"shuffle={shuffle!r} must be 'none', 'window', 'shards' or 'global'")
    return cast(Shuffle, shuffle)


DEFAULT_WINDOW_BYTES = 512 << 20
# Above this, a bijection permutes a window's samples: an array would cost time and memory before the first batch.
WINDOW_ARRAY_SAMPLES_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class OrderOptions:
    """What, beside the manifest and the epoch, settles the order. Raises `ConfigError`."""

    seed: int = 0
    shuffle: Shuffle = "window"
    window_bytes: int = DEFAULT_WINDOW_BYTES
    partitions: int = 1

    def __post_init__(self) -> None:
        check_shuffle(self.shuffle)
        if self.window_bytes < 1:
            raise ConfigError(f"window_bytes={self.window_bytes} must be at least 1; a window holds one shard or more")
        if self.partitions < 1:
            raise ConfigError(f"partitions={self.partitions} must be at least 1")


@dataclass(frozen=True)
class EpochOrder:
    """The order of one partition in one epoch: its shards, window by window. Made by `epoch_order`.

    `object_order`, int32[shards], holds object numbers in the order of their first use; window w is
    `object_order[window_start[w] : window_start[w + 1]]`, with `window_start` int64[window_count + 1].
    """

    manifest: Manifest
    options: OrderOptions
    epoch: int
    partition: int
    object_order: NDArray[np.int32]
    window_start: NDArray[np.int64]

    @property
    def window_count(self) -> int:
        return len(self.window_start) - 1

    def window_objects(self, window: int) -> NDArray[np.int32]:
        """The object numbers of one window, int32[shards of the window]; read-only."""
        return self.object_order[self.window_start[window] : self.window_start[window + 1]]

    @cached_attribute
    def window_bytes(self) -> NDArray[np.int64]:
        """Bytes of each window's shards, int64[window_count]."""
        ends = np.zeros(len(self.object_order) + 1, np.int64)
        np.cumsum(self.manifest.sizes[self.object_order], out=ends[1:])
        return np.diff(ends[self.window_start])

    def window_permutation(self, window: int, sample_count: int) -> Permutation:
        """Which of the window's samples comes first, second, ...

        Samples are numbered through the window's shards in the order of `window_objects`.
        """
        if self.options.shuffle not in ("window", "global"):
            return Identity(sample_count)
        key = _key("samples", self.options.seed, self.epoch, self.partition, window)
        if self.options.shuffle == "global" or sample_count > WINDOW_ARRAY_SAMPLES_MAX:
            return Bijection(key, sample_count)
        return keyed_permutation(key, sample_count)


def epoch_order(manifest: Manifest, options: OrderOptions, epoch: int, partition: int = 0) -> EpochOrder:
    """The order of `partition` in `epoch`. Time and memory are linear in shards, whatever they hold."""
    if not 0 <= partition < options.partitions:
        raise ConfigError(f"partition={partition} must be from 0 to {options.partitions - 1}")
    dealt = deal_to_partitions(manifest.sizes, options.partitions, manifest.version_starts)
    return _partition_order(manifest, options, epoch, partition, np.flatnonzero(dealt == partition).astype(np.int32))


def epoch_orders(manifest: Manifest, options: OrderOptions, epoch: int) -> tuple[EpochOrder, ...]:
    """The orders of all partitions in `epoch`, for the cost of dealing the shards once."""
    dealt = deal_to_partitions(manifest.sizes, options.partitions, manifest.version_starts)
    # numpy sorts small integers by their digits, in a tenth of the time.
    by_partition = np.argsort(dealt.astype(np.min_scalar_type(options.partitions)), kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(dealt, minlength=options.partitions))
    parts = np.split(by_partition, ends[:-1])
    return tuple(_partition_order(manifest, options, epoch, partition, part) for partition, part in enumerate(parts))


def _partition_order(
    manifest: Manifest, options: OrderOptions, epoch: int, partition: int, objects: NDArray[np.int32]
) -> EpochOrder:
    """The order of a partition that holds `objects`, given in the order of their numbers. Those that are gone were
    dealt to it like the others, so that these stay where they were, and are left out.
    """
    objects = objects[manifest.is_there[objects]]
    if options.shuffle in ("window", "shards"):
        objects = objects[keyed_permutation(_key("shards", options.seed, epoch, partition), len(objects))]
    if options.shuffle == "window":
        starts = cut_windows(manifest.sizes[objects], options.window_bytes)
    elif options.shuffle == "global":
        starts = np.unique([0, len(objects)])  # no window where there is no shard
    else:
        starts = np.arange(len(objects) + 1, dtype=np.int64)
    objects.flags.writeable = starts.flags.writeable = False
    return EpochOrder(manifest, options, epoch, partition, objects, starts)


def deal_to_partitions(sizes: NDArray[np.int64], partitions: int, starts: Sequence[int] = ()) -> NDArray[np.int32]:
    """int32[objects]: the partition of each object.

    Largest first, each to the partition with the fewest bytes so far (then the fewest objects, then the
    lowest number): no two partitions differ by more than the largest object. Objects from each of `starts` on came
    later, and are dealt when those before them are: these stay where they were.
    """
    dealt = np.zeros(len(sizes), np.int32)
    load_bytes, load_counts = np.zeros((2, partitions), np.int64)
    if partitions > 1:
        for first, stop in pairwise((0, *starts, len(sizes))):
            turns = first + np.argsort(-sizes[first:stop], kind="stable")
            of_turn = np.empty(len(turns), np.int32)
            deal(sizes[turns], np.lexsort((load_counts, load_bytes)), load_bytes, load_counts, of_turn)
            dealt[turns] = of_turn
    return dealt


def cut_windows(sizes: NDArray[np.int64], window_bytes: int) -> NDArray[np.int64]:
    """int64[windows + 1]: where windows begin among shards of these sizes, and last the number of shards."""
    starts = np.empty(len(sizes) + 1, np.int64)
    return starts[: cut(sizes, window_bytes, starts)].copy()


def _key(what: str, seed: int, epoch: int, partition: int, window: int | None = None) -> str:
    key = f"fastload order 1 {what} seed={seed} epoch={epoch} partition={partition}"
    return key if window is None else f"{key} window={window}"


class SourcePlan(NamedTuple):
    """One source: its data and the order of its samples."""

    manifest: Manifest
    options: OrderOptions


class WindowKey(NamedTuple):
    """A window: which source of a mixture (0 where one data set is read alone), which epoch of it, and partition and
    number there.
    """

    source: int
    epoch: int
    partition: int
    window: int


_LIVE_WINDOWS_OF_LANE = 2
_ARENA_TO_WINDOWS = int(1 / shares.WINDOWS)  # how many times their share the arena is


@dataclass(frozen=True, slots=True)
class RequestedOrder:
    """The order that the user asked for; what is None is chosen here."""

    seed: int = 0
    shuffle: Shuffle = "none"
    window_bytes: int | None = None
    partitions: int | None = None

    def adopted(self, saved: OrderOptions) -> RequestedOrder:
        """The same, with what it leaves open as a saved run settled it."""
        return replace(
            self,
            window_bytes=self.window_bytes or saved.window_bytes,
            partitions=self.partitions or saved.partitions,
        )

    def partition_count(self, ranks: Ranks) -> int:
        """How many partitions there will be. Raises `ConfigError` where the user did not say and nodes differ."""
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
    return Assignment(ranks, partitions, ranks.world_size).home


def fitting_window_bytes(lanes: int, ram_bytes: int) -> int:
    """The largest power of two of which the live windows of `lanes` fit in their share of the arena."""
    return _power_below(ram_bytes // (_ARENA_TO_WINDOWS * _LIVE_WINDOWS_OF_LANE * lanes))


def ram_bytes_for(lanes: int, window_bytes: int) -> int:
    """The arena in which windows of this size fit."""
    return _ARENA_TO_WINDOWS * _LIVE_WINDOWS_OF_LANE * lanes * window_bytes


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)
