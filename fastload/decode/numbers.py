"""Fractions written as text, such as scores: cast a group at a time by pyarrow, rounded as Python's `float` rounds.

pyarrow takes 30 to 60 ns a value where Python takes 160 to 280, and holds no GIL. Python's `float` decides about
what pyarrow refuses, and about NaN, since pyarrow also takes `nan(1)`: a version that takes less is only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, located
from fastload.decode.integers import shown
from fastload.errors import ConfigError, DecodeError

__all__ = ["Number", "number"]

_DTYPES = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Number(Decoder):
    """See `number`."""

    dtype: np.dtype[Any]
    default: float | None = None

    def missing(self) -> float | None:
        return self.default

    def fixed(self) -> Fixed:
        return (), self.dtype

    def _decode(self, value: memoryview) -> float:
        found = _parsed(bytes(value))
        if found is None:
            raise _not_a_number(value)
        with np.errstate(over="ignore"):  # infinite, as it should be
            return float(self.dtype.type(found))

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert self.fixed() == (out.shape[1:], out.dtype), (out.shape, out.dtype)
        found = _cast(values, offsets)
        for item in np.flatnonzero(np.isnan(found)).tolist():
            value = values.data[offsets[item] : offsets[item + 1]]
            one = _parsed(bytes(value))
            if one is None:
                raise located(_not_a_number(value), where(item))
            found[item] = one
        with np.errstate(over="ignore"):
            np.copyto(out, found, casting="same_kind")


def _cast(values: npt.NDArray[np.uint8], offsets: Offsets) -> npt.NDArray[np.float64]:
    """All items as pyarrow reads them; nothing but NaN where it refuses one of them."""
    import pyarrow as pa  # takes a quarter of a second to import, which only such columns cost
    import pyarrow.compute as pc

    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
    texts = pa.Array.from_buffers(pa.large_utf8(), len(offsets) - 1, buffers)
    try:
        floats = pc.cast(pc.ascii_trim_whitespace(texts), pa.float64())
    except pa.ArrowInvalid:
        return np.full(len(texts), np.nan)
    found: npt.NDArray[np.float64] = floats.to_numpy(zero_copy_only=False, writable=True)
    return found


def _parsed(value: bytes) -> float | None:
    """One item: what Python's `float` makes of it, without underscores; None where it is no number."""
    try:
        return None if b"_" in value else float(value)
    except ValueError:
        return None


def _not_a_number(value: memoryview) -> DecodeError:
    return DecodeError(f"{shown(value)} is not a decimal number")


def number(dtype: npt.DTypeLike = "float64", *, default: float | None = None) -> Decoder:
    """A decimal number as text, such as `-12`, `0.5`, `1e-7`, `inf` or `nan`, spaces around it allowed: `float` a
    sample, a tensor of `dtype` (`"float64"` or `"float32"`) a batch.

    The value is that of Python's `float`, for `"float32"` rounded to that. Anything else is a `DecodeError`.
    `default` stands for the value of samples that lack an optional column; `float("nan")` is one that can be told from
    others.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise ConfigError(f'dtype={dtype!r} is neither "float32" nor "float64"; integer() gives int64')
    if default is not None and not isinstance(default, int | float | np.integer | np.floating):
        raise ConfigError(f"default={default!r} is not a number")
    with np.errstate(over="ignore"):
        return Number(found.newbyteorder("="), None if default is None else float(np.array(default, found)))
