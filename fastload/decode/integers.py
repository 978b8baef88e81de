"""Integers written as text, such as the `cls` column of an image data set: parsed a group at a time by one
kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, located
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.parse import parse_integers

__all__ = ["Integer", "integer"]


@dataclass(frozen=True, slots=True)
class Integer(Decoder):
    """See `integer`."""

    default: int | None = None

    def missing(self) -> int | None:
        return self.default

    def fixed(self) -> Fixed:
        return (), np.dtype(np.int64)

    def _decode(self, value: memoryview) -> int:
        out = np.empty(1, np.int64)
        if parse_integers(np.frombuffer(value, np.uint8), np.array([0, len(value)]), out) >= 0:
            raise _not_an_integer(value)
        return int(out[0])

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert self.fixed() == (out.shape[1:], out.dtype), (out.shape, out.dtype)
        failed = parse_integers(values, offsets, out)
        if failed >= 0:
            value = values.data[offsets[failed] : offsets[failed + 1]]
            raise located(_not_an_integer(value), where(failed))

    def kernel_modules(self) -> tuple[str, ...]:
        return ("parse",)


def _not_an_integer(value: memoryview) -> DecodeError:
    if re.fullmatch(rb"[+-]?[0-9]+", bytes(value).strip()):
        return DecodeError(f"{shown(value)} does not fit a 64-bit integer")
    return DecodeError(f"{shown(value)} is not a decimal integer")


def shown(value: memoryview) -> str:
    """A value for an error, which may be of any length."""
    return repr(bytes(value[:40])) + (f"... ({len(value)} bytes)" if len(value) > 40 else "")


def integer(default: int | None = None) -> Decoder:
    """A decimal integer as text, spaces around it allowed: `int` a sample, an int64 tensor a batch.

    Anything else, and what does not fit 64 bits, is a `DecodeError`. `default` stands for the value of samples that
    lack an optional column.
    """
    if default is None:
        return Integer()
    try:
        return Integer(int(np.array(default.__index__(), np.int64)))
    except (AttributeError, TypeError, OverflowError) as error:
        raise ConfigError(f"default={default!r} is not an integer of 64 bits") from error
