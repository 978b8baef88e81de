"""Every kind of state: what it is after some steps, and what a loader that loads it gives.

A case is made anew each time, after the global generators were seeded; what follows a state is kept as a digest and its
first batch. States of torchdata's `StatefulDataLoader` over data sets that are not ours are only read: their form is
torchdata's.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import fastload
from tests.golden.texts import digest, with_texts_named
from tests.golden.world import MIXTURES, data_set, mixture, world
from tests.torchloader.datasets import (
    EagerSampler,
    Mapped,
    Ranges,
    RangesWithStatefulIterator,
    StatefulMapped,
    StatefulRanges,
    StatefulSampler,
    as_is,
)

COUNT = 11
# Of an epoch without an end, how much is looked at.
STEPS_MAX = 60


@dataclass(frozen=True)
class Case:
    """`make` gives what is iterated, and can say and load a state; `steps` are those after which it is asked."""

    make: Callable[[], Any]
    steps: tuple[int, ...]


def record(folder: Path) -> dict[str, Any]:
    """All states, in the form in which long texts have names."""
    return with_texts_named({kind: record_kind(folder / kind, kind) for kind in KINDS})


def record_kind(folder: Path, kind: str) -> dict[str, Any]:
    """Those of one kind by case and number of steps: `said`, with what came then, and `resumed`, by a loader that loads
    that.
    """
    said = say_kind(folder / "said", kind)
    resumed = resume_kind(folder / "resumed", kind, said)
    return {
        name: {steps: {"said": each[steps], "resumed": resumed[name][steps]} for steps in each}
        for name, each in said.items()
    }


def say_kind(folder: Path, kind: str) -> dict[str, Any]:
    """The states, and what came after them."""
    with world(folder) as cache, random_numbers_kept():
        return {name: _said(case) for name, case in KINDS[kind](cache).items()}


def resume_kind(folder: Path, kind: str, said: dict[str, Any]) -> dict[str, Any]:
    """What comes where these states are loaded."""
    with world(folder) as cache, random_numbers_kept():
        cases = KINDS[kind](cache)
        return {
            name: {steps: _resumed(cases[name].make, of["state"]) for steps, of in each.items()}
            for name, each in said.items()
        }


def resume_torchdata(said: dict[str, Any]) -> dict[str, Any]:
    """What comes where loaders of ours load states of torchdata's."""
    with random_numbers_kept():
        return {name: _resumed(make, said[name]["state"]) for name, (make, _) in from_torchdata().items()}


def ours(cache: fastload.Cache) -> dict[str, Case]:
    """Loaders of our data sets, and iterations over their samples."""
    own = partial(data_set, cache, shuffle=True, seed=5)

    def loader(of: Callable[..., Any] = own, epoch: int | None = None, **options: Any) -> Callable[[], Any]:
        def make() -> Any:
            made = _Keys(fastload.DataLoader(of(), **{"batch_size": 4, **options}))
            if epoch is not None:
                made.loader.set_epoch(epoch)
            return made

        return make

    cases = {
        "loader": Case(loader(), (0, 3, STEPS_MAX)),
        "loader, epoch 5": Case(loader(epoch=5), (0, 1)),
        "loader, in threads": Case(loader(num_workers=2), (3,)),
        "loader, samples": Case(loader(batch_size=None), (7,)),
        "loader, drop_last": Case(loader(drop_last=True), (STEPS_MAX,)),
    }
    for shuffle in (False, "shards", "global"):
        cases[f"loader, shuffle={shuffle}"] = Case(loader(partial(own, shuffle=shuffle)), (3,))
    for options in (
        {"rank": 1, "world_size": 2, "partitions": 2},
        {"rank": 2, "world_size": 3, "tail": "drop"},
        {"rank": 0, "world_size": 3, "tail": "uneven", "partitions": 3},
        {"rank": 3, "world_size": 4, "replicas": 2},
    ):
        cases[f"loader, {options}"] = Case(loader(partial(own, **options)), (2, STEPS_MAX))
    for options in MIXTURES:
        of = partial(mixture, cache, **options)
        cases[f"loader of a mixture, {options}"] = Case(loader(of), (0, 5) if options["stop"] == "never" else (5, 60))
        cases[f"mixture, {options}"] = Case(lambda of=of: _Keys(of()), (9,))
    for batch_size in (None, 8):
        cases[f"data set, batch_size={batch_size}"] = Case(
            lambda batch_size=batch_size: _Keys(own(batch_size=batch_size)), (0, 11, 80)
        )
    return cases


def foreign(_: fastload.Cache) -> dict[str, Case]:
    """Loaders of other data sets, in torch's own layout of threads and processes."""

    def loader(dataset: Callable[[], Any], sampler: Callable[[], Any] | None = None, **options: Any) -> Any:
        def make() -> Any:
            made = {} if sampler is None else {"sampler": sampler()}
            return _Run(fastload.DataLoader(dataset(), **{"batch_size": 2, "collate_fn": as_is, **made, **options}))

        return make

    def batched() -> Any:
        sampler = BatchSampler(EagerSampler(COUNT), 3, False)
        return _Run(fastload.DataLoader(_plain(), batch_sampler=sampler, collate_fn=as_is))

    def own_generator() -> Any:
        generator = torch.Generator().manual_seed(3)
        return _Run(fastload.DataLoader(_plain(), 2, True, generator=generator, collate_fn=as_is))

    ranges, stateful_ranges = partial(Ranges, (9, 4)), partial(StatefulRanges, (9, 4))
    stateful_iterator, stateful_mapped = partial(RangesWithStatefulIterator, (9, 4)), partial(StatefulMapped, COUNT)
    cases = {
        "in order": Case(loader(_plain), (0, 3)),
        "shuffled": Case(loader(_plain, shuffle=True), (0, 3, STEPS_MAX)),
        "shuffled samples": Case(loader(_plain, shuffle=True, batch_size=None), (4,)),
        "own generator": Case(own_generator, (3,)),
        "with replacement": Case(loader(_plain, lambda: RandomSampler(range(COUNT), True, 40)), (3,)),
        "batch sampler": Case(batched, (2,)),
        "stateful sampler": Case(loader(_plain, partial(StatefulSampler, COUNT)), (3,)),
        "stateful data set": Case(loader(stateful_mapped), (3,)),
        "iterable": Case(loader(ranges), (0, 3, STEPS_MAX)),
        "stateful iterator": Case(loader(stateful_iterator), (3,)),
        "stateful iterable": Case(loader(stateful_ranges), (3, STEPS_MAX)),
    }
    threads = {"num_workers": 2, "workers": "thread"}
    processes = {"num_workers": 2, "workers": "process", "multiprocessing_context": "fork"}
    cases |= {
        "threads, shuffled": Case(loader(_plain, shuffle=True, **threads), (0, 3, STEPS_MAX)),
        "threads, stateful data set": Case(loader(stateful_mapped, **threads), (3,)),
        "threads, iterable": Case(loader(ranges, **threads), (3,)),
        "threads, stateful iterable": Case(loader(stateful_ranges, **threads), (3, STEPS_MAX)),
        "processes, shuffled": Case(loader(_plain, shuffle=True, **processes), (3,)),
        "processes, stateful data set": Case(loader(stateful_mapped, **processes), (3,)),
        "processes, stateful iterator": Case(loader(stateful_iterator, **processes), (3,)),
        "processes, stateful iterable": Case(loader(stateful_ranges, **processes), (STEPS_MAX,)),
        "processes, snapshots every 4": Case(loader(stateful_iterator, snapshot_every_n_steps=4, **processes), (3,)),
    }
    return cases


def torchdata(cache: fastload.Cache) -> dict[str, Case]:
    """Our data set in torchdata's loader."""

    def make(batch_size: int | None, num_workers: int) -> Any:
        dataset = data_set(cache, shuffle=True, seed=5, batch_size=batch_size)
        context = "fork" if num_workers else None
        return _Run(
            StatefulDataLoader(dataset, 4, num_workers=num_workers, collate_fn=keys_of, multiprocessing_context=context)
        )

    return {
        f"our data set, batch_size={batch_size}, num_workers={num_workers}": Case(
            partial(make, batch_size, num_workers), (5,)
        )
        for batch_size, num_workers in ((None, 0), (4, 2))
    }


def from_torchdata() -> dict[str, tuple[Callable[..., Any], int]]:
    """Loaders of other data sets by kind of loader, and after how many steps torchdata's is asked."""

    def loader(dataset: Callable[[], Any], **options: Any) -> Callable[..., Any]:
        def make(kind: Callable[..., Any] = fastload.DataLoader) -> Any:
            return _Run(kind(dataset(), **{"batch_size": 2, "collate_fn": as_is, **options}))

        return make

    return {
        "shuffled": (loader(_plain, shuffle=True), 3),
        "iterable": (loader(partial(Ranges, (9, 4))), 3),
        "stateful iterable": (loader(partial(StatefulRanges, (9, 4))), 3),
        "stateful iterator, two workers": (
            loader(partial(RangesWithStatefulIterator, (9, 4)), num_workers=2, snapshot_every_n_steps=2),
            5,
        ),
    }


def record_of_torchdata(folder: Path) -> dict[str, Any]:
    """States that torchdata's loader saved, and what came then; these are read, and never compared with new ones."""
    said = {}
    with random_numbers_kept():
        for name, (make, steps) in from_torchdata().items():
            _seed(1)
            run = make(StatefulDataLoader)
            said[name] = _after(run, [steps])[steps]
            run.close()
    resumed = resume_torchdata(said)
    return with_texts_named({name: {"said": each, "resumed": resumed[name]} for name, each in said.items()})


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """After it, the global generators are as they were before."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def keys_of(samples: list[Any]) -> list[str]:
    """A `collate_fn`."""
    return [sample["__key__"] for sample in samples]


def to_json(value: Any) -> Any:
    """`value` in JSON's types; torchdata has tensors in its states."""
    return json.loads(
        json.dumps(value, default=lambda tensor: {"tensor": tensor.numpy().tobytes().hex()}, sort_keys=True)
    )


def from_json(value: Any) -> Any:
    """What `to_json` was given."""

    def whole(each: dict[str, Any]) -> Any:
        return torch.tensor(list(bytes.fromhex(each["tensor"])), dtype=torch.uint8) if "tensor" in each else each

    return json.loads(json.dumps(value), object_hook=whole)


class _Run:
    """A loader, or what is iterated in the same way."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    def close(self) -> None:
        if hasattr(self.loader, "close"):
            self.loader.close()
        elif hasattr(self.loader.dataset, "close"):
            self.loader.dataset.close()


class _Keys(_Run):
    """The keys of what comes."""

    def __iter__(self) -> Iterator[Any]:
        return (key if isinstance(key, str) else list(key) for key in (each["__key__"] for each in iter(self.loader)))


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _plain() -> Mapped:
    return Mapped(COUNT, as_is)


def _said(case: Case) -> dict[str, Any]:
    found, begun = {}, [steps for steps in case.steps if steps]
    if begun != list(case.steps):  # the state of what was not iterated
        _seed(1)
        run = case.make()
        found["after 0"] = {"state": to_json(run.state_dict()), **_rest(iter(run)), "next": _first_of_next(run)}
        run.close()
    if begun:
        _seed(1)
        run = case.make()
        found |= {f"after {steps}": each for steps, each in _after(run, begun).items()}
        run.close()
    return found


def _resumed(make: Callable[[], Any], state: Mapping[str, Any]) -> dict[str, Any]:
    _seed(2)  # whatever the numbers are in the process that goes on
    run = make()
    run.load_state_dict(from_json(state))
    iterator = iter(run)
    found = {"state": to_json(run.state_dict()), **_rest(iterator), "next": _first_of_next(run)}
    run.close()
    return found


def _after(run: Any, asked: list[int]) -> dict[int, dict[str, Any]]:
    """What a run says after each of some numbers of steps, and what comes then."""
    iterator, states, came = iter(run), {}, []
    for steps in asked:
        came += itertools.islice(iterator, steps - len(came))
        states[steps] = to_json(run.state_dict())
    came += itertools.islice(iterator, STEPS_MAX)
    following = _first_of_next(run)
    return {steps: {"state": state, **_rest(iter(came[steps:])), "next": following} for steps, state in states.items()}


def _rest(iterator: Iterator[Any]) -> dict[str, Any]:
    rest = to_json(list(itertools.islice(iterator, STEPS_MAX)))
    return {"rest": digest(rest), "batches": len(rest), "first": rest[:1]}


def _first_of_next(run: Any) -> Any:
    """What the next epoch begins with."""
    return to_json(list(itertools.islice(iter(run), 1)))


KINDS: dict[str, Callable[[fastload.Cache], dict[str, Case]]] = {
    "fastload": ours,
    "foreign": foreign,
    "torchdata": torchdata,
}
