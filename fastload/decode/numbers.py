"""Fractions written as text, such as scores: parsed a group at a time by one kernel, rounded as Python's `float`
rounds.

The kernel leaves undecided what has more than 19 digits and lies just between two floats; that goes to Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, located
from fastload.decode.integers import shown
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.floats import MALFORMED, parse_floats, powers_of_five

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
        out = np.empty(1, self.dtype)
        if self._parse(np.frombuffer(value, np.uint8), np.array([0, len(value)]), out) >= 0:
            raise _not_a_number(value)
        return float(out[0])

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert self.fixed() == (out.shape[1:], out.dtype), (out.shape, out.dtype)
        failed = self._parse(values, offsets, out)
        if failed >= 0:
            raise located(_not_a_number(values.data[offsets[failed] : offsets[failed + 1]]), where(failed))

    def _parse(self, values: npt.NDArray[np.uint8], offsets: Offsets, out: npt.NDArray[Any]) -> int:
        """The number of the first that is none, or -1."""
        floats = out if self.dtype == np.float64 else np.empty(len(out), np.float64)
        bits, stopped, item = floats.view(np.uint64), np.empty(1, np.int64), 0
        while (item := parse_floats(values, offsets, powers_of_five(), item, bits, stopped)) >= 0:
            if stopped[0] == MALFORMED:
                return item
            floats[item] = float(bytes(values.data[offsets[item] : offsets[item + 1]]))
            item += 1
        if floats is not out:
            with np.errstate(over="ignore"):  # infinite, as it should be
                np.copyto(out, floats, casting="same_kind")
        return -1

    def kernel_modules(self) -> tuple[str, ...]:
        return ("floats",)


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
