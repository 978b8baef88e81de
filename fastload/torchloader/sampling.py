"""The order of an epoch: a loader's sampler, which can report its position and resume there.

torch's iterators ask the sampler for an iterator, and the iterator for indexes; `Order` replaces the sampler and passes
both requests on, at the same moments. It remembers enough to draw the same order again and continue in it:

- for a sampler, or its iterator, that has `state_dict` and `load_state_dict`, its state;
- for any other, how many indexes it gave, and the `Randomness` at the two moments when an order may be drawn.

A batch sampler that torch made is taken apart, as torchdata does, since the sampler inside has the state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler

from fastload.errors import StateError
from fastload.torchloader.randomness import Generators, Randomness, preserve_global_generators

# torchdata's names.
SAMPLES_YIELDED, SAMPLER, SAMPLER_ITER = "samples_yielded", "sampler_state", "sampler_iter_state"


@dataclass(frozen=True, slots=True)
class Mark:
    """A position in an order: after `yielded` indexes, with the states of a stateful sampler and iterator."""

    yielded: int = 0
    sampler_state: Any = None
    iterator_state: Any = None


@dataclass(frozen=True, slots=True)
class SavedOrder:
    """Where to begin. `ahead`: the numbers of indexes beyond the mark that were used out of order."""

    mark: Mark
    at_iter: Randomness | None = None
    at_first: Randomness | None = None
    ahead: frozenset[int] = field(default=frozenset())


class Order:
    """Replaces `sampler`; iterate it once an epoch. `generators`: those that belong to it or its loader."""

    def __init__(self, sampler: Any, generators: Generators) -> None:
        self.sampler, self.generators = sampler, generators

    def __iter__(self) -> OrderIterator:
        return OrderIterator(self.sampler, self.generators)

    def __len__(self) -> int:
        return len(self.sampler)


class OrderIterator:
    """One epoch's indexes."""

    def __init__(self, sampler: Any, generators: Generators) -> None:
        self._sampler, self._generators = sampler, generators
        self.at_iter = Randomness.now(generators)
        self.at_first: Randomness | None = None
        self.yielded = 0
        self._ahead: frozenset[int] = frozenset()
        self._held: list[Any] = []  # drawn and not yielded
        self._source = _source(sampler)

    def __iter__(self) -> OrderIterator:
        return self

    def __next__(self) -> Any:
        if self.at_first is None:
            self._begin()
        while True:
            index = self._held.pop() if self._held else next(self._source)
            self.yielded += 1
            if self.yielded - 1 not in self._ahead:
                return index

    def mark(self) -> Mark:
        return Mark(self.yielded, state_of(self._sampler), self._source.state())

    def settle(self) -> None:
        """Draw the order if that was not done, so that it is fixed."""
        if self.at_first is None:
            self._begin()
            if not self._source.is_stateful:
                self._held = list(islice(self._source, 1))

    def resume(self, saved: SavedOrder) -> None:
        """Advance to where `saved` was taken, before the first index. Raises `StateError` where the order differs."""
        with preserve_global_generators():
            self._resume(saved)

    def _begin(self) -> None:
        self.at_first = Randomness.now(self._generators)
        self._source.begin()

    def _resume(self, saved: SavedOrder) -> None:
        mark, self._ahead = saved.mark, saved.ahead
        if saved.at_iter is not None:
            self.at_iter = saved.at_iter
            saved.at_iter.restore(self._generators)
        load_state(self._sampler, mark.sampler_state, "sampler")
        self._source = _source(self._sampler)
        if saved.at_first is not None:
            saved.at_first.restore(self._generators)
        self._begin()
        self.at_first = saved.at_first or self.at_first
        shuffled_by = _generator_of_torchdata(self._sampler, mark.iterator_state)
        if shuffled_by is not None:
            with _drawn_from(_innermost(self._sampler), shuffled_by):
                self._skip(mark.yielded)
        elif self._source.is_stateful and (mark.sampler_state is not None or mark.iterator_state is not None):
            self._source.load(mark.iterator_state)
            self.yielded = mark.yielded
        else:
            self._skip(mark.yielded)

    def _skip(self, count: int) -> None:
        """Skip indexes. The first is drawn in any case, while the generators are in the state for it."""
        first = list(islice(self._source, 1))
        skipped = min(count, len(first)) + sum(1 for _ in islice(self._source, max(0, count - 1)))
        if skipped < count:
            raise StateError(
                f"the state was taken after {count} batches of the epoch, and the sampler has only {skipped}: "
                "it belongs to another data set, sampler or batch size"
            )
        self._held = first if not count else []
        self.yielded = count


class _SamplerIndexes:
    """The indexes of a sampler, unchanged."""

    def __init__(self, sampler: Any) -> None:
        self._sampler, self._iterator = sampler, iter(sampler)

    @property
    def is_stateful(self) -> bool:
        return is_stateful(self._sampler) or is_stateful(self._iterator)

    def __iter__(self) -> _SamplerIndexes:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def begin(self) -> None:
        """The iterator was made by the constructor."""

    def state(self) -> Any:
        return state_of(self._iterator)

    def load(self, state: Any) -> None:
        load_state(self._iterator, state, "sampler's iterator")


class _SamplerBatches:
    """The batches of torch's `BatchSampler`. Like torch, it makes the sampler's iterator with the first batch."""

    def __init__(self, batches: BatchSampler) -> None:
        self._sampler = batches.sampler
        self._batch_size, self._drop_last = batches.batch_size, batches.drop_last
        self._indexes: Iterator[Any] | None = None
        self._samples_yielded = 0

    @property
    def is_stateful(self) -> bool:
        return is_stateful(self._sampler) or is_stateful(self._indexes)

    def __iter__(self) -> _SamplerBatches:
        return self

    def __next__(self) -> list[Any]:
        self.begin()
        assert self._indexes is not None, "it has begun"
        batch = list(islice(self._indexes, self._batch_size))
        if not batch or (self._drop_last and len(batch) < self._batch_size):
            raise StopIteration
        self._samples_yielded += len(batch)
        return batch

    def begin(self) -> None:
        if self._indexes is None:
            self._indexes = iter(self._sampler)

    def state(self) -> dict[str, Any]:
        """The state in torchdata's layout."""
        state: dict[str, Any] = {SAMPLES_YIELDED: self._samples_yielded}
        if is_stateful(self._sampler):
            state[SAMPLER] = state_of(self._sampler)
        if is_stateful(self._indexes):
            state[SAMPLER_ITER] = state_of(self._indexes)
        return state

    def load(self, state: Any) -> None:
        if not isinstance(state, Mapping) or SAMPLES_YIELDED not in state:
            raise StateError(f"the state of the batch sampler lacks {SAMPLES_YIELDED!r}: it was taken with another one")
        self._samples_yielded = state[SAMPLES_YIELDED]
        load_state(self._sampler, state.get(SAMPLER), "sampler")
        self._indexes = iter(self._sampler)
        load_state(self._indexes, state.get(SAMPLER_ITER), "sampler's iterator")


def _source(sampler: Any) -> _SamplerIndexes | _SamplerBatches:
    return _SamplerBatches(sampler) if type(sampler) is BatchSampler else _SamplerIndexes(sampler)


def is_stateful(thing: Any) -> bool:
    """Whether it has torchdata's methods for a state."""
    try:
        return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))
    except Exception:  # a property of the user, which torch's loader would not read
        return False


def state_of(thing: Any, problems: list[str] | None = None) -> Any:
    """The object's state; None where it has none. Where it only seems to have one, the reason is appended to
    `problems`: it may use these names for something else, and torch's loader does not call them.
    """
    reason = None
    if is_stateful(thing):
        try:
            return thing.state_dict()
        except Exception as error:
            reason = f"{type(thing).__name__}.state_dict() raised {type(error).__name__}: {error}"
    elif _has_attribute(thing, "state_dict") and _has_attribute(thing, "load_state_dict"):
        reason = f"{type(thing).__name__}.state_dict and load_state_dict are no methods"
    if reason is not None and problems is not None:
        problems.append(reason)
    return None


def _has_attribute(thing: Any, name: str) -> bool:
    try:
        return hasattr(thing, name)
    except Exception:  # a property that raises
        return True


def load_state(thing: Any, state: Any, what: str) -> None:
    """Load a copy of the state, which the object may go on to change. Raises `StateError` where there is a state and
    the object cannot load one.
    """
    if state is None:
        return
    if not is_stateful(thing):
        raise StateError(
            f"the state contains a state of the {what}, and this {what} ({type(thing).__name__}) has no "
            f"load_state_dict; it was taken with another {what}"
        )
    thing.load_state_dict(copy.deepcopy(state))


def _innermost(sampler: Any) -> Any:
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def _generator_of_torchdata(sampler: Any, iterator_state: Any) -> torch.Tensor | None:
    """The state of the generator of torchdata's own random sampler, which draws as torch's does."""
    if type(_innermost(sampler)) is not RandomSampler or not isinstance(iterator_state, Mapping):
        return None
    inner = iterator_state.get(SAMPLER_ITER, iterator_state)
    state = inner.get("generator") if isinstance(inner, Mapping) else None
    return state if isinstance(state, torch.Tensor) else None


@contextmanager
def _drawn_from(sampler: RandomSampler, state: torch.Tensor) -> Iterator[None]:
    """Within the block, the sampler draws from a generator in this state: its own, if it has one."""
    own = sampler.generator
    sampler.generator = own or torch.Generator()
    sampler.generator.set_state(state)
    try:
        yield
    finally:
        sampler.generator = own
