"""How well an order is shuffled: three figures, each beside what a perfect shuffle gives.

A *line* is an epoch's samples in their order, as shard and number in the shard. A perfect shuffle is one that is drawn
from all permutations evenly.

- *Distance moved*: how far a sample is from where it would be without shuffling, as a share of the whole, in the mean.
  A third is perfect; less means that the epoch still runs through the data from one end to the other.
- *Same-shard neighbours*: the share of samples whose successor is of the same shard. What is stored together is alike:
  one video, one speaker, one day.
- *Class imbalance*: Pearson's chi-square of the classes of a batch against those of the whole, per degree of freedom,
  in the mean over batches, where a perfect shuffle gives 1. At x, a batch of B samples is as even as a perfectly
  shuffled one of B / x, so no batch exceeds B by much. It says most on data whose shards are sorted by class, which is
  the worst that can be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.plan import EpochOrder, Ranks, epoch_cursor

DISTANCE_MOVED_PERFECT = 1 / 3

# Samples that are walked through at a time.
_STEP = 1 << 14


class SampleLine(NamedTuple):
    """Samples in order: number `sample_no[i]`, int64, of shard `object_no[i]`, int32."""

    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]


def epoch_line(orders: Sequence[EpochOrder], counts: NDArray[np.int64]) -> SampleLine:
    """The line of an epoch, given the orders of all partitions and how many samples each shard holds."""
    cursor = epoch_cursor(orders, Ranks(), _STEP)
    entries = cursor.add_counts(0, np.arange(len(counts), dtype=np.int32), counts)
    while True:
        if more := cursor.settled():
            entries += more
        elif (key := cursor.next_window) is not None:
            entries += cursor.add(key, counts[cursor.objects_of(key)])
        else:
            break
    entries += cursor.finish()
    return SampleLine(
        np.concatenate([entry.object_no for entry in entries] or [np.empty(0, np.int32)]),
        np.concatenate([entry.sample_no for entry in entries] or [np.empty(0, np.int64)]),
    )


def stored_positions(line: SampleLine, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each sample of the line is in the data as stored, shard after shard, int64."""
    return (np.cumsum(counts) - counts)[line.object_no] + line.sample_no


def distance_moved(line: SampleLine, counts: NDArray[np.int64]) -> float:
    """The mean distance between a sample's place in the line and in the data as stored, as a share of all."""
    stored = stored_positions(line, counts)
    return float(np.abs(stored - np.arange(len(stored))).mean()) / len(stored)


def same_shard_neighbours(line: SampleLine) -> float:
    """The share of samples that have a successor of the same shard; at least two samples."""
    return float((line.object_no[1:] == line.object_no[:-1]).mean())


def same_shard_neighbours_perfect(counts: NDArray[np.int64]) -> float:
    """The share that a perfect shuffle has of shards that hold so many samples each."""
    total = int(counts.sum())
    return float((counts / total * (counts - 1) / (total - 1)).sum())


def class_imbalance(classes: NDArray[np.int64], batch_size: int) -> float:
    """The chi-square per degree of freedom of batches, in the mean, given the class (0, 1, ...) of each sample of a
    line; 1 is perfect.

    Samples that make no whole batch are left out, and classes without samples do not count. There must be two classes,
    and more samples than a batch has.
    """
    of_class = np.bincount(classes)
    batches, expected = len(classes) // batch_size, of_class[of_class > 0] * (batch_size / len(classes))
    assert batch_size < len(classes), f"{len(classes)} samples in batches of {batch_size}"
    assert len(expected) > 1, "all samples are of one class"
    # The sum of (seen - expected)² / expected over classes is that of seen² / expected, less the size of the batch; and
    # the first needs only the classes that a batch has.
    batch_no = np.repeat(np.arange(batches), batch_size)
    seen = np.unique(batch_no * len(of_class) + classes[: batches * batch_size], return_counts=True)
    squares = seen[1] ** 2 / (of_class[seen[0] % len(of_class)] * (batch_size / len(classes)))
    # Samples of a batch are drawn without putting any back, which evens them out a little.
    dependence = (len(classes) - batch_size) / (len(classes) - 1)
    return float((squares.sum() / batches - batch_size) / (len(expected) - 1) / dependence)
