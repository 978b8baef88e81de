"""Permutations of 0 ... n-1 that belong to a text, the same on every machine and for ever.

Two ways to have one: as an array, which is exactly even over all permutations and costs memory and time for all n
at once (`permute`); or as a bijection, whose places cost the same whichever are asked for and however many
there are (`biject`), both in `kernels.shuffling`. A text's blake2b gives the words that key them: four little-endian
ones of 64 bits for the array, one for each round of the bijection, eight from the text followed by " rounds=0", and so
on.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.kernels.shuffling import BIJECTION_ITEMS_MAX, BIJECTION_ROUNDS, PERMUTATION_ITEMS_MAX, biject, permute


class Permutation(Protocol):
    """Which things come first, second, ...; an array, or what answers for one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[np.int64]:
        """What stands at some places, int64. Raises `IndexError` for a place that there is not."""
        ...


class Bijection:
    """The bijection of 0 ... count-1 that belongs to `key`. Any thread may ask it."""

    def __init__(self, key: str, count: int) -> None:
        if count > BIJECTION_ITEMS_MAX:
            raise ConfigError(
                f"cannot shuffle {count} samples together: {BIJECTION_ITEMS_MAX} are the most; raise partitions, so "
                "that each holds fewer"
            )
        self._count = count
        digests = (_digest(f"{key} rounds={i}", 64) for i in range(BIJECTION_ROUNDS // 8))
        self._keys = _words(b"".join(digests))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[np.int64]:
        """What stands at some places, int64, for the time of these alone."""
        places = np.ascontiguousarray(places, np.int64)
        out = np.empty(len(places), np.int64)
        wrong = biject(self._keys, self._count, places, out)
        if wrong >= 0:
            raise IndexError(f"place {places[wrong]} is not from 0 to {self._count - 1}")
        return out


class Identity:
    """Things as they stand."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: NDArray[np.int64], /) -> NDArray[np.int64]:
        """The places themselves."""
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= self._count):
            raise IndexError(f"places from {places.min()} to {places.max()} of {self._count}")
        return places


def keyed_permutation(key: str, count: int) -> NDArray[np.int64]:
    """int64[count]: the permutation of 0 ... count-1 that belongs to `key`."""
    if count > PERMUTATION_ITEMS_MAX:
        raise ConfigError(f"cannot shuffle {count} samples in one window; lower shuffle_window so that it holds fewer")
    out = np.empty(count, np.int64)
    permute(_words(_digest(key, 32)), out)
    return out


def _digest(text: str, byte_count: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=byte_count).digest()


def _words(digest: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(digest, "<u8").astype(np.uint64)
