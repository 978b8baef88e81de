"""How far the line of a mixture is settled, and where it ends, by what is known of its sources.

Lane p of a source that has N samples has its *quota* of them in each of the source's epochs. Where the lanes of the
mixture come to the ends of quotas is asked of `Blend`: where its line ends with "first" and "all", and, for a source
that is not counted and so has at least some quotas, up to where all that it gives is certain to lie in its first epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.plan.lanes import lane_lengths
from fastload.plan.mixture.blend import NEVER, Blend
from fastload.plan.mixture.options import MixtureOptions, Stop


class Extent(NamedTuple):
    """The line is settled up to `known`; `limits` are the positions up to which each source has it settled. `total` is
    where it ends, None where that is not known yet or there is no end.
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


def sample_count(options: MixtureOptions, epoch: int, counts: Sequence[int], partitions: int) -> int | None:
    """The samples of an epoch of a mixture, over all ranks and without repeats, by those of its sources; None where it
    has no end. Raises `ConfigError`.
    """
    blend = Blend.of(options.weights, options.seed, epoch, partitions)
    quotas = np.stack([lane_lengths(count, partitions) for count in counts], axis=1)
    return extent_of(blend, quotas, np.ones(len(counts), np.bool_), options.stop).total


def _end_of_all(last: NDArray[np.int64]) -> int:
    """Where all sources have been gone through, by the last position of each lane and source."""
    never = np.flatnonzero((last == NEVER).any(axis=0))
    if len(never):
        raise ConfigError(
            f"stop='all', but source {never[0]} of the mixture is never gone through, since its last weight is 0; "
            "give it another, or use stop='first' or 'never'"
        )
    return int(last.max()) + 1
