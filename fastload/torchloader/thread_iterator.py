"""Worker threads for data sets that are not fastload's own: `DataLoader(workers="thread")`.

They do the work of torch's worker processes in this process: nothing is pickled, started or copied between processes,
and a data set that is large, or that cannot be pickled, exists once. They share one interpreter lock with the trainer,
so they are for data sets that spend their time outside Python (reading, decoding, numpy).

A thread has its own copy of what a worker process has of its own where that matters and is possible:
`get_worker_info()`, with a seed; and the data set, `collate_fn` and `worker_init_fn`, copied together so that they
still refer to each other, if the data set is iterable or has a state (each worker is at another position in it) or
there is a `worker_init_fn` (whose purpose is to make the copies differ). Otherwise all threads share the user's
objects. The global generators of Python, numpy and torch are not copied: they stay the trainer's, and unseeded.

Tasks are dispatched to workers in turn, as torch does. With `in_order`, answers are taken in the order of their tasks,
including the ends of workers' data sets, so that the order does not depend on timing.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import IterDataPipe, MapDataPipe
from torch.utils.data.dataloader import _DatasetKind

from fastload import callers
from fastload.torchloader.iterators import LoaderView, WorkersIterator
from fastload.torchloader.loader_state import SavedState
from fastload.torchloader.sampling import is_stateful
from fastload.torchloader.thread_workers import (
    NO_EPOCH,
    Answer,
    WorkerSpec,
    WorkerTask,
    WorkerThreads,
    next_of,
    pinning,
    shard,
)
from fastload.torchloader.worker import DatasetEnded, WorkerCollate, wrapped_dataset
from fastload.torchloader.worker_info import info_of_thread
from fastload.transport.packing import Arrived


class ThreadIterator(WorkersIterator):
    """One pass over a data set, or several with `persistent_workers`, that continues where `saved` was taken. If that
    pass was over, a new one begins, with the workers' states of its end.
    """

    def __init__(self, loader: Any, saved: SavedState | None = None) -> None:
        if loader.multiprocessing_context is not None:
            callers.warn('multiprocessing_context: ignored with workers="thread"')
        saved = self._configure(loader, saved)
        super().__init__(LoaderView(loader, pin_memory=self._pins(loader)))
        self._prefetch_factor = loader.prefetch_factor
        self._in_order = loader.in_order
        self._worker_init_fn = loader.worker_init_fn
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            self._worker_init_fn = functools.partial(shard, self._worker_init_fn, self._world_size, self._rank)
        self._epoch = NO_EPOCH
        self._start_threads(loader, saved)
        self._reset(loader, first_iter=True)
        self._catch_up(saved)

    def _start_threads(self, loader: Any, saved: SavedState | None = None) -> None:
        self._threads = WorkerThreads(self._specs(loader, saved), self._timeout)

    def _specs(self, loader: Any, saved: SavedState | None) -> list[WorkerSpec]:
        parts = (self._dataset, self._collate_fn, self._worker_init_fn)
        needs_own = self.progress.is_iterable or self._worker_init_fn is not None or is_stateful(self._dataset)
        pin = pinning(self._pin_memory_device) if self._pin_memory else None
        specs = []
        for number, (dataset, collate, init) in enumerate(_for_workers(parts, self._num_workers, needs_own)):
            worker = self._new_worker(loader, saved)
            fetcher = functools.partial(
                _DatasetKind.create_fetcher,
                self._dataset_kind,
                wrapped_dataset(worker, dataset),
                self._auto_collation,
                WorkerCollate(worker, collate),
                self._drop_last,
            )
            info = info_of_thread(number, self._num_workers, int(self._base_seed), dataset)
            specs.append(WorkerSpec(info, worker, fetcher, init, pin))
        return specs

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(LoaderView(loader), first_iter)
        if self._threads.is_inherited:
            self._start_threads(loader)
        self._epoch += 1
        self._turn = self._begin()
        self._threads.begin(self._epoch, self._shared_seed)
        self._next_task = 0  # the number of the next one to dispatch
        self._awaited = deque[int]()  # tasks whose batches were not delivered, in order of dispatch
        self._early: dict[int, Answer] = {}  # answers that were received and not taken
        self._loads = [0] * self._num_workers  # for each worker, tasks whose answers were not taken
        self._has_more = [True] * self._num_workers
        for _ in range(self._prefetch_factor * self._num_workers):
            self._dispatch_task()
        if not first_iter and not self.progress.is_iterable and is_stateful(self._user_dataset):
            for worker, load in zip(self.progress.workers, self._loads, strict=True):
                if load:
                    worker.initial = None  # it reports its state itself, which includes unused work for the last epoch

    def _next_data(self) -> Any:
        while self._awaited:
            answer = self._take()
            worker, data = answer.worker, answer.data
            self._loads[worker] -= 1
            self._has_more[worker] = not isinstance(data, DatasetEnded)
            self._dispatch_task()
            if isinstance(data, ExceptionWrapper):
                self.progress.failed()
                data.reraise()  # type: ignore[no-untyped-call]  # torch has no types here
            elif isinstance(data, Arrived):
                batch = self.delivered(data.batch)
                self.progress.delivered(worker, data.state, outstanding=self._awaited)
                return batch
        if not self._persistent_workers:
            self._threads.stop()
        raise StopIteration

    def wait_for_states(self) -> None:
        """Wait until the initial state of each worker's data set is known, if it has one."""
        if not is_stateful(self._user_dataset) or self._threads.is_inherited:
            return
        while len(self._early) < len(self._awaited) and any(
            worker.state() is None and load for worker, load in zip(self.progress.workers, self._loads, strict=True)
        ):
            self._receive()

    def _take(self) -> Answer:
        """The next answer to deliver, which is no longer awaited."""
        while self._awaited[0] not in self._early if self._in_order else not self._early:
            self._receive()
        number = self._awaited[0] if self._in_order else next(iter(self._early))
        self._awaited.remove(number)
        return self._early.pop(number)

    def _receive(self) -> None:
        if self._threads.is_inherited:
            raise RuntimeError(
                "this iterator's worker threads belong to the process that this one was forked from; "
                "iterate the DataLoader again"
            )
        answer = next_of(self._threads.answers, self._timeout)
        if answer.epoch == self._epoch:
            self._note_state(answer.data)
            self._early[answer.task] = answer

    def _dispatch_task(self) -> None:
        worker = self._next_worker()
        if worker is None:
            return
        try:
            index = self._next_index()  # type: ignore[no-untyped-call]
        except StopIteration:
            return
        number, self._next_task = self._next_task, self._next_task + 1
        if self.order is not None:
            self.progress.marks.sent(number, self.order.mark())
        self._turn = (worker + 1) % self._num_workers
        self._loads[worker] += 1
        self._awaited.append(number)
        self._threads.dispatch(worker, WorkerTask(self._epoch, number, index))

    def _next_worker(self) -> int | None:
        """The next worker in turn; without `in_order`, workers that have their share of tasks are skipped."""
        share = self._prefetch_factor * self._num_workers // max(1, sum(self._has_more))
        for step in range(self._num_workers):
            worker = (self._turn + step) % self._num_workers
            if self._has_more[worker] and (self._in_order or self._loads[worker] < share):
                return worker
        return None

    def _shutdown_workers(self) -> None:
        """End the threads and wait for them, with a timeout: the user's code may not return."""
        self._threads.stop()
        self._threads.wait()


def _for_workers(parts: tuple[Any, ...], count: int, needs_own: bool) -> list[tuple[Any, ...]]:
    """The parts for each worker: a deep copy of all parts together, or `parts` themselves."""
    if not needs_own:
        return [parts] * count
    try:
        copies = [copy.deepcopy(parts) for _ in range(count)]
        if any(type(each[0]) is not type(parts[0]) for each in copies):  # it has any attribute, even `__deepcopy__`
            raise TypeError(f"deepcopy() made a {type(copies[0][0]).__name__} of it")
        return copies
    except Exception as error:  # the user's objects may raise anything
        callers.warn(
            f"{type(parts[0]).__name__}, collate_fn and worker_init_fn could not be copied for each worker thread, so "
            f'all threads share them ({type(error).__name__}: {error}); workers="process" keeps them apart'
        )
        return [parts] * count
