"""What iterations with workers, processes or threads, have in common: where they begin, and what workers tell them."""

from __future__ import annotations

import pickle
from abc import abstractmethod
from typing import Any

from torch.utils.data import IterDataPipe
from torch.utils.data.dataloader import _DatasetKind

from fastload.device import NO_MOVER, mover_to
from fastload.torchloader.progress import WorkersProgress
from fastload.torchloader.randomness import generators_of
from fastload.torchloader.resuming import Resuming
from fastload.torchloader.saved import WORKER_ID, Saved
from fastload.torchloader.telling import turns_between_states
from fastload.torchloader.unpacking import Arrived
from fastload.torchloader.workplace import Ended, Workplace


class Working(Resuming):
    """An iteration whose batches workers make. `_set_out` comes before torch's constructor, `_catch_up` after it."""

    progress: WorkersProgress

    @abstractmethod
    def tell_states(self) -> None:
        """Wait until it is known where the data set of each worker was at first, if that can be known."""

    @abstractmethod
    def _shutdown_workers(self) -> None:
        """End the workers, and wait for them."""

    def _set_out(self, loader: Any, saved: Saved | None) -> Saved | None:
        """What workers can begin with: None where all has to be made again and thrown away."""
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

    def _workplace(self, loader: Any, saved: Saved | None) -> Workplace:
        """For workers that begin where `saved` was taken."""
        return Workplace(
            is_iterable=self.progress.is_iterable,
            batch_size=loader.batch_size,
            saved=() if saved is None or saved.num_workers != loader.num_workers else saved.workers,
            is_next_epoch=saved is not None and saved.is_finished,
            mover=NO_MOVER if self.mover is None else self.mover.number,
            tells_every=turns_between_states(
                loader.snapshot_every_n_steps,
                loader.num_workers,
                # A worker for a map-style data set does not hear that an epoch begins.
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

    def _catch_up(self, saved: Saved | None) -> None:
        """Go to where `saved` was taken."""
        if saved is not None and not saved.is_finished:
            self._num_yielded = saved.num_yielded
            self._IterableDataset_len_called = saved.length  # type: ignore[assignment]
            self.note_seeds()
        self.discard(self._discard, self._failed)

    def _is_to_be_repeated(self, saved: Saved) -> bool:
        """Whether no worker can skip what is behind it."""
        if saved.is_finished or not all(worker.is_silent for worker in saved.workers):
            return False
        return isinstance(self._user_dataset, IterDataPipe) or any(worker.batches is None for worker in saved.workers)

    def _begin(self) -> int:
        """The sampler's iterator is there, and no worker was given an index; the worker whose turn it is."""
        saved, self.saved = self.saved, None
        is_continued = saved is not None and not saved.is_finished
        if is_continued and saved is not None and self.order is not None:
            self.order.resume(saved.order)
        self.progress.begin(self.order, saved if is_continued else None)
        self.note_seeds()
        return (self.progress.last_worker + 1) % self._num_workers

    def _note(self, answer: Any) -> None:
        """What a worker tells of its data set has come, with a batch that is not delivered yet or without."""
        if isinstance(answer, Ended):
            state, before = pickle.loads(answer.pickled)
            worker = self.progress.workers[answer.worker_id]
            worker.end = state
            worker.initial = worker.initial if before is None else before
        elif isinstance(answer, Arrived) and answer.before is not None:
            self.progress.workers[answer.before[WORKER_ID]].initial = answer.before
