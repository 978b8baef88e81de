"""Worker threads for data sets that are not ours: `DataLoader(workers="thread")`.

They do what torch's worker processes do, in this process: nothing is pickled, started or copied from process to
process, and a data set that is large, or that cannot be pickled, is there once. They share one interpreter lock with
the trainer, so they are for data sets that spend their time outside Python (reading, decoding, numpy).

What a worker process has of its own, a thread has where that matters and can be: `get_worker_info()`, with a seed; the
data set, `collate_fn` and `worker_init_fn`, copied together so that they still refer to each other, if the data set is
iterable or has a state (each worker is somewhere else in it) or there is a `worker_init_fn` (which is there to make the
copies differ); otherwise all share what the user gave. Not the global generators of Python, numpy and torch: they stay
the trainer's, and unseeded.

Batches are dealt to workers in turn, as torch deals them. Each task has exactly one answer: a batch, an error, or that
the worker's iterable data set has ended. With `in_order`, answers are taken in the order of their tasks, that last kind
too, so that the order does not depend on who was faster.

Threads refer to their inbox and the board, not to the iterator: one that is dropped tells them to end, and waits for
nothing. At exit they are waited for, for a while, since a thread that is inside of torch's C++ when the interpreter
goes away may take the process with it.
"""

from __future__ import annotations

import atexit
import copy
import functools
import os
import queue
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.utils.data.graph_settings
from torch._utils import ExceptionWrapper
from torch.utils.data import IterDataPipe, MapDataPipe
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _DatasetKind, _sharding_worker_init_fn

from fastload.errors import WorkerError
from fastload.foreign.info import info_of_thread, worker_thread
from fastload.foreign.order import is_stateful
from fastload.foreign.packing import Arrived
from fastload.foreign.randomness import global_kept
from fastload.foreign.resuming import View
from fastload.foreign.saved import Saved
from fastload.foreign.working import Working
from fastload.foreign.workplace import Collate, Ended, Workplace, wrapped_dataset

# How long threads that are to end are waited for, all together, where they are waited for.
_END_S = 5.0

_NO_EPOCH = -1

T = TypeVar("T")

# torch looks through data pipes by pickling them with a hook of their class, of which there is one in the process.
_torchs_hooks = threading.Lock()


def _renew_lock() -> None:
    global _torchs_hooks
    _torchs_hooks = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # whoever held it is not there


def _shard(user_init: Callable[[int], None] | None, world_size: int, rank: int, worker: int) -> None:
    """What torch does in a worker whose data set is a data pipe."""
    with _torchs_hooks:
        _sharding_worker_init_fn(None, world_size, rank, worker)
    if user_init is not None:
        user_init(worker)


class Threads(Working):
    """One pass over a foreign data set, or one after another with `persistent_workers`, from where `saved` was taken;
    if that one was over, from the beginning, with workers that know what those knew then.
    """

    def __init__(self, loader: Any, saved: Saved | None = None) -> None:
        if loader.multiprocessing_context is not None:
            warnings.warn('multiprocessing_context: ignored with workers="thread"', stacklevel=2)
        saved = self._set_out(loader, saved)
        super().__init__(View(loader, pin_memory=self._pins(loader)))
        self._prefetch_factor = loader.prefetch_factor
        self._in_order = loader.in_order
        self._worker_init_fn = loader.worker_init_fn
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            self._worker_init_fn = functools.partial(_shard, self._worker_init_fn, self._world_size, self._rank)
        self._epoch = _NO_EPOCH
        self._hire(loader, saved)
        self._reset(loader, first_iter=True)
        self._catch_up(saved)

    def _hire(self, loader: Any, saved: Saved | None = None) -> None:
        self._crew = _Crew(self._jobs(loader, saved), self._timeout)
        self._end = weakref.finalize(self, self._crew.dismiss)
        self._end.atexit = False  # `_end_workers` does more

    def _jobs(self, loader: Any, saved: Saved | None) -> list[_Job]:
        parts = (self._dataset, self._collate_fn, self._worker_init_fn)
        needs_own = self.progress.is_iterable or self._worker_init_fn is not None or is_stateful(self._dataset)
        pin = _pinning(self._pin_memory_device) if self._pin_memory else None
        jobs = []
        for number, (dataset, collate, init) in enumerate(_for_workers(parts, self._num_workers, needs_own)):
            workplace = self._workplace(loader, saved)
            fetcher = functools.partial(
                _DatasetKind.create_fetcher,
                self._dataset_kind,
                wrapped_dataset(workplace, dataset),
                self._auto_collation,
                Collate(workplace, collate),
                self._drop_last,
            )
            info = info_of_thread(number, self._num_workers, int(self._base_seed), dataset)
            jobs.append(_Job(info, workplace, fetcher, init, pin))
        return jobs

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(View(loader), first_iter)
        if self._crew.is_foreign:
            self._hire(loader)
        self._epoch += 1
        self._turn = self._begin()
        self._crew.begin(self._epoch, self._shared_seed)
        self._next_task = 0  # the number of the next to be given to a worker
        self._awaited = deque[int]()  # tasks whose batches were not delivered, in the order in which they were given
        self._early: dict[int, _Answer] = {}  # answers that came and were not taken
        self._loads = [0] * self._num_workers  # tasks of each worker whose answers were not taken
        self._has_more = [True] * self._num_workers
        for _ in range(self._prefetch_factor * self._num_workers):
            self._give_task()
        if not first_iter and not self.progress.is_iterable and is_stateful(self._user_dataset):
            for worker, load in zip(self.progress.workers, self._loads, strict=True):
                if load:
                    worker.initial = None  # it says itself where it is, after what it did for the last epoch in vain

    def _next_data(self) -> Any:
        while self._awaited:
            answer = self._take()
            worker, data = answer.worker, answer.data
            self._loads[worker] -= 1
            self._has_more[worker] = not isinstance(data, Ended)
            self._give_task()
            if isinstance(data, ExceptionWrapper):
                self.progress.failed()
                data.reraise()  # type: ignore[no-untyped-call]  # torch has no types here
            elif isinstance(data, Arrived):
                batch = self.delivered(data.batch)
                self.progress.delivered(worker, data.state, outstanding=self._awaited)
                return batch
        if not self._persistent_workers:
            self._crew.dismiss()
        raise StopIteration

    def tell_states(self) -> None:
        """Wait until it is known where the data set of each worker was at first, if that can be known."""
        if not is_stateful(self._user_dataset) or self._crew.is_foreign:
            return
        while len(self._early) < len(self._awaited) and any(
            worker.state() is None and load for worker, load in zip(self.progress.workers, self._loads, strict=True)
        ):
            self._receive()

    def _take(self) -> _Answer:
        """The answer whose turn it is, which is awaited no more."""
        while self._awaited[0] not in self._early if self._in_order else not self._early:
            self._receive()
        number = self._awaited[0] if self._in_order else next(iter(self._early))
        self._awaited.remove(number)
        return self._early.pop(number)

    def _receive(self) -> None:
        if self._crew.is_foreign:
            raise RuntimeError(
                "this iterator's worker threads stayed in the process that this one was forked from; "
                "iterate the DataLoader anew"
            )
        answer = _next_of(self._crew.answers, self._timeout)
        if answer.epoch == self._epoch:
            self._note(answer.data)
            self._early[answer.task] = answer

    def _give_task(self) -> None:
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
        self._crew.give(worker, _Task(self._epoch, number, index))

    def _next_worker(self) -> int | None:
        """Whose turn it is; without `in_order`, workers with their share of tasks are passed over."""
        share = self._prefetch_factor * self._num_workers // max(1, sum(self._has_more))
        for step in range(self._num_workers):
            worker = (self._turn + step) % self._num_workers
            if self._has_more[worker] and (self._in_order or self._loads[worker] < share):
                return worker
        return None

    def _shutdown_workers(self) -> None:
        """End the threads and wait for them, unless one does not come back from the user's code."""
        self._crew.dismiss()
        self._crew.wait()


@dataclass(frozen=True, slots=True)
class _Task:
    epoch: int
    number: int
    index: Any


@dataclass(frozen=True, slots=True)
class _Answer:
    epoch: int
    task: int
    worker: int
    data: Arrived | Ended | ExceptionWrapper


@dataclass(frozen=True, slots=True)
class _Begin:
    """An epoch begins. Data pipes are seeded by `shared_seed`."""

    shared_seed: int | None


@dataclass(frozen=True, slots=True)
class _Job:
    """What one worker needs."""

    info: Any
    workplace: Workplace
    fetcher: Callable[[], Any]  # for one epoch
    init: Callable[[int], None] | None
    pin: Callable[[Any], Any] | None


@dataclass(slots=True)
class _Board:
    """What all workers of a crew see."""

    epoch: int = _NO_EPOCH  # tasks of others are skipped
    answers: queue.SimpleQueue[_Answer] = field(default_factory=queue.SimpleQueue)
    started: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    prepared: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class _Crew:
    """A thread for each job."""

    def __init__(self, jobs: list[_Job], timeout_s: float) -> None:
        """`timeout_s`: how long a `worker_init_fn` may take, as long as it likes where that is 0."""
        self._pid = os.getpid()
        self._timeout_s = timeout_s
        self._board = _Board()
        self.answers = self._board.answers
        self._workers = [_Worker(job, self._board) for job in jobs]
        try:
            with self._generators_kept(jobs):
                self._start()
        except BaseException:  # no more threads can be had, say: those that began are not to wait for ever
            self.dismiss()
            raise

    def _start(self) -> None:
        own_threads = torch.get_num_threads()
        begun = 0
        try:
            for worker in self._workers:
                worker.start()
                begun += 1
        finally:
            for _ in range(begun):
                self._board.started.get()
            # They gave torch one thread each, which holds for themselves, but for any thread that begins later too.
            torch.set_num_threads(own_threads)

    @contextmanager
    def _generators_kept(self, jobs: list[_Job]) -> Iterator[None]:
        """Wait until `worker_init_fn` was called everywhere, and put the global generators back: a function made
        for worker processes seeds them, and here they are the trainer's.
        """
        if all(job.init is None for job in jobs):
            yield
            return
        with global_kept():
            yield
            for _ in self._workers:
                _next_of(self._board.prepared, self._timeout_s)

    @property
    def is_foreign(self) -> bool:
        """Whether the threads stayed behind in a process that this one was forked from."""
        return self._pid != os.getpid()

    def begin(self, epoch: int, shared_seed: int | None) -> None:
        """Tasks of earlier epochs are of no use any more."""
        self._board.epoch = epoch
        for worker in self._workers:
            worker.inbox.put(_Begin(shared_seed))

    def give(self, worker: int, task: _Task) -> None:
        """Its answer comes to `answers`, after those of the worker's earlier tasks."""
        self._workers[worker].inbox.put(task)

    def dismiss(self) -> None:
        """Each thread ends after the task that it is at. May be called often, in any thread and under any lock."""
        for worker in self._workers:
            worker.dismiss()

    def wait(self) -> None:
        """Until all have ended, or they take too long."""
        _wait_for(self._workers)


def _next_of(answers: queue.SimpleQueue[T], timeout_s: float) -> T:
    """What comes next, as torch waits for it."""
    try:
        return answers.get(timeout=timeout_s or None)
    except queue.Empty:
        raise RuntimeError(f"DataLoader timed out after {timeout_s} seconds") from None


class _Worker(threading.Thread):
    """Prepares itself, then does what comes into its inbox, until that is None."""

    def __init__(self, job: _Job, board: _Board) -> None:
        super().__init__(name=f"fastload-worker-{job.info.id}", daemon=True)
        self.inbox: queue.SimpleQueue[_Task | _Begin | None] = queue.SimpleQueue()
        self._job, self._board = job, board
        self._where = f"in DataLoader worker thread {job.info.id}"
        self._fetcher: Any = None
        self._failure: ExceptionWrapper | None = None  # of `worker_init_fn`, or of the beginning of an epoch
        self._ended: Ended | None = None  # what is answered once the data set has ended

    def dismiss(self) -> None:
        self._board.epoch = _NO_EPOCH
        self.inbox.put(None)

    def run(self) -> None:
        """torch's threads of a thread begin as those of the process, when they are first asked for: so ask before."""
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._board.started.put(None)
        with worker_thread(self._job.info):
            init_failure = self._caught(self._prepare)
            self._board.prepared.put(None)
            while (order := self.inbox.get()) is not None:
                if isinstance(order, _Begin):
                    self._failure = init_failure or self._caught(functools.partial(self._begin, order))
                elif order.epoch == self._board.epoch:
                    # Nothing here refers to the batch once it is on its way: the next may be long in coming.
                    self._board.answers.put(
                        _Answer(order.epoch, order.number, self._job.info.id, self._answer(order.index))
                    )

    def _prepare(self) -> None:
        self._job.workplace.prepare(self._job.info.id, self._job.info.dataset, self._job.init)

    def _begin(self, order: _Begin) -> None:
        if self._fetcher is not None:
            self._job.workplace.begin_again()
        dataset = self._job.info.dataset
        if isinstance(dataset, IterDataPipe) and order.shared_seed is not None:
            generator = torch.Generator()
            generator.manual_seed(order.shared_seed)
            with _torchs_hooks:
                torch.utils.data.graph_settings.apply_random_seed(dataset, generator)
        self._ended = None
        self._fetcher = self._job.fetcher()

    def _answer(self, index: Any) -> Any:
        if self._failure is not None:
            return self._failure
        return self._ended or self._caught(functools.partial(self._fetch, index))

    def _fetch(self, index: Any) -> Arrived | Ended:
        try:
            arrived: Arrived = self._fetcher.fetch(index)
        except StopIteration:
            if not self._job.workplace.is_iterable:
                raise
            self._ended = self._job.workplace.ended(self._job.info.id)
            return self._ended
        except BaseException:
            self._job.workplace.failed()
            raise
        return arrived if self._job.pin is None else self._job.pin(arrived)

    def _caught(self, call: Callable[[], Any]) -> Any:
        """What `call` gives; or what it raises, as torch's workers send it."""
        try:
            return call()
        except Exception:
            return ExceptionWrapper(where=self._where)  # type: ignore[no-untyped-call]
        except BaseException as error:
            # A SystemExit in the data set, say: the trainer is neither to end nor to wait for ever.
            return ExceptionWrapper(  # type: ignore[no-untyped-call]
                (WorkerError, error, error.__traceback__), where=self._where
            )


def _for_workers(parts: tuple[Any, ...], count: int, needs_own: bool) -> list[tuple[Any, ...]]:
    """The parts for each worker: copies, each made as a whole, or `parts` themselves."""
    if not needs_own:
        return [parts] * count
    try:
        return [copy.deepcopy(parts) for _ in range(count)]
    except Exception as error:  # whatever the user's objects raise
        warnings.warn(
            f"{type(parts[0]).__name__}, collate_fn and worker_init_fn could not be copied for each worker thread, so "
            f'that all share them ({type(error).__name__}: {error}); workers="process" keeps them apart',
            stacklevel=2,
        )
        return [parts] * count


def _pinning(device: Any) -> Callable[[Any], Any]:
    """Pins for the device that is current here: each thread has one of its own, and it begins with the first."""
    current = torch.accelerator.current_device_index() if hasattr(torch, "accelerator") else torch.cuda.current_device()

    def pin(batch: Any) -> Any:
        if hasattr(torch, "accelerator"):
            torch.accelerator.set_device_index(current)
        else:
            torch.cuda.set_device(current)
        return pin_memory(batch, device)  # type: ignore[no-untyped-call]

    return pin


def _wait_for(workers: list[_Worker]) -> None:
    deadline = time.monotonic() + _END_S
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join(max(0.0, deadline - time.monotonic()))


@atexit.register
def _end_workers() -> None:
    workers = [thread for thread in threading.enumerate() if isinstance(thread, _Worker)]
    for worker in workers:
        worker.dismiss()
    _wait_for(workers)
