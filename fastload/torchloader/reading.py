"""How a `DataLoader` reads a data set that is not fastload's own: what the loader holds beside torch's attributes.

A loader that was not iterated yet has a state too, and accelerate asks each loader for it. To begin an iteration for
that would start workers that may never be used, and draw seeds from the user's random generators at another moment than
torch's loader does. So `initial_state` draws them as an iteration would and restores the generators; an iteration that
begins while the generators are unchanged has this state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterDataPipe
from torch.utils.data.dataloader import _DatasetKind

from fastload import callers
from fastload.stats import PlainMeter, empty_stats
from fastload.torchloader.iterators import ResumableIterator, SingleProcessIterator, WorkersIterator
from fastload.torchloader.loader_state import LoaderState, SavedState, read_state, state_for_user
from fastload.torchloader.process_iterator import ProcessIterator
from fastload.torchloader.progress import IterationProgress, WorkersProgress
from fastload.torchloader.randomness import Randomness, generators_of, preserve_global_generators
from fastload.torchloader.sampling import Mark, OrderIterator, is_stateful, state_of
from fastload.torchloader.thread_iterator import ThreadIterator


def has_known_initial_state(loader: Any) -> bool:
    """Whether the initial state is known without beginning: not where a data set or sampler has its own state."""
    sampler = loader._index_sampler
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return not (isinstance(loader.dataset, IterDataPipe) or is_stateful(loader.dataset) or is_stateful(inner))


def initial_state(loader: Any) -> LoaderState:
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


def _progress(loader: Any) -> IterationProgress:
    is_iterable = loader._dataset_kind == _DatasetKind.Iterable
    if loader.num_workers:
        workers = WorkersProgress({}, is_iterable=is_iterable, num_workers=loader.num_workers)
        workers.begin(None, None)
        return workers
    fetcher = SimpleNamespace(dataset=loader.dataset, dataset_iter=iter(()) if is_iterable else None)
    return IterationProgress({}, fetcher=fetcher)


@dataclass(frozen=True)
class _Undrawn(OrderIterator):
    """An order that has given no index."""

    at_iter: Randomness
    at_first: Randomness

    def settle(self) -> None:
        """Nothing to fix."""

    def mark(self) -> Mark:
        return Mark()


class Reading:
    """The position of a loader, which is that of its latest iteration.

    It keeps the progress of that iteration alive, but not the iterator, so workers end as soon as the user drops it.
    """

    def __init__(self) -> None:
        self._progress: IterationProgress | None = None
        self._latest: Callable[[], ResumableIterator | None] = lambda: None
        self._loaded: tuple[LoaderState, SavedState] | None = None  # where the next iteration begins
        self._prepared: ResumableIterator | None = None  # the next iteration, begun early for its state
        self._has_warned = False
        self._meter: PlainMeter | None = None  # of the latest iteration, or the one that persistent workers made first

    def stats(self) -> dict[str, Any]:
        """The figures of the latest iteration."""
        latest = self._latest()
        if latest is not None and latest.meter is not None:
            self._meter = latest.meter
        return empty_stats(0) if self._meter is None else self._meter.stats()

    def iterator(self, loader: Any) -> Any:
        """Begin an iteration."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            return prepared
        loaded, self._loaded = self._loaded, None
        meter = PlainMeter(0 if self._meter is None else self._meter.epoch + 1, loader.num_workers)
        with meter.stalls.own("startup"):
            iterator = _begun(loader, None if loaded is None else loaded[1])
        iterator.meter = self._meter = meter
        self._progress, self._latest = iterator.progress, weakref.ref(iterator)
        return iterator

    def state_dict(self, loader: Any) -> LoaderState:
        """The position of the latest iteration; or of the next one, if a state was loaded or none has begun."""
        if self._loaded is not None:
            return self._loaded[0]
        if self._progress is None and has_known_initial_state(loader):
            return initial_state(loader)
        if self._progress is None:
            self._prepared = self.iterator(loader)
        assert self._progress is not None, "there was an iteration"
        latest = self._latest()
        if isinstance(latest, WorkersIterator):
            latest.wait_for_states()
        state, reasons = state_for_user(self._progress.state())
        if not is_stateful(loader.dataset):  # otherwise its workers have reported problems
            state_of(loader.dataset, reasons)
        for each in (loader.sampler, loader.batch_sampler):
            state_of(each, reasons)
        if reasons and not self._has_warned:
            self._has_warned = True
            callers.warn(
                f"the state of a loader over {type(loader.dataset).__name__} leaves out the state of one of its "
                f"parts: {reasons[0]}. That part is read as torch's loader reads it, and resuming from this "
                "state reads and discards everything before it. To avoid that, give the part state_dict() and "
                "load_state_dict(state), as in torchdata"
            )
        return state

    def load_state_dict(self, loader: Any, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken."""
        self._prepared = self._loaded = None
        if state != {}:  # as in torchdata: {} means the beginning
            is_iterable = bool(loader._dataset_kind == _DatasetKind.Iterable)
            saved = read_state(state, loader.dataset, is_iterable, loader.num_workers)
            self._loaded = dict(state), saved
        loader._iterator = None  # persistent workers cannot load a state

    def close(self, loader: Any) -> None:
        """End workers that wait for the next epoch."""
        waiting, loader._iterator = (self._prepared, loader._iterator), None
        self._prepared = None
        for iterator in waiting:
            if isinstance(iterator, WorkersIterator):
                iterator._shutdown_workers()


def _begun(loader: Any, saved: SavedState | None) -> ResumableIterator:
    kind = _kind(loader)
    if saved is None:
        return kind(loader)
    if not saved.is_finished:
        with (
            nullcontext() if kind is SingleProcessIterator else preserve_global_generators()
        ):  # which restores them itself
            return kind(loader, saved)
    if loader.num_workers and not loader.persistent_workers:
        return _next_epoch(loader, saved, lambda: kind(loader))
    if loader.num_workers and saved.discard and saved.num_workers == loader.num_workers:
        return _next_epoch(loader, saved, lambda: _advanced_to_end(loader, saved, kind))
    if loader.num_workers:
        return _next_epoch(loader, saved, lambda: kind(loader, saved))
    SingleProcessIterator(loader, saved)  # loads the data set's state
    return _next_epoch(loader, saved, lambda: SingleProcessIterator(loader))


def _kind(loader: Any) -> type[SingleProcessIterator] | type[ProcessIterator] | type[ThreadIterator]:
    if not loader.num_workers:
        return SingleProcessIterator
    return ThreadIterator if loader.workers == "thread" else ProcessIterator


def _advanced_to_end(loader: Any, saved: SavedState, kind: Callable[[Any, SavedState], Any]) -> Any:
    """The epoch after a finished one whose final worker states were not reported: workers replay to its end."""
    before = Randomness.now(generators_of(loader))
    iterator = kind(loader, replace(saved, is_finished=False))
    for _ in iterator:  # no batch is left
        pass
    before.restore(generators_of(loader))
    iterator._reset(loader)
    return iterator


def _next_epoch(loader: Any, saved: SavedState, begin: Callable[[], ResumableIterator]) -> ResumableIterator:
    """The epoch after a finished one, in the order that it would have had."""
    if saved.next_epoch is None:
        return begin()
    generators = generators_of(loader)
    before = Randomness.now(generators)
    saved.next_epoch.restore(generators)
    iterator = begin()
    if iterator.order is not None:
        iterator.order.settle()
    # A global generator that the order was drawn from stays advanced; the user's others are restored.
    before.restore_global_where_not(saved.next_epoch)
    return iterator
