"""A keyed bijection of 0 ... n-1: any place of a permutation of up to 2**40 things, without the others or any memory.

A Feistel network over numbers (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). A number is
split into a low part of `bits` bits, about half of those that n - 1 has, and a high part from 0 to `highs` - 1, where
`highs` is the least that covers 0 ... n-1. Rounds alternate: to the low part is added a function of the high part,
modulo 2**bits; to the high part a function of the low part, modulo `highs`. Each can be undone, so the whole is a
bijection of the `highs << bits` numbers. What comes out at n or above goes in again until it does not (cycle
walking), which is a bijection of those below n. They lack fewer than 2**bits, so few walk: at n = 10**9, fewer than one
in 30,000.

The function of round r is splitmix64 (Steele, Lea and Flood) seeded with the round's key, at place x: `mix(key +
x * 0x9E3779B97F4A7C15)`. The low part takes its lowest bits; the high part its upper 44 bits times `highs`, without
the lowest 44, which favours none by more than 2**-24. Adding, where the usual network has exclusive or, gives odd
permutations too.

Sixteen rounds, since eight could be told from a perfect shuffle at n below 30 (over 10**6 keys, by where four
places go that share their parts by twos), and twelve at n below 10. Rounds are the outer loop and a block of numbers
the inner one, which numba turns into vector instructions: 10 ns a number, where number after number took 75.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import scratch
from fastload.kernels.jit import array_in, array_out, int64, kernel, uint64
from fastload.kernels.splitmix import splitmix

__all__ = ["BIJECTION_ITEMS_MAX", "BIJECTION_ROUNDS", "biject"]

# Both parts then have at most 20 bits, which leaves 44 for an even draw.
BIJECTION_ITEMS_MAX = 1 << 40
BIJECTION_ROUNDS = 16

_BLOCK = 256

# numba makes float64 of an int64 with an uint64, so every constant that meets a word is an uint64 too.
_U1, _U20, _U44 = (np.uint64(n) for n in (1, 20, 44))


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
