"""Handing batches over from a worker process, and what that costs beyond making them.

The data set only copies what it has, so what is timed is the way to the trainer. (Without that copy torch's loader
would send one and the same memory again and again, which no data set has that makes anything.) Batches of
256 x 3 x 224 x 224, uint8 and float32, are given whole (`batch_size=None`) or stacked by the default `collate_fn`. The
trainer touches one value of each page, as a copy to a device touches all.

Rates are those of an epoch that is long enough for a worker's memory, which it fills for the first time in the first
batches, to be used again and again; torch's loader, which has fresh memory for each, is given a part of it.

*making it alone* is the limit: what the batch costs its maker, past the caches, with no way to go at all. What a
data set gives whole lies where the data set has made it, and is copied from there: half of its cost is the data set's.

*latency* is from the moment at which a worker begins to hand over a small part of nothing else, the trainer waiting,
until the trainer has the batch: what is beyond a copy of so many bytes, from and into memory that is used already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset, default_collate

from bench.loaders import as_a_worker, cpu_s, in_turn
from bench.targets import Figure
from fastload import DataLoader
from fastload.transport.bulk_copy import stack_into

SHAPE = (256, 3, 224, 224)
PAGE_BYTES = 4096
TIMES = 6.0
LATENCY_MS = 0.3
# The trainer of the latencies is to wait for every batch.
PAUSE_S = 0.02
# Of an epoch, for torch's loader.
PART = 5
# With two batches fetched ahead, one being built and one with the trainer.
UNDER_WAY = 4

Kind = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Case:
    """An epoch of `count` batches of a type, each stacked of so many samples; of one: given as it is."""

    title: str
    dtype: torch.dtype
    count: int
    samples: int

    @property
    def batch_bytes(self) -> int:
        """Of one batch."""
        return torch.Size(SHAPE).numel() * self.dtype.itemsize


CASES = (
    Case("uint8, stacked of 256", torch.uint8, 200, SHAPE[0]),
    Case("float32, stacked of 256", torch.float32, 200, SHAPE[0]),
    Case("uint8, given whole", torch.uint8, 200, 1),
    Case("float32, given whole", torch.float32, 200, 1),
)


class Same(Dataset[torch.Tensor]):
    """Copies of one sample."""

    def __init__(self, case: Case) -> None:
        whole = torch.ones(SHAPE, dtype=case.dtype)
        self.is_whole = case.samples == 1
        self.count, self.sample = case.count * case.samples, whole if self.is_whole else whole[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sample.clone() if self.is_whole else self.sample


@dataclass(frozen=True, slots=True)
class Took:
    """Of one batch."""

    wall_s: float
    cpu_s: float


def figures(rounds: int) -> list[Figure]:
    """Rates as ratios within a round, CPU time, latencies."""
    found = []
    for case in CASES:
        ours, theirs = in_turn(rounds, partial(one_epoch, case))
        both = list(zip(ours, theirs, strict=True))
        alone = [b.wall_s / as_a_worker(partial(making_s, case)) for b in theirs]
        least = TIMES if case.samples > 1 else None
        found += [
            Figure(f"{case.title}: MB/s", "", [case.batch_bytes / 1e6 / took.wall_s for took in ours]),
            Figure(f"{case.title}: times torch's MB/s", "", [b.wall_s / a.wall_s for a, b in both], at_least=least),
            Figure(f"{case.title}: making it alone, times torch's MB/s", "", alone),
            Figure(f"{case.title}: CPU time, of torch's", "", [a.cpu_s / b.cpu_s for a, b in both]),
        ]
    ours_ms, theirs_ms = in_turn(rounds, latency_beyond_copy_ms)
    return [
        *found,
        Figure("stacked, latency of a hand-over beyond a copy", "ms", ours_ms, at_most=LATENCY_MS),
        Figure("the same, torch's", "ms", theirs_ms),
        Figure("state_dict() with a worker", "us", [state_cost_us() for _ in range(rounds)]),
    ]


def one_epoch(case: Case, kind: Kind) -> Took:
    """What a batch takes, once it has begun."""
    if kind is TorchLoader:
        case = replace(case, count=case.count // PART)
    batch_size = None if case.samples == 1 else case.samples
    cpu_before = cpu_s()
    loader = iter(kind(Same(case), batch_size=batch_size, num_workers=1))
    touch(next(loader))
    began = time.perf_counter()
    for batch in loader:
        touch(batch)
    wall_s = time.perf_counter() - began
    del batch, loader  # its workers are waited for, whose CPU time counts then
    return Took(wall_s / (case.count - 1), (cpu_s() - cpu_before) / case.count)


def touch(batch: torch.Tensor) -> None:
    """Read a value of each page."""
    batch.view(-1)[:: PAGE_BYTES // batch.element_size()].sum()


def stamped(samples: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """A batch, and when it was ready; the clock is that of the machine."""
    batch = default_collate(samples)
    time.sleep(PAUSE_S)
    return batch, time.monotonic()


def latency_beyond_copy_ms(kind: Kind) -> float:
    """The median over an epoch, of batches that `default_collate` has stacked; less a copy, as the trainer has it."""
    case = replace(CASES[0], count=60)
    late_s = []
    for batch, ready in kind(Same(case), batch_size=case.samples, num_workers=1, collate_fn=stamped):
        late_s.append(time.monotonic() - ready)
        touch(batch)
    copy_s = copying_s(case.batch_bytes) if kind is TorchLoader else 0.0  # ours are stacked where they are read
    beyond_s: float = statistics.median(late_s[3:]) - copy_s
    return 1e3 * beyond_s


def making_s(case: Case) -> float:
    """What a worker cannot go below: a batch written to memory that is used already, in turn to as many places as there
    are batches under way. One that is given whole is made by the data set and copied to where it is sent.
    """
    dataset = Same(case)
    places = [torch.ones(SHAPE, dtype=case.dtype) for _ in range(UNDER_WAY)]
    took = []
    for turn in range(6 * UNDER_WAY):
        place = places[turn % UNDER_WAY]
        began = time.perf_counter()
        samples = [dataset[index] for index in range(case.samples)]
        stack_into(place.view(case.samples, *samples[0].shape), samples)
        took.append(time.perf_counter() - began)
    return statistics.median(took[UNDER_WAY:])


def copying_s(byte_count: int) -> float:
    """Of memory that is used already."""
    source, target = torch.ones(byte_count, dtype=torch.uint8), torch.ones(byte_count, dtype=torch.uint8)
    took = []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def state_cost_us() -> float:
    """Of one call in the middle of an epoch."""
    loader = DataLoader(Same(CASES[2]), batch_size=None, shuffle=True, num_workers=1)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    took = []
    for _ in range(100):
        began = time.perf_counter()
        loader.state_dict()
        took.append(time.perf_counter() - began)
    return 1e6 * statistics.median(took)
