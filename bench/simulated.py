"""The simulator beside what it simulates: `python -m bench.simulated`.

The same job is run for real and in virtual time: tar shards behind the proxy, which holds requests back and caps their
rate, a cache service with a disk tier of a share of the data, a `DataLoader`, and a trainer that sleeps for a while a
batch. Printed for each epoch are its seconds and how many of them the trainer waited, both ways. Rates are low, so that
no core is the limit. Four minutes; nothing else should run meanwhile. Status 1 where an epoch's seconds differ by more
than a tenth, or what the trainer waits by more than that of the epoch.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fastload
from bench.proxy import Profile, Proxy
from fastload.demo.weed import WeedServer
from fastload.simulate import Job, Node, StoreProfile, simulate

BUCKET = "bench"
SHARDS, SAMPLES_A_SHARD, SAMPLE_BYTES = 60, 80, 100_000
MEMBER_BYTES = 101_376  # with tar's header and padding
CHUNK_BYTES, RAM_CHUNKS = 1 << 20, 48
BATCH, EPOCHS, THREADS = 64, 3, 4
TOTAL_BYTES_PER_S, CONNECTION_BYTES_PER_S = 40e6, 8e6
OFF_MAX = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """A cache, a trainer and a store."""

    disk_share: float
    samples_per_s: float
    first_byte_s: float

    def disk_bytes(self) -> int:
        """The quota: a chunk has a trailer."""
        return int(self.disk_share * SHARDS * SAMPLES_A_SHARD * MEMBER_BYTES / CHUNK_BYTES * (CHUNK_BYTES + 8192))


CASES = (Case(0.0, 280, 0.1), Case(0.25, 560, 0.1), Case(0.5, 560, 0.1), Case(0.5, 560, 0.02))

Epoch = tuple[float, float]  # its seconds, and those of them that the trainer waited


def shard(number: int) -> bytes:
    """A tar of noise."""
    out, noise = io.BytesIO(), np.random.default_rng(number)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for sample in range(SAMPLES_A_SHARD):
            info = tarfile.TarInfo(f"{number:03}{sample:05}.bin")
            info.size = SAMPLE_BYTES
            tar.addfile(info, io.BytesIO(noise.bytes(SAMPLE_BYTES)))
    return out.getvalue()


def really(case: Case, weed: WeedServer, folder: Path) -> Iterator[Epoch]:
    """The epochs of a real job."""
    proxy = Proxy(weed.endpoint_url, Profile(case.first_byte_s, TOTAL_BYTES_PER_S, CONNECTION_BYTES_PER_S))
    os.environ.update({**weed.environment(), "AWS_ENDPOINT_URL": proxy.url})
    with fastload.Cache(
        folder, ram_bytes=RAM_CHUNKS * CHUNK_BYTES, disk_bytes=case.disk_bytes(), chunk_bytes=CHUNK_BYTES
    ) as cache:
        urls = f"s3://{BUCKET}/{{000..{SHARDS - 1:03}}}.tar"
        dataset = fastload.StreamingDataset(urls, cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=BATCH, num_workers=THREADS)
        for _ in range(EPOCHS):
            yield _epoch(loader, case)
    proxy.close()


def _epoch(loader: fastload.DataLoader[object], case: Case) -> Epoch:
    began, waited_s = time.monotonic(), 0.0
    batches = iter(loader)
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        waited_s += time.monotonic() - asked
        if batch is None:
            return time.monotonic() - began, waited_s
        time.sleep(BATCH / case.samples_per_s)


def virtually(case: Case) -> list[Epoch]:
    """The same in virtual time."""
    job = Job(
        data_bytes=SHARDS * SAMPLES_A_SHARD * MEMBER_BYTES,
        sample_bytes=MEMBER_BYTES,
        shard_bytes=SAMPLES_A_SHARD * MEMBER_BYTES,
        batch_size=BATCH,
        samples_per_s=case.samples_per_s,
        epochs=EPOCHS,
        threads=THREADS,
    )
    node = Node(ram_bytes=RAM_CHUNKS * CHUNK_BYTES, disk_bytes=case.disk_bytes(), chunk_bytes=CHUNK_BYTES)
    store = StoreProfile(case.first_byte_s, CONNECTION_BYTES_PER_S, TOTAL_BYTES_PER_S, noise=0.1)
    run = simulate(job, node, store, chunks_max=None)
    return [(epoch.seconds, epoch.stall_s) for epoch in run.epochs]


def main() -> int:
    """Run all cases both ways."""
    met = True
    with tempfile.TemporaryDirectory(prefix="fastload-simulated-") as folder, WeedServer(f"{folder}/weed") as weed:
        weed.make_bucket(BUCKET)
        for number in range(SHARDS):
            weed.put(f"s3://{BUCKET}/{number:03}.tar", shard(number))
        for number, case in enumerate(CASES):
            print(case)
            for epoch, (real, virtual) in enumerate(
                zip(really(case, weed, Path(folder) / f"cache-{number}"), virtually(case), strict=True)
            ):
                is_near = abs(virtual[0] / real[0] - 1) <= OFF_MAX and abs(virtual[1] - real[1]) <= OFF_MAX * real[0]
                met &= is_near
                both = (f"{seconds:6.2f} s, waited {waited_s:5.2f} s" for seconds, waited_s in (real, virtual))
                print(f"  epoch {epoch}: {'; simulated '.join(both)}{'' if is_near else '  off'}", flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
