"""What a walk asks of a line, which is that of one data set or that of a mixture.

A line has lanes, one a partition; position q is number q // P of lane q mod P. See `line` and `walk`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastload.plan.deal import Span

Key = TypeVar("Key")  # names a window
Entry = TypeVar("Entry")  # a batch, as numbers


class Row(Protocol[Entry]):
    """Samples in an order, from which batches are cut."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int, step: int = 1) -> Self:
        """Those from `start` to `stop`, or every `step`-th of them."""
        ...

    def then(self, more: Self) -> Self:
        """These and `more` after them."""
        ...

    def batch(self, number: int, repeats: int, samples_after: int) -> Entry:
        """All of them as one batch, whose last `repeats` are repeats."""
        ...

    def batches(self, size: int, numbers: Iterable[int], samples_after: Iterable[int]) -> list[Entry]:
        """Whole batches of `size`, one after the other."""
        ...


class WalkedLine(Protocol[Key, Entry]):
    """What a walk asks of a line."""

    @property
    def known(self) -> int:
        """How many positions are known to be there, and settled but for the windows that must be open."""
        ...

    @property
    def total(self) -> int | None:
        """How many positions there are; None where that is not known, or there is no end."""
        ...

    @property
    def open_windows(self) -> Collection[Key]:
        """The windows that are open."""
        ...

    def skip(self, spans: Sequence[Span]) -> None:
        """Nobody here needs what lanes hold before their `spans`."""
        ...

    def extend(self) -> None:
        """Let lanes go on through windows that are open."""
        ...

    def reaches(self) -> Mapping[int, int]:
        """For each lane up to which number its windows are open."""
        ...

    def due_in(self, spans: Sequence[Span]) -> list[tuple[int, Key]]:
        """The windows that have to be opened for lanes to reach the ends of their `spans`, each with the position from
        which it is needed; without those for which a count must be told before.
        """
        ...

    def forget(self, position: int) -> None:
        """What lies before `position` is not needed any more."""
        ...

    def close_all_but(self, kept: Key | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        ...

    def samples(self, positions: NDArray[np.int64]) -> Row[Entry]:
        """The samples at some positions, rising, that lanes have reached."""
        ...

    def find(self, lane: int, number: int) -> tuple[Key, int, int] | None:
        """Window, offset and the window's samples, of a number of a lane, whoever reads it; None where counts that
        are still missing could move it.
        """
        ...

    def sample_at(self, key: Key, offset: int) -> Row[Entry]:
        """The one sample at an offset in an open window."""
        ...
