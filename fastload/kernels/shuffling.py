"""Orders: keys, permutations and the dealing of shards, whose bytes are fixed for ever.

An epoch's order must be the same with every version of numpy and on every machine, so its generators are written here.

*splitmix64* (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), any word of it: 64
well-mixed bits for a key and a place, without a state, in a nanosecond. The keys of samples (`fastload.decode.base`)
are what it makes of a run, an object and a sample in turn.

*permute* is a keyed permutation in memory:

- xoshiro256++ (Blackman and Vigna), its four 64-bit words given by the caller;
- a draw below `bound` by Lemire's method on the upper 32 bits of a word: `product = upper * bound`, the draw
  is `product >> 32`, drawn again while `product mod 2**32 < 2**32 mod bound`, so that it has no bias;
- Fisher-Yates from the top: for i = n-1 ... 1, swap places i and draw(i + 1).

*biject* is a keyed bijection of 0 ... n-1: any place of a permutation of up to 2**40 things, without the others or any
memory. A Feistel network over numbers (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). A
number is split into a low part of `bits` bits, about half of those that n - 1 has, and a high part from 0 to `highs` -
1, where `highs` is the least that covers 0 ... n-1. Rounds alternate: to the low part is added a function of the high
part, modulo 2**bits; to the high part a function of the low part, modulo `highs`. Each can be undone, so the whole is a
bijection of the `highs << bits` numbers. What comes out at n or above goes in again until it does not (cycle walking),
which is a bijection of those below n. They lack fewer than 2**bits, so few walk: at n = 10**9, fewer than one in
30,000.

The function of round r is splitmix64 seeded with the round's key, at place x: `mix(key + x * 0x9E3779B97F4A7C15)`. The
low part takes its lowest bits; the high part its upper 44 bits times `highs`, without the lowest 44, which favours none
by more than 2**-24. Adding, where the usual network has exclusive or, gives odd permutations too.

Sixteen rounds, since eight could be told from a perfect shuffle at n below 30 (over 10**6 keys, by where four places go
that share their parts by twos), and twelve at n below 10. Rounds are the outer loop and a block of numbers the inner
one, which numba turns into vector instructions: 10 ns a number, where number after number took 75.

*deal* and *cut* give shards to partitions and cut them into windows: loops whose every step depends on the one before.
In Python a million shards took 0.8 s to deal to 64 partitions, and up to 0.5 s to cut; here 40 ms and 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import scratch
from fastload.kernels.declare import array_in, array_out, boolean, helper, int32, int64, kernel, uint64, void

__all__ = [
    "BIJECTION_ITEMS_MAX",
    "BIJECTION_ROUNDS",
    "PERMUTATION_ITEMS_MAX",
    "biject",
    "cut",
    "deal",
    "fill_keys",
    "permute",
    "splitmix",
]

Int64s = NDArray[np.int64]

# A draw has 32 bits, so this is how many things can be permuted at once.
PERMUTATION_ITEMS_MAX = 2**32 - 1
# Both parts of a number then have at most 20 bits, which leaves 44 for an even draw.
BIJECTION_ITEMS_MAX = 1 << 40
BIJECTION_ROUNDS = 16
_BLOCK = 256

# numba makes float64 of an int64 with an uint64, so every constant that meets a word is an uint64 too.
_U1, _U17, _U19, _U20, _U23, _U27 = (np.uint64(number) for number in (1, 17, 19, 20, 23, 27))
_U30, _U31, _U32, _U41, _U44, _U45 = (np.uint64(number) for number in (30, 31, 32, 41, 44, 45))
_LOW32, _TWO32 = np.uint64(0xFFFFFFFF), np.uint64(1 << 32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@helper(uint64(uint64, uint64))
def splitmix(key: np.uint64, place: np.uint64) -> np.uint64:
    """Word number `place` of splitmix64 from the seed `key`."""
    word = key + place * _GOLDEN
    word = (word ^ (word >> _U30)) * _MIX1
    word = (word ^ (word >> _U27)) * _MIX2
    return word ^ (word >> _U31)


@kernel(void(array_in(uint64), array_in(int64), array_in(int64), array_out(uint64)))
def fill_keys(
    run: NDArray[np.uint64], object_no: NDArray[np.int64], sample_no: NDArray[np.int64], keys: NDArray[np.uint64]
) -> None:
    """Write the key of sample `sample_no[i]` of object `object_no[i]` to `keys[i]`; `run` has one word."""
    for i in range(object_no.size):
        of_object = splitmix(run[0], np.uint64(object_no[i]) + _U1)
        keys[i] = splitmix(of_object, np.uint64(sample_no[i]) + _U1)


@kernel(void(array_in(uint64), array_out(int64)))
def permute(state: NDArray[np.uint64], out: NDArray[np.int64]) -> None:
    """Fill `out`, int64[n], with a permutation of 0 ... n-1 keyed by `state`, uint64[4] and not all zero
    (left as it is).
    """
    s0, s1, s2, s3 = state[0], state[1], state[2], state[3]
    for i in range(out.size):
        out[i] = i
    for i in range(out.size - 1, 0, -1):
        bound = np.uint64(i) + _U1
        threshold = bound  # an upper limit of the one below, which costs a division
        while True:
            total = s0 + s3
            word = ((total << _U23) | (total >> _U41)) + s0
            shifted = s1 << _U17
            s2 ^= s0
            s3 ^= s1
            s1 ^= s2
            s0 ^= s3
            s2 ^= shifted
            s3 = (s3 << _U45) | (s3 >> _U19)
            product = (word >> _U32) * bound
            low = product & _LOW32
            if low >= threshold:
                break
            threshold = _TWO32 % bound
            if low >= threshold:
                break
        j = np.int64(product >> _U32)
        out[i], out[j] = out[j], out[i]


@kernel(int64(array_in(uint64), int64, array_in(int64), array_out(int64)))
def biject(keys: NDArray[np.uint64], count: int, places: NDArray[np.int64], out: NDArray[np.int64]) -> int:
    """Fill `out` with what stands at some `places` of the permutation of 0 ... count-1 that belongs to `keys`,
    uint64[rounds], an even number of them.

    Returns the index of the first place that is not from 0 to count - 1 and at which it stopped, or -1.
    """
    width = 0
    while (count - 1) >> width > 0:
        width += 1
    bits = np.uint64((width + 1) // 2)
    mask, below = (_U1 << bits) - _U1, np.uint64(count)
    highs = ((below - _U1) >> bits) + _U1
    low, high = scratch(_BLOCK, np.uint64), scratch(_BLOCK, np.uint64)
    index = scratch(_BLOCK, np.int64)  # of each number of the block in `out`
    for start in range(0, places.size, _BLOCK):
        walking = min(_BLOCK, places.size - start)
        for i in range(walking):
            if places[start + i] < 0 or places[start + i] >= count:
                return start + i
            number = np.uint64(places[start + i])
            low[i], high[i], index[i] = number & mask, number >> bits, start + i
        while walking > 0:
            for r in range(0, keys.size, 2):
                for i in range(walking):
                    low[i] = (low[i] + splitmix(keys[r], high[i])) & mask
                    moved = high[i] + (((splitmix(keys[r + 1], low[i]) >> _U20) * highs) >> _U44)
                    high[i] = min(moved, moved - highs)  # the second is huge where it is below zero
            outside = 0
            for i in range(walking):
                number = (high[i] << bits) | low[i]
                if number < below:
                    out[index[i]] = np.int64(number)
                else:
                    low[outside], high[outside], index[outside] = low[i], high[i], index[i]
                    outside += 1
            walking = outside
    return -1


@kernel(void(array_in(int64), array_out(int64), array_out(int64), array_out(int64), array_out(int32)))
def deal(sizes: Int64s, heap: Int64s, load_bytes: Int64s, load_counts: Int64s, partitions: NDArray[np.int32]) -> None:
    """Give each shard, one after the other, to the partition with the fewest bytes so far, then the fewest shards, then
    the lowest number: `partitions`, int32[shards].

    What each has so far, `load_bytes` and `load_counts`, int64[partitions], is brought up to date; `heap` holds all
    partitions in the order that is meant, at first and, as a heap, at the end.
    """
    for shard in range(sizes.size):
        moved, place = heap[0], 0
        partitions[shard] = moved
        load_bytes[moved] += sizes[shard]
        load_counts[moved] += 1
        while 2 * place + 1 < heap.size:
            child = 2 * place + 1
            if child + 1 < heap.size and _has_less(heap[child + 1], heap[child], load_bytes, load_counts):
                child += 1
            if _has_less(moved, heap[child], load_bytes, load_counts):
                break
            heap[place] = heap[child]
            place = child
        heap[place] = moved


@helper(boolean(int64, int64, array_out(int64), array_out(int64)))
def _has_less(one: int, other: int, load_bytes: Int64s, load_counts: Int64s) -> bool:
    """Whether partition `one` comes before `other`."""
    if load_bytes[one] != load_bytes[other]:
        return bool(load_bytes[one] < load_bytes[other])
    if load_counts[one] != load_counts[other]:
        return bool(load_counts[one] < load_counts[other])
    return one < other


@kernel(int64(array_in(int64), int64, array_out(int64)))
def cut(sizes: Int64s, window_bytes: int, starts: Int64s) -> int:
    """Windows of as many shards as fit in `window_bytes`, at least one and at most 1, 2, 4, ... in the first windows:
    where each begins, and last the number of shards, in `starts`, int64[shards + 1]. Returns how many it filled.
    """
    start, filled, shards_max = 0, 1, 1
    starts[0] = 0
    while start < sizes.size:
        total, stop = sizes[start], start + 1
        while stop < min(start + shards_max, sizes.size) and total + sizes[stop] <= window_bytes:
            total += sizes[stop]
            stop += 1
        starts[filled] = start = stop
        filled += 1
        shards_max = min(2 * shards_max, sizes.size)
    return filled
