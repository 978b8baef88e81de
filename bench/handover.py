"""Handing batches over from worker processes: torch's DataLoader beside fastload's, and what a state costs.

    python -m bench.handover                     # two minutes
    python -m bench.handover --workers 2 --rounds 5

The data set only copies what it has, so what is timed is the way to the trainer. (Without that copy torch's loader
would send one and the same memory again and again, which no data set has that makes anything.) Batches of 38.5 MB
(256 x 3 x 224 x 224, uint8) and of 200 kB are given whole (`batch_size=None`) or stacked by the default `collate_fn`.
The two loaders take turns within a round; figures are medians over rounds, of the wall clock and of the CPU of
trainer and workers together. The trainer touches one value of each page, as whoever copies it to a device touches
all.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset

from fastload import DataLoader

LARGE, SMALL = (256, 3, 224, 224), (200_000,)
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """`count` batches of a shape, each stacked of so many samples; of one: given as it is."""

    title: str
    shape: tuple[int, ...]
    count: int
    samples: int = 1

    @property
    def batch_bytes(self) -> int:
        """Of one batch."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Took:
    """Of one batch."""

    wall_s: float
    cpu_s: float


class Same(Dataset[torch.Tensor]):
    """Copies of one sample."""

    def __init__(self, case: Case) -> None:
        whole = torch.randint(0, 255, case.shape, dtype=torch.uint8)
        self.is_whole = case.samples == 1
        self.count, self.sample = case.count * case.samples, whole if self.is_whole else whole[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sample.clone() if self.is_whole else self.sample


CASES = (
    Case("38.5 MB, given whole", LARGE, 60),
    Case("38.5 MB, stacked of 256", LARGE, 60, 256),
    Case("200 kB, given whole", SMALL, 3000),
)


def main() -> None:
    """Time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.workers} worker(s), {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}\n")
    print(f"{'':26}{'GB/s':>8}{'torch':>8}{'times':>8}{'CPU ms':>10}{'torch':>8}")
    for case in CASES:
        report(case, *measure(case, options.workers, options.rounds))
    print(f"\nstate_dict(): {state_cost_us(0):.0f} us without workers, {state_cost_us(1):.0f} us with one")


def measure(case: Case, workers: int, rounds: int) -> tuple[list[Took], list[Took]]:
    """Ours and torch's, a round each."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(one_epoch(DataLoader, case, workers))
        theirs.append(one_epoch(TorchLoader, case, workers))
    return ours, theirs


def one_epoch(kind: Callable[..., Any], case: Case, workers: int) -> Took:
    """What a batch takes, once it has begun."""
    batch_size = None if case.samples == 1 else case.samples
    cpu_before = cpu_s()
    loader = iter(kind(Same(case), batch_size=batch_size, num_workers=workers))
    touch(next(loader))
    began = time.perf_counter()
    for batch in loader:
        touch(batch)
    wall_s = time.perf_counter() - began
    del batch, loader  # its workers are waited for, whose CPU time counts then
    return Took(wall_s / (case.count - 1), (cpu_s() - cpu_before) / case.count)


def touch(batch: torch.Tensor) -> None:
    """Read a value of each page."""
    batch.view(-1)[::PAGE_BYTES].sum()


def cpu_s() -> float:
    """Of this process and of children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def report(case: Case, ours: list[Took], theirs: list[Took]) -> None:
    """A line."""
    walls = [statistics.median(took.wall_s for took in all_) for all_ in (ours, theirs)]
    cpus = [1000 * statistics.median(took.cpu_s for took in all_) for all_ in (ours, theirs)]
    rates = [case.batch_bytes / wall_s / 1e9 for wall_s in walls]
    times = rates[0] / rates[1]
    print(f"{case.title:26}{rates[0]:8.2f}{rates[1]:8.2f}{times:8.1f}{cpus[0]:10.2f}{cpus[1]:8.2f}")


def state_cost_us(workers: int) -> float:
    """Of one call in the middle of an epoch."""
    loader = DataLoader(Same(CASES[2]), batch_size=None, shuffle=True, num_workers=workers)
    iterator = iter(loader)
    for _ in range(10):
        next(iterator)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        loader.state_dict()
        took.append(time.perf_counter() - began)
    return 1e6 * statistics.median(took)


if __name__ == "__main__":
    main()
