"""The threads of `DataLoader(workers="thread")`: one for each worker, and how they start, work and end.

A worker prepares itself, as a worker process of torch's does, then carries out the tasks in its inbox; answers come
into one queue. Each task has exactly one answer: a batch, an error, or the end of the worker's iterable data set.

Threads refer to their inbox and to `_SharedByThreads`, not to the iterator: dropping the iterator signals them to end
and waits for nothing. At exit they are joined with a timeout, since a thread that is inside torch's C++ code while the
interpreter shuts down may crash the process.
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
# The timeout for joining all threads together.
_END_S = 5.0

T = TypeVar("T")

# torch traverses data pipes by pickling them with a hook of their class, which is global in the process.
_torchs_hooks = threading.Lock()


@on_fork
def _renew_lock() -> None:  # the thread that held it may be gone
    global _torchs_hooks
    _torchs_hooks = threading.Lock()


def shard(user_init: Callable[[int], None] | None, world_size: int, rank: int, worker: int) -> None:
    """Prepare a worker whose data set is a data pipe, as torch does."""
    with _torchs_hooks:
        _sharding_worker_init_fn(None, world_size, rank, worker)
    if user_init is not None:
        user_init(worker)


@dataclass(frozen=True, slots=True)
class WorkerTask:
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
    """An epoch begins. Data pipes are seeded with `shared_seed`."""

    shared_seed: int | None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker needs."""

    info: Any
    worker: Worker
    fetcher: Callable[[], Any]  # makes torch's fetcher for one epoch
    init: Callable[[int], None] | None
    pin: Callable[[Any], Any] | None


@dataclass(slots=True)
class _SharedByThreads:
    """What all workers of an iterator share."""

    epoch: int = NO_EPOCH  # tasks of other epochs are skipped
    answers: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)
    started: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    prepared: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class WorkerThreads:
    """A thread for each spec."""

    def __init__(self, specs: list[WorkerSpec], timeout_s: float) -> None:
        """`timeout_s`: how long a `worker_init_fn` may take; 0 is no limit."""
        self._timeout_s = timeout_s
        self._shared = _SharedByThreads()
        self.answers = self._shared.answers
        self._workers = [_WorkerThread(spec, self._shared) for spec in specs]
        self._ending = Ending(self, _stop_all, self._workers, waits=False, at_exit=True)
        try:
            with self._generators_kept(specs):
                self._start()
        except BaseException:  # for example, no more threads can be started: end those that run
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
            # Each gave torch one thread, which applies to itself, but also to any thread that starts later.
            torch.set_num_threads(own_threads)

    @contextmanager
    def _generators_kept(self, specs: list[WorkerSpec]) -> Iterator[None]:
        """Wait until `worker_init_fn` has run in all workers, then restore the global generators: a function made for
        worker processes seeds them, and here they belong to the trainer.
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
        """Whether this process is a forked child, and the threads are its parent's."""
        return self._ending.is_inherited

    def begin(self, epoch: int, shared_seed: int | None) -> None:
        """Begin an epoch; tasks of earlier epochs are skipped."""
        self._shared.epoch = epoch
        for worker in self._workers:
            worker.inbox.put(BeginEpoch(shared_seed))

    def dispatch(self, worker: int, task: WorkerTask) -> None:
        """Queue a task. Its answer comes to `answers`, after those of the worker's earlier tasks."""
        self._workers[worker].inbox.put(task)

    def stop(self) -> None:
        """Let each thread end after its current task. Idempotent; safe in any thread and under any lock."""
        self._ending()

    def wait(self) -> None:
        """Wait until all have ended, with a timeout."""
        deadline = time.monotonic() + _END_S
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, deadline - time.monotonic()))


def next_of(answers: queue.SimpleQueue[T], timeout_s: float) -> T:
    """The next item; a timeout is the error that torch raises."""
    try:
        return answers.get(timeout=timeout_s or None)
    except queue.Empty:
        raise RuntimeError(f"DataLoader timed out after {timeout_s} seconds") from None


class _WorkerThread(threading.Thread):
    """Prepares itself, then handles the messages in its inbox, until one is None."""

    def __init__(self, spec: WorkerSpec, shared: _SharedByThreads) -> None:
        super().__init__(name=f"fastload-worker-{spec.info.id}", daemon=True)
        self.inbox: queue.SimpleQueue[WorkerTask | BeginEpoch | None] = queue.SimpleQueue()
        self._spec, self._shared = spec, shared
        self._where = f"in DataLoader worker thread {spec.info.id}"
        self._fetcher: Any = None
        self._failure: ExceptionWrapper | None = None  # of `worker_init_fn`, or of beginning an epoch
        self._ended: DatasetEnded | None = None  # the answer once the data set has ended

    def stop(self) -> None:
        self._shared.epoch = NO_EPOCH
        self.inbox.put(None)

    def run(self) -> None:
        # torch initialises a thread's number from the process's when it is first read: so read it before setting it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        self._shared.started.put(None)
        with worker_thread(self._spec.info):
            init_failure = self._caught(self._prepare)
            self._shared.prepared.put(None)
            while (message := self.inbox.get()) is not None:
                if isinstance(message, BeginEpoch):
                    self._failure = init_failure or self._caught(functools.partial(self._begin, message))
                elif message.epoch == self._shared.epoch:
                    # No variable refers to the batch after this: the next message may take long.
                    self._shared.answers.put(
                        Answer(message.epoch, message.number, self._spec.info.id, self._answer(message.index))
                    )

    def _prepare(self) -> None:
        self._spec.worker.prepare(self._spec.info.id, self._spec.info.dataset, self._spec.init)

    def _begin(self, message: BeginEpoch) -> None:
        if self._fetcher is not None:
            self._spec.worker.begin_again()
        dataset = self._spec.info.dataset
        if isinstance(dataset, IterDataPipe) and message.shared_seed is not None:
            generator = torch.Generator()
            generator.manual_seed(message.shared_seed)
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
        """The result of `call`, or its error, wrapped as torch's workers send it."""
        try:
            return call()
        except Exception:
            return ExceptionWrapper(where=self._where)  # type: ignore[no-untyped-call]
        except BaseException as error:
            # For example, a SystemExit in the data set, which must neither end the trainer nor leave it waiting.
            return ExceptionWrapper(  # type: ignore[no-untyped-call]
                (WorkerError, error, error.__traceback__), where=self._where
            )


def pinning(device: Any) -> Callable[[Any], Any]:
    """A function that pins for the device that is current here: a new thread starts with the first device."""
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
