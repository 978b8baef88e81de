"""What a decoder is: how the bytes of one column become what a user gets.

A user declares a decoder a column (`decode={"jpg": image(224), "cls": integer()}`). A decoder is a frozen
value without resources: it compares, pickles and may be used by any number of threads at once; what a thread
needs to work with (pixels, tables) hangs on the thread, not on the decoder.

The pipeline gathers the values of one column of a group of samples end to end (`values`, `offsets`) and makes
one call:

- `fixed()` is not None: every sample has this shape and dtype. The pipeline owns an array for the batch, and
  `decode_into` fills a part of it, so that a group is decoded into its final place.
- `fixed()` is None: `decode` returns the group as a `Ragged`, a list, or an array with one row a sample.

A decoder that makes random choices says so (`wants_keys`), and is then given a key a sample, from which it
draws all of them: see below. Others take keys, and pay no heed to them.

`values` and `offsets` belong to the caller and are used again, so nothing that is returned may share their
memory; `decode_owned` is for a caller that gives them away. What a decoder returns is writable and the
user's own.

Where samples may lack the column, decoders are given only the values that there are; `missing()` says what
stands for one that is not (see `fastload.decode.optional`).

A decoder's own work is `_decode`, which knows one value and nothing of where it came from. It raises
`DecodeError` (or `ConfigError`, where something is to be installed) with what is wrong; the callers here put
the place before it. `where(i)`, which may be slow, is
called only for that.

Keys: 64 bits a sample, from which a decoder that makes random choices draws all of them.

A key says seed, epoch and sample, and nothing else: so the same sample of the same epoch looks the same whatever the
number of workers, nodes and threads, in whichever batch it lies, and after a resume; and differently in each epoch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastload.errors import ConfigError, DecodeError, FastloadError
from fastload.kernels.shuffling import fill_keys
from fastload.ragged import Ragged

__all__ = ["Bytes", "Decoder", "Fixed", "Keys", "Offsets", "Where", "each", "located", "sample_keys"]

Bytes: TypeAlias = "bytes | bytearray | memoryview"
Fixed: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]
Offsets: TypeAlias = npt.NDArray[np.int64]
Where: TypeAlias = Callable[[int], str]

"""The place of sample i of the group, for an error: its URL, key and column."""

# A `ConfigError` is one about the sample, too: a format whose library is not installed.
_FAILURES = (DecodeError, ConfigError)


class Decoder(ABC):
    """How one column is decoded; see the module. Subclasses are frozen dataclasses that define `_decode`."""

    @abstractmethod
    def _decode(self, value: memoryview) -> Any:
        """One value decoded, sharing no memory with `value`. Raises `DecodeError` without a place."""

    def fixed(self) -> Fixed | None:
        """Shape and dtype of every sample, or None where they differ."""
        return None

    def gives(self) -> tuple[Any, tuple[int, ...] | None]:
        """The dtype of arrays and numbers, or the type of other values (`object`: any), and the shape, None where
        values differ in it.
        """
        fixed = self.fixed()
        return (object, None) if fixed is None else (fixed[1], fixed[0])

    def wants_keys(self) -> bool:
        """Whether it makes random choices, so that each sample needs a key."""
        return False

    def missing(self) -> Any:
        """What stands for the value of a sample that lacks the column, made anew each time; None where nothing does.

        It is of the kind that `decode_one` gives and, where batches are arrays, fits a row of them.
        """
        return None

    def takes_missing(self) -> bool:
        """Whether batches can hold what stands for a missing value: lists and `Ragged` can, tensors need a default."""
        return self.fixed() is None or self.missing() is not None

    @property
    def is_in_place(self) -> bool:
        """Whether `decode_owned` makes batches of the very memory of `values`, so that this should be the user's."""
        return False

    def decode_one(self, value: Bytes, where: str, key: int | None = None) -> Any:
        """One sample: `bytes`, `str`, `int`, an array, or what the column holds. Raises `DecodeError`."""
        try:
            return self._decode(memoryview(value))
        except _FAILURES as error:
            raise located(error, where) from error.__cause__

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        """Decode the group into `out` (n, *shape), C-contiguous; only where `fixed()` is not None.

        `values`: uint8, 1-D, contiguous; sample i is `values[offsets[i]:offsets[i + 1]]`. Raises
        `DecodeError` for the first sample that fails; `out` is then partly written.
        """
        fixed = self.fixed()
        assert fixed == (out.shape[1:], out.dtype), f"{self} cannot decode into {out.dtype}{out.shape}"

        def place(number: int, value: memoryview) -> None:
            out[number] = self._decode(value)

        each(values, offsets, where, place)

    def decode(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged | list[Any] | npt.NDArray[Any]:
        """Decode the group into a `Ragged`, list or array of its own. Raises `DecodeError` for the first
        that fails.
        """
        fixed = self.fixed()
        if fixed is not None:
            out = np.empty((len(offsets) - 1, *fixed[0]), fixed[1])
            self.decode_into(values, offsets, out, where, keys)
            return out
        decoded: list[Any] = []
        each(values, offsets, where, lambda _, value: decoded.append(self._decode(value)))
        return decoded

    def decode_owned(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged | list[Any] | npt.NDArray[Any]:
        """As `decode`, from a caller that gives `values` (writable) and `offsets` (from 0) away for good."""
        return self.decode(values, offsets, where, keys)

    def kernel_modules(self) -> tuple[str, ...]:
        """The modules of `fastload.kernels` that this decoder calls, to be compiled ahead."""
        return ()


def each(values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, act: Callable[[int, memoryview], None]) -> None:
    """Call `act` with the number and the bytes (not a copy) of each sample; its failures get their place."""
    view = values.data
    for number, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        try:
            act(number, view[start:end])
        except _FAILURES as error:
            raise located(error, where(number)) from error.__cause__


def located(error: FastloadError, where: str) -> FastloadError:
    """`error` with its place before it."""
    return type(error)(f"{where}: {error}")


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
