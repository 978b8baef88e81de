"""What runs in a worker beside torch's code: packing batches, and tracking the state of the data set.

torch's worker loop calls three objects of the user: `worker_init_fn`, the data set and `collate_fn`. Each is wrapped,
and the wrappers share a `Worker`, which is pickled with them where a process is spawned. The user's code sees its own
data set, also in `get_worker_info()`.

In a worker process, and only there, three names in torch's module of the worker loop are replaced: the class of the
message that an iterable data set has ended, to carry the data set's last state; the class that wraps errors, so that an
error that cannot be pickled is sent as its message, where torch's loop would leave the trainer waiting for ever; and
the watchdog of the trainer (see `fastload.transport.worker_process`).
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import IterableDataset, IterDataPipe
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils import worker as torch_worker

from fastload.device import NO_MOVER
from fastload.errors import WorkerError
from fastload.torchloader.loader_state import (
    NOT_REPORTED,
    LoaderState,
    NotReported,
    SavedWorker,
    pickling_problem,
    unknown_worker_state,
    without_dataset,
    worker_state,
)
from fastload.torchloader.sampling import is_stateful, load_state
from fastload.transport.bulk_copy import stack_into
from fastload.transport.packing import Arrived, Packed, Packer
from fastload.transport.pickling import is_plain
from fastload.transport.worker_process import Watchdog, freeze_existing_objects, keep_freed_memory
from fastload.transport.worker_slots import SlotCounters


@dataclass(frozen=True)
class DatasetEnded(torch_worker._IterableDatasetStopIteration):
    """A worker's iterable data set has ended. `pickled`: its state, and its initial state if it made no batch."""

    pickled: bytes = b""


@dataclass
class Worker:
    """What the wrappers of one iteration share; each worker has a copy. `batch_size`: of an iterable data set.

    `reports_every`: after how many turns a worker reports its state (see `state.snapshot_interval`).
    """

    is_iterable: bool
    batch_size: int | None
    saved: Sequence[SavedWorker] = ()
    is_next_epoch: bool = False  # the saved epoch is over
    mover: int = NO_MOVER  # the trainer's, for each batch
    reports_every: int | None = 1

    # For processes: how their batches cross.
    counters: SlotCounters | None = None
    receiver: int = -1
    retained_bytes: int = 0

    # In the worker:
    number: int = -1
    dataset: Any = None
    packer: Packer | None = None
    reading: _TrackedIterator | None = None
    before: LoaderState | None = None
    batches: int = 0
    turns: int = 0  # in this epoch: batches, and errors in place of one

    def open(self, number: int, user_init: Callable[[int], None] | None) -> None:
        """Prepare the process of a worker, and call the user's `worker_init_fn`."""
        info = torch_worker._worker_info
        assert info is not None, "torch's loop has set it"
        self.number, self.dataset = number, info.dataset
        if isinstance(self.dataset, WorkerDataset):
            self.dataset = self.dataset.source
            torch_worker._worker_info = torch_worker.WorkerInfo(
                id=info.id, num_workers=info.num_workers, seed=info.seed, dataset=self.dataset
            )
        freeze_existing_objects()
        watchdog = Watchdog()
        Finalize(None, _leave_if_orphaned, args=(watchdog,), exitpriority=100)  # before queues are waited for
        vars(torch_worker)["ManagerWatchdog"] = lambda: watchdog
        if self.counters is not None:
            keep_freed_memory(self.retained_bytes)
            self.packer = Packer(self.counters, self.receiver, number, self.retained_bytes)
            _stack_into(self.packer)
        vars(torch_worker)["_IterableDatasetStopIteration"] = self.ended
        vars(torch_worker)["ExceptionWrapper"] = self.wrapped_error
        self.prepare(number, self.dataset, user_init)

    def prepare(self, number: int, dataset: Any, user_init: Callable[[int], None] | None) -> None:
        """Prepare a worker: load the data set's state, after the user's `worker_init_fn`."""
        self.number, self.dataset = number, dataset
        if user_init is not None:
            user_init(number)
        if self.saved:
            load_state(dataset, self.saved[number].dataset_state, "data set")
            self.batches = 0 if self.is_next_epoch else self.saved[number].batches or 0
        if not self.is_iterable and (not self.saved or self.is_next_epoch):
            self.before = self._kept_state()

    def begin_again(self) -> None:
        """Begin another epoch in a persistent worker."""
        if not self.is_iterable:
            self.before = self._kept_state()

    def send(self, batch: Any) -> Packed | Arrived:
        """The message that carries a batch."""
        self.batches += 1
        try:
            if self.packer is None:
                sent: Packed | Arrived = Arrived(batch, _copied(self._reported_state()), self.before, self.mover)
            else:
                sent = self._packed(self.packer, Arrived(batch, self._reported_state(), self.before, self.mover))
        except BaseException:
            self.batches -= 1  # an error is sent in its place
            raise
        self.turns += 1
        self.before = None
        return sent

    def _packed(self, packer: Packer, arrived: Arrived) -> Packed | Arrived:
        try:
            return packer.pack(arrived)
        except Exception:
            state, before = _without_what_cannot_cross(arrived.state), _without_what_cannot_cross(arrived.before)
            if state is arrived.state and before is arrived.before:
                raise
            return packer.pack(replace(arrived, state=state, before=before))

    def failed(self) -> None:
        """Count an error that is sent in place of a batch."""
        self.turns += 1

    def wrapped_error(self, exc_info: Any = None, where: str = "in background") -> ExceptionWrapper:
        """Replaces torch's class."""
        self.failed()
        return _picklable_error(exc_info, where)

    def read(self, source: Any) -> Iterator[Any]:
        """An iteration of the data set; the first one continues a saved one."""
        saved, self.saved = (self.saved[self.number] if self.saved else None), ()
        self.turns = 0
        if saved is None or self.is_next_epoch:
            self.batches = 0
        iterator = iter(source)
        has_ended = False
        if saved is not None:
            load_state(iterator, saved.iterator_state, "data set's iterator")
            if self.is_next_epoch:
                iterator = iter(source)
            elif saved.is_unknown:
                self._skip(iterator, saved.batches or 0)
            else:
                has_ended = saved.has_ended
        if not is_stateful(source) and not is_stateful(iterator):
            self.reading = None
            return iterator  # type: ignore[no-any-return]  # the user's own
        self.reading = _TrackedIterator(iterator, has_ended)
        if saved is None or self.is_next_epoch:
            self.before = self._kept_state()
        return self.reading

    def _skip(self, iterator: Iterator[Any], batches: int) -> None:
        """Skip samples without collating them."""
        for _ in islice(iterator, batches * (self.batch_size or 1)):
            pass

    def _kept_state(self) -> LoaderState | None:
        """A copy, to report later: the data set may go on to change the objects in its state."""
        return _copied(self._state())  # type: ignore[return-value]  # as it is

    def _reported_state(self) -> LoaderState | NotReported | None:
        """The state to report with the batch of this turn."""
        has_no_state = self.reading is None if self.is_iterable else not is_stateful(self.dataset)
        if has_no_state:
            return None
        is_due = self.reports_every is not None and (self.turns + 1) % self.reports_every == 0
        return self._state() if is_due else NOT_REPORTED

    def _state(self) -> LoaderState | None:
        reading = self.reading
        if self.is_iterable:
            if reading is None:
                return None
            return worker_state(self.number, self.dataset, reading.iterator, reading.has_ended, self.batches)
        return worker_state(self.number, self.dataset, None, False, self.batches)

    def ended(self, number: int) -> DatasetEnded:
        """Replaces torch's class."""
        before, self.before = self.before, None
        if self.reading is not None:
            self.reading.has_ended = True
        state = self._state() or unknown_worker_state(
            self.number, is_iterable=True, batches=self.batches, has_ended=True
        )
        states = _without_what_cannot_cross(state), _without_what_cannot_cross(before)
        return DatasetEnded(number, pickle.dumps(states))


def _copied(state: LoaderState | NotReported | None) -> LoaderState | NotReported | None:
    """A copy; without the data set's state where that cannot be copied."""
    try:
        return copy.deepcopy(state)
    except Exception as error:  # the user's objects may raise anything
        assert isinstance(state, dict), "all else can be copied"
        return without_dataset(state, f"the result of state_dict() cannot be copied ({type(error).__name__}: {error})")


def _without_what_cannot_cross(state: Any) -> Any:
    why = pickling_problem(state) if isinstance(state, dict) else None
    return state if why is None else without_dataset(state, why)


@dataclass
class _TrackedIterator:
    """An iterator of the user that remembers its end: after that, its state may be one of a new iteration."""

    iterator: Iterator[Any]
    has_ended: bool = False

    def __iter__(self) -> _TrackedIterator:
        return self

    def __next__(self) -> Any:
        if self.has_ended:
            raise StopIteration
        try:
            return next(self.iterator)
        except StopIteration:
            self.has_ended = True
            raise


class WorkerDataset(IterableDataset[Any]):
    """Wraps an iterable data set of the user, to track its iterations."""

    def __init__(self, worker: Worker, source: Any) -> None:
        self._worker, self.source = worker, source

    def __iter__(self) -> Iterator[Any]:
        return self._worker.read(self.source)

    def __repr__(self) -> str:
        return str(self.source)  # in torch's warnings


@dataclass(frozen=True)
class WorkerInit:
    """Wraps `worker_init_fn`."""

    worker: Worker
    user_init: Callable[[int], None] | None

    def __call__(self, number: int) -> None:
        self.worker.open(number, self.user_init)


@dataclass(frozen=True)
class WorkerCollate:
    """Wraps `collate_fn`."""

    worker: Worker
    user_collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Packed | Arrived:
        return self.worker.send(self.user_collate(samples))


def wrapped_dataset(worker: Worker, dataset: Any) -> Any:
    """The data set to pass to torch. A data pipe is not wrapped: torch traverses its graph."""
    if not worker.is_iterable or isinstance(dataset, IterDataPipe):
        return dataset
    return WorkerDataset(worker, dataset)


def _leave_if_orphaned(watchdog: Watchdog) -> None:
    """Exit at once if the trainer is gone: no process will read unsent messages, and other workers, which hold the
    sockets, would keep this one waiting.
    """
    if not watchdog.is_alive():
        os._exit(1)


def _stack_into(packer: Packer) -> None:
    """Let `default_collate` stack tensors into slots, in this process."""
    collate_map = torch_collate.default_collate_fn_map
    plain = collate_map[torch.Tensor]
    if plain is torch_collate.collate_tensor_fn:  # not one that the user has registered
        collate_map[torch.Tensor] = partial(_stacked, packer)


def _stacked(packer: Packer, batch: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
    first = batch[0]
    if type(first) is not torch.Tensor or not is_plain(first):
        return torch_collate.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)  # type: ignore[no-any-return]
    return stack_into(packer.take_tensor((len(batch), *first.shape), first.dtype), batch)


def _picklable_error(exc_info: Any, where: str) -> ExceptionWrapper:
    wrapper = ExceptionWrapper(exc_info, where)  # type: ignore[no-untyped-call]
    try:
        pickle.dumps(wrapper.exc_type)
    except Exception:  # a class of the user may raise anything
        wrapper.exc_type = WorkerError
    return wrapper
