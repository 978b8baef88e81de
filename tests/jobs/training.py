"""A small training whose result says exactly which samples each step had.

The model is linear. Gradients of single samples are rounded to multiples of 2^-20, so that their sums are exact in
float64: whatever ranks there are, the weights after a step depend on nothing but the set of its samples.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

import fastload
from tests.jobs.pool import Rank
from tests.jobs.reading import SMALL

_ROUND = 2.0**20
_LEARNING_RATE = 2.0**-12


@dataclass(frozen=True)
class Training:
    """What to train on, and where: `folder` gets the checkpoint and a log of each rank. After `held_after` steps ranks
    do nothing more, so that they are still there when they are killed.
    """

    urls: list[str]
    caches: list[str]
    folder: str
    batch_size: int
    epochs: int
    environment: Mapping[str, str]
    num_workers: int = 2
    save_every: int = 3
    held_after: int | None = None

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder) / "checkpoint.json"

    def log(self, rank: int) -> Path:
        return Path(self.folder) / f"log-{rank}.jsonl"

    def steps(self, world_size: int) -> dict[int, frozenset[str]]:
        """The samples of each step that all ranks have logged."""
        of_ranks = [dict(map(json.loads, self._lines(rank))) for rank in range(world_size)]
        common = set.intersection(*(set(steps) for steps in of_ranks))
        return {step: frozenset(key for steps in of_ranks for key in steps[step]) for step in sorted(common)}

    def _lines(self, rank: int) -> list[str]:
        text = self.log(rank).read_text() if self.log(rank).exists() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the last may be cut


def train(rank: Rank, training: Training) -> list[float]:
    """Train as `rank`, from the checkpoint on if there is one; the weights."""
    os.environ.update(training.environment)
    with fastload.Cache(training.caches[rank.node], **SMALL) as cache:
        dataset = fastload.StreamingDataset(
            training.urls, cache=cache, shuffle=True, seed=3, shuffle_window="32KiB", decode=_DECODE
        )
        loader: Any = fastload.DataLoader(dataset, batch_size=training.batch_size, num_workers=training.num_workers)
        try:
            return _trained(rank, training, loader)
        finally:
            loader.close()


_DECODE = {"cls": fastload.decode.integer()}


def _trained(rank: Rank, training: Training, loader: Any) -> list[float]:
    step, weights = 0, torch.zeros(4, dtype=torch.float64)
    epoch = 0
    if training.checkpoint.exists():
        saved = json.loads(training.checkpoint.read_text())
        step, weights = saved["step"], torch.tensor(saved["weights"], dtype=torch.float64)
        loader.load_state_dict(saved["loader"])
        epoch = saved["loader"]["epoch"]
    log = os.open(training.log(rank.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for _ in range(epoch, training.epochs):
            for batch in loader:
                gradient = _gradient(weights, batch["cls"])
                if rank.meets is not None:
                    distributed.all_reduce(gradient)
                weights -= _LEARNING_RATE * gradient
                step += 1
                os.write(log, json.dumps([step, list(batch["__key__"])]).encode() + b"\n")
                if rank.rank == 0 and step % training.save_every == 0:
                    _save(training.checkpoint, step, weights, loader)
                if step == training.held_after:
                    time.sleep(60)
    finally:
        os.close(log)
    return weights.tolist()


def _gradient(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    inputs = torch.stack([torch.ones_like(numbers), numbers % 7, numbers % 11, numbers % 13], dim=1).double()
    errors = inputs @ weights - (numbers % 17).double()
    return (inputs * errors[:, None] * _ROUND).round().sum(dim=0) / _ROUND


def _save(path: Path, step: int, weights: torch.Tensor, loader: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"step": step, "weights": weights.tolist(), "loader": loader.state_dict()}))
    part.replace(path)
