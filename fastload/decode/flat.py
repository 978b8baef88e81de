"""Arrays without a header: a member is its elements, one after the other, such as the tokens of a text.

The values of a batch lie end to end, so they are the batch: nothing is parsed, converted or copied where the dtype has
the machine's byte order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, located
from fastload.decode.npy import converted, declared_dtype, declared_shape
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged, unchecked

__all__ = ["Flat", "flat"]


@dataclass(frozen=True, slots=True)
class Flat(Decoder):
    """See `flat`. `stored` is the dtype in the members' byte order."""

    stored: np.dtype[Any]
    shape: tuple[int, ...] | None = None
    default: bytes | None = None  # as a member has it

    @property
    def _value_bytes(self) -> int:
        """The bytes of a value; where they differ, of an element."""
        return self.stored.itemsize * math.prod(self.shape or ())

    @property
    def is_in_place(self) -> bool:
        return True

    def missing(self) -> npt.NDArray[Any] | None:
        return None if self.default is None else self._decode(memoryview(self.default))

    def takes_missing(self) -> bool:
        return self.shape is None or self.default is not None

    def fixed(self) -> Fixed | None:
        return None if self.shape is None else (self.shape, self.stored.newbyteorder("="))

    def gives(self) -> tuple[Any, tuple[int, ...] | None]:
        return self.stored.newbyteorder("="), self.shape

    def _decode(self, value: memoryview) -> npt.NDArray[Any]:
        size, wanted = len(value), self._value_bytes
        if size != wanted if self.shape is not None else size % wanted:
            raise DecodeError(self._wrong_size(size))
        elements = self._elements(np.frombuffer(value, np.uint8).copy())
        array: npt.NDArray[Any] = elements.reshape(-1 if self.shape is None else self.shape)[()]  # of no axes: a number
        return array

    def _wrong_size(self, size: int) -> str:
        if self.shape is None:
            return (
                f"{size} bytes are no whole number of {self.stored} ({self.stored.itemsize} bytes each); give flat() "
                "the dtype that was written"
            )
        return (
            f"{size} bytes, and {self.stored}{list(self.shape)} takes {self._value_bytes}; give flat() the dtype and "
            "shape that were written, or no shape where lengths differ"
        )

    def _elements(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The elements of these bytes, over the same memory where it can be had as it is."""
        elements: npt.NDArray[Any]
        if self.stored.kind == "b":  # one that is neither 0 nor 1 breaks the code that gets it
            elements = data != 0
            return elements
        if not data.size or data.ctypes.data % self.stored.itemsize:
            data = data.copy()
        elements = data.view(self.stored).astype(self.stored.newbyteorder("="), copy=False)
        return elements

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert self.fixed() == (out.shape[1:], out.dtype), (self, out.shape, out.dtype)
        self._check(offsets, where)
        np.copyto(out, self._elements(values[offsets[0] : offsets[-1]]).reshape(out.shape))

    def decode(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged | npt.NDArray[Any]:
        return self.decode_owned(values[offsets[0] : offsets[-1]].copy(), offsets - offsets[0], where)

    def decode_owned(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged | npt.NDArray[Any]:
        self._check(offsets, where)
        elements = self._elements(values[: offsets[-1]])
        if self.shape is not None:
            return elements.reshape(len(offsets) - 1, *self.shape)
        return unchecked(elements, offsets // self._value_bytes, None, "array")

    def _check(self, offsets: Offsets, where: Where) -> None:
        """Raise `DecodeError` for the first value that has another size than was declared."""
        sizes, wanted = offsets[1:] - offsets[:-1], self._value_bytes
        is_wrong = sizes != wanted if self.shape is not None else sizes % wanted != 0
        if is_wrong.any():
            number = int(is_wrong.argmax())
            raise located(DecodeError(self._wrong_size(int(sizes[number]))), where(number))


def flat(dtype: npt.DTypeLike, shape: int | tuple[int, ...] | None = None, *, default: float | None = None) -> Decoder:
    """An array without a header, of numbers or booleans of `dtype`: its elements in C order, as `ndarray.tobytes` and
    `tofile` write them, in the byte order of `dtype` (`">f4"` is big-endian; without a sign, the machine's).

    With `shape`, an array of that shape a sample, a tensor (n, *shape) a batch. Without, one-dimensional arrays of
    their own lengths, a `fastload.Ragged` a batch. A member of another size is a `DecodeError`, and arguments that are
    no shape or number type are a `ConfigError`. `default`, a number that fills `shape`, stands for the value of samples
    that lack an optional column.
    """
    native = declared_dtype(dtype)
    if native is None:
        raise ConfigError('flat() needs the dtype of the elements, such as flat("uint16", 2048)')
    stored = np.dtype(dtype)
    made = Flat(stored, None if shape is None else declared_shape(shape))
    if made.shape is not None and not made._value_bytes:
        raise ConfigError(f"shape={shape!r} has no element")
    if default is None:
        return made
    if made.shape is None:
        raise ConfigError(f"default={default!r} needs shape=, which it fills")
    try:
        filled = np.full(made.shape, converted(np.asarray(default), native), stored)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"default={default!r} is no {native}: {error}") from error
    return Flat(stored, made.shape, filled.tobytes())
