"""Pin: hold one set of chunks, epoch after epoch. This says which set: a function of chunk, share and epoch.

Where each chunk is read once an epoch, a cache that holds the share c of the data hits c, whichever chunks these are.
So they are chosen for two other ends:

- The link should see a steady load, not all misses in one place. Every chunk has a *place* on a circle of length 1, and
  the cache holds the places of an *arc* as long as its share. The places of an object's chunks step around the circle
  by the golden ratio, which spreads any number of them evenly: each shard has its share in the cache, and so has every
  stretch of every epoch, in whatever order shards come. An object begins where its id says, so objects of a single
  chunk are held or not as if by lot. (Holding whole shards, chosen by lot or because they came first, leaves long runs
  without a hit.)
- It should not be the same bytes for ever that come from afar. The arc moves by `ROTATION` of the circle an epoch, so
  all of the data are held at one time or another. What the arc has left goes after it was used, and makes room for
  what it has come to, which is fetched in that epoch anyway: moving on costs writes, and not one fetch.

Disk and RAM have arcs that follow one another, so that they hold different chunks and their shares add up.

Nothing here depends on what is in a cache: nodes agree without talking, and the order of the samples is untouched.
Rejected: to choose by the orders of the epochs to come, which can only be even for two of them at a time, and ties the
set to a seed; a job that starts again with another one finds what the last run left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ROTATION", "Arc", "place", "places"]

# Of the data, an epoch. A cache of half the data so changes a sixty-fourth of what it holds.
ROTATION = 1 / 128

_GOLDEN_STEP = (5**0.5 - 1) / 2


def place(object_id: bytes, index: int) -> float:
    """The place of a chunk on the circle: from 0 up to 1."""
    return (_first_place(object_id) + index * _GOLDEN_STEP) % 1.0


def places(object_id: bytes, count: int) -> npt.NDArray[np.float64]:
    """The places of an object's chunks, float64[count]."""
    return np.asarray((_first_place(object_id) + np.arange(count) * _GOLDEN_STEP) % 1.0)


def _first_place(object_id: bytes) -> float:
    return int.from_bytes(object_id[:8], "little") / 2.0**64


@dataclass(frozen=True, slots=True)
class Arc:
    """The places from `start` on, around the circle, that make up `share` of it."""

    start: float
    share: float

    @classmethod
    def of_epoch(cls, epoch: int, share: float, before: float = 0.0) -> Arc:
        """The arc of a tier that holds `share` of the data, where tiers before it hold the share `before`."""
        return cls((epoch * ROTATION + before) % 1.0, min(max(share, 0.0), max(0.0, 1.0 - before)))

    def holds(self, at: float) -> bool:
        """Whether a place lies on it."""
        return self.share >= 1.0 or (at - self.start) % 1.0 < self.share
