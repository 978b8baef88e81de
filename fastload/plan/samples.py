"""Samples as numbers: those of an open window, some of them in an order, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload.plan.tally import WindowKey


@dataclass(frozen=True, slots=True, eq=False)
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

    @property
    def window_first(self) -> int:
        """The number of the first window that the batch needs, where there is one partition."""
        return self.windows[0].window

    @property
    def window_last(self) -> int:
        """The number of the last window that the batch needs, where there is one partition."""
        return self.windows[-1].window


_WINDOWS = 1 << 40  # above any window's number, so that partition and window fit one int64


@dataclass(frozen=True, slots=True, eq=False)
class OpenWindow:
    """The samples of a window in their order, `line`, int64, numbered through its `objects`."""

    line: NDArray[np.int64]
    objects: NDArray[np.int32]
    counts: NDArray[np.int64]

    def located(self, offsets: NDArray[np.int64], key: WindowKey) -> Samples:
        """The samples at some offsets in the window's order."""
        line, ends = self.line[offsets], np.cumsum(self.counts)
        # "right" steps over objects without samples.
        place = np.searchsorted(ends, line, side="right")
        code = key.partition * _WINDOWS + key.window
        return Samples(self.objects[place], line - (ends - self.counts)[place], np.full(len(line), code, np.int64))


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
        return tuple(WindowKey(*divmod(code, _WINDOWS)) for code in np.unique(self.window).tolist())

    def part(self, start: int, stop: int, step: int = 1) -> Samples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        part = slice(start, stop, step)
        return Samples(self.object_no[part], self.sample_no[part], self.window[part])

    def part_at(self, places: NDArray[np.int64]) -> Samples:
        """Those at `places`, in that order."""
        return Samples(self.object_no[places], self.sample_no[places], self.window[places])

    def then(self, more: Samples) -> Samples:
        """These and `more` after them; a copy."""
        return Samples.joined((self, more))


NO_SAMPLES = Samples(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64))
