"""Data sets for the tests of foreign loaders; at the top of a module, so that spawned workers find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


class Mapped(Dataset[Any]):
    """What `make` makes of each index."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class StatefulMapped(Mapped):
    """Gives each index with how many samples this copy has made, which is its state."""

    def __init__(self, count: int) -> None:
        super().__init__(count, self.made)
        self.calls = 0

    def made(self, index: int) -> tuple[int, int]:
        self.calls += 1
        return index, self.calls

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class RandomMapped(Mapped):
    """Draws from the global generator, whose state is its own."""

    def __init__(self, count: int) -> None:
        super().__init__(count, drawn)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": torch.get_rng_state().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(torch.tensor(state["generator"], dtype=torch.uint8))


def drawn(index: int) -> tuple[int, int]:
    return index, int(torch.randint(1000, ()))


class Ranges(IterableDataset[int]):
    """Each worker's range of integers; `sizes` of them, of unequal length. No state."""

    def __init__(self, sizes: tuple[int, ...] = (23, 5)) -> None:
        self.sizes = sizes

    def part(self) -> range:
        info = get_worker_info()
        if info is None:
            return range(sum(self.sizes))
        start = sum(self.sizes[: info.id])
        return range(start, start + self.sizes[info.id])

    def __iter__(self) -> Iterator[int]:
        return iter(self.part())


class RangesWithStatefulIterator(Ranges):
    """Its iterator knows where it is."""

    def __iter__(self) -> Iterator[int]:
        return StatefulIterator(self.part())


class StatefulIterator(Iterator[int]):
    def __init__(self, part: range) -> None:
        self.part, self.at = part, 0

    def __next__(self) -> int:
        if self.at == len(self.part):
            raise StopIteration
        self.at += 1
        return self.part[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class StatefulRanges(Ranges):
    """The data set itself knows where it is and in which epoch; its iterators are generators."""

    def __init__(self, sizes: tuple[int, ...] = (23, 5)) -> None:
        super().__init__(sizes)
        self.at = self.epoch = 0
        self.begin: int | None = None

    def __iter__(self) -> Iterator[Any]:
        self.at, self.begin = self.begin or 0, None
        for number in self.part()[self.at :]:
            self.at += 1
            yield number, self.epoch
        self.at = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin, self.epoch = state["at"], state["epoch"]


class StatefulSampler(Sampler[int]):
    """Backwards; its iterator knows where it is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return StatefulIterator(range(self.count - 1, -1, -1))


class EagerSampler(Sampler[int]):
    """Draws from a global generator, torch's if no other is named, when it is asked for an iterator."""

    def __init__(
        self, count: int, draw: Callable[[int], list[int]] = lambda count: torch.randperm(count).tolist()
    ) -> None:
        self.count, self.draw = count, draw

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw(self.count))


def as_is(value: Any) -> Any:
    """A `collate_fn` that can be pickled."""
    return value
