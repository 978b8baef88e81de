"""Map-style data sets as they are: small tensors, texts, and a folder of pictures with torchvision's transforms.

Both loaders read the same data set with the same settings and the default `collate_fn`. CPU time is that of the trainer
and its workers.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from bench.decode import MEAN, SIZE, SMALL, STD, crops
from bench.loaders import as_a_worker, cpu_s, in_turn
from bench.targets import Figure

SAMPLE_FLOATS = 256  # 1 kB
SMALL_COUNT, SMALL_BATCH = 200 * 1024, 1024
TEXT_BYTES, TEXT_COUNT, TEXT_BATCH = 1000, 3000 * 64, 64
# Without workers both run the same code, but for a microsecond a batch.
AS_FAST = 0.98
PICTURES, PICTURE_BATCH, CLASSES = 4096, 128, 8


@dataclass(frozen=True, slots=True)
class Took:
    """Of one epoch."""

    wall_s: float
    cpu_s: float


class Small(Dataset[torch.Tensor]):
    """Rows of a tensor."""

    def __init__(self) -> None:
        self.rows = torch.ones(SMALL_COUNT, SAMPLE_FLOATS)

    def __len__(self) -> int:
        return SMALL_COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class Texts(Dataset[str]):
    """Strings: nothing that shared memory is made for, and hardly any work."""

    def __len__(self) -> int:
        return TEXT_COUNT

    def __getitem__(self, index: int) -> str:
        return str(index).ljust(TEXT_BYTES)


def small_figures(rounds: int) -> list[Figure]:
    """Tensors without workers, with one, with two; texts with one."""
    dataset = Small()
    found = []
    samples_s = [as_a_worker(partial(samples_alone_s, dataset)) for _ in range(rounds)]
    for workers, times in ((0, AS_FAST), (1, 1.5), (2, 1.5)):

        def epoch(kind: Callable[..., Any], workers: int = workers) -> Took:
            with collected() if not workers else nullcontext():
                return one_epoch(kind(dataset, batch_size=SMALL_BATCH, shuffle=True, num_workers=workers))

        ours, theirs = in_turn(rounds, epoch)
        found += ratios(f"1 kB tensors, {workers} workers", ours, theirs, times=times)
        if workers == 1:
            limit = [b.wall_s / alone_s for b, alone_s in zip(theirs, samples_s, strict=True)]
            found.append(Figure("1 kB tensors, taking the samples alone: times torch's rate", "", limit))
    texts = Texts()
    both = in_turn(rounds, lambda kind: one_epoch(kind(texts, batch_size=TEXT_BATCH, num_workers=1)))
    return found + ratios("1 kB texts, 1 worker", *both, times=AS_FAST)


@contextmanager
def collected() -> Iterator[None]:
    """The garbage collector leaves alone what is there: a look at all of it costs a third of an epoch, and which loader
    it comes by in is chance.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def samples_alone_s(dataset: Small) -> float:
    """What no worker can go below: the data set's own calls."""
    order = torch.randperm(SMALL_COUNT).tolist()
    began = time.perf_counter()
    for first in range(0, SMALL_COUNT, SMALL_BATCH):
        _ = [dataset[index] for index in order[first : first + SMALL_BATCH]]
    return time.perf_counter() - began


def folder_figures(rounds: int, folder: Path) -> list[Figure]:
    """torchvision's `ImageFolder` with its usual transforms, two workers."""
    from torchvision import datasets, transforms

    write_pictures(folder)
    dataset = datasets.ImageFolder(
        str(folder),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        ),
    )

    def epoch(kind: Callable[..., Any]) -> Took:
        return one_epoch(kind(dataset, batch_size=PICTURE_BATCH, shuffle=True, num_workers=2))

    return ratios("image folder, 2 workers", *in_turn(rounds, epoch), times=1.1, cpu=1.0)


def one_epoch(loader: Any) -> Took:
    """From the first batch to the last, and all of its CPU time."""
    cpu_before = cpu_s()
    batches = iter(loader)
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    wall_s = time.perf_counter() - began
    del batches  # its workers are waited for
    return Took(wall_s, cpu_s() - cpu_before)


def ratios(title: str, ours: list[Took], theirs: list[Took], *, times: float, cpu: float | None = None) -> list[Figure]:
    """Within a round."""
    both = list(zip(ours, theirs, strict=True))
    return [
        Figure(f"{title}: times torch's rate", "", [b.wall_s / a.wall_s for a, b in both], at_least=times),
        Figure(f"{title}: CPU time, of torch's", "", [a.cpu_s / b.cpu_s for a, b in both], at_most=cpu),
    ]


def write_pictures(folder: Path) -> None:
    """JPEGs of 500 x 375, in a folder a class."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, file in enumerate(crops(SMALL, 93, PICTURES)):
        place = folder / str(number % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(file)
