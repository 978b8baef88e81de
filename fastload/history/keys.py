"""Keys by which reads of different runs are compared: 64 bits that stand for an object, or for a chunk of one.

An object's is a hash of its URL, so that a new version of it is the same object. Two objects of a run of a million have
the same key by chance once in 37 million runs; what comes of it is one chunk fetched in vain.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
# 2**64 over the golden ratio: chunks of an object are spread over all numbers.
_SPREAD = 0x9E3779B97F4A7C15


def object_key(url: str) -> int:
    return int.from_bytes(hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def chunk_key(object_key: int, index: int) -> int:
    return object_key ^ (index * _SPREAD & _MASK)


def chunk_keys(object_keys: UInt64, indexes: npt.NDArray[np.uint32]) -> UInt64:
    with np.errstate(over="ignore"):
        return object_keys ^ (indexes.astype(np.uint64) * np.uint64(_SPREAD))
