"""Which source of a mixture each number of its sequence comes from, and how long that sequence is.

A mixture's sequence has the lanes of any sequence: position q is number q // P of lane q mod P. Every lane takes from
the lane of that number of each source, in its order, so that a node reads the same lanes of all. Which source comes
when is a function of (weights, seed, epoch, lane), drawn so that each is within about a sample of its share everywhere;
see `kernels.mixing`. It can be had at any number of any lane for the same cost, without those before.

The words of a lane and a source are keyed by the first eight bytes, little-endian, of blake2b of `fastload mixture 1
seed=0 epoch=0 lane=0 source=0`.

Lane p of a source that has N samples has its *quota* of them in each of the source's epochs. Where the lanes of the
mixture come to the ends of quotas follows from the `Blend`: where the sequence ends with "first" and "all", and, for a
source that is not counted and so has at least some quotas, up to where all that it gives is certain to lie in its first
epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.kernels.mixing import NEVER, fill_steps, mix, numbers_of, shares_at
from fastload.plan.lanes import lane_length
from fastload.plan.weights import Stop, Weights, weight_steps


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
        steps, lanes, sources = weight_steps(weights), range(partitions), range(len(weights))
        keys = np.array([[_key(seed, epoch, lane, source) for source in sources] for lane in lanes], np.uint64)
        rates = np.array([shares for _, shares in steps], np.float64)
        starts = np.array([[lane_length(lane, first, partitions) for first, _ in steps] for lane in lanes], np.int64)
        counts = np.empty((partitions, *rates.shape), np.int64)
        lags = np.empty(counts.shape, np.float64)
        fill_steps(keys, rates, starts, *_scratch(len(keys[0])), counts, lags)
        return cls(keys, rates, starts, counts, lags)

    @property
    def lanes(self) -> NDArray[np.int64]:
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
        """The positions of sample samples[p, s] of source s in lane p, for all lanes; or `NEVER`."""
        return self.positions_at(self.lanes[:, None], self.numbers(self.lanes, samples))

    def positions_at(self, lanes: NDArray[np.int64] | int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of `numbers` of `lanes`; or `NEVER`."""
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


class Extent(NamedTuple):
    """The sequence is settled up to `known`; `limits` are the positions up to which each source has it settled. `total`
    is where it ends, None where that is not known yet or there is no end.
    """

    known: int
    limits: tuple[int, ...]
    total: int | None


def extent_of(blend: Blend, quotas: NDArray[np.int64], is_counted: NDArray[np.bool_], stop: Stop) -> Extent:
    """`quotas` are those of the sources in each lane, int64[lanes, sources]: at least so many where a source is not
    counted. Raises `ConfigError` where "all" would never end.
    """
    beyond = blend.positions(quotas).min(axis=0)
    known = int(beyond[~is_counted | (stop == "first")].min(initial=NEVER))
    if stop == "all":
        last = blend.positions(np.maximum(quotas, 1) - 1)
        known = min(known, _end_of_all(np.where(quotas > 0, last, -1)))
    return Extent(known, tuple(beyond.tolist()), known if is_counted.all() and stop != "never" else None)


def _end_of_all(last: NDArray[np.int64]) -> int:
    """Where all sources have been gone through, by the last position of each lane and source."""
    never = np.flatnonzero((last == NEVER).any(axis=0))
    if len(never):
        raise ConfigError(
            f"stop='all', but source {never[0]} of the mixture is never gone through, since its last weight is 0; "
            "give it another, or use stop='first' or 'never'"
        )
    return int(last.max()) + 1
