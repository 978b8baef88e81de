"""What a loader costs a training step: how much slower it is while threads or processes make batches.

A step is many small operations, as a model's Python launches them, on one thread. It takes about as long as one core
needs to decode a batch, so that on two cores there is one for each, and all of the slowdown is interference: for the
interpreter lock, for caches and memory. Without a loader, steps follow one another; with one, each waits for its batch,
which is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchLoader

import fastload
from bench import data
from bench.interference import images
from bench.targets import Figure

BATCH, STEPS, OPERATIONS = 64, 60, 16_000
FIRST_STEPS = 10  # which do not count

Make = Callable[[Any], Any]

WAYS: dict[str, Make] = {
    "thread": lambda dataset: fastload.DataLoader(dataset, batch_size=BATCH, num_workers=1, workers="thread"),
    "side": lambda dataset: fastload.DataLoader(dataset, batch_size=BATCH, num_workers=1, workers="side"),
    "process": lambda dataset: fastload.DataLoader(dataset, batch_size=BATCH, num_workers=1, workers="process"),
    "torch's DataLoader": lambda dataset: TorchLoader(dataset, batch_size=BATCH, num_workers=1),
}


def figures(rounds: int, folder: Path) -> list[Figure]:
    """Slowdowns within a round, 1.0 being none."""
    cache = fastload.Cache(str(folder / "cache"), ram_bytes="1GiB", disk_bytes="4GiB")
    slowdowns: dict[str, list[float]] = {name: [] for name in WAYS}
    try:
        for number in range(rounds + 1):
            alone_s = step_s(iter(()))
            for name, make in WAYS.items():
                slowdown = with_loader_s(images(data.default_folder(), cache), make) / alone_s
                if number:  # the first round fills the cache
                    slowdowns[name].append(slowdown)
    finally:
        cache.close()
    return [Figure(f"a step beside a loader: {name}", "of a step alone", took) for name, took in slowdowns.items()]


def with_loader_s(dataset: Any, make: Make) -> float:
    """Of a step."""
    loader = make(dataset)
    batches = iter(loader)
    try:
        return step_s(batches)
    finally:
        del batches
        if isinstance(loader, fastload.DataLoader):
            loader.close()
        dataset.close()


def step_s(batches: Iterator[Any]) -> float:
    """The median over steps, each after its batch, if there is one."""
    took = []
    value = torch.ones(8)
    for _ in range(STEPS):
        next(batches, None)
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            value = torch.add(value, 1.0)
        took.append(time.perf_counter() - began)
    return statistics.median(took[FIRST_STEPS:])
