"""The loaders that are measured, each run in a process of its own: `python -m bench.peers SETTINGS`, JSON in and out.

They are those of `fastload.bench.peers`. All do the same: give every sample of the tar shards, raw, in batches of 256,
shuffled in its own way, with two workers; and the consumer hashes every byte that it gets and checks that each sample
came exactly once. What reads formats of its own gets the same samples in them, from the same store (`data.FORMATS`).

The clock of an epoch starts with everything imported and, for a loader that has a service, with the service up; the
first epoch's covers building data set and loader. CPU-seconds are taken `SETTLE_S` after the last batch, so that what
is still being written to a cache is in them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from bench import rawget
from bench.data import FORMATS, DataSet, Tally
from bench.settings import BATCH_SIZE, WORKERS, Samples, Settings
from fastload.bench import measure
from fastload.bench.peers import OURS, module
from fastload.bench.peers import fastload as ours
from fastload.bench.peers.job import Batch, Job, Loader

SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch took. `began` is on the monotonic clock; `cpu_s` by process: "client" is the runner with its cache
    service, "service" the part of that which is the service's. `service_cpu_s_before` is what the service had taken
    when the epoch began: before the first one, its start. `slots_bytes` is memory of batches, lent or kept for later.
    """

    began: float
    seconds: float
    first_batch_s: float
    samples: int
    bytes: int
    cpu_s: dict[str, float]
    service_cpu_s_before: float
    slots_bytes: int = 0


NAMES = ("fastload", "webdataset", "streaming", "litdata", "spdl", "s3torchconnector")


def job_of(settings: Settings) -> Job:
    """The same for the package's loaders."""
    source = FORMATS.get(settings.system)
    return Job(
        urls=[settings.pattern] if settings.system == OURS else settings.urls,
        columns=["jpg", "cls"],
        batch_size=BATCH_SIZE,
        workers=WORKERS,
        folder=settings.folder,
        ram_bytes=settings.ram_bytes,
        cache_bytes=settings.disk_bytes,
        source=f"s3://{settings.bucket}/{source}" if source else "",
    )


def samples_of(batch: Batch) -> Samples:
    """Key, picture and label of each sample of a batch."""
    return zip(batch.keys, *(_items(batch.columns[name]) for name in ("jpg", "cls")), strict=True)


def _items(column: Any) -> Iterator[Any]:
    """The items of a column; of a `Ragged` without a copy."""
    if not hasattr(column, "offsets"):
        return iter(column)
    values, offsets = memoryview(column.values), column.offsets.tolist()
    return (values[begin:end] for begin, end in pairwise(offsets))


def run(settings: Settings) -> list[Epoch]:
    """Read the data `settings.epochs` times; AssertionError unless each sample came exactly once, every time."""
    if settings.system == "raw":
        return [_timed(settings, list, lambda: _read_raw(settings)) for _ in range(settings.epochs)]
    peer: Loader = module(settings.system).Loader(job_of(settings))
    try:
        time.sleep(max(0.0, settings.starts_at - time.monotonic()))
        return [
            replace(
                _timed(settings, peer.processes, lambda: _read(peer, number, settings.data_set)),  # noqa: B023 (called at once)
                slots_bytes=peer.slots_bytes() if isinstance(peer, ours.Loader) else 0,
            )
            for number in range(settings.epochs)
        ]
    finally:
        peer.close()


# What reading an epoch says: seconds until the first batch, seconds in all, samples, bytes.
Reading = tuple[float, float, int, int]


def _read(peer: Loader, number: int, data_set: DataSet) -> Reading:
    tally, first_batch_s, began = Tally(), 0.0, time.monotonic()
    for batch in peer.epoch(number):
        first_batch_s = first_batch_s or time.monotonic() - began
        for key, jpg, label in samples_of(batch):
            tally.add(key, jpg, label)
    seconds = time.monotonic() - began
    data_set.check(tally)
    return first_batch_s, seconds, tally.samples, tally.bytes


def _read_raw(settings: Settings) -> Reading:
    objects = [(path.name, path.stat().st_size) for path in settings.data_set.paths]
    began = time.monotonic()
    byte_count, first_s = rawget.read_all(settings.bucket, objects)
    return first_s, time.monotonic() - began, 0, byte_count


def _timed(settings: Settings, own: Callable[[], list[int]], read: Callable[[], Reading]) -> Epoch:
    before, began = _cpu_s(own(), settings), time.monotonic()
    first_batch_s, seconds, samples, byte_count = read()
    time.sleep(SETTLE_S)
    after = _cpu_s(own(), settings)
    used = {name: after[name] - before[name] for name in after}
    return Epoch(began, seconds, first_batch_s, samples, byte_count, used, before["service"])


def _cpu_s(own: list[int], settings: Settings) -> dict[str, float]:
    service = measure.cpu_s(own)
    client = {"client": measure.cpu_s([os.getpid()]) + service, "service": service}
    return client | {name: measure.cpu_s([pid]) for name, pid in settings.processes.items()}


def main() -> None:
    """Run what the argument says and print the epochs."""
    settings = Settings.from_json(sys.argv[1])
    measure.die_with_parent()
    print(json.dumps([asdict(epoch) for epoch in run(settings)]))


if __name__ == "__main__":
    main()
