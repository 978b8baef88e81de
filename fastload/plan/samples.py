"""Samples as numbers: those of an open window, some of them in an order, and a batch of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.locate import fill_buckets, locate
from fastload.plan.permutation import Permutation
from fastload.plan.tally import WindowKey


# Not frozen, which would take a microsecond more to make.
@dataclass(slots=True, eq=False)
class BatchEntry:
    """One batch of one rank (or of one of its workers), as numbers.

    `number` counts the rank's batches through the epoch. Sample i is number `sample_no[i]` (int64) of object
    `object_no[i]` (int32). The last `repeats` samples are repeats made to fill the tail. All samples lie in
    `windows`, each named once, rising. `samples_after` is how far the line is delivered once every rank has this
    batch.
    """

    number: int
    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    repeats: int
    windows: tuple[WindowKey, ...]
    samples_after: int

    def __len__(self) -> int:
        return len(self.object_no)


_WINDOWS = 1 << 40  # above any window's number, so that partition and window fit one int64


class OpenWindow:
    """The samples of a window in their order, `line`, numbered through its `objects`, which hold `counts` each."""

    def __init__(self, line: Permutation, objects: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        self.line, self.objects = line, objects
        self._ends = np.cumsum(counts)
        assert len(line) == counts.sum(), f"an order of {len(line)} samples for {counts.sum()}"
        self._bucket_shift = (len(line) // max(1, len(objects))).bit_length()
        self._buckets = np.empty((len(line) >> self._bucket_shift) + 2, np.int32)
        fill_buckets(self._ends, self._bucket_shift, self._buckets)

    def located(self, offsets: NDArray[np.int64], key: WindowKey) -> Samples:
        """The samples at some offsets in the window's order."""
        numbers = np.ascontiguousarray(self.line[offsets])
        object_no = np.empty(len(numbers), np.int32)
        sample_no, window = np.empty_like(numbers), np.empty_like(numbers)
        locate(self._ends, self._buckets, self._bucket_shift, self.objects, numbers, object_no, sample_no)
        window.fill(key.partition * _WINDOWS + key.window)
        return Samples(object_no, sample_no, window)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples in order: object_no int32[n], sample_no int64[n], and the window of each as one number,
    int64[n].
    """

    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    window: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """One after the other; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.object_no for part in parts]),
            np.concatenate([part.sample_no for part in parts]),
            np.concatenate([part.window for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.object_no)

    def windows(self) -> tuple[WindowKey, ...]:
        """The windows in which they lie, each once, rising."""
        return tuple(_keys(np.unique(self.window)))

    def batch(self, number: int, repeats: int, samples_after: int) -> BatchEntry:
        """All of them as one batch, whose last `repeats` are repeats."""
        return BatchEntry(number, self.object_no, self.sample_no, repeats, self.windows(), samples_after)

    def batches(self, size: int, numbers: Iterable[int], samples_after: Iterable[int]) -> list[BatchEntry]:
        """Whole batches of `size` one after the other, without repeats; given for each are its number and
        `samples_after`.
        """
        starts = range(0, len(self), size)
        windows_of = self.windows_of_parts(np.full(len(starts), size))
        return [
            BatchEntry(number, self.object_no[i : i + size], self.sample_no[i : i + size], 0, windows, after)
            for i, number, windows, after in zip(starts, numbers, windows_of, samples_after, strict=True)
        ]

    def windows_of_parts(self, sizes: NDArray[np.int64]) -> list[tuple[WindowKey, ...]]:
        """`windows` of parts of these sizes, one after the other. Few of them differ, and each is made once."""
        codes, count = np.unique(self.window), len(sizes)
        is_in = np.zeros((count, len(codes)), np.bool_)
        is_in[np.repeat(np.arange(count), sizes), np.searchsorted(codes, self.window)] = True
        rows, made = is_in.tobytes(), dict[bytes, tuple[WindowKey, ...]]()
        windows = []
        for i in range(count):
            row = rows[i * len(codes) : (i + 1) * len(codes)]
            if row not in made:
                made[row] = tuple(_keys(codes[is_in[i]]))
            windows.append(made[row])
        return windows

    def part(self, start: int, stop: int, step: int = 1) -> Samples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        part = slice(start, stop, step)
        return Samples(self.object_no[part], self.sample_no[part], self.window[part])

    def part_at(self, places: NDArray[np.int64]) -> Samples:
        """Those at `places`, in that order."""
        return Samples(self.object_no[places], self.sample_no[places], self.window[places])

    def placed(self, places: NDArray[np.int64]) -> Samples:
        """Each moved to its place; `places` has every number from 0 on once."""
        moved = Samples(np.empty_like(self.object_no), np.empty_like(self.sample_no), np.empty_like(self.window))
        moved.object_no[places], moved.sample_no[places] = self.object_no, self.sample_no
        moved.window[places] = self.window
        return moved

    def then(self, more: Samples) -> Samples:
        """These and `more` after them; a copy."""
        return Samples.joined((self, more))


def _keys(codes: NDArray[np.int64]) -> list[WindowKey]:
    return [WindowKey(*divmod(code, _WINDOWS)) for code in codes.tolist()]


NO_SAMPLES = Samples(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
