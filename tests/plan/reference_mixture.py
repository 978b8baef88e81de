"""A mixture as plain Python: what the real one must do, one sample at a time, with every count known.

Shares no code with `fastload.plan`. Read it after `reference`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

from tests.plan.reference import WORD


@functools.cache
def key_of(seed, epoch, lane, source):
    text = f"fastload mixture 1 seed={seed} epoch={epoch} lane={lane} source={source}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def jitter(seed, epoch, lane, source, count):
    word = (key_of(seed, epoch, lane, source) + count * 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return ((word ^ (word >> 31)) >> 11) * 2.0**-53


def steps(weights):
    """(global sample count, the share of each source from there on), where `weights` are lists of (count, weight)."""
    found = []
    for first in sorted({count for schedule in weights for count, _ in schedule}):
        now = [[weight for count, weight in schedule if count <= first][-1] for schedule in weights]
        found.append((first, [weight / sum(now) for weight in now]))
    return found


def mixed_lane(weights, seed, epoch, lane, partitions):
    """The sources of a lane's numbers, without end."""
    begun = steps(weights)
    counts, lags = [0] * len(weights), [0.0] * len(weights)
    for (first, shares), following in itertools.zip_longest(begun, begun[1:]):
        numbers = None
        if following:
            numbers = len(range(lane, following[0], partitions)) - len(range(lane, first, partitions))
        taken = [0] * len(weights)
        for _ in itertools.count() if numbers is None else range(numbers):
            times = [
                ((i + jitter(seed, epoch, lane, s, counts[s] + i) - lags[s]) / shares[s], s)
                for s, i in enumerate(taken)
                if shares[s]
            ]
            source = min(times)[1]
            yield source
            taken[source] += 1
        counts = [count + more for count, more in zip(counts, taken, strict=True)]
        lags = [lag + (numbers * share - n) for lag, share, n in zip(lags, shares, taken, strict=True)]


def mixed_line(weights, seed, epoch, partitions, quotas, stop, samples_max):
    """The (source, round of the source, lane, number in the source's lane) of each position of a mixture.

    `quotas` are, for each source, how many samples each lane has of it in an epoch of its own.
    """
    lanes = [mixed_lane(weights, seed, epoch, lane, partitions) for lane in range(partitions)]
    seen = [[0] * partitions for _ in weights]
    line = []
    for position in range(samples_max):
        lane = position % partitions
        if stop == "all" and all(seen[s][p] >= quotas[s][p] for s in range(len(weights)) for p in range(partitions)):
            break
        source = next(lanes[lane])
        round_no, number = divmod(seen[source][lane], quotas[source][lane])
        if stop == "first" and round_no:
            break
        line.append((source, round_no, lane, number))
        seen[source][lane] += 1
    return line


def source_epoch(stop, epoch, round_no):
    """Which epoch of a source a round of it is, in an epoch of the mixture."""
    return epoch if stop == "first" else epoch * 2**20 + round_no
