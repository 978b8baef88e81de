"""`snapshot_every_n_steps`: workers tell their data sets' states now and then only, and what comes after loading is the
same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from fastload import DataLoader
from fastload.errors import ConfigError, StateError
from fastload.torchloader.loader_state import snapshot_interval
from tests.torchloader.datasets import (
    Mapped,
    RandomMapped,
    RangesWithStatefulIterator,
    StatefulMapped,
    StatefulRanges,
    as_is,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata calls

DATASETS: dict[str, Callable[[], Any]] = {
    "map": lambda: StatefulMapped(23),
    "random map": lambda: RandomMapped(23),
    "iterator": lambda: RangesWithStatefulIterator((19, 7)),
    "iterable": lambda: StatefulRanges((5, 21)),
}


def make(dataset: Any, every: int | None, kind: type = DataLoader, **options: Any) -> Any:
    options = {"num_workers": 2, "batch_size": 2, "collate_fn": as_is, **options}
    if isinstance(dataset, Mapped):
        options.setdefault("shuffle", True)
    return kind(dataset, snapshot_every_n_steps=every, **options)


def taken(loader: Any, steps: int) -> tuple[dict[str, Any], list[Any]]:
    """The state after so many steps, and the rest."""
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    return loader.state_dict(), list(iterator)


@pytest.mark.parametrize(
    ("every", "workers", "turns"),
    [(1, 1, 1), (1, 4, 1), (4, 4, 1), (8, 4, 2), (11, 4, 2), (10, 1, 10), (0, 2, None), (None, 2, None)],
)
def test_how_often_a_worker_reports(every, workers, turns):
    assert snapshot_interval(every, workers, are_in_step=True) == turns
    assert snapshot_interval(every, workers, are_in_step=False) == 1


# What a worker tells and when does not depend on what it is: threads, which begin at once, try all numbers of steps.
@pytest.mark.parametrize(
    ("every", "workers"), [(None, "thread"), (4, "thread"), (7, "thread"), (None, "process"), (4, "process")]
)
@pytest.mark.parametrize("name", DATASETS)
def test_from_every_step_the_rest_is_what_came_then(name, every, workers):
    if name == "random map" and workers == "thread":
        pytest.skip("threads share one generator")
    steps = range(len(list(make(DATASETS[name](), every, workers=workers))) + 1)
    for step in steps[:: 6 if workers == "process" else 1]:
        state, rest = taken(make(DATASETS[name](), every, workers=workers), step)
        state = json.loads(json.dumps(state))
        torch.manual_seed(step)
        other = make(DATASETS[name](), every, workers=workers)
        other.load_state_dict(state)
        iterator = iter(other)
        resumed = other.state_dict()
        assert resumed["_snapshot"]["_snapshot_step"] + resumed["_steps_since_snapshot"] == step
        if rest:  # a state of what goes on from a state
            assert next(iterator) == rest[0]
            third = make(DATASETS[name](), 1, workers=workers)
            third.load_state_dict(other.state_dict())
            assert list(third) == rest[1:]
        assert list(iterator) == rest[1:]


class Telling(StatefulMapped):
    """Gives how often this copy was asked for its state."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.times_asked = 0

    def made(self, index: int) -> Any:
        return self.times_asked

    def state_dict(self) -> dict[str, Any]:
        self.times_asked += 1
        return super().state_dict()


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_workers_are_asked_now_and_then_only(workers):
    def asked(every: int | None, **options: Any) -> int:
        """By each worker, before its last batch."""
        *_, last = make(Telling(40), every, batch_size=None, workers=workers, **options)
        return last

    assert asked(1) == 20
    assert asked(8) == 5
    assert asked(None) == 1  # at first
    assert asked(8, persistent_workers=True) == 20
    assert asked(8, in_order=False, num_workers=1) == 40


@pytest.mark.parametrize("name", DATASETS)
def test_a_snapshot_is_no_older_than_was_asked_for(name):
    loader = make(DATASETS[name](), 4, workers="thread")
    since = []
    for _ in loader:
        state = loader.state_dict()
        since.append(state["_steps_since_snapshot"])
        assert state["_snapshot"]["_snapshot_step"] + since[-1] == len(since)
    assert max(since) == 3
    assert since[:8] == [1, 2, 3, 0, 1, 2, 3, 0] or not isinstance(loader.dataset, Mapped)


def test_what_has_no_state_is_known_at_every_step():
    loader = make(Mapped(12, as_is), 6, workers="thread")
    for _ in loader:
        assert loader.state_dict()["_steps_since_snapshot"] == 0


class FailsAt(StatefulMapped):
    """Not with the `broken` ones."""

    def __init__(self, count: int, *broken: int) -> None:
        super().__init__(count)
        self.broken = broken

    def made(self, index: int) -> Any:
        if index in self.broken:
            raise ValueError(f"not {index}")
        return super().made(index)


def outcomes(iterator: Any) -> list[Any]:
    """Batches, and errors in their place."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(iterator))
        except StopIteration:
            return found
        except ValueError as error:
            found.append(str(error).splitlines()[-1])


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_errors_on_the_way_are_passed_over_again(workers):
    def loader() -> Any:
        return make(FailsAt(16, 4, 5, 11), 8, batch_size=None, shuffle=False, workers=workers)

    whole = outcomes(iter(loader()))
    assert [number for number, found in enumerate(whole) if isinstance(found, str)] == [4, 5, 11]
    for count in range(17)[:: 1 if workers == "thread" else 4]:
        one = loader()
        iterator = iter(one)
        for found in whole[:count]:
            if isinstance(found, str):
                with pytest.raises(ValueError, match="not"):
                    next(iterator)
            else:
                assert next(iterator) == found
        other = loader()
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        behind = count
        while behind and isinstance(whole[behind - 1], str):
            behind -= 1  # what failed last is tried again
        assert [type(found) for found in outcomes(iter(other))] == [type(found) for found in whole[behind:]]


def test_an_error_that_was_not_there_then_is_one():
    state, _ = taken(make(FailsAt(16), 8, batch_size=None, shuffle=False, workers="thread"), 7)
    other = make(FailsAt(16, 5), 8, batch_size=None, shuffle=False, workers="thread")
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="not 5"):
        iter(other)


def test_a_data_set_that_has_become_too_short_is_an_error():
    state, _ = taken(make(StatefulMapped(16), None, batch_size=None, shuffle=False, workers="thread"), 7)
    other = make(StatefulMapped(5), None, batch_size=None, shuffle=False, workers="thread")
    other.load_state_dict(state)
    with pytest.raises(StateError, match=r"7 batches have to be made again to .* and there are only 5"):
        iter(other)


# Pairs of each with each.
@pytest.mark.parametrize(
    ("name", "kind", "workers"),
    [
        ("map", DataLoader, "process"),
        ("map", StatefulDataLoader, "thread"),
        ("iterable", DataLoader, "thread"),
        ("iterable", StatefulDataLoader, "process"),
    ],
)
def test_workers_that_live_on_begin_the_next_epoch_where_they_were(name, kind, workers):
    """The state is that of the end of an epoch, with steps since the snapshot where it is torchdata's."""
    options = {"persistent_workers": True, "shuffle": False} if name == "map" else {"persistent_workers": True}
    theirs = make(DATASETS[name](), 5, kind, **options)
    list(theirs)
    state = theirs.state_dict()
    following = [list(theirs), list(theirs)]
    ours = make(DATASETS[name](), 5, workers=workers, **options)
    ours.load_state_dict(state)
    assert [list(ours), list(ours)] == following
    ours.close()


class WithEmptyState(Mapped):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_batches_since_are_passed_over_with_any_number_of_workers(kind, num_workers):
    state, rest = taken(make(WithEmptyState(30, as_is), 8, kind), 7)
    assert state["_steps_since_snapshot"] == 7
    other = make(WithEmptyState(30, as_is), 8, num_workers=num_workers)
    other.load_state_dict(state)
    assert list(other) == rest


@pytest.mark.parametrize("every", [-1, 1.5, True, "2"])
def test_what_is_no_number_of_batches_is_refused(every):
    with pytest.raises(ConfigError, match=r"snapshot_every_n_steps=.* must be a number of batches"):
        DataLoader([1], snapshot_every_n_steps=every)
