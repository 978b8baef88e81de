"""Histograms of durations: counts in buckets that grow with the duration, in fixed memory.

Seven buckets for each power of ten from 10 microseconds to two hours, so that a quantile is off by a fifth at most.
What is shown to others has the three bounds of each power of ten (1, 2, 5) that people know from metrics, which are
among them. Not thread-safe: one thread adds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_BOUNDS_S = tuple(float(f"{step}e{power}") for power in range(-5, 4) for step in ("1", "1.4", "2", "3", "4", "5", "7"))
# Of what is shown: from a millisecond to 100 seconds.
BOUNDS_S = (*(float(f"{step}e{power}") for power in range(-3, 2) for step in (1, 2, 5)), 100.0)
_SHOWN = tuple(_BOUNDS_S.index(bound) for bound in BOUNDS_S)


class Histogram:
    """See the module's text."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self.count = 0
        self.sum_s = self.max_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration."""
        self._counts[bisect_left(_BOUNDS_S, seconds)] += times
        self.count += times
        self.sum_s += times * seconds
        self.max_s = max(self.max_s, seconds)

    def quantile(self, share: float, zeros: int = 0) -> float:
        """The duration that this share of all is not above; 0 of nothing. `zeros`: so many more took no time."""
        wanted = share * (self.count + zeros) - zeros
        if wanted <= 0 or not self.count:
            return 0.0
        below, low = 0, 0.0
        for count, high in zip(self._counts, (*_BOUNDS_S, self.max_s), strict=True):
            if below + count >= wanted:
                return min(self.max_s, low + (high - low) * (wanted - below) / count) if count else low
            below, low = below + count, high
        return self.max_s

    def cumulative(self, zeros: int = 0) -> list[int]:
        """How many were not above each of `BOUNDS_S`, `zeros` more included."""
        sums: Sequence[int] = list(accumulate(self._counts))
        return [zeros + sums[number] for number in _SHOWN]
