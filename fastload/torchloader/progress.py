"""How far an iteration is, counted in batches that were delivered; it outlives the iteration, whose state it can tell.

With worker processes, batches are on their way that are not delivered. Of each index that a worker was given, the
`Mark` of the order is remembered until all before it were delivered; of each worker, the state that came with the last
batch of its that was. Where a batch came without (see `telling`), what was known before it is kept as a `Snapshot`
until all is known again.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from typing import Any

from fastload.torchloader import state as keys
from fastload.torchloader.order import Mark, OrderIterator, SavedOrder
from fastload.torchloader.randomness import Generators, Randomness
from fastload.torchloader.state import NOT_REPORTED, LoaderState, NotReported, SavedState


@dataclass(slots=True)
class IterationProgress:
    """Of an iteration without worker processes: data set and sampler are here, and are asked when the state is."""

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
        """Where it is."""
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
            # One that has not begun has not read where its data set was told to begin, so that does not know either.
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
    """Of one with worker processes."""

    is_iterable: bool = False
    num_workers: int = 0
    last_worker: int = 0
    marks: Marks = field(default_factory=lambda: Marks(Mark()))
    workers: list[WorkerProgress] = field(default_factory=list)
    snapshot: Snapshot | None = None  # None: all is known now
    failures: int = 0  # errors since the last batch, which a state does not count

    def begin(self, order: OrderIterator | None, saved: SavedState | None) -> None:
        """An epoch begins, where one was that was saved."""
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
            self.workers = [WorkerProgress(initial=worker.state()) for worker in self.workers]  # they live on
        else:
            self.workers = [WorkerProgress() for _ in range(self.num_workers)]

    def delivered(self, worker: int, state: LoaderState | NotReported | None, outstanding: Container[int]) -> None:
        """A batch has come from a worker; indexes that are `outstanding` have not."""
        if state is NOT_REPORTED and self.snapshot is None:
            self.snapshot = self._now()
        if self.snapshot is not None:
            self.snapshot.passed(self.failures)
        self.failures = 0
        self.last_worker = worker
        self.marks.settle(outstanding)
        self.workers[worker].delivered(state)
        self._let_go_if_known()

    def failed(self) -> None:
        """An error has come in the place of a batch. It is behind once another batch has come."""
        self.failures += 1

    def state(self) -> LoaderState:
        """Where it is."""
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
        self._let_go_if_known()
        return self.snapshot or self._now()

    def _let_go_if_known(self) -> None:
        """Nobody needs a snapshot while all is known."""
        if self.snapshot is not None and all(worker.is_known for worker in self.workers):
            self.snapshot = None

    def _now(self) -> Snapshot:
        worker_marks = [worker.mark for worker in self.workers]
        return Snapshot(self.num_yielded, self.last_worker, self.marks.last, self.marks.ahead(), worker_marks)


@dataclass(slots=True)
class Snapshot:
    """Where an iteration was when all workers' states were known last. `failed`: which turns since were errors."""

    num_yielded: int
    last_worker: int
    mark: Mark
    ahead: frozenset[int]
    worker_marks: list[WorkerMark]
    turns: int = 0
    failed: list[int] = field(default_factory=list)

    def passed(self, failures: int) -> None:
        """So many errors have come since the last batch, and now another batch."""
        self.failed += range(self.turns, self.turns + failures)
        self.turns += failures + 1


@dataclass(frozen=True, slots=True)
class WorkerMark:
    """How many batches of a worker were delivered, and the state that came with the last of them."""

    batches: int
    state: LoaderState | NotReported | None


@dataclass(slots=True)
class WorkerProgress:
    """One worker's. `initial`: its state before its first batch; `last`: after the last that was delivered; `end`: when
    its iterable data set had ended.
    """

    batches: int = 0
    initial: LoaderState | None = None
    last: LoaderState | NotReported | None = None
    end: LoaderState | None = None

    @classmethod
    def of(cls, worker: int, saved: keys.SavedWorker, is_iterable: bool) -> WorkerProgress:
        """Of one that begins where another was."""
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
        """Where it is."""
        return WorkerMark(self.batches, self.last)

    @property
    def is_known(self) -> bool:
        """Whether it told its last state, if it has any."""
        return self.last is not NOT_REPORTED or self._has_ended_at(self.mark)

    def delivered(self, state: LoaderState | NotReported | None) -> None:
        """A batch, with the state after it."""
        self.batches += 1
        self.last = state

    def state_at(self, mark: WorkerMark) -> LoaderState | None:
        """Its state where it is or was; None where that has none, or is not known."""
        if self._has_ended_at(mark):
            return self.end
        return (None if isinstance(mark.state, NotReported) else mark.state) or self.initial

    def state(self) -> LoaderState | None:
        """The last that counts; None where nothing is known."""
        return self.state_at(self.mark)

    def _has_ended_at(self, mark: WorkerMark) -> bool:
        return self.end is not None and bool(self.end[keys.BATCHES] == mark.batches)


class Marks:
    """How far an order is, of which indexes are on their way; their numbers are those of torch's iterator."""

    def __init__(self, start: Mark, ahead: frozenset[int] = frozenset()) -> None:
        self.last = start  # all before it was delivered
        self._ahead = ahead
        self._marks: dict[int, Mark] = {}
        self._settled: set[int] = set()

    def sent(self, number: int, mark: Mark) -> None:
        """An index was given to a worker, after which the order is at `mark`."""
        self._marks[number] = mark

    def settle(self, outstanding: Container[int]) -> None:
        """Those that are not outstanding were delivered."""
        self._settled = {number for number in self._marks if number not in outstanding}
        for number in list(self._marks):
            if number not in self._settled:
                break
            self.last = self._marks.pop(number)

    def ahead(self) -> frozenset[int]:
        """Which indexes beyond `last` were delivered, by their place in the order."""
        settled = {self._marks[number].yielded - 1 for number in self._settled if number in self._marks}
        return frozenset(place for place in settled | self._ahead if place >= self.last.yielded)
