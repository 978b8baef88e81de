"""Several nodes reading one data set: the plan run on each rank, and what the reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
from hypothesis import strategies as st

from fastload.plan import (
    Batch,
    BatchEntry,
    Cursor,
    EpochOrder,
    Manifest,
    OrderOptions,
    Position,
    Ranks,
    Tail,
    WindowKey,
    epoch_cursor,
    epoch_orders,
)
from fastload.store.types import ObjectInfo
from tests.plan import reference


@dataclass(frozen=True)
class Cluster:
    """A data set (size and sample count of each shard), and `nodes` of `local` ranks that read it."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    partitions: int = 1
    nodes: int = 1
    local: int = 1
    batch_size: int = 1
    shuffle: str = "window"
    window_bytes: int = 100
    seed: int = 0
    epoch: int = 0
    tail: Tail = "pad"
    drop_last: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.local

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def sources(self) -> tuple[Cluster]:
        return (self,)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def manifest(self) -> Manifest:
        return _manifest(self.sizes)

    @property
    def options(self) -> OrderOptions:
        return OrderOptions(self.seed, self.shuffle, self.window_bytes, self.partitions)

    @property
    def orders(self) -> tuple[EpochOrder, ...]:
        return _orders(self.sizes, self.options, self.epoch)

    def with_(self, **changes) -> Cluster:
        return replace(self, **changes)

    def ranks(self, rank: int) -> Ranks:
        return Ranks(rank, self.world_size, rank % self.local, self.local)

    def cursor(self, rank: int = 0, start: Position | None = None, **kwargs) -> Cursor[BatchEntry]:
        settings = {"drop_last": self.drop_last, "tail": self.tail, "start": start} | kwargs
        return epoch_cursor(self.orders, self.ranks(rank), self.batch_size, **settings)

    def begun(self, rank: int = 0, start: Position | None = None, **kwargs) -> Run:
        return Run(self, self.cursor(rank, start, **kwargs))

    def run(self, rank: int = 0, start: Position | None = None, told: str = "wanted", **kwargs) -> Run:
        """All of a rank's batches."""
        run = self.begun(rank, start, **kwargs)
        run.tell_early(told)
        return run.to_the_end()

    def runs(self, start: Position | None = None, told: str = "wanted") -> list[Run]:
        return [self.run(rank, start, told) for rank in range(self.world_size)]

    def reference_line(self):
        """Each (partition, window, offset, object, sample)."""
        return _reference_line(self.with_(nodes=1, local=1, batch_size=1, tail="pad", drop_last=False))

    def reference_batches(self, rank: int, delivered: int = 0) -> list[list[tuple[int, int]]]:
        """A rank's batches after so many samples of the line, each a list of (object, sample)."""
        line, by_window = self.reference_line()
        left_over = (len(line) - delivered) % self.world_size
        total = len(line) - left_over * (self.tail == "drop")
        positions = reference.rank_positions(
            delivered, total, rank, self.nodes, self.local, self.partitions, self.global_batch
        )
        mine = [line[position] for position in positions]
        mine_missing = reference.turn(rank, rank // self.local, self.nodes, self.local, self.partitions)
        mine_missing -= left_over
        if self.tail == "pad" and left_over and mine_missing >= 0:
            repeats = reference.repeats(
                line,
                lambda sample: [other for other in by_window if other[:2] == sample[:2]],
                self.partitions,
                self.world_size,
                self.global_batch,
            )
            mine.append(repeats[mine_missing])
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        return [
            [sample[3:] for sample in batch] for batch in batches if len(batch) == self.batch_size or not self.drop_last
        ]


# What follows from a data set and not from who reads it is made once for all ranks and positions; nothing changes it.


@lru_cache(maxsize=16)
def _manifest(sizes: tuple[int, ...]) -> Manifest:
    return Manifest(ObjectInfo(f"s3://bucket/{i:06}.tar", size, "a") for i, size in enumerate(sizes))


@lru_cache(maxsize=16)
def _orders(sizes: tuple[int, ...], options: OrderOptions, epoch: int) -> tuple[EpochOrder, ...]:
    return epoch_orders(_manifest(sizes), options, epoch)


@lru_cache(maxsize=16)
def _reference_line(cluster: Cluster):
    lines = []
    for partition, objects in enumerate(reference.dealt(cluster.sizes, cluster.partitions)):
        cut = reference.windows(
            cluster.sizes, cluster.seed, cluster.epoch, cluster.shuffle, cluster.window_bytes, partition, objects
        )
        line = reference.line(cut, cluster.counts, cluster.seed, cluster.epoch, cluster.shuffle, partition)
        lines.append([(partition, *sample) for sample in line])
    return reference.one_line(lines), [sample for line in lines for sample in line]


class Run:
    """A cursor on its way, as a feed would drive it, with what it opened and whose counts it had to be told."""

    def __init__(self, world: Any, cursor: Cursor[Any]) -> None:
        """`world` has the `sources` that the cursor reads, with the counts of each."""
        self.world, self.cursor = world, cursor
        self.entries: list[Batch] = []
        self.opened: list[WindowKey] = []
        self.needed: frozenset[WindowKey] = frozenset()
        self.live_max = 0

    @property
    def is_over(self) -> bool:
        """Whether enough was seen of what has no end."""
        return False

    def tell_early(self, told: str) -> None:
        """Counts are told when they are wanted, or all at the start, or some then."""
        if share := {"wanted": 0, "some": 2, "all": 1}[told]:
            for number, source in enumerate(self.world.sources):
                self.add_counts(number, np.arange(0, len(source.counts), share, dtype=np.int32))

    def to_the_end(self) -> Self:
        while not self.is_over and self.step():
            pass
        if not self.is_over:
            self._give(self.cursor.finish())
        return self

    def step(self) -> bool:
        """One window more, or the counts that it takes; whether there was anything to do."""
        wanted, key = self.cursor.counts_wanted, self.cursor.next_window
        if key is None:
            for source, object_nos in wanted.items():
                self.add_counts(source, object_nos)
            return len(wanted) > 0
        assert not wanted
        assert key not in self.needed
        self.opened.append(key)
        self.needed |= {key}
        self._give(self.cursor.add(key, self._counts(key.source, self.cursor.objects_of(key))))
        return True

    def add_counts(self, source: int, object_nos) -> None:
        self._give(self.cursor.add_counts(source, object_nos, self._counts(source, object_nos)))

    def _give(self, entries: list[Batch]) -> None:
        while entries:
            assert all(set(entry.windows) <= self.needed for entry in entries)
            self.entries += entries
            entries = self.cursor.settled()
        assert self.cursor.needed <= self.needed
        self.needed = self.cursor.needed
        self.live_max = max(self.live_max, len(self.needed))

    def _counts(self, source: int, object_nos) -> np.ndarray:
        return np.array(self.world.sources[source].counts, np.int64)[object_nos]

    @property
    def samples(self) -> list[list[tuple[int, ...]]]:
        """The batches as lists of (object, sample)."""
        return [list(zip(e.object_no.tolist(), e.sample_no.tolist(), strict=True)) for e in self.entries]


def samples_of(entry: Batch) -> list[tuple[int, ...]]:
    """Each (source, epoch, object, sample) of a batch, in order."""
    parts = []
    for part in entry.parts:
        samples = zip(part.object_no.tolist(), part.sample_no.tolist(), strict=True)
        parts.append(iter([(part.source, part.epoch, *sample) for sample in samples]))
    return [next(parts[number]) for number in entry.part_of.tolist()]


def global_batches(runs: list[Run]) -> list[frozenset[tuple[int, int]]]:
    """What all ranks have together in each step; repeats count once."""
    steps = max(len(run.entries) for run in runs)
    batches = [[run.samples[i] for run in runs if i < len(run.entries)] for i in range(steps)]
    return [frozenset(sample for batch in step for sample in batch) for step in batches]


def shared(sizes: tuple[int, ...], counts: tuple[int, ...], world_size: int = 1, **options) -> Cluster:
    """One partition, and so one node, which all ranks share."""
    return Cluster(sizes, counts, local=world_size, **options)


@st.composite
def shared_clusters(draw: st.DrawFn) -> Cluster:
    """Odd shapes: empty shards, no samples at all, more ranks than samples, empty last windows, one huge shard."""
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 20, 60]), min_size=1, max_size=9))
    return shared(
        tuple(draw(st.lists(st.sampled_from([0, 1, 30, 50, 1000]), min_size=len(counts), max_size=len(counts)))),
        tuple(counts),
        world_size=draw(st.integers(1, 9)),
        batch_size=draw(st.integers(1, 8)),
        shuffle=draw(st.sampled_from(["window", "window", "shards", "none"])),
        window_bytes=draw(st.sampled_from([1, 60, 100, 10_000])),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
        tail=draw(st.sampled_from(["pad", "drop", "uneven"])),
        drop_last=draw(st.booleans()),
    )


@st.composite
def clusters(draw: st.DrawFn, *, nodes_divide: bool = False) -> Cluster:
    """Odd shapes: empty shards and partitions, one huge shard, samples that are nothing like their bytes."""
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 20, 60]), min_size=1, max_size=12))
    sizes = draw(st.lists(st.sampled_from([0, 1, 30, 50, 1000]), min_size=len(counts), max_size=len(counts)))
    partitions = draw(st.integers(1, 8))
    divisors = [n for n in range(1, 9) if partitions % n == 0] if nodes_divide else list(range(1, 9))
    return Cluster(
        sizes=tuple(sizes),
        counts=tuple(counts),
        partitions=partitions,
        nodes=draw(st.sampled_from(divisors)),
        local=draw(st.integers(1, 3)),
        batch_size=draw(st.integers(1, 8)),
        shuffle=draw(st.sampled_from(["window", "window", "shards", "none"])),
        window_bytes=draw(st.sampled_from([1, 60, 100, 10_000])),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
        tail=draw(st.sampled_from(["pad", "drop", "uneven"])),
        drop_last=draw(st.booleans()),
    )
