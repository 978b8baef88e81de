"""The threads of `DataLoader(workers="thread")`: one for each worker, and how they begin, work and end.

A worker prepares itself, as a worker process of torch's does, then does the tasks of its inbox; answers come into one
queue. Each task has exactly one answer: a batch, an error, or that the worker's iterable data set has ended.

Threads refer to their inbox and the shared, not to the iterator: one that is dropped tells them to end, and waits for
nothing. At exit they are waited for, for a while, since a thread that is inside of torch's C++ when the interpreter
goes away may take the process with it.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.utils.data.graph_settings
from torch._utils import ExceptionWrapper
from torch.utils.data import IterDataPipe
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _sharding_worker_init_fn

from fastload.errors import WorkerError
from fastload.lifecycle import Ending, end_at_exit, join_at_exit, on_fork
from fastload.torchloader.randomness import preserve_global_generators
from fastload.torchloader.worker import DatasetEnded, Worker
from fastload.torchloader.worker_info import worker_thread
from fastload.transport.packing import Arrived

NO_EPOCH = -1
# How long threads that are to end are waited for, all together, where they are waited for.
_END_S = 5.0

T = TypeVar("T")

# torch looks through data pipes by pickling them with a hook of their class, of which there is one in the process.
_torchs_hooks = threading.Lock()


@on_fork
def _renew_lock() -> None:  # the thread that held it may be gone
    global _torchs_hooks
    _torchs_hooks = threading.Lock()


def shard(user_init: Callable[[int], None] | None, world_size: int, rank: int, worker: int) -> None:
    """What torch does in a worker whose data set is a data pipe."""
    with _torchs_hooks:
        _sharding_worker_init_fn(None, world_size, rank, worker)
    if user_init is not None:
        user_init(worker)


@dataclass(frozen=True, slots=True)
class Task:
    epoch: int
    number: int
    index: Any


@dataclass(frozen=True, slots=True)
class Answer:
    epoch: int
    task: int
    worker: int
    data: Arrived | DatasetEnded | ExceptionWrapper


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """An epoch begins. Data pipes are seeded by `shared_seed`."""

    shared_seed: int | None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker needs."""

    info: Any
    worker: Worker
    fetcher: Callable[[], Any]  # for one epoch
    init: Callable[[int], None] | None
    pin: Callable[[Any], Any] | None


@dataclass(slots=True)
class _Shared:
    """What all workers of a crew see."""

    epoch: int = NO_EPOCH  # tasks of others are skipped
    answers: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)
    started: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    prepared: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class WorkerThreads:
    """A thread for each spec."""

    def __init__(self, specs: list[WorkerSpec], timeout_s: float) -> None:
        """`timeout_s`: how long a `worker_init_fn` may take, as long as it likes where that is 0."""
        self._timeout_s = timeout_s
        self._shared = _Shared()
        self.answers = self._shared.answers
        self._workers = [_WorkerThread(spec, self._shared) for spec in specs]
        self._ending = Ending(self, _stop_all, self._workers, waits=False, at_exit=True)
        try:
            with self._generators_kept(specs):
                self._start()
        except BaseException:  # no more threads can be had, say: those that began are not to wait for ever
            self.stop()
            raise

    def _start(self) -> None:
        own_threads = torch.get_num_threads()
        begun = 0
        try:
            for worker in self._workers:
                worker.start()
                join_at_exit(worker, _END_S)
                begun += 1
        finally:
            for _ in range(begun):
                self._shared.started.get()
            # They gave torch one thread each, which holds for themselves, but for any thread that begins later too.
            torch.set_num_threads(own_threads)

    @contextmanager
    def _generators_kept(self, specs: list[WorkerSpec]) -> Iterator[None]:
        """Wait until `worker_init_fn` was called everywhere, and put the global generators back: a function made
        for worker processes seeds them, and here they are the trainer's.
        """
        if all(spec.init is None for spec in specs):
            yield
            return
        with preserve_global_generators():
            yield
            for _ in self._workers:
                next_of(self._shared.prepared, self._timeout_s)

    @property
    def is_inherited(self) -> bool:
        """Whether the threads stayed behind in a process that this one was forked from."""
        return self._ending.is_inherited

    def begin(self, epoch: int, shared_seed: int | None) -> None:
        """Tasks of earlier epochs are of no use any more."""
        self._shared.epoch = epoch
        for worker in self._workers:
            worker.inbox.put(BeginEpoch(shared_seed))

    def dispatch(self, worker: int, task: Task) -> None:
        """Its answer comes to `answers`, after those of the worker's earlier tasks."""
        self._workers[worker].inbox.put(task)

    def stop(self) -> None:
        """Each thread ends after the task that it is at. May be called often, in any thread and under any lock."""
        self._ending()

    def wait(self) -> None:
        """Until all have ended, or they take too long."""
        deadline = time.monotonic() + _END_S
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, deadline - time.monotonic()))


def next_of(answers: queue.SimpleQueue[T], timeout_s: float) -> T:
    """What comes next, as torch waits for it."""
    try:
        return answers.get(timeout=timeout_s or None)
    except queue.Empty:
        raise RuntimeError(f"DataLoader timed out after {timeout_s} seconds") from None


class _WorkerThread(threading.Thread):
    """Prepares itself, then does what comes into its inbox, until that is None."""

    def __init__(self, spec: WorkerSpec, shared: _Shared) -> None:
        super().__init__(name=f"fastload-worker-{spec.info.id}", daemon=True)
        self.inbox: queue.SimpleQueue[Task | BeginEpoch | None] = queue.SimpleQueue()
        self._spec, self._shared = spec, shared
        self._where = f"in DataLoader worker thread {spec.info.id}"
        self._fetcher: Any = None
        self._failure: ExceptionWrapper | None = None  # of `worker_init_fn`, or of the beginning of an epoch
        self._ended: DatasetEnded | None = None  # what is answered once the data set has ended

    def stop(self) -> None:
        self._shared.epoch = NO_EPOCH
        self.inbox.put(None)

    def run(self) -> None:
        """torch's threads of a thread begin as those of the process, when they are first asked for: so ask before."""
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._shared.started.put(None)
        with worker_thread(self._spec.info):
            init_failure = self._caught(self._prepare)
            self._shared.prepared.put(None)
            while (order := self.inbox.get()) is not None:
                if isinstance(order, BeginEpoch):
                    self._failure = init_failure or self._caught(functools.partial(self._begin, order))
                elif order.epoch == self._shared.epoch:
                    # Nothing here refers to the batch once it is on its way: the next may be long in coming.
                    self._shared.answers.put(
                        Answer(order.epoch, order.number, self._spec.info.id, self._answer(order.index))
                    )

    def _prepare(self) -> None:
        self._spec.worker.prepare(self._spec.info.id, self._spec.info.dataset, self._spec.init)

    def _begin(self, order: BeginEpoch) -> None:
        if self._fetcher is not None:
            self._spec.worker.begin_again()
        dataset = self._spec.info.dataset
        if isinstance(dataset, IterDataPipe) and order.shared_seed is not None:
            generator = torch.Generator()
            generator.manual_seed(order.shared_seed)
            with _torchs_hooks:
                torch.utils.data.graph_settings.apply_random_seed(dataset, generator)
        self._ended = None
        self._fetcher = self._spec.fetcher()

    def _answer(self, index: Any) -> Any:
        if self._failure is not None:
            return self._failure
        return self._ended or self._caught(functools.partial(self._fetch, index))

    def _fetch(self, index: Any) -> Arrived | DatasetEnded:
        try:
            arrived: Arrived = self._fetcher.fetch(index)
        except StopIteration:
            if not self._spec.worker.is_iterable:
                raise
            self._ended = self._spec.worker.ended(self._spec.info.id)
            return self._ended
        except BaseException:
            self._spec.worker.failed()
            raise
        return arrived if self._spec.pin is None else self._spec.pin(arrived)

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


def pinning(device: Any) -> Callable[[Any], Any]:
    """Pins for the device that is current here: each thread has one of its own, and it begins with the first."""
    current = torch.accelerator.current_device_index() if hasattr(torch, "accelerator") else torch.cuda.current_device()

    def pin(batch: Any) -> Any:
        if hasattr(torch, "accelerator"):
            torch.accelerator.set_device_index(current)
        else:
            torch.cuda.set_device(current)
        return pin_memory(batch, device)  # type: ignore[no-untyped-call]

    return pin


def _stop_all(workers: list[_WorkerThread]) -> None:
    for worker in workers:
        worker.stop()


end_at_exit()
