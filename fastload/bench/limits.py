"""What store, disk, memory and decoders give by themselves: no loader can be faster.

The store is read by fastload's own stores, without cache, order or samples: first small ranges one after the other, for
the time to the first byte; then ranges of about half a second's worth at 1, 2, 4, ... requests at a time, each for a
second, until more of them bring no more. The bend is the fewest requests that give nearly all. The best level is then
read for longer, since a rate over few ranges is a coarse one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastload.bench import measure
from fastload.bench.schema import Figure, Phase, Series
from fastload.config import format_bytes
from fastload.errors import FastloadError
from fastload.store import Counters, ObjectInfo, RequestOptions, Store, StoreOptions, open_store, store_root

REQUESTS = (1, 2, 4, 8, 16, 32, 64)
RANGE_BYTES_MAX, _RANGE_BYTES_MIN = 8 << 20, 128 << 10
_LEVEL_S, _BEST_S = 1.0, 4.0
_RANGE_S = 0.4  # a range takes about so long at the rate that is expected
_NEARLY_ALL = 0.95
_FIRST_BYTES = 24  # small reads
_SMALL_BYTES = 1024


@dataclass(slots=True)
class Budget:
    """Bytes that may still be read from the store. Thread-safe."""

    left: int
    spent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, byte_count: int) -> bool:
        """Whether so many may be read, which then are."""
        with self._lock:
            if byte_count > self.left:
                return False
            self.left -= byte_count
            self.spent += byte_count
            return True


def store(objects: Sequence[ObjectInfo], options: StoreOptions, budget: Budget, report: Callable[[str], None]) -> Phase:
    """The limit of the store that holds `objects`."""
    began = time.monotonic()
    counters = Counters()
    phase = Phase(name="store", seconds=0.0)
    opened = open_store(objects[0].url, options, RequestOptions(requests_max=REQUESTS[-1], counters=counters))
    here = [each for each in objects if store_root(each.url) == store_root(objects[0].url)]
    ranges = _Ranges(here)
    with contextlib.closing(opened):
        first = _first_bytes(opened, ranges, budget)
        rates, sizes = _levels(opened, ranges, budget, report)
        if not rates:
            phase.error = "too few bytes may be read to say anything: raise --max-bytes"
            phase.seconds = time.monotonic() - began
            return phase
        best = max(rates, key=lambda requests: rates[requests])
        bend = min(requests for requests, rate in rates.items() if rate >= _NEARLY_ALL * rates[best])
        report(f"store: {bend} requests at a time")
        steady = _level(opened, ranges, max(bend, best), rates[best], _BEST_S, budget) or rates[best]
    counted = counters.values()
    phase.figures = [
        Figure(name="goodput", unit="B/s", values=[steady], better="more"),
        Figure(name="first byte, p50", unit="s", values=[statistics.median(first)], better="less"),
        Figure(name="first byte, p99", unit="s", values=[max(first)], better="less"),
        Figure(name="goodput of one request at a time", unit="B/s", values=[rates[1]], better="more"),
        Figure(name="rate of a connection", unit="B/s", values=[_connection(sizes[1], rates[1], first)], better="more"),
        Figure(name="requests at the bend", unit="", values=[float(bend)]),
        Figure(name="bytes a request at the bend", unit="B", values=[sizes[bend]]),
        Figure(name="requests", unit="", values=[float(counted["requests"])]),
        Figure(name="requests tried again", unit="", values=[float(counted["retries"])]),
    ]
    phase.series = [
        Series(
            name="goodput",
            x_unit="requests at a time",
            y_unit="B/s",
            xs=[float(requests) for requests in rates],
            ys=list(rates.values()),
        )
    ]
    if counted["retries"]:
        phase.notes.append(f"the store refused or failed {counted['retries']} requests, which were tried again")
    phase.seconds = time.monotonic() - began
    return phase


class _Ranges:
    """Ranges of the objects, one after the other, from the beginning again at the end. Thread-safe."""

    def __init__(self, objects: Sequence[ObjectInfo]) -> None:
        self._objects = [each for each in objects if each.size]
        self._lock = threading.Lock()
        self.mean_bytes = sum(each.size for each in self._objects) / max(1, len(self._objects))
        self._number = self._start = 0

    def next(self, byte_count: int) -> tuple[ObjectInfo, int, int]:
        """An object, and the start and length of a range of it: no longer than asked."""
        with self._lock:
            info, start = self._objects[self._number], self._start
            length = min(byte_count, info.size - start)
            self._start += length
            if self._start >= info.size:
                self._number, self._start = (self._number + 1) % len(self._objects), 0
            return info, start, length


def _first_bytes(opened: Store, ranges: _Ranges, budget: Budget) -> list[float]:
    took = []
    out = memoryview(bytearray(_SMALL_BYTES))
    for _ in range(_FIRST_BYTES):
        info, start, length = ranges.next(_SMALL_BYTES)
        budget.take(length)
        began = time.monotonic()
        opened.read_into(info, start, out[:length])
        took.append(time.monotonic() - began)
    return took


def _levels(
    opened: Store, ranges: _Ranges, budget: Budget, report: Callable[[str], None]
) -> tuple[dict[int, float], dict[int, float]]:
    """The goodput at each number of requests, up to where more of them bring no more; and the bytes of one of them."""
    rates: dict[int, float] = {}
    sizes: dict[int, float] = {}
    expected = 8e6  # one connection's, before anything is known
    for requests in REQUESTS:
        report(f"store: {requests} requests at a time")
        rate = _level(opened, ranges, requests, expected, _LEVEL_S, budget)
        if rate is None:
            break
        rates[requests] = rate
        sizes[requests] = min(_range_bytes(expected, requests), ranges.mean_bytes)
        before = [other for number, other in rates.items() if number < requests]
        if len(before) > 1 and rate < 1.03 * max(before) and before[-1] < 1.03 * max(before[:-1]):
            break
        expected = rate * 2
    return rates, sizes


def _connection(request_bytes: float, bytes_per_s: float, first_bytes_s: Sequence[float]) -> float:
    """What one gives between the first byte and the last, from requests one after the other."""
    whole_s = request_bytes / bytes_per_s
    return request_bytes / max(0.1 * whole_s, whole_s - statistics.median(first_bytes_s))


def _range_bytes(expected: float, requests: int) -> int:
    return int(min(RANGE_BYTES_MAX, max(_RANGE_BYTES_MIN, expected * _RANGE_S / requests)))


def _level(
    opened: Store, ranges: _Ranges, requests: int, expected: float, seconds: float, budget: Budget
) -> float | None:
    """Bytes a second of so many requests at a time; None where the budget allows none.

    Counted from the first completion of any request to the end of the last that began in time, so that neither the
    start of connections nor a range that was cut off is in it.
    """
    range_bytes = _range_bytes(expected, requests)
    done: list[tuple[float, int]] = []
    began = time.monotonic()

    def read() -> None:
        out = memoryview(mmap.mmap(-1, range_bytes))
        while time.monotonic() - began < seconds:
            info, start, length = ranges.next(range_bytes)
            if not budget.take(length):
                return
            opened.read_into(info, start, out[:length])
            done.append((time.monotonic(), length))

    with ThreadPoolExecutor(requests) as pool:
        for future in [pool.submit(read) for _ in range(requests)]:
            future.result()
    done.sort()
    # The first round of requests shares the link with the opening of connections.
    start = done[min(requests, len(done) // 3)][0] if len(done) > 2 else began
    counted = [(at, length) for at, length in done if at > start]
    if not counted:
        return None if not done else sum(length for _, length in done) / max(1e-6, done[-1][0] - began)
    # The tail, when fewer and fewer are under way, is left out: up to the last moment at which all were.
    end = max(at for at, _ in counted[: max(1, len(counted) - requests + 1)])
    if end - start < (done[-1][0] - began) / 2:  # too little is left to say: a slow link, or one that gives in bursts
        start, end, counted = began, done[-1][0], done
    byte_count = sum(length for at, length in counted if at <= end)
    return byte_count / max(1e-6, end - start)


# The node


_DISK_BYTES = 512 << 20
_BLOCK = 8 << 20


def disk(folder: Path, *, byte_count: int = _DISK_BYTES) -> Phase:
    """How fast the cache's disk is written and read with O_DIRECT, by four threads; the files are removed."""
    began = time.monotonic()
    free = os.statvfs(folder)
    room = free.f_bavail * free.f_frsize
    if room < 2 * byte_count:
        raise FastloadError(
            f"{folder} has {format_bytes(room)} free, and {format_bytes(2 * byte_count)} are needed to measure it; "
            "free some, or name another disk with --cache"
        )
    scratch = folder / f"bench-{os.getpid()}"
    scratch.mkdir()
    threads = 4
    blocks = byte_count // threads // _BLOCK
    direct = True
    try:
        with ThreadPoolExecutor(threads) as pool:
            at = time.monotonic()
            for done in pool.map(lambda number: _write_file(scratch / str(number), blocks), range(threads)):
                direct = direct and done
            wrote_s = time.monotonic() - at
        measure.drop_page_cache([scratch])
        read_rate = measure.disk_bytes_per_s(scratch, threads) if direct else _read_through_cache(scratch, threads)
    finally:
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()
    phase = Phase(
        name="disk",
        seconds=time.monotonic() - began,
        figures=[
            Figure(name="write", unit="B/s", values=[threads * blocks * _BLOCK / wrote_s], better="more"),
            Figure(name="read", unit="B/s", values=[read_rate], better="more"),
        ],
    )
    if not direct:
        phase.notes.append("this file system does no direct I/O: the rates are those of its page cache (warm)")
    return phase


def _write_file(path: Path, blocks: int) -> bool:
    """Whether that could be done with O_DIRECT."""
    block = mmap.mmap(-1, _BLOCK)
    block[:] = os.urandom(1 << 20) * (_BLOCK >> 20)
    try:
        fd, direct = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600), True
        os.pwrite(fd, block, 0)
    except OSError:  # tmpfs and some network file systems
        fd, direct = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), False
    try:
        for number in range(blocks):
            os.pwrite(fd, block, number * _BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)
    return direct


def _read_through_cache(folder: Path, threads: int) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        byte_count = sum(pool.map(lambda path: len(path.read_bytes()), folder.iterdir()))
    return byte_count / (time.monotonic() - began)


def memory() -> Phase:
    """How fast one thread copies memory, which is what a byte costs at least on its way from the arena to a batch."""
    began = time.monotonic()
    source, target = np.ones(64 << 20, np.uint8), np.zeros(64 << 20, np.uint8)
    took = []
    for _ in range(5):
        at = time.monotonic()
        np.copyto(target, source)
        took.append(time.monotonic() - at)
    rate = source.nbytes / statistics.median(took)
    return Phase(
        name="memory",
        seconds=time.monotonic() - began,
        figures=[Figure(name="copy, one thread", unit="B/s", values=[rate], better="more")],
    )


# Decoding


def decode(decoder: Any, column: str, values: Sequence[bytes], threads: int, seconds: float = 2.0) -> Phase:
    """How many of these very values a second decoders make of 1 to `threads` threads, from memory into memory."""
    from fastload.decode.base import sample_keys

    began = time.monotonic()
    joined = np.frombuffer(b"".join(values), np.uint8)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    keys = sample_keys(0, 0, np.zeros(len(values), np.int64), np.arange(len(values)))
    rates: dict[int, float] = {}
    for count in _steps(threads):
        rates[count] = _decode_rate(decoder, joined, offsets, keys, count, seconds)
    return Phase(
        name="decode",
        seconds=time.monotonic() - began,
        figures=[
            Figure(
                name=f"decode {column}, {count} thread{'s' * (count > 1)}",
                unit="samples/s",
                values=[rate],
                better="more",
            )
            for count, rate in rates.items()
        ],
        series=[
            Series(
                name=f"decode {column}",
                x_unit="threads",
                y_unit="samples/s",
                xs=[float(count) for count in rates],
                ys=list(rates.values()),
            )
        ],
    )


def _steps(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _decode_rate(decoder: Any, joined: Any, offsets: Any, keys: Any, threads: int, seconds: float) -> float:
    fixed = decoder.fixed()
    count = len(keys)
    done = [0] * threads
    end = time.monotonic() + seconds

    def where(number: int) -> str:
        return f"sample {number} of those that were measured"

    def work(number: int) -> None:
        out = None if fixed is None else np.empty((count, *fixed[0]), fixed[1])
        while time.monotonic() < end:
            if out is None:
                decoder.decode(joined, offsets, where, keys)
            else:
                decoder.decode_into(joined, offsets, out, where, keys)
            done[number] += count

    work_began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, number) for number in range(threads)]:
            future.result()
    return sum(done) / (time.monotonic() - work_began)
