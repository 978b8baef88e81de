"""splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), any word of it.

A helper of other kernels: 64 well-mixed bits for a key and a place, without a state, in a nanosecond.
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import helper, uint64

__all__ = ["splitmix"]

# numba makes float64 of an int64 with an uint64, so every constant that meets a word is an uint64 too.
_U27, _U30, _U31 = (np.uint64(n) for n in (27, 30, 31))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@helper(uint64(uint64, uint64))
def splitmix(key: np.uint64, place: np.uint64) -> np.uint64:
    """Word number `place` of splitmix64 from the seed `key`."""
    word = key + place * _GOLDEN
    word = (word ^ (word >> _U30)) * _MIX1
    word = (word ^ (word >> _U27)) * _MIX2
    return word ^ (word >> _U31)
