"""Keys and URLs of gathered samples, which become strings only where they are used.

Of gathered samples only their rows in the windows' keys and the numbers of their objects are kept; a string costs 50
ns. What is held is the keys of whole windows, some ten bytes a sample, until the strings are made or their batch is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastload.kernels.rows import write_keys
from fastload.kernels.yielding import yield_state

__all__ = ["KeyTable", "Keys", "Names", "NumberedKeys", "UrlTable"]

Ints = npt.NDArray[np.int64]

# URLs of objects that are kept as Python's strings: a million would take 100 MB.
_URLS_KEPT = 4096


class UrlTable:
    """The URLs of objects by their numbers; those of one object are one string. Thread-safe.

    `urls_of` gives those of some objects, in their order.
    """

    def __init__(self, urls_of: Callable[[Ints], list[str]]) -> None:
        self._urls_of = urls_of
        self._kept: dict[int, str] = {}

    def of(self, object_nos: npt.NDArray[np.integer[Any]]) -> list[str]:
        """The URLs of these, which may be named many times."""
        numbers, kept = object_nos.tolist(), self._kept
        if lacking := set(numbers) - kept.keys():
            there = {} if len(kept) + len(lacking) > _URLS_KEPT else dict(kept)
            lacking = set(numbers) - there.keys()
            there.update(zip(lacking, self._urls_of(np.array(list(lacking), np.int64)), strict=True))
            self._kept = kept = there
        return list(map(kept.__getitem__, numbers))


class Keys(Protocol):
    """The keys of a window's rows."""

    def keys(self, rows: Ints) -> list[str]:
        """The keys of these rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class NumberedKeys:
    """Keys of samples that have none of their own: `<name of the shard>/<number of the sample in it>`. The rows of
    shard i, which is called `names[i]`, begin at `first_rows[i]`, and their numbers at `first_numbers[i]`.
    """

    names: list[str]
    first_rows: Ints
    first_numbers: list[int]

    def keys(self, rows: Ints) -> list[str]:
        shards = np.searchsorted(self.first_rows, rows, side="right") - 1
        numbers = (rows - self.first_rows[shards] + np.array(self.first_numbers, np.int64)[shards]).tolist()
        return [f"{self.names[shard]}/{number}" for shard, number in zip(shards.tolist(), numbers, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class KeyTable:
    """The keys of a window's rows, UTF-8: key i is `key_bytes[starts[i] : starts[i + 1]]`, of at most `bytes_max`."""

    key_bytes: npt.NDArray[np.uint8]
    starts: Ints
    bytes_max: int

    def keys(self, rows: Ints) -> list[str]:
        """The keys of these rows. Written as one text and cut at NUL, which no key holds: no Python a sample."""
        if not len(rows):
            return []
        text = np.empty(len(rows) * (self.bytes_max + 1), np.uint8)
        byte_count = write_keys(yield_state, self.key_bytes, self.starts, rows, text)
        if byte_count < 0:
            raise IndexError(f"row {rows[-1 - byte_count]} is none of {len(self.starts) - 1}")
        return str(text.data[: byte_count - 1], "utf-8", "backslashreplace").split("\0")


class Names:
    """Keys and URLs of some samples, looked up when they are first needed. Thread-safe.

    `keys`: for the samples of each window which they are (None: all), the window's keys, and their rows there.
    """

    def __init__(
        self,
        keys: Sequence[tuple[Ints | None, Keys, Ints]],
        object_nos: npt.NDArray[np.integer[Any]],
        urls: UrlTable,
    ) -> None:
        self._rows, self._object_nos, self._table = keys, object_nos, urls
        self._keys: list[str] | None = None
        self._urls: list[str] | None = None

    def keys(self) -> list[str]:
        """The samples' keys."""
        if self._keys is None:
            self._keys = _in_order(self._rows, len(self._object_nos))
        return self._keys

    def urls(self) -> list[str]:
        """The URLs of their shards."""
        if self._urls is None:
            self._urls = self._table.of(self._object_nos)
        return self._urls

    def place(self, number: int, column: str) -> str:
        """Where a value is, for an error."""
        return f"{self.urls()[number]}: sample {self.keys()[number]!r}, column {column!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _Made, (self.keys(), self.urls())


class _Made(Names):
    """Names that another process was sent."""

    def __init__(self, keys: list[str], urls: list[str]) -> None:
        self._keys, self._urls = keys, urls


def _in_order(parts: Sequence[tuple[Ints | None, Keys, Ints]], count: int) -> list[str]:
    keys = [""] * count
    for samples, table, rows in parts:
        if samples is None:
            return table.keys(rows)
        for sample, key in zip(samples.tolist(), table.keys(rows), strict=True):
            keys[sample] = key
    return keys
