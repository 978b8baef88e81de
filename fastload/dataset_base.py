"""The base of StreamingDataset and Mixture: iterations, epochs, and a state.

There are two ways to iterate: `iter(dataset)` gives samples one by one (in torch's own DataLoader, in each of its
workers); `fastload.DataLoader` takes whole batches through `begin`.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Generic, NewType, Self

import torch.utils.data
from typing_extensions import TypeVar

from fastload import callers
from fastload.arguments import checked_epoch, checked_function
from fastload.callers import public
from fastload.errors import ConfigError
from fastload.pipeline.delivery import InlineRun, Iteration
from fastload.pipeline.epoch_counter import EpochCounter
from fastload.pipeline.epoch_pass import EpochPass
from fastload.pipeline.finish import Filter, Finish, Function
from fastload.pipeline.resume import Delivery, IterationState
from fastload.plan import Position, Ranks, Split, Tail

# Samples that are gathered together when they are asked for one by one: enough to share the cost of a gather, few
# enough that the first comes at once.
_SAMPLES_AT_ONCE = 32


# For type checkers: what a sample of a data set is, and so what a loader makes of several.
Row = NewType("Row", dict[str, Any])  # by column; a batch is a dict, too
Columns = NewType("Columns", tuple[Any, ...])  # of a sample, or of a batch
Result = TypeVar("Result", covariant=True)


class BatchOf(Generic[Result]):
    """What `map_batch` has made of a batch. There are no objects of it: it has no samples."""


class Unsaid:
    """What only `Any` is taken for: a sample of which nothing is known."""


Sample = TypeVar("Sample", covariant=True, default=Any)


class DatasetBase(torch.utils.data.IterableDataset[Sample]):
    """The base of `StreamingDataset` and `Mixture`."""

    def __init__(self, batch_size: int | None, tail: Tail) -> None:
        super().__init__()
        self._batch_size, self._tail = batch_size, tail
        self._on_samples: tuple[Function, ...] = ()
        self._on_batches: tuple[Function, ...] = ()
        self._epochs = EpochCounter()
        self._resumed: IterationState | None = None  # where the next iteration over samples begins
        self._delivery: Delivery | None = None  # how far the last of them is
        self._warned: set[str] = set()

    @property
    def batch_size(self) -> int | None:
        """The batch size that was given."""
        return self._batch_size

    @property
    def tail(self) -> Tail:
        """What is done where ranks do not divide the samples."""
        return self._tail

    @property
    @abstractmethod
    def seed(self) -> int:
        """The seed of its order."""

    @property
    def epoch(self) -> int:
        """The epoch of the iteration that began last; before the first, and after `set_epoch`, of the next."""
        return self._epochs.current()

    @abstractmethod
    def shuffled(self) -> Self:
        """As a loader's `shuffle=True` means it: itself where it shuffles anyhow; where that was left open, one
        that does, with the same epochs. Raises `ConfigError` where it was given `shuffle=False`.
        """

    @public
    def map(self, function: Function) -> DatasetBase[Any]:
        """This data set with `function` applied to each sample, after those that are applied already.

        It is given what iterating yields (a dict or a tuple, decoded), and what it returns takes its place. A
        `fastload.DataLoader` calls it in its worker processes, unless it has `workers="thread"`; the function has
        to pickle where these are not forked. There the generators of Python, numpy and torch are seeded before each
        sample, from the data set's seed, the epoch and the sample: what they give is the same with any number of
        workers, and after a resume. Batches of samples that were mapped are collated by torch's `default_collate`, or
        by the loader's `collate_fn`. Raises `ConfigError`.
        """
        if self._on_batches:
            raise ConfigError("map() after map_batch(): functions on samples come first; call map() before")
        return self._with_functions((*self._on_samples, checked_function(function, "map")), ())

    @public
    def filter(self, function: Function) -> Self:
        """This data set with only those samples for which `function` gives something true, after what is applied
        already; it is called where and as `map` says.

        What is left out is left out of its batch: batches get shorter, never fewer, and other batches keep their
        samples, so that an epoch has as many steps on all ranks, and a state stays exact. `len()` counts all samples,
        and `stats()["filtered"]` those that were left out. Samples are not read by number where some are left out.
        """
        if self._on_batches:
            raise ConfigError("filter() after map_batch(): functions on samples come first; call filter() before")
        return self._with_functions((*self._on_samples, Filter(checked_function(function, "filter"))), ())

    @public
    def map_batch(self, function: Function) -> DatasetBase[Any]:
        """This data set with `function` applied to each batch of a `fastload.DataLoader`, where and as `map` says."""
        return self._with_functions(self._on_samples, (*self._on_batches, checked_function(function, "map_batch")))

    @property
    def on_batches(self) -> tuple[Function, ...]:
        """The functions that are applied to batches."""
        return self._on_batches

    @property
    def has_functions(self) -> bool:
        """Whether functions of the user's are applied to its samples or batches."""
        return bool(self._on_samples or self._on_batches)

    def _with_functions(self, on_samples: tuple[Function, ...], on_batches: tuple[Function, ...]) -> Self:
        mapped = copy.copy(self)
        mapped._on_samples, mapped._on_batches = on_samples, on_batches
        mapped._epochs = EpochCounter()  # it is iterated by itself
        mapped._epochs.set(self.next_epoch())
        return mapped

    @property
    @abstractmethod
    def sample_count(self) -> int:
        """Samples of an epoch, over all ranks and without repeats. TypeError while it is not known."""

    @property
    @abstractmethod
    def ranks(self) -> Ranks:
        """Which share of the samples is this process's; settled at the first iteration."""

    @property
    @abstractmethod
    def partitions(self) -> int:
        """Into how many partitions the data is dealt."""

    @abstractmethod
    def begin(self, epoch: int, batch_size: int, **options: Any) -> EpochPass:
        """Prepare one pass over `epoch`, from `start` on; its `end` must follow. For loaders.

        `options`: drop_last, start, worker, split, as cursors have them. Raises `StateError` where `start` belongs to
        another run.
        """

    @abstractmethod
    def adopt(self, position: Position) -> None:
        """Go on in the order of a saved position, where it was left to us."""

    @abstractmethod
    def read_position(self, state: Mapping[str, Any]) -> Position:
        """The position that a loader saved. Raises `StateError`."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect from the cache. The data set can still be used, and connects again."""

    @public
    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`, also in worker processes that exist already.

        It begins at the beginning, unless a state of that epoch was loaded: then it goes on there.
        """
        epoch = checked_epoch(epoch)
        if self._resumed is not None and self._resumed.epoch != epoch:
            self._resumed = None
        self._epochs.set(epoch)

    def warn_once(self, message: str) -> None:
        """Warn once of what recurs in every epoch."""
        if message not in self._warned:
            self._warned.add(message)
            callers.warn(message)

    def begin_epoch(self) -> int:
        """The epoch of an iteration that begins now, for loaders."""
        return self._epochs.begin()

    def next_epoch(self) -> int:
        """The epoch that the next iteration will be."""
        return self._epochs.next()

    @public
    def __iter__(self) -> Iterator[Sample]:
        """The samples of this rank (in a torch worker: that worker's part of them), and the next epoch each time."""
        if self._on_batches:
            raise ConfigError("map_batch() functions need batches, and this iterates samples; use fastload.DataLoader")
        info = torch.utils.data.get_worker_info()
        worker = (0, 1) if info is None else (info.id, info.num_workers)
        split: Split = "batches" if self._batch_size else "samples"
        resumed = self._resumed
        if resumed is None:
            # With workers they agree on the epoch; without, it is only taken once the pass has begun.
            epoch = self.next_epoch() if info is None else self._epochs.begin(info.seed - info.id, info.num_workers)
            resumed = IterationState(epoch, worker)
        resumed.check_worker(worker)
        size = self._batch_size or _SAMPLES_AT_ONCE
        current = self.begin(resumed.epoch, size, start=resumed.position, worker=worker, split=split)
        if info is None or self._resumed is not None:
            self._epochs.go_on_after(resumed.epoch)
        self._resumed = None
        finish = partial(Finish(current.builder, "samples"), slots=current.slots)
        make = partial(current.make, finish=partial(map, finish), memory=current.memory)
        run = InlineRun(current.feed, make, current.waits)
        entries = Iteration(run, current.interrupted, current.end)
        warn = self.warn_once if info is None and not resumed.is_within_epoch else None
        self._delivery = Delivery(current.cursor, resumed, worker[1], warn, current.skips)
        return itertools.chain.from_iterable(self._delivery.iterators(entries))

    @public
    def state_dict(self) -> dict[str, Any]:
        """Where the iteration over samples that began last stands; JSON's own types.

        In a worker of torch's loader, where that worker stands: torchdata's `StatefulDataLoader` calls this there. A
        `fastload.DataLoader` has a state of its own, which is the one to save.
        """
        if self._resumed is not None:
            return self._resumed.to_state()
        if self._delivery is not None:
            return self._delivery.state().to_state()
        return IterationState(self.next_epoch()).to_state()

    @public
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration over samples where `state` was taken. Raises `StateError` for what is no such state.

        It goes on as the same worker of as many.
        """
        resumed = IterationState.from_state(state, self.read_position)
        if resumed.position is not None:
            self.adopt(resumed.position)
        self._resumed = resumed

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs."""
        return {**self.__dict__, "_delivery": None}
