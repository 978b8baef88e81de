"""Small data sets for the plan's tests, and the real plan run over them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from hypothesis import strategies as st

from fastload.plan import BatchEntry, EpochOrder, Manifest, OrderOptions, Position, Ranks, epoch_order
from fastload.store import types
from tests.plan import reference
from tests.plan.onepartition import RankCursor


@dataclass(frozen=True)
class World:
    """A data set (size and sample count of each shard), how it is read, and by whom."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    shuffle: str = "window"
    window_bytes: int = 100
    seed: int = 0
    epoch: int = 0
    world_size: int = 1
    batch_size: int = 1
    tail: str = "pad"
    drop_last: bool = False
    etag: str = field(default="a")

    @property
    def manifest(self) -> Manifest:
        return _manifest(self.sizes, self.etag)

    @property
    def options(self) -> OrderOptions:
        return OrderOptions(self.seed, self.shuffle, self.window_bytes)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def with_(self, **changes) -> World:
        return replace(self, **changes)

    def cursor(self, rank=0, start: Position | None = None, **kwargs) -> RankCursor:
        order = _order(self.sizes, self.etag, self.options, self.epoch)
        ranks = Ranks(rank, self.world_size, rank, self.world_size)
        return RankCursor(
            order, ranks, self.batch_size, drop_last=self.drop_last, tail=self.tail, start=start, **kwargs
        )

    def run(self, rank=0, start: Position | None = None, **kwargs) -> tuple[RankCursor, list[BatchEntry]]:
        """The cursor, fed with all windows, and all its entries."""
        cursor = self.cursor(rank, start, **kwargs)
        entries = []
        for window in cursor.windows:
            entries += cursor.add_window(window, self.window_counts(cursor, window))
        return cursor, entries + cursor.finish()

    def window_counts(self, cursor: RankCursor, window: int) -> np.ndarray:
        return np.array(self.counts, np.int64)[cursor.window_objects(window)]

    def reference_line(self) -> list[tuple[int, int, int, int]]:
        return _reference_line(self.sizes, self.counts, self.seed, self.epoch, self.shuffle, self.window_bytes)

    def reference_batches(self, rank=0, delivered=0) -> list[list[tuple[int, int, int, int]]]:
        rest, _ = reference.with_tail(self.reference_line(), delivered, self.world_size, self.tail)
        return reference.rank_batches(rest, rank, self.world_size, self.batch_size, self.drop_last)


# What follows from a data set and not from who reads it is made once for all ranks and positions; nothing changes it.


@lru_cache(maxsize=16)
def _manifest(sizes: tuple[int, ...], etag: str) -> Manifest:
    urls = (f"s3://bucket/{i:03}.tar" for i in range(len(sizes)))
    return Manifest(types.ObjectInfo(url, size, etag) for url, size in zip(urls, sizes, strict=True))


@lru_cache(maxsize=16)
def _order(sizes: tuple[int, ...], etag: str, options: OrderOptions, epoch: int) -> EpochOrder:
    return epoch_order(_manifest(sizes, etag), options, epoch)


@lru_cache(maxsize=16)
def _reference_line(
    sizes: tuple[int, ...], counts: tuple[int, ...], seed: int, epoch: int, shuffle: str, window_bytes: int
) -> list[tuple[int, int, int, int]]:
    return reference.line(reference.windows(sizes, seed, epoch, shuffle, window_bytes), counts, seed, epoch, shuffle)


def samples(entries: list[BatchEntry]) -> list[list[tuple[int, int]]]:
    """Batches as lists of (object, sample)."""
    return [list(zip(e.object_no.tolist(), e.sample_no.tolist(), strict=True)) for e in entries]


def bare(batches: list[list[tuple[int, int, int, int]]]) -> list[list[tuple[int, int]]]:
    """The reference's batches in the form of `samples`."""
    return [[sample[2:] for sample in batch] for batch in batches]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Odd shapes: empty shards, no samples at all, more ranks than samples, empty last windows, one huge
    shard.
    """
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 20, 60]), min_size=1, max_size=9))
    sizes = draw(st.lists(st.sampled_from([0, 1, 30, 50, 1000]), min_size=len(counts), max_size=len(counts)))
    return World(
        sizes=tuple(sizes),
        counts=tuple(counts),
        shuffle=draw(st.sampled_from(["window", "window", "shards", "none"])),
        window_bytes=draw(st.sampled_from([1, 60, 100, 10_000])),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
        world_size=draw(st.integers(1, 9)),
        batch_size=draw(st.integers(1, 8)),
        tail=draw(st.sampled_from(["pad", "drop", "uneven"])),
        drop_last=draw(st.booleans()),
    )
