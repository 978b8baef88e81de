"""The plan as plain Python: what the real one must do, one sample at a time, with every count known.

Shares no code with `fastload.plan`. Slow on purpose; read it to learn what the order is.
"""

from __future__ import annotations

import hashlib
import math
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


def dealt(sizes, partitions):
    """The object numbers of each partition."""
    parts = [[] for _ in range(partitions)]
    for shard in sorted(range(len(sizes)), key=lambda shard: (-sizes[shard], shard)):
        min(parts, key=lambda part: (sum(sizes[s] for s in part), len(part), parts.index(part))).append(shard)
    return [sorted(part) for part in parts]


def windows(sizes, seed, epoch, shuffle, window_bytes, partition=0, objects=None):
    """Lists of object numbers."""
    order = list(range(len(sizes))) if objects is None else objects
    if shuffle != "none":
        order = shuffled(order, f"fastload order 1 shards seed={seed} epoch={epoch} partition={partition}")
    cut = []
    for shard in order:
        ramp = 2 ** (len(cut) - 1) if cut else 0
        fits = cut and len(cut[-1]) < ramp and sum(sizes[s] for s in [*cut[-1], shard]) <= window_bytes
        if fits and shuffle == "window":
            cut[-1].append(shard)
        else:
            cut.append([shard])
    return cut


def line(cut, counts, seed, epoch, shuffle, partition=0):
    """The samples of a partition, each (window, offset, object, sample)."""
    samples = []
    for window, shards in enumerate(cut):
        inside = [(shard, sample) for shard in shards for sample in range(counts[shard])]
        if shuffle == "window":
            key = f"fastload order 1 samples seed={seed} epoch={epoch} partition={partition} window={window}"
            inside = shuffled(inside, key)
        samples += [(window, offset, *sample) for offset, sample in enumerate(inside)]
    return samples


def one_line(lines):
    """The samples of all partitions, given the line of each: by turns, from lanes that are made equally long."""
    count, total = len(lines), sum(map(len, lines))
    quotas = [len(range(lane, total, count)) for lane in range(count)]
    rest = [sample for line, quota in zip(lines, quotas, strict=True) for sample in line[quota:]]
    lanes = []
    for line, quota in zip(lines, quotas, strict=True):
        lacking = max(0, quota - len(line))
        lanes.append(line[:quota] + rest[:lacking])
        rest = rest[lacking:]
    return [lanes[position % count][position // count] for position in range(total)]


def repeats(samples, windows_of, partitions, world_size, global_batch):
    """What fills the last group of ranks: one sample for each position that is missing.

    `windows_of` names the window of a sample, all of whose samples are then in `samples` in their order.
    """
    total, found = len(samples), []
    for position in range(total, -(-total // world_size) * world_size):
        lane = [p for p in range(total) if p % partitions == position % partitions]
        in_last_batch = lane and lane[-1] >= (total - 1) // global_batch * global_batch
        window = windows_of(samples[lane[-1] if in_last_batch else total - 1])
        found.append(window[(position - total) % len(window)])
    return found


def turn(rank, node, nodes, local_world_size, partitions):
    """Which positions mod world_size are a rank's."""
    shared = math.gcd(nodes, partitions)
    group = [(n, r) for n in range(nodes) if n % shared == node % shared for r in range(local_world_size)]
    return node % shared + shared * group.index((node, rank % local_world_size))


def rank_positions(start, total, rank, nodes, local_world_size, partitions, global_batch):
    """A rank's positions from `start`, where a global batch begins, up to `total`."""
    node, world_size, shared = rank // local_world_size, nodes * local_world_size, math.gcd(nodes, partitions)
    mine, whole = [], total - (total - start) % world_size
    for first in range(start, whole, global_batch):
        batch = range(first, min(first + global_batch, whole))
        if partitions == 1 or shared in (nodes, partitions):
            of_turn = turn(rank, node, nodes, local_world_size, partitions)
            mine += [position for position in batch if position % world_size == of_turn]
        else:
            lanes = range(node % shared, partitions, shared)
            digits = max(1, (len(lanes) - 1).bit_length())
            row = sorted(lanes, key=lambda lane: f"{lane // shared:0{digits}b}"[::-1])
            theirs = sorted(
                (position for position in batch if position % partitions in lanes),
                key=lambda position: (row.index(position % partitions), position),
            )
            size = len(batch) // nodes
            piece = theirs[node // shared * size :][:size]
            mine += sorted(piece)[rank % local_world_size :: local_world_size]
    left_over = whole + turn(rank, node, nodes, local_world_size, partitions)
    return mine + ([left_over] if left_over < total else [])


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


def repeat_count(total: int, world_size: int, tail: str) -> int:
    """How many samples are repeated over all ranks."""
    return -total % world_size if tail == "pad" else 0
