"""Iterating a foreign data set without workers: torch's way, and knowing where it is."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from typing import Any

from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from fastload.device import mover_to
from fastload.torchloader.order import load_state
from fastload.torchloader.progress import Progress
from fastload.torchloader.randomness import generators_of, global_kept
from fastload.torchloader.resuming import Resuming, View
from fastload.torchloader.saved import Saved, SavedWorker


class Single(_SingleProcessDataLoaderIter, Resuming):
    """One pass over a foreign data set in the calling thread, from where `saved` was taken."""

    def __init__(self, loader: Any, saved: Saved | None = None) -> None:
        self.saved = saved
        self.mover = mover_to(loader.device)
        self.progress = Progress(generators_of(loader))
        if saved is not None:
            load_state(loader.dataset, saved.workers[0].dataset_state, "data set")
        # What torch draws was drawn for the saved one; but a data set that sets the random numbers where they were is
        # not undone.
        with nullcontext() if saved is None else global_kept():
            super().__init__(View(loader))
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

    def _resume(self, saved: Saved, worker: SavedWorker, batch_size: int | None) -> None:
        self._num_yielded = saved.num_yielded
        self._IterableDataset_len_called = saved.length  # type: ignore[assignment]
        if self.order is not None:
            if not saved.is_finished:
                self.order.resume(saved.order)
            return
        fetcher: Any = self._dataset_fetcher
        if worker.is_silent:
            skipped = 0 if saved.is_finished else saved.num_yielded * (batch_size or 1)
            for _ in islice(fetcher.dataset_iter, skipped):
                pass  # without collating what is skipped
            return
        load_state(fetcher.dataset_iter, worker.iterator_state, "data set's iterator")
        fetcher.ended = worker.has_ended
