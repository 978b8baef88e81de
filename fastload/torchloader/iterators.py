"""Iterators over a data set in torch's way, which can resume from a saved state and report their own.

`ResumableIterator` is the base of all. In the method resolution order it lies between torch's iterators and their base,
whose methods they call, so it acts at the right moments: after the base has drawn the seed and before a worker is
started; after the base has created the sampler's iterator and before that is asked for an index.
`SingleProcessIterator` is the one without workers. `WorkersIterator` is the base of those with worker processes
(`process_iterator`) and threads (`thread_iterator`).
"""

from __future__ import annotations

import pickle
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import islice
from typing import Any

from torch.utils.data import IterDataPipe
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _DatasetKind,
    _InfiniteConstantSampler,
    _SingleProcessDataLoaderIter,
)

from fastload.device import NO_MOVER, Mover, mover_to
from fastload.errors import StateError
from fastload.stats import PlainMeter
from fastload.timing import activity
from fastload.torchloader.loader_state import WORKER_ID, SavedState, SavedWorker, snapshot_interval
from fastload.torchloader.progress import IterationProgress, WorkersProgress
from fastload.torchloader.randomness import generators_of, preserve_global_generators
from fastload.torchloader.sampling import Order, OrderIterator, load_state
from fastload.torchloader.worker import DatasetEnded, Worker
from fastload.transport.packing import Arrived


class LoaderView:
    """A loader as passed to torch's iterators: some attributes are replaced, and its sampler is an `Order`."""

    def __init__(self, loader: Any, **others: Any) -> None:
        self._loader = loader
        if not isinstance(loader.sampler, _InfiniteConstantSampler):
            self._index_sampler = Order(loader._index_sampler, generators_of(loader))
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class ResumableIterator(_BaseDataLoaderIter):
    """Set `saved` (where to begin), `progress` and `mover` before torch's constructor runs."""

    saved: SavedState | None
    progress: IterationProgress
    mover: Mover | None  # if batches are to arrive on a device
    meter: PlainMeter | None = None  # set once it has begun

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._base_seed: int
        if self.saved is not None and self.saved.base_seed is not None:
            self._base_seed = self.saved.base_seed
        if self.saved is not None and self.saved.shared_seed is not None:
            self._shared_seed = self.saved.shared_seed
        if self.saved is not None and self.saved.is_finished and self.saved.next_epoch is not None:
            # Persistent workers draw no seed for another epoch.
            self.saved.next_epoch.restore(generators_of(loader))

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if self.meter is not None:
            self.meter = self.meter.next()
        begun_with = self._shared_seed
        super()._reset(loader, first_iter)
        if first_iter:  # torch draws another seed for data pipes, which reaches workers with the next epoch
            self._shared_seed = begun_with

    def __next__(self) -> Any:
        meter = self.meter
        if meter is None:
            return self._next_batch()
        batch = meter.stalls.next(self._next_batch, "map")
        meter.delivered()
        return batch

    def _next_batch(self) -> Any:
        try:
            batch = super().__next__()
        except StopIteration:
            self.progress.is_finished = True
            raise
        self.progress.num_yielded = self._num_yielded
        return batch

    def discard(self, batches: int, failed: frozenset[int]) -> None:
        """Make that many batches and discard them. Turns in `failed` raised errors before the state was taken.

        Raises `StateError` where there are fewer.
        """
        for turn in range(batches + len(failed)):
            with suppress(Exception) if turn in failed else nullcontext():
                try:
                    next(self)
                except StopIteration:
                    raise StateError(
                        f"{batches} batches have to be made again to reach the position of the state, and there are "
                        f"only {turn}: it belongs to another data set, sampler or batch size"
                    ) from None

    def delivered(self, batch: Any) -> Any:
        """The batch for the user; afterwards it counts as delivered."""
        if self.mover is None:
            return batch
        account = activity.current()
        before = account.switch("transfer")
        try:
            return self.mover.deliver(batch)
        finally:
            account.switch(before)

    @property
    def order(self) -> OrderIterator | None:
        """The sampler's iterator; None for an iterable data set, whose sampler is a stub."""
        return self._sampler_iter if isinstance(self._sampler_iter, OrderIterator) else None

    def note_seeds(self) -> None:
        """Copy the values of the whole iteration to the progress."""
        self.progress.length = self._IterableDataset_len_called
        self.progress.base_seed, self.progress.shared_seed = self._base_seed, self._shared_seed


class _Collate:
    """The user's `collate_fn`, in the calling thread."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        account = activity.current()
        before = account.switch("collate")
        try:
            return self._collate(samples)
        finally:
            account.switch(before)


class SingleProcessIterator(_SingleProcessDataLoaderIter, ResumableIterator):
    """One pass over a data set in the calling thread, which continues where `saved` was taken."""

    def __init__(self, loader: Any, saved: SavedState | None = None) -> None:
        self.saved = saved
        self.mover = mover_to(loader.device)
        self.progress = IterationProgress(generators_of(loader))
        if saved is not None:
            load_state(loader.dataset, saved.workers[0].dataset_state, "data set")
        # The saved iteration has drawn torch's seed already, so the generators are restored. A data set whose
        # `load_state_dict` sets them is not undone.
        with nullcontext() if saved is None else preserve_global_generators():
            super().__init__(LoaderView(loader, collate_fn=_Collate(loader.collate_fn)))
        if saved is not None:
            self._resume(saved, saved.workers[0], loader.batch_size)
            self.progress.begun_at = saved.workers[0]
        self.progress.order, self.progress.fetcher = self.order, self._dataset_fetcher
        self.progress.num_yielded = self._num_yielded
        self.note_seeds()
        if saved is not None and not saved.is_finished:
            self.discard(saved.discard, saved.failed)

    def _next_data(self) -> Any:
        batch = super()._next_data()  # type: ignore[no-untyped-call]
        return self.delivered(batch if self.mover is None else self.mover.begin(batch))

    def _resume(self, saved: SavedState, worker: SavedWorker, batch_size: int | None) -> None:
        self._num_yielded = saved.num_yielded
        self._IterableDataset_len_called = saved.length  # type: ignore[assignment]
        if self.order is not None:
            if not saved.is_finished:
                self.order.resume(saved.order)
            return
        fetcher: Any = self._dataset_fetcher
        if worker.is_unknown:
            skipped = 0 if saved.is_finished else saved.num_yielded * (batch_size or 1)
            for _ in islice(fetcher.dataset_iter, skipped):
                pass  # skipped samples are not collated
            return
        load_state(fetcher.dataset_iter, worker.iterator_state, "data set's iterator")
        fetcher.ended = worker.has_ended


class WorkersIterator(ResumableIterator):
    """An iteration with workers. Call `_configure` before torch's constructor, and `_catch_up` after it."""

    progress: WorkersProgress

    @abstractmethod
    def wait_for_states(self) -> None:
        """Wait until the initial state of each worker's data set is known, if it has one."""

    @abstractmethod
    def _shutdown_workers(self) -> None:
        """End the workers and wait for them."""

    def _configure(self, loader: Any, saved: SavedState | None) -> SavedState | None:
        """The state that workers can begin with: None where all batches have to be made again and discarded."""
        self._user_dataset = loader.dataset
        self.mover = mover_to(loader.device)
        is_iterable = loader._dataset_kind == _DatasetKind.Iterable
        self.progress = WorkersProgress(generators_of(loader), is_iterable=is_iterable, num_workers=loader.num_workers)
        self._discard = 0 if saved is None or saved.is_finished else saved.discard
        self._failed = frozenset[int]() if saved is None else saved.failed
        if saved is not None and is_iterable and self._is_to_be_repeated(saved):
            self._discard += saved.num_yielded
            saved = None
        self.saved = saved
        return saved

    def _new_worker(self, loader: Any, saved: SavedState | None) -> Worker:
        """A `Worker` that begins where `saved` was taken."""
        return Worker(
            is_iterable=self.progress.is_iterable,
            batch_size=loader.batch_size,
            saved=() if saved is None or saved.num_workers != loader.num_workers else saved.workers,
            is_next_epoch=saved is not None and saved.is_finished,
            mover=NO_MOVER if self.mover is None else self.mover.number,
            reports_every=snapshot_interval(
                loader.snapshot_every_n_steps,
                loader.num_workers,
                # A worker for a map-style data set is not notified that an epoch begins.
                are_in_step=loader.in_order and (self.progress.is_iterable or not loader.persistent_workers),
            ),
        )

    def delivered(self, batch: Any) -> Any:
        try:
            return super().delivered(batch)
        except BaseException:
            self.progress.failed()
            raise

    def _pins(self, loader: Any) -> bool:
        """Whether batches go through pinned memory."""
        return self.mover is not None or loader.pin_memory

    def _catch_up(self, saved: SavedState | None) -> None:
        """Advance to where `saved` was taken."""
        if saved is not None and not saved.is_finished:
            self._num_yielded = saved.num_yielded
            self._IterableDataset_len_called = saved.length  # type: ignore[assignment]
            self.note_seeds()
        self.discard(self._discard, self._failed)

    def _is_to_be_repeated(self, saved: SavedState) -> bool:
        """Whether workers cannot skip their samples, so that all batches have to be made again."""
        if saved.is_finished or not all(worker.is_unknown for worker in saved.workers):
            return False
        return isinstance(self._user_dataset, IterDataPipe) or any(worker.batches is None for worker in saved.workers)

    def _begin(self) -> int:
        """Begin an epoch, before any index is dispatched; returns the worker whose turn it is."""
        saved, self.saved = self.saved, None
        is_continued = saved is not None and not saved.is_finished
        if is_continued and saved is not None and self.order is not None:
            self.order.resume(saved.order)
        self.progress.begin(self.order, saved if is_continued else None)
        self.note_seeds()
        return (self.progress.last_worker + 1) % self._num_workers

    def _note_state(self, answer: Any) -> None:
        """Note the state in a worker's answer when it is received, before its batch is delivered."""
        if isinstance(answer, DatasetEnded):
            state, before = pickle.loads(answer.pickled)
            worker = self.progress.workers[answer.worker_id]
            worker.end = state
            worker.initial = worker.initial if before is None else before
        elif isinstance(answer, Arrived) and answer.before is not None:
            self.progress.workers[answer.before[WORKER_ID]].initial = answer.before
