"""What a cache keeps, and what deciding costs: `python -m bench.policy [--quick] [--json FILE]`.

The first table is the service's core itself, over a store in memory and a disk tier on disk, with the real plans of
windowed epochs. The others are the pure policies over real plans: nothing is read. Targets stand beside headings; ends
with status 1 where one is missed.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import tables
from bench.plan import walk
from bench.tables import Column, Question, Table
from fastload import protocol
from fastload.cache import CacheDirectory, DiskTier
from fastload.cache.policy import PolicyName
from fastload.cache.policy.known_order import FAR, NextUses, lookahead
from fastload.cache.policy.pin import Arc, places
from fastload.cache.policy.unknown_order import least
from fastload.plan import Manifest, OrderOptions, Ranks, epoch_cursor, epoch_order, epoch_orders
from fastload.service.core import Core
from fastload.store.types import ObjectInfo

Int64 = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

SHARES = (0.10, 0.25, 0.50, 0.75)
CHUNKS_A_SHARD = 8
CHUNK_BYTES = 64 << 10  # in the core's table: the decisions do not depend on it


def epochs(quick: bool) -> Table:
    """Windowed epochs through the service's core, the disk tier holding a share of the data."""
    table = Table(
        "windowed shuffle, disk tier of a share of the data, after the first epoch",
        "cache, policy",
        [
            Column("hit, %"),
            Column("points below the share", 1),
            Column("remote bytes / data, worst epoch", 1),
            Column("disk writes / data, an epoch"),
            Column("disk writes / data, first epoch"),
        ],
    )
    shards, epoch_count = (64, 3) if quick else (192, 5)
    for share in SHARES:
        for policy in ("pin", "lru", "sieve"):
            with tempfile.TemporaryDirectory() as folder:
                world = _World(Path(folder), shards, share)
                fetched, written = asyncio.run(world.run(policy, epoch_count))
            later = fetched[1:]
            hit = 100 * (1 - later.mean())
            row = hit, max(0.0, 100 * share - hit), float(fetched.max()), float(written[1:].mean()), float(written[0])
            table.add(f"{share:.0%}, {policy}", *row, judged=policy == "pin")
    return table


class _Store:
    """Objects that hold zeros."""

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Nothing to do: it is not read."""

    def close(self) -> None:
        """Nothing to let go of."""


class _World:
    """A core with a consumer that reads windows, the next one being asked for while it reads one."""

    def __init__(self, folder: Path, shards: int, share: float) -> None:
        self._infos = [
            ObjectInfo(f"s3://bucket/{number:05}.tar", CHUNKS_A_SHARD * CHUNK_BYTES, "etag") for number in range(shards)
        ]
        self._manifest = Manifest(self._infos)
        self._options = OrderOptions(window_bytes=4 * CHUNKS_A_SHARD * CHUNK_BYTES)
        self._data_bytes = int(self._manifest.sizes.sum())
        quota = int(share * shards * CHUNKS_A_SHARD * DiskTier.file_bytes(CHUNK_BYTES))
        # Room for two windows and what is fetched ahead, and no more: what counts here is the disk tier.
        arena_bytes = (2 * 4 * CHUNKS_A_SHARD + 32) * CHUNK_BYTES
        self._directory = CacheDirectory.open(
            folder / "cache", ram_bytes=arena_bytes, disk_bytes=quota, chunk_bytes=CHUNK_BYTES
        )
        self._granted: set[int] = set()
        self._news = asyncio.Event()
        self._serial = 0

    async def run(self, policy: PolicyName, epoch_count: int) -> tuple[Shares, Shares]:
        """Bytes fetched and written in each epoch, as shares of the data."""
        core = Core(self._directory, asyncio.get_running_loop(), factory=lambda url, options: _Store())  # type: ignore[arg-type,return-value]
        self._say, counted = self._connect(core), []
        self._say(protocol.Keep(list(range(len(self._infos))), policy))
        try:
            for epoch in range(epoch_count):
                await self._read(core, epoch)
                counters = {**core._residency.counters, **core._writer.counters}
                counted.append((counters["fetched_bytes"], counters["written_bytes"]))
        finally:
            core.close(10)
        totals = np.diff(np.array([(0, 0), *counted]), axis=0) / self._data_bytes
        return totals[:, 0], totals[:, 1]

    def _connect(self, core: Core) -> Callable[[protocol.FromConsumer], None]:
        consumer = core.connect(protocol.Hello(protocol.VERSION, 1, "bench", {}), self._take)
        core.receive(consumer, protocol.Attach(True, True, protocol.ObjectRows.of(self._infos)))
        return lambda message: core.receive(consumer, message)

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Grants):
            self._granted.update(message.chunks)
        elif isinstance(message, protocol.Recall):
            self._say(protocol.Pinned(message.chunks))
        self._news.set()

    async def _read(self, core: Core, epoch: int) -> None:
        order = epoch_order(self._manifest, self._options, epoch)
        self._say(protocol.SetPlan(order.object_order.tolist(), epoch, False, 0))
        windows = [_chunks(order.window_objects(number)) for number in range(order.window_count)]
        position = 0
        self._want(windows[0])
        for number, window in enumerate(windows):
            if number + 1 < len(windows):
                self._want(windows[number + 1])
            while not self._granted.issuperset(window):
                self._news.clear()
                await asyncio.wait_for(self._news.wait(), 30)
            while core._writer._queue or core._writer._running:  # a store in memory leaves the disk no time
                await asyncio.sleep(0.0005)
            position += len(window)
            self._granted.difference_update(window)
            self._say(protocol.Advance(position))
            self._say(protocol.Release(window))

    def _want(self, chunks: list[int]) -> None:
        self._serial += 1
        self._say(protocol.Want(chunks, self._serial, False))


def _chunks(objects: npt.NDArray[np.int32]) -> list[int]:
    numbers = objects[:, None].astype(np.int64) * CHUNKS_A_SHARD + np.arange(CHUNKS_A_SHARD)
    return [int(number) for number in numbers.ravel()]


def evenness(quick: bool) -> Table:
    """How even misses are over windowed epochs, where each shard is cached in part, and where shards are whole."""
    table = Table(
        "misses over an epoch, shards of 8 chunks, worst of some epochs",
        "cache, what is pinned",
        [Column("worst tenth / its part", 1.15), Column("most chunks in a row")],
    )
    shards, epoch_count = (512, 4) if quick else (2048, 10)
    manifest = Manifest(ObjectInfo(f"s3://bucket/{number:05}.tar", 64 << 20, "etag") for number in range(shards))
    at = np.stack(
        [places(hashlib.blake2b(f"{number}".encode(), digest_size=16).digest(), 8) for number in range(shards)]
    )
    first = epoch_order(manifest, OrderOptions(), 0).object_order
    for share in SHARES:
        came_first = np.zeros((shards, 8), bool)
        came_first[first[: int(share * shards)]] = True
        rows: dict[str, Callable[[int], npt.NDArray[np.bool_]]] = {
            "a part of each shard": lambda epoch, share=share: (at - Arc.of_epoch(epoch, share).start) % 1 < share,  # type: ignore[misc]
            "shards that came first": lambda epoch, held=came_first: held,  # type: ignore[misc]
        }
        for name, held in rows.items():
            found = [
                _unevenness(~held(epoch)[epoch_order(manifest, OrderOptions(), epoch).object_order].ravel())
                for epoch in range(1, epoch_count + 1)
            ]
            table.add(f"{share:.0%}, {name}", *map(max, zip(*found, strict=True)), judged=name.startswith("a part"))
    return table


def _unevenness(missed: npt.NDArray[np.bool_]) -> tuple[float, float]:
    worst = max(part.mean() for part in np.array_split(missed, 10)) / missed.mean()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missed.astype(np.int8), [0]])))
    return float(worst), float((edges[1::2] - edges[::2]).max())


Units = npt.NDArray[np.int64]
_TOLD_AT_FIRST = 1 << 16  # samples that are planned in one go
_ENTRY_BYTES = 12  # of a sample that is announced, in the loader: its object and number


def trace(shards: int, samples_a_chunk: int, batch_size: int, epoch: int) -> Iterator[Units]:
    """The chunks of each batch of an epoch with `shuffle="global"`, each chunk once a batch."""
    manifest = Manifest(ObjectInfo(f"s3://bucket/{number:06}.tar", 64 << 20, "etag") for number in range(shards))
    counts = np.full(shards, CHUNKS_A_SHARD * samples_a_chunk)
    cursor = epoch_cursor(epoch_orders(manifest, OrderOptions(0, "global"), epoch), Ranks(), batch_size)
    cursor.add_counts(0, np.arange(shards, dtype=np.int32), counts)
    for _, entries in walk(cursor, counts):
        for entry in entries:
            yield np.unique(entry.object_no.astype(np.int64) * CHUNKS_A_SHARD + entry.sample_no // samples_a_chunk)


class _Arena:
    """Which units are held, `capacity` of them at most; what is farthest goes, but nothing of the batch."""

    def __init__(self, unit_count: int, capacity: int) -> None:
        self._slot_of = np.full(unit_count, -1, np.int64)
        self._unit_in = np.full(capacity, -1, np.int64)
        self._used = 0

    def read(self, units: Units, next_use: Callable[[Int64], Int64]) -> int:
        """Have a batch's units; how many were there."""
        missing = units[self._slot_of[units] < 0]
        hits = len(units) - len(missing)
        fresh = min(len(missing), len(self._unit_in) - self._used)
        slots = np.arange(self._used, self._used + fresh)
        self._used += fresh
        if fresh < len(missing):
            far = next_use(self._unit_in[: self._used - fresh])
            far[self._slot_of[units[self._slot_of[units] >= 0]]] = -1
            count = len(missing) - fresh
            victims = least(-far, count)
            self._slot_of[self._unit_in[victims]] = -1
            slots = np.concatenate([slots, victims])
        self._slot_of[missing], self._unit_in[slots] = slots, missing
        return hits


def offline_hits(batches: list[Units], unit_count: int, capacity: int, counted_from: int) -> float:
    """Belady with all of the order in hand, back to front: the hit share of the batches from one on."""
    units = np.concatenate(batches)
    number = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    after, seen = np.empty(len(units), np.int64), np.full(unit_count, FAR, np.int64)
    for start in range(len(batches) - 1, -1, -1):
        low, high = np.searchsorted(number, [start, start + 1])
        after[low:high] = seen[units[low:high]]
        seen[units[low:high]] = start
    arena, hits, reads, at = _Arena(unit_count, capacity), 0, 0, 0
    for number_of, batch in enumerate(batches):
        found = arena.read(batch, lambda held: seen[held])
        seen[batch] = after[at : at + len(batch)]
        at += len(batch)
        if number_of >= counted_from:
            hits, reads = hits + found, reads + len(batch)
    return hits / reads


def foreseen_hits(epochs_read: Sequence[Iterable[Units]], unit_count: int, capacity: int) -> float:
    """The same of the last epoch, by what loader and service do: uses are announced `lookahead` of them ahead, fewer
    where
    an epoch begins, and of the next epoch nothing.
    """
    arena, hits, reads = _Arena(unit_count, capacity), 0, 0
    for batches in epochs_read:
        uses, waiting, hits, reads = NextUses(unit_count), deque[Units](), 0, 0
        for batch in chain(batches, [None]):
            if batch is not None:
                uses.add(uses.end, batch.astype(np.int32))
                waiting.append(batch)
            ahead = 0 if batch is None else min(lookahead(unit_count), max(_TOLD_AT_FIRST, 2 * uses.cursor))
            while waiting and uses.end - uses.cursor > ahead:
                read = waiting.popleft()
                hits, reads = hits + arena.read(read, uses.of), reads + len(read)
                uses.advance(uses.cursor + len(read))
    return hits / max(1, reads)


def future(quick: bool) -> Table:
    """Global shuffle over data that the disk tier holds: hits of an arena in the second epoch."""
    table = Table(
        "global shuffle, arena of a share of the data, second epoch",
        "arena",
        [Column("hit, %"), Column("offline Belady, %"), Column("points below it", 3)],
    )
    shards, samples, batch_size = (50, 20, 8) if quick else (250, 100, 32)
    both = [list(trace(shards, samples, batch_size, epoch)) for epoch in range(2)]
    units = shards * CHUNKS_A_SHARD
    for share in SHARES:
        capacity = int(share * units)
        best = 100 * offline_hits([*both[0], *both[1]], units, capacity, len(both[0]))
        hit = 100 * foreseen_hits(both, units, capacity)
        table.add(f"{share:.0%} of {units:,} chunks, {samples} samples a chunk", hit, best, max(0.0, best - hit))
    return table


def cost(quick: bool) -> Table:
    """What foreseeing and choosing cost."""
    shards, samples = (1250, 100) if quick else (12_500, 100)
    units = shards * CHUNKS_A_SHARD
    table = Table(
        f"known future: {units * samples:,} samples, {units:,} chunks, batches of 256",
        "arena",
        [Column("CPU µs a sample", 2), Column("MB, with what is announced", 60)],
    )
    for share in (0.04, 0.25):
        capacity = int(share * units)
        batches = list(trace(shards, samples, 256, 0))
        began = time.process_time()
        foreseen_hits([batches], units, capacity)
        took = (time.process_time() - began) * 1e6 / (units * samples)
        part = batches[: 4 * lookahead(units) // 256]
        del batches
        tracemalloc.start()
        foreseen_hits([(batch.copy() for batch in part)], units, capacity)
        peak = tracemalloc.get_traced_memory()[1] + _ENTRY_BYTES * lookahead(units)
        tracemalloc.stop()
        table.add(f"{share:.0%}", took, peak / 1e6)
    return table


QUESTIONS: tuple[Question, ...] = (epochs, evenness, future, cost)


def main() -> int:
    """Measure what the arguments ask for."""
    arguments = tables.parser("policy", __doc__).parse_args()
    return tables.answer(QUESTIONS, quick=arguments.quick, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
