"""The loaders that are measured, each run in a process of its own: `python -m bench.peers SETTINGS`, JSON in and out.

All do the same: give every sample of the tar shards, raw, in batches of 256, shuffled in its own way, with two workers;
and the consumer hashes every byte that it gets and checks that each sample came exactly once. Each is set up as its own
documentation recommends for shards in S3 with a local cache, and reads its credentials from the AWS_* variables.

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
from typing import Any, Protocol

from bench import others, rawget
from bench.data import DataSet, Tally
from bench.settings import BATCH_SIZE, WORKERS, Batch, Settings
from fastload.bench import measure

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


class Peer(Protocol):
    """A loader under measurement."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch; the first call builds the loader."""
        ...

    def processes(self) -> list[int]:
        """Processes that work for it and are not below this one."""
        ...

    def close(self) -> None:
        """Stop all that it started."""
        ...


class WebDataset:
    """webdataset over `pipe:curl`, which signs with the credentials, and its own cache of whole shards."""

    def __init__(self, settings: Settings) -> None:
        import webdataset

        self._webdataset, self._settings = webdataset, settings
        self._loader: Any = None

    def _build(self) -> Any:
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        curl = "curl -sSf --aws-sigv4 aws:amz:us-east-1:s3 --user $AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"
        urls = [f"pipe:{curl} {endpoint}/{url.removeprefix('s3://')}" for url in self._settings.urls]
        cache_dir = os.path.join(self._settings.folder, "shards")
        os.makedirs(cache_dir, exist_ok=True)
        dataset = self._webdataset.WebDataset(urls, shardshuffle=len(urls), cache_dir=cache_dir, seed=0)
        dataset = dataset.shuffle(1000).to_tuple("__key__", "jpg", "cls").batched(BATCH_SIZE)
        return self._webdataset.WebLoader(
            dataset, batch_size=None, num_workers=WORKERS, prefetch_factor=4, persistent_workers=True
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """Tuples of three lists, turned into samples."""
        if self._loader is None:
            self._loader = self._build()
        for keys, jpgs, labels in self._loader:
            yield zip(keys, jpgs, labels, strict=True)

    def processes(self) -> list[int]:
        """None: curl runs below the workers."""
        return []

    def close(self) -> None:
        """The workers end with the loader."""
        self._loader = None


class Fastload:
    """fastload: a service with an arena and a disk tier, and two decode threads."""

    def __init__(self, settings: Settings, *, is_kept: bool = True) -> None:
        """Unless it `is_kept`, the service runs from the first epoch on only."""
        import fastload
        from fastload.client.cache import handle_of

        # Names of fastload are imported when they are first used: now, before the clock starts.
        self._data_set_class, self._loader_class = fastload.StreamingDataset, fastload.DataLoader
        self._settings = settings
        self._loader: Any = None
        self._directory = os.path.join(settings.folder, "fastload")
        self._cache = fastload.Cache(self._directory, ram_bytes=settings.ram_bytes, disk_bytes=settings.disk_bytes)
        # Starts the service and keeps it. What that costs is a figure of its own.
        self._keeper = handle_of(self._cache).consumer(name="keeper") if is_kept else None
        if is_kept:
            measure.wait_until_idle(self.processes())

    def _build(self) -> Any:
        self._dataset = self._data_set_class(self._settings.pattern, cache=self._cache, shuffle=True, seed=0)
        return self._loader_class(self._dataset, batch_size=BATCH_SIZE, num_workers=WORKERS)

    def slots_bytes(self) -> int:
        """Memory of batches, in use and kept for later."""
        held: int = self._dataset._source.slots.held_bytes
        return held

    def epoch(self, number: int) -> Iterator[Batch]:
        """Keys, and two `Ragged` columns."""
        if self._loader is None:
            self._loader = self._build()
        for batch in self._loader:
            yield zip(batch["__key__"], _items(batch["jpg"]), _items(batch["cls"]), strict=True)

    def processes(self) -> list[int]:
        """The cache service, which has a session of its own."""
        return measure.find_processes("fastload.service", self._directory)

    def close(self) -> None:
        """Loader first, then cache; the service ends by itself."""
        if self._loader is not None:
            self._loader.close()
        if self._keeper is not None:
            self._keeper.close()
        self._cache.close()


def _items(column: Any) -> Iterator[memoryview]:
    """The items of a `Ragged` without a copy."""
    values, offsets = memoryview(column.values), column.offsets.tolist()
    return (values[begin:end] for begin, end in pairwise(offsets))


PEERS: dict[str, Callable[[Settings], Peer]] = {
    "fastload": Fastload,
    "webdataset": WebDataset,
    "streaming": others.Streaming,
    "litdata": others.LitData,
    "spdl": others.Spdl,
    "s3torchconnector": others.S3Connector,
}


def run(settings: Settings) -> list[Epoch]:
    """Read the data `settings.epochs` times; AssertionError unless each sample came exactly once, every time."""
    if settings.system == "raw":
        return [_timed(settings, list, lambda: _read_raw(settings)) for _ in range(settings.epochs)]
    peer = PEERS[settings.system](settings)
    try:
        time.sleep(max(0.0, settings.starts_at - time.monotonic()))
        return [
            replace(
                _timed(settings, peer.processes, lambda: _read(peer, number, settings.data_set)),  # noqa: B023 (called at once)
                slots_bytes=peer.slots_bytes() if isinstance(peer, Fastload) else 0,
            )
            for number in range(settings.epochs)
        ]
    finally:
        peer.close()


# What reading an epoch says: seconds until the first batch, seconds in all, samples, bytes.
Reading = tuple[float, float, int, int]


def _read(peer: Peer, number: int, data_set: DataSet) -> Reading:
    tally, first_batch_s, began = Tally(), 0.0, time.monotonic()
    for batch in peer.epoch(number):
        first_batch_s = first_batch_s or time.monotonic() - began
        for key, jpg, label in batch:
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
