"""Keys: 64 bits a sample, from which a decoder that makes random choices draws all of them.

A key says seed, epoch and sample, and nothing else: so the same sample of the same epoch looks the same whatever the
number of workers, nodes and threads, in whichever batch it lies, and after a resume; and differently in each epoch.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastload.kernels.keys import fill_keys

__all__ = ["Keys", "sample_keys"]

Keys: TypeAlias = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_keys(seed: int, epoch: int, object_no: npt.NDArray[Any], sample_no: npt.NDArray[Any]) -> Keys:
    """A key for each sample, number `sample_no[i]` of object `object_no[i]`. Pure; any integers will do."""
    run = np.array([_mixed(_mixed(seed & _MASK) + (epoch & _MASK)) & _MASK], np.uint64)
    keys = np.empty(len(object_no), np.uint64)
    fill_keys(run, np.ascontiguousarray(object_no, np.int64), np.ascontiguousarray(sample_no, np.int64), keys)
    return keys


def _mixed(word: int) -> int:
    """What splitmix64 makes of a word: every bit depends on every other."""
    word = (word + _GOLDEN) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)
