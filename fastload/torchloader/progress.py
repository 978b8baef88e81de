"""The position of an iteration, counted in delivered batches. It outlives the iterator, and makes the loader's state.

With workers, some batches are in flight, not delivered. For each index that was dispatched, the order's `Mark` is kept
until all earlier indexes were delivered; for each worker, the state that came with its last delivered batch. Where a
batch came without one (see `loader_state`), the position before it is kept as a `Snapshot` until all states are known
again.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from typing import Any

from fastload.torchloader import loader_state as keys
from fastload.torchloader.loader_state import NOT_REPORTED, LoaderState, NotReported, SavedState
from fastload.torchloader.randomness import Generators, Randomness
from fastload.torchloader.sampling import Mark, OrderIterator, SavedOrder


@dataclass(slots=True)
class IterationProgress:
    """Of an iteration without workers: data set and sampler are in this process, and asked for their states."""

    generators: Generators
    order: OrderIterator | None = None  # of a map-style data set
    fetcher: Any = None
    begun_at: keys.SavedWorker | None = None
    num_yielded: int = 0
    length: int | None = None
    shared_seed: int | None = None
    base_seed: int | None = None
    is_finished: bool = False

    def state(self) -> LoaderState:
        """The loader's state."""
        return {
            **self._main(),
            keys.NUM_YIELDED: self.num_yielded,
            **self._dataset(),
            keys.FINISHED: self.is_finished,
            **self._next(),
        }

    def _main(self) -> LoaderState:
        return {
            **keys.order_state(self._order()),
            keys.LENGTH: self.length,
            keys.SHARED_SEED: self.shared_seed,
            keys.BASE_SEED: self.base_seed,
        }

    def _order(self) -> SavedOrder:
        if self.order is None:
            return SavedOrder(Mark(self.num_yielded))
        self.order.settle()
        return SavedOrder(self.order.mark(), self.order.at_iter, self.order.at_first)

    def _dataset(self) -> LoaderState:
        iterator = getattr(self.fetcher, "dataset_iter", None)
        if self.begun_at is not None and isgenerator(iterator) and getgeneratorstate(iterator) == GEN_CREATED:
            # A generator that has not started has not read the position that its data set loaded.
            return {
                keys.FETCHER: {keys.DATASET_ITER: None, keys.FETCHER_ENDED: self.begun_at.has_ended},
                keys.DATASET: self.begun_at.dataset_state,
                keys.BATCHES: self.num_yielded,
            }
        ended = bool(getattr(self.fetcher, "ended", False))
        reported = keys.worker_state(0, self.fetcher.dataset, iterator, ended, self.num_yielded)
        reported = reported or keys.unknown_worker_state(0, iterator is not None, self.num_yielded)
        return {
            key: reported[key]
            for key in (keys.FETCHER, keys.DATASET, keys.BATCHES, keys.NOT_REPORTED_BECAUSE)
            if key in reported
        }

    def _next(self) -> LoaderState:
        return {keys.NEXT: Randomness.now(self.generators).to_json()} if self.is_finished else {}


@dataclass(slots=True)
class WorkersProgress(IterationProgress):
    """Of an iteration with workers."""

    is_iterable: bool = False
    num_workers: int = 0
    last_worker: int = 0
    marks: Marks = field(default_factory=lambda: Marks(Mark()))
    workers: list[WorkerProgress] = field(default_factory=list)
    snapshot: Snapshot | None = None  # None while all states are known
    failures: int = 0  # errors since the last batch, which a state does not count

    def begin(self, order: OrderIterator | None, saved: SavedState | None) -> None:
        """Begin an epoch, where `saved` was taken."""
        self.order = order
        self.is_finished = False
        self.snapshot, self.failures = None, 0
        self.num_yielded = 0 if saved is None else saved.num_yielded
        same_count = saved is not None and saved.num_workers == self.num_workers
        self.last_worker = saved.last_worker if saved is not None and same_count else self.num_workers - 1
        self.marks = Marks(
            Mark() if saved is None else saved.order.mark, frozenset() if saved is None else saved.order.ahead
        )
        if saved is not None and same_count:
            self.workers = [WorkerProgress.of(n, worker, self.is_iterable) for n, worker in enumerate(saved.workers)]
        elif self.workers and not self.is_iterable:
            self.workers = [WorkerProgress(initial=worker.state()) for worker in self.workers]  # persistent workers
        else:
            self.workers = [WorkerProgress() for _ in range(self.num_workers)]

    def delivered(self, worker: int, state: LoaderState | NotReported | None, outstanding: Container[int]) -> None:
        """Count a batch of a worker; tasks in `outstanding` are not delivered yet."""
        if state is NOT_REPORTED and self.snapshot is None:
            self.snapshot = self._now()
        if self.snapshot is not None:
            self.snapshot.passed(self.failures)
        self.failures = 0
        self.last_worker = worker
        self.marks.settle(outstanding)
        self.workers[worker].delivered(state)
        self._drop_snapshot_if_known()

    def failed(self) -> None:
        """Count an error in place of a batch. The position is past it only after the next batch."""
        self.failures += 1

    def state(self) -> LoaderState:
        """The loader's state."""
        at = self._last_known()
        workers = {}
        for number, (worker, mark) in enumerate(zip(self.workers, at.worker_marks, strict=True)):
            reported = worker.state_at(mark) or keys.unknown_worker_state(number, self.is_iterable, mark.batches)
            workers[keys.worker_key(number)] = {**reported, keys.BATCHES: mark.batches}
        return {
            keys.SNAPSHOT: {
                keys.SNAPSHOT_STEP: at.num_yielded,
                keys.LAST_WORKER: at.last_worker,
                keys.MAIN: {keys.NUM_WORKERS: self.num_workers, **self._main()},
                keys.WORKERS: workers,
            },
            keys.STEPS_SINCE: self.num_yielded - at.num_yielded,
            **({keys.FAILED: at.failed.copy()} if at.failed else {}),
            keys.FINISHED: self.is_finished,
            **self._next(),
        }

    def _order(self) -> SavedOrder:
        at = self._last_known()
        if self.order is None:
            return SavedOrder(Mark(at.num_yielded))
        return SavedOrder(at.mark, self.order.at_iter, self.order.at_first, at.ahead)

    def _last_known(self) -> Snapshot:
        self._drop_snapshot_if_known()
        return self.snapshot or self._now()

    def _drop_snapshot_if_known(self) -> None:
        """Drop the snapshot, which is not needed while all states are known."""
        if self.snapshot is not None and all(worker.is_known for worker in self.workers):
            self.snapshot = None

    def _now(self) -> Snapshot:
        worker_marks = [worker.mark for worker in self.workers]
        return Snapshot(self.num_yielded, self.last_worker, self.marks.last, self.marks.ahead(), worker_marks)


@dataclass(slots=True)
class Snapshot:
    """The position when all workers' states were last known. `failed`: which turns since then were errors."""

    num_yielded: int
    last_worker: int
    mark: Mark
    ahead: frozenset[int]
    worker_marks: list[WorkerMark]
    turns: int = 0
    failed: list[int] = field(default_factory=list)

    def passed(self, failures: int) -> None:
        """Count a batch, and the errors that came before it."""
        self.failed += range(self.turns, self.turns + failures)
        self.turns += failures + 1


@dataclass(frozen=True, slots=True)
class WorkerMark:
    """How many batches of a worker were delivered, and the state that came with the last of them."""

    batches: int
    state: LoaderState | NotReported | None


@dataclass(slots=True)
class WorkerProgress:
    """Of one worker. `initial`: its state before its first batch; `last`: after its last delivered batch; `end`: when
    its iterable data set had ended.
    """

    batches: int = 0
    initial: LoaderState | None = None
    last: LoaderState | NotReported | None = None
    end: LoaderState | None = None

    @classmethod
    def of(cls, worker: int, saved: keys.SavedWorker, is_iterable: bool) -> WorkerProgress:
        """Of a worker that begins where a saved one was."""
        batches = saved.batches or 0
        if saved.is_unknown and not saved.has_ended:
            return cls(batches)
        fetcher = {keys.DATASET_ITER: saved.iterator_state, keys.FETCHER_ENDED: saved.has_ended}
        reported = keys.unknown_worker_state(worker, is_iterable, batches)
        return cls(
            batches, {**reported, keys.FETCHER: fetcher if is_iterable else None, keys.DATASET: saved.dataset_state}
        )

    @property
    def mark(self) -> WorkerMark:
        return WorkerMark(self.batches, self.last)

    @property
    def is_known(self) -> bool:
        """Whether its last state is known, if it has one."""
        return self.last is not NOT_REPORTED or self._has_ended_at(self.mark)

    def delivered(self, state: LoaderState | NotReported | None) -> None:
        """Count a batch, with the state after it."""
        self.batches += 1
        self.last = state

    def state_at(self, mark: WorkerMark) -> LoaderState | None:
        """Its state at a mark; None where it has none, or it is unknown."""
        if self._has_ended_at(mark):
            return self.end
        return (None if isinstance(mark.state, NotReported) else mark.state) or self.initial

    def state(self) -> LoaderState | None:
        return self.state_at(self.mark)

    def _has_ended_at(self, mark: WorkerMark) -> bool:
        return self.end is not None and bool(self.end[keys.BATCHES] == mark.batches)


class Marks:
    """The position of an order while indexes are in flight; these have the numbers of torch's iterator."""

    def __init__(self, start: Mark, ahead: frozenset[int] = frozenset()) -> None:
        self.last = start  # everything before it was delivered
        self._ahead = ahead
        self._marks: dict[int, Mark] = {}
        self._settled: set[int] = set()

    def sent(self, number: int, mark: Mark) -> None:
        """Note an index that was dispatched; `mark` is the position after it."""
        self._marks[number] = mark

    def settle(self, outstanding: Container[int]) -> None:
        """Note that all indexes that are not outstanding were delivered."""
        self._settled = {number for number in self._marks if number not in outstanding}
        for number in list(self._marks):
            if number not in self._settled:
                break
            self.last = self._marks.pop(number)

    def ahead(self) -> frozenset[int]:
        """Which indexes beyond `last` were delivered, by their number in the order."""
        settled = {self._marks[number].yielded - 1 for number in self._settled if number in self._marks}
        return frozenset(place for place in settled | self._ahead if place >= self.last.yielded)
