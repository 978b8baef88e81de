"""What a rank does in most of these tests: it reads a data set as a trainer would, and says what it got."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch.distributed as distributed

import fastload
from tests.jobs.pool import Rank

SMALL = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}


@dataclass(frozen=True)
class Reading:
    """What to read, and how. `caches` are the nodes' cache directories, one for each.

    Epochs from `epoch` on, `epochs` of them; or the first `take` batches (None: all) of one. `state` is loaded first;
    it says the epoch itself. `dataset` has the arguments of the data set, and `skips`, whether to decode samples and
    leave out those that cannot be. `mixture`: the weight of this data set, the URLs and weights of others, and the
    arguments of the mixture.
    """

    urls: list[str]
    caches: list[str]
    dataset: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    mixture: tuple[Any, list[tuple[list[str], Any]], Mapping[str, Any]] | None = None
    epoch: int | None = None
    epochs: int = 1
    take: int | None = None
    state: Mapping[str, Any] | None = None

    def with_(self, **changes: Any) -> Reading:
        return replace(self, **changes)

    def open(self, cache: fastload.Cache) -> Any:
        """The data set."""
        if self.mixture is None:
            return self._open(self.urls, cache)
        weight, others, options = self.mixture
        sources = [(self.urls, weight), *others]
        return fastload.Mixture([(self._open(urls, cache), weight) for urls, weight in sources], **options)

    def _open(self, urls: list[str], cache: fastload.Cache) -> fastload.StreamingDataset:
        options = {"columns": ["cls"], **self.dataset}
        if options.pop("skips", False):
            options |= {"columns": None, "decode": {"cls": fastload.decode.integer()}, "on_error": "skip"}
        return fastload.StreamingDataset(urls, cache=cache, **options)


@dataclass(frozen=True)
class Read:
    """What a rank got: the keys of each batch in each epoch, `stats()` after each, and its state at the end."""

    epochs: list[list[list[str]]]
    stats: list[dict[str, Any]]
    state: dict[str, Any]

    @property
    def batches(self) -> list[list[str]]:
        (batches,) = self.epochs
        return batches


def read(rank: Rank, reading: Reading) -> Read:
    """Read as `rank`."""
    os.environ.update(reading.environment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows that do not fit these arenas; tested elsewhere
        with fastload.Cache(reading.caches[rank.node], **reading.cache) as cache:
            return _read(reading.open(cache), reading, rank)


def _read(dataset: Any, reading: Reading, rank: Rank) -> Read:
    loader = fastload.DataLoader(dataset, **reading.loader)
    try:
        if reading.state is not None:
            loader.load_state_dict(reading.state)
        elif reading.epoch is not None:
            dataset.set_epoch(reading.epoch)
        epochs, stats = [], []
        for _ in range(reading.epochs):
            batches = iter(loader)
            epochs.append([batch["__key__"] for batch in islice(batches, reading.take)])
            state = loader.state_dict()
            stats.append(loader.stats())
            del batches
        if rank.meets is not None:
            distributed.barrier()  # a step of a trainer is over when it is over for all
        return Read(epochs, stats, state)
    finally:
        loader.close()
