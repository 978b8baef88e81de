"""The plan as plain Python: what the real one must do, one sample at a time, with every count known.

Shares no code with `fastload.plan`. Slow on purpose; read it to learn what the order is.
"""

from __future__ import annotations

import hashlib
import struct

WORD = (1 << 64) - 1


def xoshiro(state):
    """The words of xoshiro256++ from four words of state."""
    s = list(state)

    def rotate(x, k):
        return ((x << k) | (x >> (64 - k))) & WORD

    while True:
        yield (rotate((s[0] + s[3]) & WORD, 23) + s[0]) & WORD
        t = (s[1] << 17) & WORD
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = rotate(s[3], 45)


def shuffled(items, key):
    items = list(items)
    stream = xoshiro(struct.unpack("<4Q", hashlib.blake2b(key.encode(), digest_size=32).digest()))
    for i in range(len(items) - 1, 0, -1):
        product = (next(stream) >> 32) * (i + 1)
        while product % 2**32 < 2**32 % (i + 1):
            product = (next(stream) >> 32) * (i + 1)
        j = product >> 32
        items[i], items[j] = items[j], items[i]
    return items


def windows(sizes, seed, epoch, shuffle, window_bytes):
    """Lists of object numbers."""
    order = list(range(len(sizes)))
    if shuffle != "none":
        order = shuffled(order, f"fastload order 1 shards seed={seed} epoch={epoch} partition=0")
    cut = []
    for shard in order:
        ramp = 2 ** (len(cut) - 1) if cut else 0
        fits = cut and len(cut[-1]) < ramp and sum(sizes[s] for s in [*cut[-1], shard]) <= window_bytes
        if fits and shuffle == "window":
            cut[-1].append(shard)
        else:
            cut.append([shard])
    return cut


def line(cut, counts, seed, epoch, shuffle):
    """The samples of an epoch, each (window, offset, object, sample)."""
    samples = []
    for window, shards in enumerate(cut):
        inside = [(shard, sample) for shard in shards for sample in range(counts[shard])]
        if shuffle == "window":
            key = f"fastload order 1 samples seed={seed} epoch={epoch} partition=0 window={window}"
            inside = shuffled(inside, key)
        samples += [(window, offset, *sample) for offset, sample in enumerate(inside)]
    return samples


def with_tail(samples, delivered, world_size, tail):
    """What is left after `delivered` samples, made to fit the ranks; with the number of repeats."""
    rest, left_over = samples[delivered:], (len(samples) - delivered) % world_size
    if tail == "drop":
        return rest[: len(rest) - left_over], 0
    repeats = world_size - left_over if left_over and tail == "pad" else 0
    last = [sample for sample in samples if sample[0] == samples[-1][0]]
    return rest + [last[i % len(last)] for i in range(repeats)], repeats


def rank_batches(rest, rank, world_size, batch_size, drop_last):
    """The batches of one rank, each a list of (window, offset, object, sample)."""
    mine = rest[rank::world_size]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return [batch for batch in batches if len(batch) == batch_size or not drop_last]


def worker_batches(batches, worker, worker_count, split, batch_size, drop_last):
    """A worker's share of a rank's batches."""
    if split == "batches":
        return batches[worker::worker_count]
    mine = [sample for batch in batches for sample in batch][worker::worker_count]
    return rank_batches(mine, 0, 1, batch_size, drop_last)
