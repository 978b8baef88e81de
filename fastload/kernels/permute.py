"""A keyed permutation whose bytes are fixed for ever.

The order of an epoch must be the same with every version of numpy, on every machine, so the generator is ours
and is written down here:

- xoshiro256++ (Blackman and Vigna), its four 64-bit words given by the caller;
- a draw below `bound` by Lemire's method on the upper 32 bits of a word: `product = upper * bound`, the draw
  is `product >> 32`, drawn again while `product mod 2**32 < 2**32 mod bound`, so that it has no bias;
- Fisher-Yates from the top: for i = n-1 ... 1, swap places i and draw(i + 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.jit import array_in, array_out, int64, kernel, uint64, void

# A draw has 32 bits, so this is how many things can be permuted at once.
PERMUTATION_ITEMS_MAX = 2**32 - 1

# numba makes float64 of an int64 with an uint64, so every constant that meets a word is an uint64 too.
_U1, _U17, _U19, _U23, _U32, _U41, _U45 = (np.uint64(n) for n in (1, 17, 19, 23, 32, 41, 45))
_LOW32 = np.uint64(0xFFFFFFFF)
_TWO32 = np.uint64(1 << 32)


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
