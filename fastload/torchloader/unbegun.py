"""The state of a loader that was not iterated: that of an iteration which begins now, and does not begin.

accelerate asks for it of each loader that it is given. To begin an iteration for that would start workers which nobody
may ever want, and draw seeds from the user's random numbers at another moment than torch's loader does. So those are
drawn as an iteration draws them and put back; one that begins while they are the same has this state.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterDataPipe
from torch.utils.data.dataloader import _DatasetKind

from fastload.torchloader.order import Mark, OrderIterator, is_stateful
from fastload.torchloader.progress import Progress, WorkersProgress
from fastload.torchloader.randomness import Randomness, generators_of
from fastload.torchloader.saved import State


def is_known_unbegun(loader: Any) -> bool:
    """Whether that can be told: not where a data set or sampler says itself where it is once it has begun."""
    sampler = loader._index_sampler
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return not (isinstance(loader.dataset, IterDataPipe) or is_stateful(loader.dataset) or is_stateful(inner))


def unbegun_state(loader: Any) -> State:
    """The state of an iteration before its first batch."""
    generators = generators_of(loader)
    at_iter = Randomness.now(generators)
    base_seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())
    at_first = Randomness.now(generators)
    at_iter.restore(generators)
    progress = _progress(loader)
    progress.base_seed, progress.length = base_seed, loader._IterableDataset_len_called
    if loader._dataset_kind == _DatasetKind.Map:
        progress.order = _Undrawn(at_first if loader.num_workers else at_iter, at_first)
    return progress.state()


def _progress(loader: Any) -> Progress:
    is_iterable = loader._dataset_kind == _DatasetKind.Iterable
    if loader.num_workers:
        workers = WorkersProgress({}, is_iterable=is_iterable, num_workers=loader.num_workers)
        workers.begin(None, None)
        return workers
    fetcher = SimpleNamespace(dataset=loader.dataset, dataset_iter=iter(()) if is_iterable else None)
    return Progress({}, fetcher=fetcher)


@dataclass(frozen=True)
class _Undrawn(OrderIterator):
    """An order of which nothing was given."""

    at_iter: Randomness
    at_first: Randomness

    def settle(self) -> None:
        """It does not change."""

    def mark(self) -> Mark:
        return Mark()
