"""What history costs those who have no use for it: time of the service's thread, memory, disk, and chunks in vain.

`python -m bench.history --costs` shows it. Reads go through the service's core, in the thread of its loop, where all is
held in RAM: what a read costs more with history than without is history's. How often a reader with an order of
his own is taken for an earlier reader is asked of the follower alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench.targets import Figure
from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.history import archive as archives
from fastload.history.archive import Archive
from fastload.history.follow import Follower
from fastload.history.keys import chunk_key, object_key
from fastload.history.library import Library
from fastload.history.record import Recorder
from fastload.service.core import Core
from fastload.store.types import ObjectInfo

CHUNK_BYTES = 64 << 10
READS, OBJECTS = 1 << 21, 400_000  # of a library as large as it gets, and its objects
READERS, BATCH = 4, 16  # that take turns
CORE_READS = 4000
EARLIER = 8  # epochs of other orders that are remembered


def info(number: int, chunks: int = 1) -> ObjectInfo:
    """An object as stores name them."""
    etag = hashlib.md5(b"%d" % number, usedforsecurity=False).hexdigest()
    return ObjectInfo(f"s3://bucket/train/{number:08d}.jpg", chunks * CHUNK_BYTES, f'"{etag}"', -1)


def shuffled(count: int, seed: int) -> list[int]:
    """An order."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def figures(rounds: int) -> list[Figure]:
    """All of them."""
    return [*vain_figures(rounds), *read_figures(rounds), *library_figures()]


# Chunks in vain


def vain_figures(rounds: int) -> list[Figure]:
    """How much is predicted wrongly of an order that is drawn anew each time."""
    return [
        Figure(
            f"predicted in vain, {objects} objects of {chunks} chunks",
            "% of the reads",
            [
                100 * statistics.mean(vain_share(objects, chunks, seed) for seed in range(4 * number, 4 * number + 4))
                for number in range(rounds)
            ],
        )
        for objects, chunks in ((200, 1), (200, 8), (1000, 1), (1000, 8))
    ]


def vain_share(object_count: int, chunks: int, seed: int) -> float:
    """Of an epoch after some others, all of them in orders of their own: the chunks that are predicted and do not come
    soon, as a share of the reads.
    """
    orders = [shuffled(object_count, (EARLIER + 1) * seed + epoch) for epoch in range(EARLIER + 1)]
    earlier = [[(number, index) for number in order for index in range(chunks)] for order in orders[1:]]
    reads = [(number, index) for number in orders[0] for index in range(chunks)]
    follower = Follower(library(earlier, chunks))
    keys = [chunk_key(object_key(info(number).url), index) for number, index in reads]
    vain: set[int] = set()
    for at, (number, index) in enumerate(reads):
        follower.saw(object_key(info(number).url), index)
        if follower.place is not None:
            ahead = follower.library.keys[follower.library.after(follower.place, follower.ahead_max)]
            vain |= {int(key) for key in ahead} - {*keys[at : at + 2 * follower.ahead_max + chunks]}
    return len(vain) / len(reads)


def library(traces: Sequence[Sequence[tuple[int, int]]], chunks: int) -> Library:
    """Of one run, each of whose readers read these (object number, chunk), one reader after the other."""
    with remembered(
        ((trace, *each) for trace, reads in enumerate(traces) for each in reads), len(traces), chunks
    ) as kept:
        return Library(archives.read_all(kept, READS), CHUNK_BYTES)


@contextmanager
def remembered(reads: Iterable[tuple[int, int, int]], trace_count: int, chunks: int) -> Iterator[Archive]:
    """A run of these (reader, object number, chunk), a millisecond apart, on disk."""
    recorder = Recorder("train.py", 1.8e9, CHUNK_BYTES)
    for _ in range(trace_count):
        recorder.begin_trace("reader")
    seconds = 0.0
    for trace, number, index in reads:
        what = info(number, chunks)
        seconds += 0.001
        recorder.read(trace, object_key(what.url), what, index, seconds)
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Path(folder))
        archive.append(archive.new_name(1.8e9), recorder.take(seconds, {}).pieces())
        yield archive


# Memory, disk, and reading it


def library_figures(reads: int = READS, objects: int = OBJECTS) -> list[Figure]:
    """Of as many reads as are kept in reach; what objects take is what it takes more with more of them."""
    few, many = (_of_library(reads, count) for count in (objects // 10, objects))
    more = many.objects - few.objects
    file_object = (many.file_bytes - few.file_bytes) / more
    memory_object = (many.memory_bytes - few.memory_bytes) / more
    return [
        Figure("file of a run", "bytes a read", [(few.file_bytes - few.objects * file_object) / few.reads]),
        Figure("file of a run", "bytes an object", [file_object]),
        Figure("memory", "bytes a read in reach", [(few.memory_bytes - few.objects * memory_object) / few.reads]),
        Figure("memory", "bytes an object of these", [memory_object]),
        Figure(f"reading {many.reads:,} reads of {many.objects:,} objects", "s", [many.took_s]),
    ]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is in reach, and what that takes."""

    reads: int
    objects: int
    file_bytes: int
    memory_bytes: int
    took_s: float


def _of_library(reads: int, objects: int) -> _Kept:
    """Epochs in orders of their own, by readers that take turns, until there are so many reads. A few of these are not
    news: what one epoch ends with may be what the next begins with.
    """
    orders = (number for epoch in range(-(-reads // objects)) for number in shuffled(objects, epoch))
    told = ((at // BATCH % READERS, number, 0) for at, number in enumerate(islice(orders, reads)))
    with remembered(told, READERS, 1) as archive:
        (run,) = archive.runs()
        began = time.thread_time()
        Library(archives.read_all(archive, reads), CHUNK_BYTES)
        took_s = time.thread_time() - began
        tracemalloc.start()
        kept = Library(archives.read_all(archive, reads), CHUNK_BYTES)
        memory_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return _Kept(len(kept), objects, run.size, memory_bytes, took_s)


# Time of the service's thread


def read_figures(rounds: int) -> list[Figure]:
    """What a read costs more with history than without, by the rounds that were disturbed least."""
    found = asyncio.run(_read_costs(rounds))
    return [
        Figure(f"a read, {what}", "µs of the service's thread more", [min(having) - min(without)])
        for what, (without, having) in found.items()
    ]


async def _read_costs(rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Microseconds a read without history and with it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(_Reading(Path(folder) / "off", 0)) as without,
        closing(_Reading(Path(folder) / "on", 64 << 20)) as having,
    ):
        order = shuffled(CORE_READS, 0)
        for each in (without, having):  # both hold all of it then, and one of them remembers it
            await each.read_us(order)
        costs: dict[str, tuple[list[float], list[float]]] = {
            "its order known": ([], []),
            "in an unknown order": ([], []),
            "in the order of an earlier run": ([], []),
        }
        for number in range(1, rounds + 1):
            ways = [(list(range(CORE_READS)), True), (shuffled(CORE_READS, number), False), (order, False)]
            for (reads, is_told), found in zip(ways, costs.values(), strict=True):
                for each, took_us in zip((without, having), found, strict=True):
                    took_us.append(await each.read_us(reads, is_told))
        assert having.replayed > 0.9 * rounds * CORE_READS, f"{having.replayed} reads came as predicted"
        return costs


class _Store:
    """Objects that hold zeros."""

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Nothing to do: it is not read."""

    def close(self) -> None:
        """Nothing to let go of."""


class _Reading:
    """A core whose arena holds all objects, and readers that come one after the other, each of a run of its own."""

    def __init__(self, folder: Path, history_bytes: int) -> None:
        self._directory = CacheDirectory.open(
            folder,
            ram_bytes=(CORE_READS + 1024) * CHUNK_BYTES,
            disk_bytes=0,
            chunk_bytes=CHUNK_BYTES,
            history_bytes=history_bytes,
        )
        self._core = Core(
            self._directory,
            asyncio.get_running_loop(),
            factory=lambda url, options: _Store(),  # type: ignore[arg-type,return-value]
        )
        self._rows = protocol.ObjectRows.of([info(number) for number in range(CORE_READS)])
        self._group = 0
        self._granted = asyncio.Event()

    @property
    def replayed(self) -> int:
        """Reads that came as predicted."""
        return int(self._core._replay.counters["replayed_reads"])

    async def read_us(self, order: Sequence[int], is_told: bool = False) -> float:
        """One reader reads all in this order; microseconds a read. `is_told`: it says the order first."""
        core, self._group = self._core, self._group + 1
        hello = protocol.Hello(protocol.VERSION, self._group, "bench", {}, group=self._group, program="bench")
        reader = core.connect(hello, self._take)
        core.receive(reader, protocol.Attach(True, True, self._rows))
        if is_told:
            core.receive(reader, protocol.SetPlan(list(order), 0, False, 0))
        self._serial = 0
        await self._read(reader, order[0])
        await asyncio.sleep(1.0)  # the history is read meanwhile
        began = time.thread_time()
        for number in order[1:]:
            await self._read(reader, number)
        took_s = time.thread_time() - began
        core.disconnect(reader)
        return took_s * 1e6 / (len(order) - 1)

    async def _read(self, reader: object, chunk: int) -> None:
        self._serial += 1
        self._granted.clear()
        self._core.receive(reader, protocol.Want([chunk], self._serial, True))  # type: ignore[arg-type]
        await self._granted.wait()
        self._core.receive(reader, protocol.Release([chunk]))  # type: ignore[arg-type]

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Grants):
            self._granted.set()

    def close(self) -> None:
        """End the core."""
        self._core.close(10)
