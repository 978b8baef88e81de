"""How the sources of a mixture stand in its line: weights, their schedule, and which source each number is of.

A mixture's line has the lanes of any line: position q is number q // P of lane q mod P. Every lane takes from the lane
of that number of each source, in its order, so that a node reads the same lanes of all. Which source comes when is a
function of (weights, seed, epoch, lane), drawn so that each is within about a sample of its share everywhere; see
`kernels.mixing`. It can be had at any number of any lane for the same cost, without those before.

The words of a lane and a source are keyed by the first eight bytes, little-endian, of blake2b of `fastload mixture 1
seed=0 epoch=0 lane=0 source=0`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.kernels.mixing import NEVER, fill_steps, mix, numbers_of, shares_at
from fastload.plan.lanes import lane_length

__all__ = ["NEVER", "Blend", "Schedule", "Weights", "check_weights"]

# A source's weights: (global sample count, weight), the first from 0 on.
Schedule = tuple[tuple[int, float], ...]
Weights = tuple[Schedule, ...]

# Below this share of all, a source has hardly a sample in any epoch that there will ever be.
_SHARE_MIN = 1e-9


def check_weights(weights: Sequence[float | Sequence[tuple[int, float]]]) -> Weights:
    """The weights of sources, each a number or a list of (global sample count, weight), in one form. Raises
    `ConfigError`.
    """
    if not weights:
        raise ConfigError("a mixture of no sources; give at least one")
    checked = tuple(_checked(f"of source {number}", weight) for number, weight in enumerate(weights))
    for first, shares in _steps(checked):
        if not any(shares):
            raise ConfigError(f"from sample {first} on the weights of all sources are 0; give one of them another")
        for number, share in enumerate(shares):
            if 0 < share < _SHARE_MIN:
                raise ConfigError(
                    f"the weight of source {number} from sample {first} on is {share:.3g} of all, below {_SHARE_MIN}; "
                    "raise it, or make it 0"
                )
    return checked


def _checked(whose: str, weight: Any) -> Schedule:
    steps = weight if isinstance(weight, list | tuple) else [(0, weight)]
    try:
        schedule = tuple((int(first), float(value)) for first, value in steps)
        is_whole = all(int(first) == first for first, _ in steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the weight {whose}, {weight!r}, must be a number or a list of (sample count, number)"
        ) from error
    firsts = [first for first, _ in schedule]
    if not is_whole or firsts[:1] != [0] or sorted(set(firsts)) != firsts:
        raise ConfigError(f"the steps of the weight {whose} begin at {firsts}; they must be rising integers from 0 on")
    wrong = [value for _, value in schedule if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ConfigError(f"the weight {whose} must be a finite number of at least 0, not {wrong[0]!r}")
    return schedule


def _steps(weights: Weights) -> list[tuple[int, list[float]]]:
    """Where weights change, and the share of each source from there on."""
    steps = []
    for first in sorted({first for schedule in weights for first, _ in schedule}):
        now = [max(step for step in schedule if step[0] <= first)[1] for schedule in weights]
        total = sum(now)
        steps.append((first, [weight / total if total else 0.0 for weight in now]))
    return steps


@dataclass(frozen=True, eq=False)
class Blend:
    """Which source each number of each lane is of. Made by `Blend.of`; any thread may ask it.

    Memory is linear in lanes, steps of the schedule and sources.
    """

    keys: NDArray[np.uint64]
    rates: NDArray[np.float64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    lags: NDArray[np.float64]

    @classmethod
    def of(cls, weights: Weights, seed: int, epoch: int, partitions: int) -> Blend:
        """The blend of a mixture's epoch."""
        steps, lanes, sources = _steps(weights), range(partitions), range(len(weights))
        keys = np.array([[_key(seed, epoch, lane, source) for source in sources] for lane in lanes], np.uint64)
        rates = np.array([shares for _, shares in steps], np.float64)
        starts = np.array([[lane_length(lane, first, partitions) for first, _ in steps] for lane in lanes], np.int64)
        counts = np.empty((partitions, *rates.shape), np.int64)
        lags = np.empty(counts.shape, np.float64)
        fill_steps(keys, rates, starts, *_scratch(len(keys[0])), counts, lags)
        return cls(keys, rates, starts, counts, lags)

    @property
    def lanes(self) -> NDArray[np.int64]:
        """All lanes."""
        return np.arange(len(self.keys))

    def shares(self, lanes: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples of each source the first `numbers` of `lanes` hold, int64[lanes, sources]."""
        found = np.empty((len(lanes), self.keys.shape[1]), np.int64)
        shares_at(*self._tables, lanes, numbers, *_scratch(found.shape[1])[1:], found)
        return found

    def numbers(self, lanes: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers in `lanes` of sample samples[i, s] of source s, int64[lanes, sources]; `NEVER` where it does not
        come.
        """
        (count, sources), of_source = samples.shape, np.arange(samples.shape[1])
        found = self.numbers_of(np.repeat(lanes, sources), np.tile(of_source, count), samples.ravel())
        return found.reshape(samples.shape)

    def numbers_of(
        self, lanes: NDArray[np.int64], sources: NDArray[np.int64], samples: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The numbers in `lanes` of samples of `sources`, int64, or `NEVER`."""
        found = np.empty(len(samples), np.int64)
        numbers_of(*self._tables, lanes, sources, samples, found)
        return found

    def positions(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions in the line of sample samples[p, s] of source s in lane p, for all lanes; or `NEVER`."""
        return self.positions_at(self.lanes[:, None], self.numbers(self.lanes, samples))

    def positions_at(self, lanes: NDArray[np.int64] | int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions in the line of `numbers` of `lanes`; or `NEVER`."""
        # The remainder, since the position of `NEVER` would not fit.
        return np.where(numbers == NEVER, NEVER, numbers % NEVER * len(self.keys) + lanes)

    def sources(self, lane: int, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The source of each of some rising numbers of a lane, int32, and which of its samples there, int64."""
        sources, samples = np.empty(len(numbers), np.int32), np.empty(len(numbers), np.int64)
        mix(*self._tables, lane, np.ascontiguousarray(numbers), *_scratch(self.keys.shape[1]), sources, samples)
        return sources, samples

    @property
    def _tables(
        self,
    ) -> tuple[NDArray[np.uint64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        return self.keys, self.rates, self.starts, self.counts, self.lags


def _scratch(sources: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.empty(sources, np.int64), np.empty(sources, np.float64)


def _key(seed: int, epoch: int, lane: int, source: int) -> int:
    text = f"fastload mixture 1 seed={seed} epoch={epoch} lane={lane} source={source}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
