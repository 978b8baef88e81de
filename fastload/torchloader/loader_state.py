"""The layout of a loader's state, which is that of torchdata's StatefulDataLoader.

So its checkpoints can be read here, and tools that inspect a state find torchdata's keys. Without worker processes a
state is one dict; with them, one for the trainer's part (`_snapshot`, `_main_snapshot`) and one for each worker.
fastload adds these keys: `_order`, the random state that an order is drawn from (see `sampling`); `_batches`, how many
batches of a worker were delivered; `_failed`, which turns since the snapshot were errors; and `_next`, the random state
for the next epoch's order, once an epoch is over.

This module only reads and writes states; nothing here has side effects.

**Snapshots.** With `snapshot_every_n_steps` a worker reports its data set's state with some of its batches only: a
state may be large, it is copied with every batch that carries it, and it is rarely used. The loader then knows its
position only at moments at which it has the last state of each worker: a *snapshot*. In between, a state is the last
snapshot and the number of batches since, which are made again and discarded when the state is loaded.

Batches are dispatched to workers in turn. So if each reports after the same number of its turns, they report one after
another, and the last one completes a snapshot; a worker whose data set has ended has reported its final state, and is
not waited for. But correctness does not depend on workers being in step: a snapshot is complete when all states are
known (see `progress`). Where workers get out of step, the last snapshot is only older than it should be.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastload.errors import StateError
from fastload.torchloader.randomness import Randomness
from fastload.torchloader.sampling import Mark, SavedOrder, is_stateful, state_of
from fastload.transport.pickling import dump_apart

LoaderState = dict[str, Any]
SNAPSHOT, MAIN, WORKERS = "_snapshot", "_main_snapshot", "_worker_snapshots"
SNAPSHOT_STEP, STEPS_SINCE, LAST_WORKER = "_snapshot_step", "_steps_since_snapshot", "_last_yielded_worker_id"
NUM_WORKERS, BASE_SEED, SHARED_SEED = "_num_workers", "_base_seed", "_shared_seed"
SAMPLER_STATE, SAMPLER_ITER_STATE, SAMPLER_YIELDED = (
    "_index_sampler_state",
    "_sampler_iter_state",
    "_sampler_iter_yielded",
)
NUM_YIELDED, LENGTH, FINISHED = "_num_yielded", "_IterableDataset_len_called", "_iterator_finished"
WORKER_ID, FETCHER, DATASET = "worker_id", "fetcher_state", "dataset_state"
DATASET_ITER, FETCHER_ENDED = "dataset_iter_state", "fetcher_ended"
ORDER, BATCHES, FAILED, NEXT = "_order", "_batches", "_failed", "_next"
# Internal, removed before a user gets the state: why a worker's data set reported none.
NOT_REPORTED_BECAUSE = "_not_reported_because"


class NotReported(Enum):
    """Stands for a state that a worker has, and did not report with this batch."""

    NOT_REPORTED = "not reported"


NOT_REPORTED = NotReported.NOT_REPORTED


@dataclass(frozen=True, slots=True)
class SavedWorker:
    """The state of one worker. `batches`: how many were delivered; None where that is unknown."""

    dataset_state: Any = None
    iterator_state: Any = None
    has_ended: bool = False
    batches: int | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether neither data set nor iterator has a saved state."""
        return self.dataset_state is None and self.iterator_state is None


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state that was read. `num_workers`: of the loader that it was taken from; `workers` has as many, or one for 0.

    `discard`: batches to make and discard, where the snapshot is older than the state. `failed`: which turns among
    these raised errors instead.
    """

    order: SavedOrder
    workers: tuple[SavedWorker, ...]
    num_workers: int
    last_worker: int
    num_yielded: int
    length: int | None
    shared_seed: int | None
    base_seed: int | None
    discard: int
    is_finished: bool
    next_epoch: Randomness | None
    failed: frozenset[int] = frozenset()


def worker_state(worker: int, dataset: Any, iterator: Any, has_ended: bool, batches: int) -> LoaderState | None:
    """The state of a worker's data set; None where it has none. `iterator`: of an iterable data set."""
    if not is_stateful(dataset) and not is_stateful(iterator):
        return None
    fetcher, problems = None, list[str]()
    if iterator is not None:
        fetcher = {DATASET_ITER: state_of(iterator, problems), FETCHER_ENDED: has_ended}
    dataset_state = state_of(dataset, problems) if iterator is not dataset else None
    state = {WORKER_ID: worker, FETCHER: fetcher, DATASET: dataset_state, BATCHES: batches}
    return state if not problems else {**state, NOT_REPORTED_BECAUSE: problems}


def without_dataset(state: LoaderState, why: str) -> LoaderState:
    """The same, without the states of data set and iterator."""
    fetcher = state[FETCHER] and {**state[FETCHER], DATASET_ITER: None}
    return {**state, FETCHER: fetcher, DATASET: None, NOT_REPORTED_BECAUSE: [*state.get(NOT_REPORTED_BECAUSE, ()), why]}


def state_for_user(state: LoaderState) -> tuple[LoaderState, list[str]]:
    """The state to return to a user, and the reasons why data sets have reported none."""
    if SNAPSHOT not in state:
        return _worker_for_user(state)
    reported = {name: _worker_for_user(worker) for name, worker in state[SNAPSHOT][WORKERS].items()}
    snapshot = {**state[SNAPSHOT], WORKERS: {name: worker for name, (worker, _) in reported.items()}}
    return {**state, SNAPSHOT: snapshot}, [why for _, reasons in reported.values() for why in reasons]


def _worker_for_user(state: LoaderState) -> tuple[LoaderState, list[str]]:
    why = pickling_problem(state)
    if why is not None:
        state = without_dataset(state, why)
    return {key: value for key, value in state.items() if key != NOT_REPORTED_BECAUSE}, state.get(
        NOT_REPORTED_BECAUSE, []
    )


def pickling_problem(state: LoaderState | None) -> str | None:
    """Why the states of data set and iterator cannot be pickled; None where they can."""
    if state is None or (state.get(DATASET) is None and state.get(FETCHER) is None):
        return None
    try:
        dump_apart((state.get(DATASET), state.get(FETCHER)), io.BytesIO())
    except Exception as error:  # the user's objects may raise anything
        return f"the result of state_dict() cannot be pickled ({type(error).__name__}: {error})"
    return None


def unknown_worker_state(worker: int, is_iterable: bool, batches: int, has_ended: bool = False) -> LoaderState:
    """The state of a worker whose data set has reported none."""
    fetcher = {DATASET_ITER: None, FETCHER_ENDED: has_ended} if is_iterable else None
    return {WORKER_ID: worker, FETCHER: fetcher, DATASET: None, BATCHES: batches}


def order_state(saved: SavedOrder) -> LoaderState:
    """The part of a state that describes the order."""
    mark = saved.mark
    state: LoaderState = {
        SAMPLER_STATE: mark.sampler_state,
        SAMPLER_ITER_STATE: mark.iterator_state,
        SAMPLER_YIELDED: mark.yielded,
    }
    if saved.at_iter is not None and saved.at_first is not None:
        state[ORDER] = {
            "at_iter": saved.at_iter.to_json(),
            "at_first": saved.at_first.to_json(),
            "ahead": sorted(saved.ahead),
        }
    return state


def read_state(state: Any, dataset: Any, is_iterable: bool, num_workers: int) -> SavedState:
    """Read a state. Raises `StateError`, with the reason, where it does not fit this loader."""
    if not isinstance(state, Mapping):
        raise StateError(f"a state is the result of state_dict(), a dict, and not a {type(state).__name__}")
    saved = _of_processes(state) if SNAPSHOT in state else _of_one(state)
    _check_kind(state, saved, is_iterable)
    if saved.num_workers != num_workers:
        _check_other_count(saved, is_iterable, num_workers)
    if not is_stateful(dataset) and any(worker.dataset_state for worker in saved.workers):
        raise StateError(
            f"the state contains a state of the data set, and {type(dataset).__name__} has no load_state_dict; "
            "it was taken with another data set"
        )
    return saved


def _of_one(state: Mapping[str, Any]) -> SavedState:
    _check_keys(state, [NUM_YIELDED, SAMPLER_YIELDED, FINISHED], "the state")
    return SavedState(
        order=_order(state),
        workers=(_worker(state),),
        num_workers=0,
        last_worker=-1,
        num_yielded=state[NUM_YIELDED],
        length=state.get(LENGTH),
        shared_seed=state.get(SHARED_SEED),
        base_seed=state.get(BASE_SEED),
        discard=0,
        is_finished=state[FINISHED],
        next_epoch=_next(state),
    )


def _of_processes(state: Mapping[str, Any]) -> SavedState:
    _check_keys(state, [SNAPSHOT, FINISHED], "the state")
    snapshot = state[SNAPSHOT]
    _check_keys(snapshot, [MAIN, WORKERS, SNAPSHOT_STEP, LAST_WORKER], f"the state's {SNAPSHOT!r}")
    main, workers = snapshot[MAIN], snapshot[WORKERS]
    _check_keys(main, [NUM_WORKERS, SAMPLER_YIELDED], f"the state's {MAIN!r}")
    _check_keys(workers, [worker_key(n) for n in range(main[NUM_WORKERS])], f"the state's {WORKERS!r}")
    return SavedState(
        order=_order(main),
        workers=tuple(_worker(workers[worker_key(n)]) for n in range(main[NUM_WORKERS])),
        num_workers=main[NUM_WORKERS],
        last_worker=snapshot[LAST_WORKER],
        num_yielded=snapshot[SNAPSHOT_STEP],
        length=main.get(LENGTH),
        shared_seed=main.get(SHARED_SEED),
        base_seed=main.get(BASE_SEED),
        discard=state.get(STEPS_SINCE, 0),
        is_finished=state[FINISHED],
        next_epoch=_next(state),
        failed=frozenset(state.get(FAILED, ())),
    )


def worker_key(worker: int) -> str:
    return f"worker_{worker}"


def _order(state: Mapping[str, Any]) -> SavedOrder:
    mark = Mark(state[SAMPLER_YIELDED], state.get(SAMPLER_STATE), state.get(SAMPLER_ITER_STATE))
    drawn = state.get(ORDER)
    if drawn is None:
        return SavedOrder(mark)
    _check_keys(drawn, ["at_iter", "at_first", "ahead"], f"the state's {ORDER!r}")
    at_iter, at_first = Randomness.from_json(drawn["at_iter"]), Randomness.from_json(drawn["at_first"])
    return SavedOrder(mark, at_iter, at_first, frozenset(drawn["ahead"]))


def _worker(state: Mapping[str, Any]) -> SavedWorker:
    fetcher = state.get(FETCHER) or {}
    return SavedWorker(
        state.get(DATASET), fetcher.get(DATASET_ITER), bool(fetcher.get(FETCHER_ENDED)), state.get(BATCHES)
    )


def _next(state: Mapping[str, Any]) -> Randomness | None:
    return None if state.get(NEXT) is None else Randomness.from_json(state[NEXT])


def _check_keys(state: Any, keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if not isinstance(state, Mapping) or key not in state]
    if missing:
        there = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"{what} lacks {', '.join(map(repr, missing))} (there is: {there}); a loader over this data set "
            "loads states of its own state_dict(), or of a StatefulDataLoader"
        )


def _check_kind(state: Mapping[str, Any], saved: SavedState, is_iterable: bool) -> None:
    parts = list(state[SNAPSHOT][WORKERS].values()) if SNAPSHOT in state else [state]
    was_iterable = any(part.get(FETCHER) is not None for part in parts)
    if parts and was_iterable != is_iterable:
        kinds = {True: "an iterable-style", False: "a map-style"}
        raise StateError(f"the state is that of {kinds[was_iterable]} data set, and this is {kinds[is_iterable]} one")


def _check_other_count(saved: SavedState, is_iterable: bool, num_workers: int) -> None:
    was = f"the state was taken with num_workers={saved.num_workers}, and this loader has {num_workers}"
    if saved.is_finished:
        return
    if is_iterable:
        raise StateError(
            f"{was}: each worker has its own part of an iterable-style data set; give num_workers={saved.num_workers}"
        )
    if any(worker.dataset_state for worker in saved.workers):
        raise StateError(
            f"{was}: the data set of each worker has a state of its own; give num_workers={saved.num_workers}"
        )


def snapshot_interval(every_n_steps: int | None, num_workers: int, *, are_in_step: bool) -> int | None:
    """A worker reports its state with each of its batches whose number, from 1, is a multiple of this; None: never.

    So there is a snapshot at least every `every_n_steps` steps. `are_in_step`: whether workers take turns.
    """
    if not are_in_step:
        return 1
    return max(1, every_n_steps // num_workers) if every_n_steps else None
