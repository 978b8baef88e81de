"""Warming beside jobs: `python -m bench.warming [--quick] [--case NAME ...] [--rounds N]`.

A store of `weed mini` behind a proxy that holds requests back by 20 ms and is capped at 200 MB/s (`--cap`), `fastload
warm` as a process of its own, and a loader in this one that does nothing with its batches, so that the link binds it.
Each run has an empty cache. All figures are ratios within a run of this program.

    alone    `fastload warm` of a data set: bytes a second, of the cap
    limit    the same with --bandwidth: bytes a second, of the limit
    beside   a loader beside a warm-up of other data that began before it: throughput and batch waits, of those alone
    third    a loader that begins when 30 % of its own warm-up are done: seconds of its epoch, of those without one
    pinned   a loader on warmed, pinned data, after two epochs of another job that fill the cache twice: bytes fetched

Each figure stands beside its target; the status is 1 where one is missed. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import fastload
from bench import data
from bench.proxy import Profile, Proxy
from bench.targets import Figure, show
from fastload.bench.measure import find_processes
from fastload.config import GIB
from fastload.demo.weed import WeedServer

BUCKET = "bench"
CAP_MB_PER_S, FIRST_BYTE_S = 200.0, 0.02
LIMITS_MB_PER_S = (20, 100)
BATCH_SIZE, WORKERS = 32, 2
HEAD_START_S = 2.0  # of a warm-up of other data
ENDS_S = 60.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch of the loader: how long it took, and each wait for a batch."""

    seconds: float
    waits_s: list[float]
    fetched_bytes: int

    @property
    def p99_wait_s(self) -> float:
        """Of a hundred waits the longest."""
        return float(np.quantile(self.waits_s, 0.99))


class Place:
    """A store with two data sets that are alike, `job/` and `other/`, and a folder for caches."""

    def __init__(self, weed: WeedServer, proxy: Proxy, folder: Path, data_set: data.DataSet) -> None:
        self.proxy, self.data_set, self._folder = proxy, data_set, folder
        weed.make_bucket(BUCKET)
        for path in data_set.paths:
            for prefix in ("job", "other"):
                weed.upload(path, f"s3://{BUCKET}/{prefix}/{path.name}")

    @contextmanager
    def cache(self, data_sets: float = 3.0) -> Iterator[fastload.Cache]:
        """An empty one, whose disk has room for so many times a data set."""
        with tempfile.TemporaryDirectory(prefix="cache-", dir=self._folder) as directory:
            disk_bytes = int(data_sets * self.data_set.bytes)
            with fastload.Cache(directory, ram_bytes=GIB, disk_bytes=disk_bytes) as cache:
                yield cache
            _until(lambda: not find_processes("fastload.service", directory), "the service has ended")

    @contextmanager
    def warming(self, cache: fastload.Cache, prefix: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`fastload warm` of a data set while the block runs; it is ended after that where it still runs."""
        command = [sys.executable, "-m", "fastload", "warm", f"s3://{BUCKET}/{prefix}/", f"--cache={cache.directory}"]
        warming = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        try:
            yield warming
        finally:
            warming.send_signal(signal.SIGTERM)
            warming.wait(ENDS_S)

    def warm(self, cache: fastload.Cache, prefix: str, *options: str) -> float:
        """Warm a data set to its end; bytes a second, from the first request to the end of the last."""
        self.proxy.log()
        with self.warming(cache, prefix, *options) as warming:
            assert warming.wait() == 0, f"fastload warm {prefix} failed"
        log = [each for each in self.proxy.log() if each["method"] == "GET" and each["range"]]
        seconds = max(each["done"] for each in log) - min(each["began"] for each in log)
        return float(sum(each["body_bytes"] for each in log) / seconds)

    def epochs(self, cache: fastload.Cache, prefix: str, count: int = 1) -> list[Epoch]:
        """Epochs of a loader over a data set; each sample is counted."""
        dataset = fastload.StreamingDataset(f"s3://{BUCKET}/{prefix}/", cache=cache, shuffle=True, seed=0)
        loader = fastload.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=WORKERS)
        try:
            return [self._epoch(loader, cache) for _ in range(count)]
        finally:
            loader.close()

    def _epoch(self, loader: fastload.DataLoader[Any], cache: fastload.Cache) -> Epoch:
        before, began = cache.stats()["fetched_bytes"], time.monotonic()
        waits_s, samples, asked = list[float](), 0, time.monotonic()
        for batch in loader:
            waits_s.append(time.monotonic() - asked)
            samples += len(batch["__key__"])
            asked = time.monotonic()
        assert samples == self.data_set.samples, f"{samples} samples came"
        return Epoch(time.monotonic() - began, waits_s, cache.stats()["fetched_bytes"] - before)


def _until(true: object, what: str) -> None:
    deadline = time.monotonic() + ENDS_S
    while not true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"gave up waiting until {what}")
        time.sleep(0.05)


def alone(place: Place, rounds: int, cap: float) -> list[Figure]:
    """See the module's text."""
    rate = Figure("warming alone, of the cap", "", at_least=0.95)
    for _ in range(rounds):
        with place.cache() as cache:
            rate.values.append(place.warm(cache, "job") / cap)
    return [rate]


def limit(place: Place, rounds: int, cap: float) -> list[Figure]:
    """See the module's text."""
    figures = []
    for limit_mb_per_s in LIMITS_MB_PER_S:
        most = Figure(f"with --bandwidth={limit_mb_per_s}MB/s, of that", "", at_most=1.05)
        least = Figure("the same", "", most.values, at_least=0.95)
        for _ in range(rounds):
            with place.cache() as cache:
                rate = place.warm(cache, "job", f"--bandwidth={limit_mb_per_s}MB/s")
                most.values.append(rate / 1e6 / limit_mb_per_s)
        figures += [least, most]
    return figures


def beside(place: Place, rounds: int, cap: float) -> list[Figure]:
    """See the module's text."""
    rate = Figure("loader beside a warm-up, throughput of that alone", "", at_least=0.9)
    wait = Figure("the same, p99 of batch waits", "", at_most=1.2)
    other = Figure("bytes that the warm-up got meanwhile, of the loader's", "")
    for number in range(rounds):
        found: dict[bool, Epoch] = {}
        for is_beside in (False, True) if number % 2 == 0 else (True, False):
            with place.cache() as cache:
                if not is_beside:
                    found[False] = place.epochs(cache, "job")[0]
                    continue
                with place.warming(cache, "other") as warming:
                    _until(lambda: cache.stats()["fetched_bytes"] > 0, "the warm-up has begun")
                    time.sleep(HEAD_START_S)
                    found[True] = place.epochs(cache, "job")[0]
                    assert warming.poll() is None, "the warm-up ended before the epoch; give more data"
                other.values.append(found[True].fetched_bytes / place.data_set.bytes - 1)
        rate.values.append(found[False].seconds / found[True].seconds)
        wait.values.append(found[True].p99_wait_s / found[False].p99_wait_s)
    return [rate, wait, other]


def third(place: Place, rounds: int, cap: float) -> list[Figure]:
    """See the module's text."""
    seconds = Figure("loader from 30 % of its warm-up on, seconds of those without", "", at_most=1.05)
    for _ in range(rounds):
        with place.cache() as cache:
            before = place.epochs(cache, "job")[0].seconds
        with place.cache() as cache, place.warming(cache, "job"):
            _until(lambda: cache.stats()["fetched_bytes"] > 0.3 * place.data_set.bytes, "30 % are there")
            seconds.values.append(place.epochs(cache, "job")[0].seconds / before)
    return [seconds]


def pinned(place: Place, rounds: int, cap: float) -> list[Figure]:
    """See the module's text."""
    fetched = Figure("fetched of warmed, pinned data after another job", "bytes", at_most=0.0)
    for _ in range(rounds):
        with place.cache(1.3) as cache:
            place.warm(cache, "job", "--pin")
            place.epochs(cache, "other", 2)
            fetched.values.append(place.epochs(cache, "job")[0].fetched_bytes)
    return [fetched]


CASES = {"alone": alone, "limit": limit, "beside": beside, "third": third, "pinned": pinned}


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the data, once: a look, not a figure")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cap", type=float, default=CAP_MB_PER_S, help="MB/s in all")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    folder, is_missed = data.default_folder(), False
    data_set = data.prepare(folder, shard_count=data.SHARD_COUNT // 3 if options.quick else data.SHARD_COUNT)
    profile = Profile(FIRST_BYTE_S, options.cap * 1e6)
    with (
        tempfile.TemporaryDirectory(prefix="warming-", dir=folder) as work,
        WeedServer(Path(work) / "store") as weed,
        Proxy(weed.endpoint_url, profile) as proxy,
        mock.patch.dict(os.environ, {**weed.environment(), "AWS_ENDPOINT_URL": proxy.url, "FASTLOAD_IDLE_S": "0.5"}),
    ):
        place = Place(weed, proxy, Path(work), data_set)
        for name in options.case:
            title = f"{name}: {data_set.bytes / 1e9:.2f} GB at {options.cap:g} MB/s"
            is_missed |= show(title, CASES[name](place, rounds, options.cap * 1e6))
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
