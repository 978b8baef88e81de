"""What costs how much more where there is more of it: `python -m bench.growth [--quick] [--question NAME]`.

Time, memory and requests of an epoch over 1 to 8 times the data, with 1 to 8 threads, in 1 to 10,000 shards, for 1 to
32 consumers of one cache, and of planning 10^5 to 10^8 samples. The last row of each table has the exponent e of
cost ~ size^e, fitted to the three largest sizes, where what is done once weighs least: 0 is flat, 1 is linear. What is
worse than linear is named at the end, and the status is 1 then. CPU-seconds count rather than seconds, so that
neighbours matter less. Data is made in a temporary folder (1 GB), and read from there as from a store.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import tables
from bench.plan import start_cost
from bench.tables import Column, Question, Table
from fastload.bench import measure, runs
from fastload.bench.workloads import Workload, write_shard

# An exponent that is fitted to three noisy figures: above it, growth is worse than linear.
LINEAR = 1.15
_FITTED = 3
_RAM_BYTES, _DISK_BYTES = 64 << 20, 4 << 30
IMAGES = Workload("images", 20_000, 5_000, 12_800, 64, 0.0, 0.0)
RECORDS = Workload("records", 1_000, 300, 10_000, 64, 0.0, 0.0)
MB = 1e6


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the line through the logarithms of the largest sizes, by least squares. What is below one (of a
    millisecond, a megabyte or a request) is noise and counts as one.
    """
    points = [(math.log(x), math.log(max(y, 1.0))) for x, y in zip(sizes, costs, strict=True)][-_FITTED:]
    middle = [sum(each) / len(points) for each in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    slope: float = above / sum((x - middle[0]) ** 2 for x, _ in points)
    return slope


def grown(title: str, label: str, columns: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]]) -> Table:
    """A table of costs by size, with the exponents as its last row, which alone is judged."""
    table = Table(title, label, [Column(name, LINEAR) for name in columns])
    for size, costs in rows:
        table.add(f"{size:,.0f}", *costs, judged=False)
    sizes = [size for size, _ in rows]
    table.add("exponent", *(exponent(sizes, costs) for costs in zip(*(costs for _, costs in rows), strict=True)))
    return table


def summary(table: Table) -> str:
    """The exponents in a line."""
    *rows, (_, exponents, _) = table.rows
    sizes = f"{rows[0][0]} to {rows[-1][0]} {table.label}"
    return f"{sizes:40}" + ", ".join(
        f"{column.name.partition(',')[0]} {value:.2f}" for column, value in zip(table.columns, exponents, strict=True)
    )


def worse(table: Table) -> list[str]:
    """What grows faster than its size, in words."""
    _, exponents, _ = table.rows[-1]
    return [
        f"{column.name} with {table.label} (exponent {value:.2f})"
        for column, value in zip(table.columns, exponents, strict=True)
        if table.is_missed(column, value, judged=True)
    ]


def data(quick: bool) -> Table:
    """More data, in as many more shards of 10 MB, with an arena of 64 MiB."""
    rows = []
    with _folder() as folder:
        for times in (1, 2, 4) if quick else (1, 2, 4, 8):
            urls = _shards(folder / str(times), IMAGES, 1600 * times, 2 * times)
            rows.append((32 * times, _first_epoch(folder, urls, IMAGES.batch_size)))
    return grown("a first epoch", "MB of data", _OF_EPOCH, rows)


def threads(quick: bool) -> Table:
    """More threads, for the same data."""
    rows = []
    with _folder() as folder:
        urls = _shards(folder / "data", IMAGES, 3200 if quick else 6400, 16)
        for count in (1, 2, 4) if quick else (1, 2, 4, 8):
            rows.append((count, _first_epoch(folder, urls, IMAGES.batch_size, workers=count)))
    return grown("a first epoch over the same data", "threads", _OF_EPOCH, rows)


def shards(quick: bool) -> Table:
    """More shards, for the same samples."""
    count = 1_000 if quick else 10_000
    rows = []
    with _folder() as folder:
        for number in (1, 10, 100, 1_000) if quick else (1, 10, 100, 1_000, 10_000):
            urls = _shards(folder / str(number), RECORDS, count, number)
            # A shard takes a buffer of the arena while its window is open, however small it is: few of them a window.
            epoch = _first_epoch(folder, urls, RECORDS.batch_size, ram_bytes=4 << 30, shuffle_window=512 << 10)
            rows.append((number, epoch))
    return grown(f"a first epoch over the same {count:,} samples", "shards", _OF_EPOCH, rows)


_OF_EPOCH = ("CPU, ms", "first batch, ms", "memory, MB", "requests")


def _first_epoch(
    folder: Path, urls: Sequence[str], batch_size: int, workers: int = 2, ram_bytes: int = _RAM_BYTES, **dataset: Any
) -> Sequence[float]:
    """With an empty cache, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        settings = runs.Settings(
            urls=list(urls),
            byte_count=sum(Path(url).stat().st_size for url in urls),
            dataset=dataset,
            decode={},
            batch_size=batch_size,
            workers=workers,
            directory=f"{directory}/cache",
            ram_bytes=ram_bytes,
            disk_bytes=_DISK_BYTES,
            epochs=1,
        )
        (epoch,) = runs.run(settings, 600.0).epochs
    return epoch.cpu_s * 1e3, epoch.first_batch_s * 1e3, epoch.peak_memory_bytes / MB, epoch.requests


def consumers(quick: bool) -> Table:
    """More loaders at a time over the same data and cache, in one process."""
    rows = []
    with _folder() as folder:
        urls = _shards(folder / "data", IMAGES, 800, 4)
        for count in (1, 2, 4, 8) if quick else (1, 2, 4, 8, 16, 32):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append((count, pool.submit(_consume, urls, str(folder / f"cache-{count}"), count).result()))
    columns = ("CPU of the service, ms", "CPU of the loaders, ms", "memory of the service, MB", "fetched, MB")
    return grown("an epoch of each", "consumers", columns, rows)


def _consume(urls: list[str], directory: str, count: int) -> Sequence[float]:
    import fastload
    from fastload.client.cache import handle_of

    os.environ["FASTLOAD_IDLE_S"] = "0"
    cache = fastload.Cache(directory, ram_bytes=_RAM_BYTES, disk_bytes=_DISK_BYTES, history_bytes=0)
    keeper = handle_of(cache).consumer(name="keeper")
    service = measure.find_processes("fastload.service", directory)
    measure.wait_until_idle(service)
    loaders = [
        fastload.DataLoader(fastload.StreamingDataset(urls, cache=cache, seed=seed), batch_size=64, num_workers=1)
        for seed in range(count)
    ]
    before, own_before = measure.cpu_s(service), time.process_time()
    threads = [threading.Thread(target=lambda loader=loader: [None for _ in loader]) for loader in loaders]
    with measure.PeakMemory(lambda: service, every_s=0.1) as memory:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = (measure.cpu_s(service) - before) * 1e3, (time.process_time() - own_before) * 1e3
    fetched_bytes = loaders[0].stats()["node"]["fetched_bytes"]
    for loader in loaders:
        loader.close()
    keeper.close()
    cache.close()
    return *found, memory.peak_bytes / MB, fetched_bytes / MB


def samples(quick: bool) -> Table:
    """More samples in as many shards: what beginning an epoch takes, which reads nothing."""
    rows = []
    for count in (10**5, 10**6, 10**7) if quick else (10**5, 10**6, 10**7, 10**8):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, peak_mb, kept_mb = pool.submit(start_cost, "window", 1000, count, 1).result()
        rows.append((count, (seconds * 1e3, peak_mb, kept_mb)))
    return grown(
        "beginning an epoch over 1,000 shards", "samples planned", ("time, ms", "peak memory, MB", "kept, MB"), rows
    )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        yield Path(folder)


def _shards(folder: Path, workload: Workload, count: int, shard_count: int) -> list[str]:
    folder.mkdir()
    paths = [folder / f"{number:06d}.tar" for number in range(shard_count)]
    for number, path in enumerate(paths):
        write_shard(path, workload, range(count * number // shard_count, count * (number + 1) // shard_count))
    return list(map(str, paths))


QUESTIONS: tuple[Question, ...] = (data, threads, shards, consumers, samples)


def main() -> int:
    """Answer what the arguments ask for."""
    parser = tables.parser("growth", __doc__)
    names = [question.__name__ for question in QUESTIONS]
    parser.add_argument("--question", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    console, found = Console(), list[Table]()
    for question in QUESTIONS:
        if question.__name__ in arguments.question:
            found.append(question(arguments.quick))
            console.print(tables.printed(found[-1]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(table) for table in found], indent=1))
    for table in found:
        console.print(summary(table), soft_wrap=True)
    bad = [line for table in found for line in worse(table)]
    console.print(f"worse than linear: {', '.join(bad) or 'nothing'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
