"""What a cursor asks of the sequence that it walks through, of one data set (`sequence`) or of several (`mixture`).

A sequence has lanes, one a partition; position q is number q // P of lane q mod P. See `lanes` and `cursor`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastload.plan.assignment import LaneSpan
from fastload.plan.order import WindowKey
from fastload.plan.position import SourcePosition
from fastload.plan.samples import BatchEntry

Entry = TypeVar("Entry", bound="Batch")


class Batch(Protocol):
    """A batch as numbers, with a part for each source and epoch from which samples come."""

    @property
    def parts(self) -> tuple[BatchEntry, ...]: ...
    @property
    def part_of(self) -> NDArray[np.int32]: ...
    @property
    def windows(self) -> tuple[WindowKey, ...]: ...
    @property
    def samples_after(self) -> int: ...
    def __len__(self) -> int: ...


class SampleRow(Protocol[Entry]):
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


class SampleSequence(Protocol[Entry]):
    """What a cursor asks of the sequence that it walks through."""

    @property
    def known(self) -> int:
        """How many positions are known to be there, and settled but for the windows that must be open."""
        ...

    @property
    def total(self) -> int | None:
        """How many positions there are; None where that is not known, or there is no end."""
        ...

    @property
    def is_measured(self) -> bool:
        """Whether nothing more can become known of its length."""
        ...

    @property
    def open_windows(self) -> Collection[WindowKey]:
        """The windows that are open."""
        ...

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window in its source, int32."""
        ...

    def add_counts(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects of a source."""
        ...

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects."""
        ...

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        """No rank of this node needs what lanes hold before their `spans`."""
        ...

    def extend(self) -> None:
        """Let lanes continue through windows that are open."""
        ...

    def reaches(self) -> Mapping[int, int]:
        """For each lane the number up to which its windows are open."""
        ...

    def due_in(self, spans: Sequence[LaneSpan]) -> list[tuple[int, WindowKey]]:
        """The windows that have to be opened for lanes to reach the ends of their `spans`, each with the position from
        which it is needed; without those for which a count is needed first.
        """
        ...

    def counts_wanted(
        self,
        spans: Sequence[LaneSpan],
        end: int,
        others: Sequence[int],
        home: Sequence[int],
        last: tuple[int, int] | None,
    ) -> dict[int, NDArray[np.int32]]:
        """By source, objects whose counts are needed before lanes can continue to the ends of their `spans`, or to
        settle positions up to `end` (from the next windows of partitions `others`, or of `home` where these have none),
        or to find lane and number `last`. Sources of which none is needed are left out.
        """
        ...

    def forget(self, position: int) -> None:
        """What lies before `position` is no longer needed."""
        ...

    def close_all_but(self, kept: WindowKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        ...

    def samples(self, positions: NDArray[np.int64]) -> SampleRow[Entry]:
        """The samples at some positions, rising, that lanes have reached."""
        ...

    def find(self, lane: int, number: int) -> tuple[WindowKey, int, int] | None:
        """Window, offset and the window's samples, of a number of any lane; None where counts that are still missing
        could move it.
        """
        ...

    def sample_at(self, key: WindowKey, offset: int) -> SampleRow[Entry]:
        """The one sample at an offset in an open window."""
        ...

    def position(self, samples: int) -> tuple[SourcePosition, ...]:
        """Where each source stands when so many samples are delivered."""
        ...

    def windows_ahead(self, position: int, lanes: Sequence[int]) -> Iterator[WindowKey]:
        """The windows that `lanes` need from `position` on, in the order in which positions come to them, each once."""
        ...
