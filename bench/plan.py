"""What planning costs: `python -m bench.plan [--quick] [--quality] [--json FILE]`.

Nothing is read: data sets are made of sizes and sample counts alone. Prints a table for each question with the target
beside each heading, and writes the same as JSON. Ends with status 1 where a target is missed. `--quality` shows instead
how well each way to shuffle does (docs/shuffling.md).
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import tables
from bench.quality import (
    DISTANCE_MOVED_PERFECT,
    class_imbalance,
    distance_moved,
    epoch_line,
    same_shard_neighbours,
    same_shard_neighbours_perfect,
    stored_positions,
)
from bench.tables import Column, Question, Table
from fastload.bench.measure import median
from fastload.plan import (
    BatchEntry,
    Cursor,
    Manifest,
    OrderOptions,
    Position,
    Ranks,
    Shuffle,
    epoch_cursor,
    epoch_orders,
)
from fastload.store.types import ObjectInfo

SHARD_BYTES = 64 << 20  # so that a default window holds eight
MB = 1e6


@dataclass(frozen=True, slots=True)
class Data:
    """Shards of one data set, whose sizes differ by up to a quarter, and their samples a byte by up to a tenth."""

    shards: int
    samples_a_shard: int

    def manifest(self) -> Manifest:
        """The list of shards; what else it knows by the time an epoch begins is made here too."""
        sizes = (SHARD_BYTES * self._random(0).uniform(0.75, 1.25, self.shards)).astype(np.int64).tolist()
        manifest = Manifest(ObjectInfo(f"s3://bucket/{i:07}.tar", size, "etag") for i, size in enumerate(sizes))
        assert manifest.fingerprint
        assert len(manifest.sizes) == self.shards
        return manifest

    def counts(self, manifest: Manifest) -> NDArray[np.int64]:
        """How many samples each shard holds."""
        share = manifest.sizes / SHARD_BYTES * self._random(1).uniform(0.9, 1.1, self.shards)
        return np.maximum(1, (share * self.samples_a_shard).astype(np.int64))

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.shards, stream])


def walk(cursor: Cursor[BatchEntry], counts: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int32], list[BatchEntry]]]:
    """All of an epoch, step by step: the objects of a window that is opened, if one is, and the batches that came."""
    none = np.empty(0, np.int32)
    while True:
        if entries := cursor.settled():
            yield none, entries
        elif (key := cursor.next_window) is not None:
            objects = cursor.objects_of(key)
            yield objects, cursor.add(key, counts[objects])
        elif wanted := cursor.counts_wanted:
            yield none, cursor.add_counts(0, wanted[0], counts[wanted[0]])
        else:
            yield none, cursor.finish()
            return


def cost(quick: bool) -> Table:
    """Planning an epoch."""
    batch_sizes = (32, 256, 4096)
    table = Table(
        "planning, CPU µs a sample of the rank, shards of 1000 samples",
        "order",
        [Column(f"batches of {size}", 0.2) for size in batch_sizes],
    )
    data = Data(1024 if quick else 4096, 1000)
    manifest = data.manifest()
    counts = data.counts(manifest)
    for shuffle, partitions, nodes, ranks_a_node in COST_CASES:
        options, ranks = (
            OrderOptions(0, shuffle, partitions=partitions),
            Ranks(0, nodes * ranks_a_node, 0, ranks_a_node),
        )
        rounds = [[_cost_us(manifest, counts, options, ranks, size) for size in batch_sizes] for _ in range(2)]
        values = [min(found) for found in zip(*rounds, strict=True)]  # the round that was disturbed least
        what = f"{shuffle}, {_counted(partitions, 'partition')}, {_counted(nodes, 'node')}"
        if ranks_a_node > 1:
            what += f" of {ranks_a_node} ranks"
        # Where nodes do not divide partitions each batch is cut among them, which costs more in small ones.
        table.add(what, *values, judged=partitions % nodes == 0)
    return table


def _cost_us(
    manifest: Manifest, counts: NDArray[np.int64], options: OrderOptions, ranks: Ranks, batch_size: int
) -> float:
    cursor = epoch_cursor(epoch_orders(manifest, options, 0), ranks, batch_size)
    cursor.add_counts(0, np.arange(len(counts), dtype=np.int32), counts)
    began = time.process_time()
    planned = sum(len(entry) for _, entries in walk(cursor, counts) for entry in entries)
    return (time.process_time() - began) * 1e6 / planned


COST_CASES: tuple[tuple[Shuffle, int, int, int], ...] = (
    ("window", 1, 1, 1),
    ("window", 1, 1, 8),
    ("window", 8, 8, 1),
    ("window", 64, 8, 1),
    ("window", 64, 1, 1),
    ("window", 64, 7, 1),
    ("shards", 1, 1, 1),
    ("global", 1, 1, 1),
    ("global", 64, 8, 1),
)


def start(quick: bool) -> Table:
    """Starting an epoch: the orders of all partitions, a cursor, and the first window open."""
    table = Table(
        "starting an epoch, each in a process of its own",
        "order",
        [Column("s", 0.5), Column("peak memory, MB", 50), Column("kept, MB")],
    )
    shuffles: tuple[Shuffle, ...] = ("window", "global")
    cases = [
        (shuffle, shards, samples, partitions)
        for shuffle in shuffles
        for shards in (10, 10_000, 1_000_000)
        for samples in (10**6, 10**8, 10**9)
        for partitions in ((1, 64) if shards == 1_000_000 and samples == 10**9 else (1,))
    ]
    for shuffle, shards, samples, partitions in cases[1::4] if quick else cases:
        # Its memory is its own, not what ran before.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(start_cost, shuffle, shards, samples, partitions).result()
        table.add(f"{shuffle}, {samples:,} samples, {shards:,} shards, {_counted(partitions, 'partition')}", *found)
    return table


def start_cost(shuffle: Shuffle, shards: int, samples: int, partitions: int) -> tuple[float, float, float]:
    """Seconds, and megabytes at the peak and in the end, of starting an epoch in this process."""
    _start(Data(2, 2).manifest(), np.full(2, 2), OrderOptions(0, shuffle, partitions=2))  # compiles
    manifest, counts = Data(shards, samples // shards).manifest(), np.full(shards, samples // shards)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before, began = _memory("VmRSS"), time.perf_counter()
    kept = _start(manifest, counts, OrderOptions(0, shuffle, partitions=partitions))
    took, peak = time.perf_counter() - began, _memory("VmHWM") - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    after = _memory("VmRSS") - before
    del kept
    return took, peak / MB, after / MB


def _start(manifest: Manifest, counts: NDArray[np.int64], options: OrderOptions) -> tuple[object, ...]:
    nodes = options.partitions
    orders = epoch_orders(manifest, options, 0)
    cursor = epoch_cursor(orders, Ranks(0, nodes, 0, 1), 256)
    key = cursor.next_window
    assert key is not None
    return cursor, cursor.add(key, counts[cursor.objects_of(key)])


def _memory(name: str) -> int:
    """Bytes from a line of this process's status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def state(quick: bool) -> Table:
    """What a position is, as JSON."""
    table = Table("a saved position in the middle of an epoch", "order", [Column("bytes", 4000)])
    data = Data(10_000 if quick else 1_000_000, 1000)
    manifest = data.manifest()
    counts = data.counts(manifest)
    for options in (OrderOptions(), OrderOptions(partitions=64), OrderOptions(0, "global", partitions=64)):
        size = len(json.dumps(_position(manifest, counts, options, 0.5).to_state()))
        what = f"{options.shuffle}, {_counted(options.partitions, 'partition')}"
        table.add(f"{what}, {counts.sum():,} samples, {data.shards:,} shards", size)
    return table


def resume(quick: bool) -> Table:
    """Going on from a state, against beginning an epoch, both from the listed shards to the first batches."""
    shares = (0.01, 0.5, 0.99)
    table = Table(
        "from listed shards to the first batch, from a state, as a multiple of a fresh start",
        "order",
        [Column("fresh start, ms"), *(Column(f"after {share:.0%}", 1.2) for share in shares)],
    )
    data = Data(1000 if quick else 10_000, 1000)
    manifest = data.manifest()
    counts = data.counts(manifest)
    for options in (OrderOptions(), OrderOptions(partitions=8), OrderOptions(0, "global")):
        states = [_position(manifest, counts, options, share).to_state() for share in shares]
        rounds = [
            [_first_batch_s(list(manifest.objects), counts, options, saved) for saved in (None, *states)]
            for _ in range(5 if quick else 15)
        ]
        fresh, *resumed = (median(times) for times in zip(*rounds, strict=True))
        what = f"{options.shuffle}, {_counted(options.partitions, 'partition')}, as many nodes"
        table.add(what, fresh * 1e3, *(time_s / fresh for time_s in resumed))
    return table


def _first_batch_s(
    listed: Sequence[ObjectInfo], counts: NDArray[np.int64], options: OrderOptions, saved: dict[str, object] | None
) -> float:
    began = time.process_time()
    position = None if saved is None else Position.from_state(saved)
    cursor = epoch_cursor(epoch_orders(Manifest(listed), options, 0), _ranks(options), 256, start=position)
    next(entries for _, entries in walk(cursor, counts) if entries)
    return time.process_time() - began


def _position(manifest: Manifest, counts: NDArray[np.int64], options: OrderOptions, share: float) -> Position:
    """The position after a share of the epoch, from a run that knows all counts."""
    cursor = epoch_cursor(epoch_orders(manifest, options, 0), _ranks(options), 256)
    cursor.add_counts(0, np.arange(len(counts), dtype=np.int32), counts)
    global_batch = 256 * options.partitions
    return cursor.position_at(int(counts.sum() * share) // global_batch * global_batch)


def _ranks(options: OrderOptions) -> Ranks:
    """The first of as many nodes as partitions."""
    return Ranks(0, options.partitions, 0, 1)


def nodes(quick: bool) -> Table:
    """Four nodes, each with a cache that holds a quarter of the data and keeps what came first."""
    table = Table(
        "four nodes, caches of a quarter of the data each: bytes from the store, as a share of the data",
        "order",
        [Column("first epoch"), Column("second epoch", 0.02)],
    )
    for shards in (1024, 4096) if quick else (1024, 8192):
        data = Data(shards, 1000)
        manifest = data.manifest()
        counts, size = data.counts(manifest), f"{manifest.sizes.sum() / 1e9:,.0f} GB"
        for partitions in (4, 64, 1):
            shares = remote_shares(manifest, counts, OrderOptions(partitions=partitions), nodes=4)
            # With many partitions more of them end before others, and then some windows of others are read too; with
            # one, every node reads everything.
            table.add(f"window, {size}, {_counted(partitions, 'partition')}", *shares, judged=partitions == 4)
    return table


def remote_shares(
    manifest: Manifest, counts: NDArray[np.int64], options: OrderOptions, nodes: int
) -> tuple[float, float]:
    """Bytes that all nodes fetch in the first and the second epoch, as shares of the data.

    Each opens what its cursor says, and its cache admits whole objects as they come until it holds a share of the data
    of its own size; nothing is ever dropped for another.
    """
    fetched = np.zeros(2, np.int64)
    for node in range(nodes):
        room, is_cached = int(manifest.sizes.sum()) // nodes, np.zeros(len(manifest), np.bool_)
        for epoch in range(2):
            cursor = epoch_cursor(epoch_orders(manifest, options, epoch), Ranks(node, nodes, 0, 1), 256)
            cursor.add_counts(0, np.arange(len(counts), dtype=np.int32), counts)
            for objects, _ in walk(cursor, counts):
                missing = objects[~is_cached[objects]]
                fetched[epoch] += manifest.sizes[missing].sum()
                admitted = missing[np.cumsum(manifest.sizes[missing]) <= room]
                is_cached[admitted] = True
                room -= int(manifest.sizes[admitted].sum())
    first, second = (fetched / manifest.sizes.sum()).tolist()
    return first, second


def quality(quick: bool) -> Table:
    """How well orders are shuffled: a thousand classes, one after the other, in 1024 shards of 110 MB."""
    shards, classes, batch_size = 256 if quick else 1024, 1000, 256
    manifest = Manifest(ObjectInfo(f"s3://bucket/{i:04}.tar", 110_000_000, "etag") for i in range(shards))
    counts = np.full(shards, 1000)
    table = Table(
        f"{shards * 1000:,} samples sorted by class, {classes} classes, shards of 110 MB, batches of {batch_size}",
        "shuffle",
        [
            Column("distance moved"),
            Column("same-shard neighbours"),
            Column("class imbalance"),
            Column("as even as a perfect batch of"),
        ],
    )
    for shuffle, window_mib, partitions in QUALITY_CASES:
        line = epoch_line(epoch_orders(manifest, OrderOptions(0, shuffle, window_mib << 20, partitions), 0), counts)
        imbalance = class_imbalance(stored_positions(line, counts) * classes // int(counts.sum()), batch_size)
        what = shuffle + (f" of {window_mib} MiB" if shuffle == "window" else "")
        table.add(
            f"{what}, {_counted(partitions, 'partition')}",
            distance_moved(line, counts),
            same_shard_neighbours(line),
            imbalance,
            batch_size / imbalance,
        )
    table.add("perfect", DISTANCE_MOVED_PERFECT, same_shard_neighbours_perfect(counts), 1, batch_size)
    return table


QUALITY_CASES: tuple[tuple[Shuffle, int, int], ...] = (
    ("none", 512, 1),
    ("shards", 512, 1),
    ("window", 512, 1),
    ("window", 2048, 1),
    ("window", 8192, 1),
    ("shards", 512, 64),
    ("window", 512, 8),
    ("window", 512, 64),
    ("window", 2048, 64),
    ("global", 512, 1),
    ("global", 512, 8),
)

QUESTIONS: tuple[Question, ...] = (cost, start, state, resume, nodes)


def main() -> int:
    """Measure what the arguments ask for."""
    parser = tables.parser("plan", __doc__)
    parser.add_argument("--quality", action="store_true", help="how well orders are shuffled, and nothing else")
    arguments = parser.parse_args()
    questions = (quality,) if arguments.quality else QUESTIONS
    return tables.answer(questions, quick=arguments.quick, json_file=arguments.json)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


if __name__ == "__main__":
    sys.exit(main())
