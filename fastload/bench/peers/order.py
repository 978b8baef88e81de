"""How well a loader shuffled, and whether each sample came once: from the keys that came. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DISTANCE_PERFECT = 1 / 3


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the samples lie: by key the shard and the place in all of the data. Keys that come twice have no place."""

    shard_of: Mapping[str, int]
    place_of: Mapping[str, int]
    repeated_keys: bool
    counts: Counter[str]

    @classmethod
    def of(cls, shards: Sequence[Sequence[str]]) -> Stored:
        """Of the keys of each shard, in order."""
        keys = [key for shard in shards for key in shard]
        counts = Counter(keys)
        shard_of = {key: number for number, shard in enumerate(shards) for key in shard}
        return cls(shard_of, {key: place for place, key in enumerate(keys)}, len(counts) < len(keys), counts)

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.counts.total()


@dataclass(frozen=True, slots=True)
class Seen:
    """Of an epoch: `distance` is how far apart in the data two samples are, of which one came after the other, in the
    mean and as a share of the data (a third is perfect); `of_one_shard` the largest part of a batch that is from one
    shard, in the mean. None where keys do not say where a sample lies.
    """

    missing: int
    repeated: int  # came more often than they are there, or are no such samples
    distance: float | None
    of_one_shard: float | None


def seen(stored: Stored, keys: Sequence[str], batch_sizes: Sequence[int]) -> Seen:
    """What the keys of an epoch, batch after batch, say."""
    came = Counter(keys)
    missing, repeated = (stored.counts - came).total(), (came - stored.counts).total()
    if stored.repeated_keys or not keys or any(key not in stored.place_of for key in came):
        return Seen(missing, repeated, None, None)
    places = np.array([stored.place_of[key] for key in keys])
    shards = np.array([stored.shard_of[key] for key in keys])
    distance = float(np.abs(np.diff(places)).mean()) / stored.samples if len(keys) > 1 else 0.0
    ends = np.cumsum(batch_sizes)
    batches = [shards[end - size : end] for end, size in zip(ends, batch_sizes, strict=True) if size]
    shares = [np.bincount(batch).max() / len(batch) for batch in batches]
    return Seen(missing, repeated, distance, float(np.mean(shares)))
