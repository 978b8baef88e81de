"""Mixture: several data sets read as one, by weights.

The source of each sample is a function of weights, seed and epoch, and each source is read in its own order, by the
same nodes as if it were read alone (see `plan.mixture`). So a mixture keeps the promises of a data set: the same global
batches at every world size, every sample of a source once in each of its epochs, and a state of a few integers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from fastload.arguments import checked_batch_size, checked_seed
from fastload.callers import public
from fastload.dataset import StreamingDataset
from fastload.dataset_base import BatchOf, DatasetBase, Result, Row, Sample, Unsaid
from fastload.errors import ConfigError
from fastload.kernels import compile_in_background
from fastload.pipeline.epoch_pass import EpochPass
from fastload.pipeline.finish import Function, Mixing
from fastload.pipeline.gather import Skips
from fastload.pipeline.job import PassStart
from fastload.plan import (
    MixtureOptions,
    Position,
    Ranks,
    Stop,
    Tail,
    check_stop,
    check_tail,
    check_weights,
    sample_count_of_rank,
)
from fastload.plan.mixture import mixture_cursor

Weight = float | Sequence[tuple[int, float]]


class Mixture(DatasetBase[Sample]):
    """Samples of several data sets, each as often as its weight says.

    `sources`: pairs of a `StreamingDataset` and its weight: a number, in proportion to the others', or a schedule
    `[(0, 1.0), (1_000_000, 0.2)]`: from that many samples of the epoch on, over all ranks, that weight. Every run of
    samples holds each source within about one sample of its share.

    `stop`: when an epoch ends. "first": before the first source would begin a second time. "all": when every source has
    been gone through; those that end sooner begin again, in another order. "never": it does not, and `len` is a
    TypeError.

    `seed` settles where sources come; their own seeds settle their orders. `tail` is as in `StreamingDataset`; those of
    the sources are not used, nor are their epochs: `set_epoch` belongs to the mixture. `batch_size` is for use in
    torch's own DataLoader.

    Sources may have differing shards, formats, sizes, caches and decoders. What they yield must be alike: the same
    columns, each of the same kind (and dtype, and shape where it has one), all dicts or all tuples; and all must have
    the same ranks and `partitions`. A dict has `__source__` beside `__key__` and `__url__`: the number of the source,
    in a batch an int64 tensor. Raises `ConfigError`.
    """

    if TYPE_CHECKING:

        @overload
        def map(self, function: Callable[[Any], Unsaid]) -> Mixture[Any]: ...
        @overload
        def map(self, function: Callable[[Any], dict[str, Any]]) -> Mixture[Row]: ...
        @overload
        def map(self, function: Callable[[Any], Result]) -> Mixture[Result]: ...
        def map(self, function: Function) -> Mixture[Any]: ...

        @overload
        def map_batch(self, function: Callable[[Any], Unsaid]) -> Mixture[Any]: ...
        @overload
        def map_batch(self, function: Callable[[Any], dict[str, Any]]) -> Mixture[Row]: ...  # type: ignore[overload-overlap]
        @overload
        def map_batch(self, function: Callable[[Any], Result]) -> Mixture[BatchOf[Result]]: ...
        def map_batch(self, function: Function) -> Mixture[Any]: ...

    @public
    def __init__(
        self,
        sources: Sequence[tuple[StreamingDataset[Sample], Weight]],
        *,
        seed: int = 0,
        stop: Stop = "first",
        tail: Tail = "pad",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(checked_batch_size(batch_size), check_tail(tail))
        pairs = _checked_pairs(sources)
        self._sources = [dataset for dataset, _ in pairs]
        self._options = MixtureOptions(
            check_weights([weight for _, weight in pairs]), checked_seed(seed), check_stop(stop)
        )
        self._names = _tuple_names(self._sources)
        self._is_compiling = False

    @property
    def sources(self) -> list[StreamingDataset]:
        """The data sets, by number."""
        return list(self._sources)

    @property
    def seed(self) -> int:
        """What settles where sources come; their own seeds settle their orders."""
        return self._options.seed

    def shuffled(self) -> Self:
        mixture = copy.copy(self)
        mixture._sources = [dataset.shuffled() for dataset in self._sources]
        return mixture

    def __repr__(self) -> str:
        weights = [steps[0][1] if len(steps) == 1 else list(steps) for steps in self._options.weights]
        sources = list(zip(self._sources, weights, strict=True))
        return f"Mixture({sources}, seed={self.seed}, stop={self._options.stop!r}, epoch={self.epoch})"

    @property
    def has_functions(self) -> bool:
        """Whether functions of the user's are applied to samples of a source, or to its own samples or batches."""
        return super().has_functions or any(dataset.has_functions for dataset in self._sources)

    @property
    @public
    def sample_count(self) -> int:
        """Samples of the next epoch, over all ranks and without repeats. TypeError while it is not known: see `len`."""
        if self._options.stop == "never":
            raise TypeError('a mixture with stop="never" has no end, and so no length')
        counts = [dataset.known_counts() for dataset in self._sources]
        plans = [dataset.plan() for dataset in self._sources]
        cursor = mixture_cursor(plans, self._options, self.next_epoch(), Ranks(), 1)
        for number, each in enumerate(counts):
            cursor.add_counts(number, np.arange(len(each), dtype=np.int32), each)
        assert cursor.total is not None, "all is counted"
        return cursor.total

    @public
    def __len__(self) -> int:
        """Samples of this rank in the next epoch, repeats included. TypeError, with the cure, where it is not known."""
        return sample_count_of_rank(self.sample_count, self.ranks, self.tail, self.partitions)

    def __getitem__(self, number: Any) -> Any:
        """TypeError: samples of a mixture have no numbers."""
        raise TypeError(
            f"mixture[{number!r}]: the samples of a mixture have no numbers; iterate it, or read one of a source: "
            f"mixture.sources[0][{number!r}]"
        )

    @property
    def ranks(self) -> Ranks:
        """Which share of the samples is this process's; settled at the first iteration."""
        return self._sources[0].ranks

    @property
    def partitions(self) -> int:
        """Into how many partitions each source is dealt."""
        return self._sources[0].partitions

    def begin(self, epoch: int, batch_size: int, **options: Any) -> EpochPass:
        if not self._is_compiling:
            self._is_compiling = True
            compile_in_background("mixing")
        self._settle(epoch, batch_size, options.get("start"))
        skips = Skips() if any(dataset.skips_errors for dataset in self._sources) else None
        with ExitStack() as undoing:
            opened = []
            for dataset in self._sources:
                opened.append(dataset.open(skips if dataset.skips_errors else None))
                undoing.callback(opened[-1].end)
            plans = [dataset.plan() for dataset in self._sources]
            cursor = mixture_cursor(plans, self._options, epoch, self.ranks, batch_size, tail=self.tail, **options)
            begun = EpochPass.over(cursor, opened, skips, Mixing(self._names, self._on_samples))
            undoing.pop_all()
        return begun

    def adopt(self, position: Position) -> None:
        assert position.mixture is not None, "it was read from a state of a mixture"
        for dataset, order in zip(self._sources, position.orders, strict=False):  # another number is refused later
            dataset.adopt_order(order)

    def read_position(self, state: Mapping[str, Any]) -> Position:
        return Position.from_mixture_state(state)

    def close(self) -> None:
        for dataset in self._sources:
            dataset.close()

    def _settle(self, epoch: int, batch_size: int, start: Position | None) -> None:
        options = {"stop": self._options.stop, "seed of the mixture": self._options.seed}
        settings = {**options, "weights": self._options.weights, "tail": self.tail, "batch_size": batch_size}
        samples, saved = (0, ()) if start is None else (start.samples, start.fingerprints)
        caches = [dataset.cache_name for dataset in self._sources]
        for dataset, fingerprint, cache in zip_longest(self._sources, saved[: len(caches)], caches):
            dataset.settle(settings, PassStart(epoch, fingerprint, samples), sharers=caches.count(cache))
        ranks = [dataset.ranks for dataset in self._sources]
        if len(set(ranks)) > 1:
            raise ConfigError(f"the sources of a mixture have the ranks {ranks}; give all the same rank and world_size")


def _checked_pairs(sources: Any) -> list[tuple[StreamingDataset, Any]]:
    pairs = list(sources) if isinstance(sources, Sequence) else []
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"sources={sources!r} must be a list of (data set, weight), with one or more")
    for number, (dataset, _) in enumerate(pairs):
        if not isinstance(dataset, StreamingDataset):
            raise ConfigError(f"source {number} is a {type(dataset).__name__}; it must be a fastload.StreamingDataset")
        if dataset.on_batches:
            raise ConfigError(
                f"source {number} has map_batch() functions; give them to the mixture, whose batches they are"
            )
        if any(dataset is other for other, _ in pairs[:number]):
            raise ConfigError(f"source {number} is there twice; add up its weights, or make another data set of it")
    return [(dataset, weight) for dataset, weight in pairs]


def _tuple_names(sources: Sequence[StreamingDataset]) -> tuple[str, ...] | None:
    """The columns of the tuples that all sources yield; None where all yield dicts."""
    columns = [dataset.columns for dataset in sources]
    names = [each.names for each in columns]
    # What functions make of a sample may have other columns: one source's `txt` is mapped to be another's `text`.
    known = {frozenset(own) for own, each in zip(names, sources, strict=True) if own and not each.has_functions}
    if len({each.as_tuple for each in columns}) > 1:
        raise ConfigError("some sources of a mixture yield tuples and some dicts; give all the same as_tuple")
    if len(known) > 1 or (columns[0].as_tuple and len(set(names)) > 1):
        raise ConfigError(
            f"the sources of a mixture have the columns {[list(each or ()) for each in names]}; give all the same, "
            "with columns=[...] or decode={...}"
        )
    return names[0] if columns[0].as_tuple else None
