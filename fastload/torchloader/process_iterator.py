"""Worker processes for data sets that are not fastload's own: torch's, whose batches cross through reused memory.

torch's iterator is kept whole: its processes and their loop, order, timeouts, its signal handler and its pinning
thread. The objects that it sends to its workers are wrapped (see `worker`), and what arrives is unwrapped on delivery,
which is when the state counts it. Its queues are replaced (see `fastload.transport.queue`).
"""

from __future__ import annotations

import os
from typing import Any

import torch.multiprocessing
from torch.utils.data import IterDataPipe, MapDataPipe
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data._utils.worker import _IterableDatasetStopIteration
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastload import callers
from fastload.errors import WorkerError
from fastload.torchloader.iterators import LoaderView, WorkersIterator
from fastload.torchloader.loader_state import WORKER_ID, LoaderState, SavedState
from fastload.torchloader.sampling import is_stateful
from fastload.torchloader.worker import WorkerCollate, WorkerInit, wrapped_dataset
from fastload.transport.once import Once
from fastload.transport.packing import Arrived, Receiver
from fastload.transport.queue import Queue
from fastload.transport.worker_process import HOW_TO_SEND, how_it_ended, is_unsendable
from fastload.transport.worker_slots import SlotCounters

# Free memory that the workers of an iteration keep for reuse: all together, and the least for one.
_RETAINED_BYTES = 1 << 30
_RETAINED_BYTES_EACH = 256 << 20


class ProcessIterator(_MultiProcessingDataLoaderIter, WorkersIterator):
    """One pass over a data set, or several with `persistent_workers`, that continues where `saved` was taken. If that
    pass was over, a new one begins, with the workers' states of its end.
    """

    _shutdown = True  # until torch has something to shut down

    def __init__(self, loader: Any, saved: SavedState | None = None) -> None:
        saved = self._configure(loader, saved)
        counters = _new_counters(loader.num_workers)
        self._receiver = None if counters is None else Receiver(counters)
        worker = self._new_worker(loader, saved)
        worker.counters = counters
        worker.receiver = -1 if self._receiver is None else self._receiver.number
        worker.retained_bytes = max(_RETAINED_BYTES_EACH, _RETAINED_BYTES // loader.num_workers)
        given: tuple[Any, ...] = (
            wrapped_dataset(worker, loader.dataset),
            WorkerCollate(worker, loader.collate_fn),
            WorkerInit(worker, loader.worker_init_fn),
        )
        once = _once(loader, counters, given)
        dataset, collate_fn, worker_init_fn = given if once is None else once.parts()
        view = LoaderView(
            loader,
            dataset=dataset,
            collate_fn=collate_fn,
            worker_init_fn=worker_init_fn,
            pin_memory=self._pins(loader),
            multiprocessing_context=_ContextWithQueue(_context(loader)),
        )
        try:
            super().__init__(view)
        except Exception as error:
            if is_unsendable(error):
                error.add_note(f"fastload: {HOW_TO_SEND}")
            raise
        finally:
            if counters is not None:
                counters.close_fd()
            if once is not None:
                once.close()
        self._catch_up(saved)

    def wait_for_states(self) -> None:
        """Wait until the initial state of each worker's data set is known, if it has one."""
        if is_stateful(self._user_dataset):
            while self._tasks_outstanding and any(
                worker.state() is None and self._workers_status[number]
                for number, worker in enumerate(self.progress.workers)
            ):
                self._receive_early()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:
            self._open_descriptors()
        self._is_beginning = True
        self._worker_of: dict[int, int] = {}  # for each batch in flight
        super()._reset(loader, first_iter)

    def _try_put_index(self) -> None:
        if self._is_beginning:
            self._is_beginning = False
            for _ in range(self._begin()):
                next(self._worker_queue_idx_cycle)
        number = self._send_idx
        super()._try_put_index()
        if self._send_idx > number:
            self._worker_of[number] = self._task_info[number][0]
            if self.order is not None:
                self.progress.marks.sent(number, self.order.mark())

    def _get_data(self) -> Any:
        number, data = super()._get_data()  # type: ignore[no-untyped-call]
        self._note_state(data)
        if self._is_beginning and isinstance(data, Arrived) and data.state is not None:
            self._note_left_over(data.state)
        return number, data

    def _note_left_over(self, state: LoaderState) -> None:
        """Of an epoch that was aborted: a persistent worker begins the next epoch with this state."""
        if not self.progress.is_iterable:
            self.progress.workers[state[WORKER_ID]].last = state

    def _receive_early(self) -> None:
        """Take an answer before it is requested, and process it as torch does."""
        number, data = self._get_data()
        self._tasks_outstanding -= 1
        if not isinstance(data, _IterableDatasetStopIteration):
            self._task_info[number] += (data,)
            return
        if self._persistent_workers:
            self._workers_status[data.worker_id] = False
        else:
            self._mark_worker_as_unavailable(data.worker_id)
        self._try_put_index()

    def _process_data(self, data: Any, *worker_idx: int) -> Any:
        # Older releases of torch do not pass the worker, but the batch is the one that is due.
        worker = worker_idx[0] if worker_idx else self._worker_of[self._rcvd_idx]
        self._worker_of = {number: each for number, each in self._worker_of.items() if number in self._task_info}
        try:
            arrived = super()._process_data(data, *worker_idx)  # type: ignore[no-untyped-call]
        except Exception as error:  # what the worker raised
            # torch's frame and the error refer to each other. Such a cycle would keep the iterator, and with it the
            # workers, until garbage collection, which would not signal the workers to end.
            self.progress.failed()
            raise error.with_traceback(None)  # noqa: B904  # it is the same error
        batch = self.delivered(arrived.batch)
        self.progress.delivered(worker, arrived.state, outstanding=self._task_info)
        return batch

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> Any:
        try:
            return super()._try_get_data(timeout)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            dead = [worker for worker in self._workers if worker.exitcode is not None and str(worker.pid) in str(error)]
            if not dead:
                raise
            ends = [f"worker {worker.pid} {how_it_ended(worker, 'the data set')}" for worker in dead]
            raise WorkerError(f"{error}: {'; '.join(ends)}") from error

    def _open_descriptors(self) -> None:
        """Check whether this process may open its workers' descriptors; otherwise batches cross in torch's way."""
        if self._receiver is None:
            return
        for number, worker in enumerate(self._workers):
            try:
                os.readlink(f"/proc/{worker.pid}/cwd")  # the kernel checks the same permission as for a descriptor
            except OSError as error:
                _warn(error)
                return
            self._receiver.counters.set_open(number)


class _ContextWithQueue:
    """A context of `multiprocessing`, or a module like it, with queues that send at once."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def Queue(self) -> Any:  # noqa: N802  # the name in multiprocessing
        return Queue(self._context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _context(loader: Any) -> Any:
    return loader.multiprocessing_context or torch.multiprocessing


def _new_counters(workers: int) -> SlotCounters | None:
    try:
        return SlotCounters(workers)
    except OSError as error:
        _warn(error)
        return None


def _once(loader: Any, counters: SlotCounters | None, given: tuple[Any, ...]) -> Once | None:
    """The workers' arguments, pickled once; None where workers are forked, or torch has to pickle the arguments."""
    if (
        counters is None
        or _context(loader).get_start_method() == "fork"
        or isinstance(given[0], IterDataPipe | MapDataPipe)
    ):
        return None
    return Once(given, beside=(counters,))


def _warn(error: OSError) -> None:
    callers.warn(
        f"batches cross from worker processes in torch's way, which is slower: {error}. The faster one needs "
        "memfd_create and /proc, which a container may have been denied",
        RuntimeWarning,
    )
