"""What history is worth: `python -m bench.history [--rounds N] [--first-byte-ms N] [--costs]`.

A plain map-style data set that opens one object a sample with `fastload.open`, a seeded random sampler, two torch
worker processes and a training step of a set length, against a store that is far away (`weed mini` behind a proxy).
Each run is a process of its own, and begins with an empty cache and another service. Alternating, each of the rounds:

    first     nothing is known
    second    the same order again
    skipping  the same order, of which one sample in ten is left out and as many others are put in
    off       the same order again, with history switched off

Printed are the seconds that the training waited for batches, after the first one and in all, medians of the rounds, and
the CPU-seconds of everything but the store. Nothing else should run meanwhile.

`python -m bench.history --costs` shows instead what history costs the service, without a store (`bench.remembering`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.utils.data

import fastload
from bench import remembering
from bench.prefetch import Report
from bench.proxy import Profile, Proxy
from bench.targets import show
from fastload.demo.weed import WeedServer

BUCKET = "bench"
OBJECTS, OBJECT_BYTES = 640, 110_000
BATCH, WORKERS, STEP_S = 16, 2, 0.1
SEED = 7
STALL_SHARE_MAX = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of a run's process."""

    cache: str
    urls: int
    leave_out: int = 0  # of every so many samples one; 0: none
    history_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What it says."""

    first_s: float
    stalled_s: float
    replayed: int
    cpu_s: float


class Objects(torch.utils.data.Dataset[int]):
    """As users write them."""

    def __init__(self, urls: Sequence[str], cache: fastload.Cache) -> None:
        self.urls, self.cache = urls, cache

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> int:
        with fastload.open(self.urls[number], self.cache) as file:
            return len(file.read())


def run(job: Job) -> Outcome:
    """Train for an epoch."""
    with fastload.Cache(job.cache, ram_bytes="3GiB", disk_bytes=0, history_bytes=job.history_bytes) as cache:
        data = Objects([f"s3://{BUCKET}/{number:05d}.bin" for number in range(job.urls)], cache)
        order = torch.randperm(OBJECTS, generator=torch.Generator().manual_seed(SEED)).tolist()
        loader = torch.utils.data.DataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, sampler=_changed(order, job) if job.leave_out else order
        )
        began = time.monotonic()
        waits_s: list[float] = []
        read = 0
        for batch in _timed(loader, waits_s):
            read += int(batch.sum())
            time.sleep(STEP_S)
        assert read == OBJECTS * OBJECT_BYTES, f"{read} bytes came in {time.monotonic() - began:.1f} s"
        replayed = cache.stats()["replayed_reads"]
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu_s = sum(each.ru_utime + each.ru_stime for each in usage)
        return Outcome(waits_s[0], sum(waits_s[1:]), replayed, cpu_s)


def _timed(loader: Iterable[torch.Tensor], waits_s: list[float]) -> Iterator[torch.Tensor]:
    batches = iter(loader)
    while True:
        began = time.monotonic()
        batch = next(batches, None)
        waits_s.append(time.monotonic() - began)
        if batch is None:
            return
        yield batch


def _changed(order: list[int], job: Job) -> list[int]:
    """The order with one sample of so many left out, and others in their places, which no run has read before."""
    chance = random.Random(SEED)
    others = iter(range(OBJECTS, job.urls))
    return [next(others) if chance.randrange(job.leave_out) == 0 else number for number in order]


def measure(job: Job, environment: dict[str, str]) -> Outcome:
    """A run in a process of its own; the service that it started has ended when this returns."""
    command = [sys.executable, "-m", "bench.history", "--job", json.dumps(asdict(job))]
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    _wait_for_end(Path(job.cache))
    return Outcome(**json.loads(answer))


def _wait_for_end(cache: Path) -> None:
    """The service ends by itself, soon after its last consumer."""
    deadline = time.monotonic() + 20.0
    while (cache / "socket").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the cache service of {cache} does not end; see its log there")
        time.sleep(0.05)


def main() -> int:
    """Measure, and say which targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-byte-ms", type=float, default=50.0)
    parser.add_argument("--costs", action="store_true", help="what it costs the service, and nothing else; two minutes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.costs:
        return int(show("What history costs", remembering.figures(options.rounds)))
    if options.job:
        print(json.dumps(asdict(run(Job(**json.loads(options.job))))))
        return 0
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="fastload-history-") as folder, WeedServer(Path(folder) / "weed") as weed:
        weed.make_bucket(BUCKET)
        others = OBJECTS // 5
        for number in range(OBJECTS + others):
            weed.put(f"s3://{BUCKET}/{number:05d}.bin", os.urandom(OBJECT_BYTES))
        with Proxy(weed.endpoint_url, Profile(options.first_byte_ms / 1000)) as proxy:
            environment = os.environ | weed.environment() | {"AWS_ENDPOINT_URL": proxy.url, "FASTLOAD_IDLE_S": "0.5"}
            for number in range(options.rounds):
                cache = f"{folder}/cache-{number}"
                jobs = {
                    "first": Job(cache, OBJECTS + others),
                    "second": Job(cache, OBJECTS + others),
                    "skipping": Job(cache, OBJECTS + others, leave_out=10),
                    "off": Job(cache, OBJECTS + others, history_bytes=0),
                }
                for name, job in jobs.items():
                    outcomes.setdefault(name, []).append(measure(job, environment))
    return _report(outcomes)


def _report(outcomes: dict[str, list[Outcome]]) -> int:
    report = Report()
    middle = {
        name: Outcome(*(statistics.median(getattr(each, field) for each in found) for field in Outcome.__slots__))
        for name, found in outcomes.items()
    }
    print(f"{OBJECTS} objects of {OBJECT_BYTES} bytes, batches of {BATCH}, steps of {STEP_S:g} s")
    for name, found in middle.items():
        print(name)
        report.line("first batch after", found.first_s, "s")
        report.line("waited for the others", found.stalled_s, "s")
        report.line("reads that came as predicted, of all", found.replayed / OBJECTS)
        report.line("CPU of the trainer and its workers", found.cpu_s, "s")
    waited = {name: found.first_s + found.stalled_s for name, found in middle.items()}
    report.line("waited in all: second of first", waited["second"] / waited["first"], "", STALL_SHARE_MAX, False)
    report.line("skipping of first", waited["skipping"] / waited["first"])
    report.line("switched off of first", waited["off"] / waited["first"])
    return int(not report.met)


if __name__ == "__main__":
    sys.exit(main())
