"""Eight spawned workers with a data set of 512 MiB: how long until the first batch, and how much memory.

Each measurement is a process of its own, whose memory and that of its workers is counted when the first batch is there:
anonymous and shared pages, each divided among those who map it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset

from bench.loaders import in_turn
from bench.targets import Figure
from fastload import DataLoader
from fastload.bench.measure import memory_bytes

WORKERS = 8
ROWS, ROW_BYTES = 512, 1 << 20
TIME, MEMORY = 0.6, 0.5


class Large(Dataset[torch.Tensor]):
    """Rows of an array."""

    def __init__(self) -> None:
        self.rows = np.ones((ROWS, ROW_BYTES), np.uint8)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index, :1000].copy())


@dataclass(frozen=True, slots=True)
class Took:
    """Until the first batch."""

    wall_s: float
    cpu_s: float
    memory_bytes: int


def figures(rounds: int) -> list[Figure]:
    """As parts of torch's."""
    ours, theirs = in_turn(rounds, in_a_process)
    both = list(zip(ours, theirs, strict=True))
    return [
        Figure("8 spawned workers, 512 MiB: first batch after", "s", [took.wall_s for took in ours]),
        Figure("the same, of torch's time", "", [a.wall_s / b.wall_s for a, b in both], at_most=TIME),
        Figure("the same, of torch's memory", "", [a.memory_bytes / b.memory_bytes for a, b in both], at_most=MEMORY),
        Figure("the same, of torch's CPU time", "", [a.cpu_s / b.cpu_s for a, b in both]),
    ]


def in_a_process(kind: Callable[..., Any]) -> Took:
    """One start."""
    name = "torch" if kind is TorchLoader else "fastload"
    ended = subprocess.run([sys.executable, "-m", "bench.spawned", name], stdout=subprocess.PIPE, check=True, text=True)
    return Took(**json.loads(ended.stdout))


def main() -> None:
    """Start, and print what it took."""
    from fastload.bench.measure import cpu_s

    kind: Callable[..., Any] = TorchLoader if sys.argv[1] == "torch" else DataLoader
    dataset = Large()
    before, began = cpu_s([os.getpid()]), time.monotonic()
    batches = iter(kind(dataset, batch_size=4, num_workers=WORKERS, multiprocessing_context="spawn"))
    next(batches)
    wall_s = time.monotonic() - began
    everybody = [os.getpid()]
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s(everybody) - before, "memory_bytes": memory_bytes(everybody)}))


if __name__ == "__main__":
    main()
