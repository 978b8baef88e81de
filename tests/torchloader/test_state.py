"""A loader over a foreign data set goes on where another was: at every step, with and without workers, whatever knows
where it is; also from checkpoints of torchdata's StatefulDataLoader, beside which it is held.
"""

from __future__ import annotations

import copy
import inspect
import json
import random
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, IterDataPipe, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from fastload import DataLoader
from fastload.errors import StateError
from tests.patience import PATIENCE_S
from tests.torchloader.datasets import (
    EagerSampler,
    Mapped,
    RandomMapped,
    Ranges,
    RangesWithStatefulIterator,
    StatefulMapped,
    StatefulRanges,
    StatefulSampler,
    as_is,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata calls

COUNT = 11
Make = Callable[..., Any]
# Orders drawn from what torchdata does not keep.
UNKNOWN_TO_TORCHDATA = ("with replacement", "drawn at once", "batch sampler")


def of(dataset: Make, **options: Any) -> Make:
    """Makes loaders, of either kind, each over a data set of its own."""

    def make(kind: type = DataLoader, **more: Any) -> Any:
        made = {name: value() if name.endswith("sampler") else value for name, value in options.items()}
        return kind(dataset(), **{"collate_fn": as_is, "batch_size": 2, **made, **more})

    return make


def plain() -> Mapped:
    return Mapped(COUNT, as_is)


LOADERS: dict[str, Make] = {
    "in order": of(plain),
    "shuffled": of(plain, shuffle=True),
    "samples": of(plain, shuffle=True, batch_size=None),
    "with replacement": of(plain, sampler=lambda: RandomSampler(range(COUNT), True, 40)),
    "drawn at once": of(plain, sampler=lambda: EagerSampler(COUNT), drop_last=True),
    "batch sampler": of(plain, batch_size=1, batch_sampler=lambda: BatchSampler(EagerSampler(COUNT), 3, False)),
    "stateful sampler": of(plain, sampler=lambda: StatefulSampler(COUNT)),
    "stateful data set": of(lambda: StatefulMapped(COUNT), shuffle=True),
    "random data set": of(lambda: RandomMapped(COUNT), shuffle=True),
    "iterable": of(lambda: Ranges((9, 4))),
    "iterable samples": of(lambda: Ranges((4, 9)), batch_size=None),
    "stateful iterator": of(lambda: RangesWithStatefulIterator((9, 4))),
    "stateful iterable": of(lambda: StatefulRanges((9, 4))),
    "stateful iterable, no rest": of(lambda: StatefulRanges((9, 4)), drop_last=True),
}


def taken(loader: Any, steps: int) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """The first batches of an epoch, the state then, and the rest."""
    iterator = iter(loader)
    first = [next(iterator) for _ in range(steps)]
    state = loader.state_dict()
    return first, state, list(iterator)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_from_every_step_the_rest_is_what_came_then(name, num_workers):
    make = LOADERS[name]
    steps = range(len(list(make(num_workers=num_workers))) + 1)
    for step in steps[:: 4 if num_workers else 1]:
        loader = make(num_workers=num_workers)
        _, state, rest = taken(loader, step)
        state = json.loads(json.dumps(state))
        torch.manual_seed(step)  # whatever the numbers are in the process that goes on
        before = torch.get_rng_state()
        other = make(num_workers=num_workers)
        other.load_state_dict(state)
        iterator = iter(other)
        assert json.loads(json.dumps(other.state_dict())) == state
        assert list(iterator) == rest
        if name != "random data set" or num_workers:
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", [name for name in LOADERS if name not in UNKNOWN_TO_TORCHDATA])
def test_checkpoints_of_torchdata_are_read(name, num_workers):
    make = LOADERS[name]
    for step in (0, 3, 5) if num_workers == 0 else (3,):
        theirs = make(StatefulDataLoader, num_workers=num_workers)
        _, state, rest = taken(theirs, step)
        ours = make(num_workers=num_workers)
        ours.load_state_dict(state)
        assert list(ours) == rest


@pytest.mark.parametrize("every", [2, 4])
def test_a_snapshot_of_torchdata_may_be_older_than_its_state(every):
    make = LOADERS["stateful iterator"]
    theirs = make(StatefulDataLoader, num_workers=2, snapshot_every_n_steps=every)
    _, state, rest = taken(theirs, 5)
    assert state["_steps_since_snapshot"] == 1
    ours = make(num_workers=2)
    ours.load_state_dict(state)
    assert list(ours) == rest


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("shuffled", (0, 2)),
        ("shuffled", (2, 0)),
        ("shuffled", (2, 1)),
        ("stateful sampler", (2, 1)),
        ("with replacement", (2, 0)),
    ],
)
def test_a_map_style_data_set_goes_on_with_another_number_of_workers(name, counts):
    make = LOADERS[name]
    _, state, rest = taken(make(num_workers=counts[0]), 3)
    other = make(num_workers=counts[1])
    other.load_state_dict(state)
    assert list(other) == rest


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_follow_as_they_would_have(num_workers):
    """An epoch's end is a state too, and what comes after it is what would have come."""
    for name in ("shuffled", "stateful iterable", "stateful data set"):
        persistent = num_workers > 0
        make = LOADERS[name]
        loader = make(num_workers=num_workers, persistent_workers=persistent)
        list(loader)
        state = loader.state_dict()
        following = [list(loader), list(loader)]
        other = make(num_workers=num_workers, persistent_workers=persistent)
        other.load_state_dict(state)
        assert list(other) == following[0], name
        if name == "stateful iterable":  # whose order is no random one
            assert list(other) == following[1]
        loader.close()
        other.close()


def global_states() -> list[Any]:
    numpys = np.random.get_state(legacy=False)["state"]
    return [torch.get_rng_state().tolist(), random.getstate(), numpys["key"].tolist(), numpys["pos"]]


def seed_global(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda count: torch.randperm(count).tolist(), id="torch"),
        pytest.param(lambda count: random.sample(range(count), count), id="python"),
        pytest.param(lambda count: np.random.permutation(count).tolist(), id="numpy"),
    ],
)
def test_after_an_epochs_end_orders_go_on_and_the_callers_generators_stay(draw):
    make = of(plain, sampler=lambda: EagerSampler(COUNT, draw))
    seed_global(1)
    loader = make()
    list(loader)
    state = loader.state_dict()
    following = [list(loader), list(loader)]

    seed_global(2)  # a process in which the generators are elsewhere: they are the user's
    before = global_states()
    other = make()
    other.load_state_dict(state)
    assert list(other) == following[0]
    assert global_states() == before

    seed_global(1)  # one in which they are where the epoch's end left them: they go on
    list(make())
    other = make()
    other.load_state_dict(state)
    assert [list(other), list(other)] == following


def test_with_a_generator_of_its_own_all_epochs_that_follow_are_the_same():
    def make(seed: int) -> Any:
        return LOADERS["shuffled"](num_workers=0, generator=torch.Generator().manual_seed(seed))

    loader = make(1)
    list(loader)
    _, state, rest = taken(loader, 2)
    following = [list(loader), list(loader)]
    other = make(7)
    other.load_state_dict(state)
    assert list(other) == rest
    assert [list(other), list(other)] == following


def test_the_last_batch_is_not_yet_the_end_of_the_epoch():
    for num_workers in (0, 2):
        loader = LOADERS["shuffled"](num_workers=num_workers)
        for _ in loader:
            state = loader.state_dict()
        loader.load_state_dict(state)
        assert list(loader) == []
        assert sorted(chain(*loader)) == list(range(COUNT))


def test_a_state_that_was_taken_before_an_iteration_is_that_of_the_next():
    for num_workers in (0, 2):
        loader = LOADERS["shuffled"](num_workers=num_workers)
        state = loader.state_dict()
        epoch = list(loader)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert list(loader) == epoch


def test_a_state_outlives_an_iteration_that_was_broken_off():
    for num_workers in (0, 2):
        loader = LOADERS["shuffled"](num_workers=num_workers)
        epoch = []
        for number, batch in enumerate(loader):
            epoch.append(batch)
            if number == 2:
                break
        state = loader.state_dict()
        other = LOADERS["shuffled"](num_workers=0)
        other.load_state_dict(state)
        assert sorted(chain(*epoch, *other)) == list(range(COUNT))


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_a_state_says_which_workers_have_ended_though_nothing_else_is_known_of_them(workers):
    loader = DataLoader(Ranges((2, 5)), num_workers=2, batch_size=None, workers=workers)
    iterator = iter(loader)
    for _ in range(6):
        next(iterator)
    parts = loader.state_dict()["_snapshot"]["_worker_snapshots"]
    assert [parts[f"worker_{n}"]["fetcher_state"]["fetcher_ended"] for n in range(2)] == [True, False]
    other = DataLoader(Ranges((2, 5)), num_workers=2, batch_size=None, workers=workers)
    other.load_state_dict(loader.state_dict())
    assert list(other) == list(iterator) == [6]


class KeepsWhatItIsTold(RangesWithStatefulIterator):
    """Its state is a list that it goes on with."""

    def __init__(self) -> None:
        super().__init__((9, 4))
        self.given: list[int] = []

    def __iter__(self) -> Any:
        for number in self.part()[len(self.given) :]:
            self.given.append(number)
            yield list(self.given)

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


@pytest.mark.parametrize(("workers", "num_workers"), [("auto", 0), ("process", 2), ("thread", 2)])
def test_a_state_can_be_loaded_often(workers, num_workers):
    def make() -> Any:
        return DataLoader(KeepsWhatItIsTold(), num_workers=num_workers, batch_size=None, workers=workers)

    loader = make()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = copy.deepcopy(loader.state_dict())  # without workers, it is the data set's own list
    rest = list(iterator)
    for _ in range(2):
        other = make()
        other.load_state_dict(state)
        assert list(other) == rest


def first_is_slow(index: int) -> int:
    if index == 0:
        torch.utils.data.get_worker_info().dataset.waits.wait(PATIENCE_S)
    return index


class SlowFirst(Mapped):
    def __init__(self) -> None:
        super().__init__(12, first_is_slow)
        self.waits = torch.multiprocessing.Event()


@pytest.mark.skipif(
    "in_order" not in inspect.signature(torch.utils.data.DataLoader).parameters, reason="this torch keeps the order"
)
def test_without_order_each_batch_comes_once():
    dataset = SlowFirst()
    loader = DataLoader(dataset, num_workers=2, in_order=False, batch_size=None)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(4)]
    assert 0 not in first
    state = loader.state_dict()
    dataset.waits.set()
    other = DataLoader(dataset, num_workers=2, in_order=False, batch_size=None)
    other.load_state_dict(state)
    assert sorted(first + list(other)) == list(range(12))
    assert sorted(first + list(iterator)) == list(range(12))


def fails_once(index: int) -> int:
    if index == 4:
        raise ValueError("not this one")
    return index


def test_a_batch_that_failed_was_not_delivered():
    loader = DataLoader(Mapped(8, fails_once), num_workers=2, batch_size=None)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not this one"):
        next(iterator)
    other = DataLoader(Mapped(8, as_is), num_workers=0, batch_size=None)
    other.load_state_dict(loader.state_dict())
    assert list(other) == [4, 5, 6, 7]


class Pipe(IterDataPipe[int]):
    def __iter__(self) -> Any:
        yield from range(12)


def test_data_pipes_go_on_too():
    def make(num_workers: int) -> Any:
        return DataLoader(Pipe().sharding_filter(), num_workers=num_workers, batch_size=2, collate_fn=as_is)

    for num_workers in (0, 2):
        _, state, rest = taken(make(num_workers), 3)
        other = make(num_workers)
        other.load_state_dict(state)
        assert list(other) == rest


def test_an_empty_state_is_the_beginning():
    loader = LOADERS["in order"]()
    taken(loader, 2)
    loader.load_state_dict({})
    assert len(list(loader)) == 6


def state_of(name: str, num_workers: int = 0, step: int = 3) -> dict[str, Any]:
    return taken(LOADERS[name](num_workers=num_workers), step)[1]


def broken(state: dict[str, Any], *path: str) -> dict[str, Any]:
    copy = json.loads(json.dumps(state))
    at = copy
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return copy


@pytest.mark.parametrize(
    ("state", "name", "num_workers", "message"),
    [
        (lambda: [1], "in order", 0, "a dict, and not a list"),
        (lambda: {"epoch": 1}, "in order", 0, r"lacks '_num_yielded'.*there is: \['epoch'\]"),
        (lambda: broken(state_of("in order", 2), "_snapshot", "_main_snapshot"), "in order", 2, "'_main_snapshot'"),
        (lambda: broken(state_of("in order"), "_order", "at_first", "torch"), "in order", 0, "random numbers.*'torch'"),
        (lambda: state_of("iterable"), "in order", 0, "an iterable-style data set, and this is a map-style"),
        (lambda: state_of("in order"), "iterable", 0, "a map-style data set, and this is an iterable-style"),
        (lambda: state_of("iterable", 2), "iterable", 1, "num_workers=2, and this loader has 1.*give num_workers=2"),
        (lambda: state_of("stateful data set", 2), "stateful data set", 0, "state of its own; give num_workers=2"),
        (lambda: state_of("stateful data set"), "in order", 0, "Mapped has no load_state_dict"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_what_does_not(state, name, num_workers, message):
    with pytest.raises(StateError, match=message):
        LOADERS[name](num_workers=num_workers).load_state_dict(state())


def test_an_order_that_is_too_short_is_an_error():
    short = DataLoader(Mapped(3, as_is), batch_size=2)
    short.load_state_dict(state_of("in order"))
    with pytest.raises(StateError, match="after 3 batches of the epoch, and the sampler has only 2"):
        iter(short)
