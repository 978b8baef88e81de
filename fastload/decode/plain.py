"""Bytes, text and JSON, which are Python objects in the end, and numbers written as text.

JSON is read by msgspec, several times faster than the standard library and strict. What it refuses goes to
the standard library as well: `json.dumps` writes `NaN` and `Infinity`, which JSON does not know, and many
data sets hold such files.

Integers, such as the `cls` column of an image data set, are parsed a group at a time by one kernel.

Fractions, such as scores, are cast a group at a time by pyarrow, rounded as Python's `float` rounds. pyarrow takes 30
to 60 ns a value where Python takes 160 to 280, and holds no GIL. Python's `float` decides about what pyarrow refuses,
and about NaN, since pyarrow also takes `nan(1)`: a version that takes less is only slower.
"""

from __future__ import annotations

import json as json_module
import re
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, located
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.parse import parse_integers
from fastload.ragged import Ragged, unchecked

__all__ = ["Integer", "Json", "Number", "Raw", "Text", "integer", "json", "number", "raw", "text"]


@dataclass(frozen=True, slots=True)
class Raw(Decoder):
    """See `raw`."""

    default: bytes | None = None

    def gives(self) -> tuple[Any, tuple[int, ...] | None]:
        return bytes, None

    @property
    def is_in_place(self) -> bool:
        return True

    def missing(self) -> bytes | None:
        return self.default

    def _decode(self, value: memoryview) -> bytes:
        return bytes(value)

    def decode(self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None) -> Ragged:
        return Ragged(values[offsets[0] : offsets[-1]].copy(), offsets - offsets[0])

    def decode_owned(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged:
        return unchecked(values[: offsets[-1]], offsets)


@dataclass(frozen=True, slots=True)
class Text(Decoder):
    """See `text`."""

    encoding: str = "utf-8"
    default: str | None = None

    def gives(self) -> tuple[Any, tuple[int, ...] | None]:
        return str, None

    def missing(self) -> str | None:
        return self.default

    def __post_init__(self) -> None:
        try:
            "a".encode(self.encoding)
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f'encoding={self.encoding!r} is not a text encoding of Python; "utf-8" and "latin-1" are'
            ) from error

    def _decode(self, value: memoryview) -> str:
        try:
            return str(value, self.encoding)
        except UnicodeError as error:
            raise DecodeError(
                f"not {self.encoding} text ({error}); text(encoding=...) names another encoding, raw() gives the bytes"
            ) from error


@dataclass(frozen=True, slots=True)
class Json(Decoder):
    """See `json`. The default is kept as JSON, so that no two samples share it."""

    default: bytes | None = None

    def missing(self) -> Any:
        return None if self.default is None else self._decode(memoryview(self.default))

    def _decode(self, value: memoryview) -> Any:
        try:
            return msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return _standard_json(value)


def _standard_json(value: memoryview) -> Any:
    try:
        return json_module.loads(bytes(value))
    except RecursionError as error:
        raise DecodeError("JSON nested too deeply") from error
    except ValueError as error:  # includes UnicodeDecodeError
        raise DecodeError(f"not JSON: {error}; it starts with {bytes(value[:40])!r}") from error


def raw(*, default: bytes | None = None) -> Decoder:
    """The bytes as they are: `bytes` a sample, a `fastload.Ragged` a batch.

    `default` stands for the value of samples that lack an optional column. Without, it is None, and in a batch an empty
    item that `Ragged.present` tells from others.
    """
    if not isinstance(default, bytes | None):
        raise ConfigError(f"default={default!r} is not bytes")
    return Raw(default)


def text(encoding: str = "utf-8", *, default: str | None = None) -> Decoder:
    """Text: `str` a sample, a list a batch. Bytes that `encoding` does not know are a `DecodeError`.

    `default` stands for the value of samples that lack an optional column; without, it is None.
    """
    if not isinstance(default, str | None):
        raise ConfigError(f"default={default!r} is not a str")
    return Text(encoding, default)


def json(*, default: Any = None) -> Decoder:
    """JSON: what it holds (dict, list, number, ...) a sample, a list of these a batch.

    `default`, which JSON must be able to hold, stands for the value of samples that lack an optional column; each gets
    one of its own.
    """
    try:
        return Json(None if default is None else json_module.dumps(default).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"default={default!r} is nothing that JSON can hold: {error}") from error


@dataclass(frozen=True, slots=True)
class Integer(Decoder):
    """See `integer`."""

    default: int | None = None
    null: int | None = None

    def missing(self) -> int | None:
        return self.default

    def fixed(self) -> Fixed:
        return (), np.dtype(np.int64)

    def _decode(self, value: memoryview) -> int:
        if self.null is not None and value == _NULL:
            return self.null
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
        values, nulls = (values, _NONE) if self.null is None else _without_nulls(values, offsets)
        failed = parse_integers(values, offsets, out)
        if failed >= 0:
            value = values.data[offsets[failed] : offsets[failed + 1]]
            raise located(_not_an_integer(value), where(failed))
        if len(nulls):
            out[nulls] = self.null

    def kernel_modules(self) -> tuple[str, ...]:
        return ("parse",)


def _not_an_integer(value: memoryview) -> DecodeError:
    if re.fullmatch(rb"[+-]?[0-9]+", bytes(value).strip()):
        return DecodeError(f"{shown(value)} does not fit a 64-bit integer")
    return DecodeError(f"{shown(value)} is not a decimal integer{_of_null(value, 'integer')}")


_NULL, _NONE = b"null", np.empty(0, np.int64)


def _without_nulls(values: npt.NDArray[np.uint8], offsets: Offsets) -> tuple[npt.NDArray[np.uint8], Offsets]:
    """The values with a 0 in place of each null of JSON; and the numbers of these."""
    nulls = np.flatnonzero(np.diff(offsets) == len(_NULL))
    places = offsets[nulls, None] + np.arange(len(_NULL))
    is_null = (values[places] == np.frombuffer(_NULL, np.uint8)).all(axis=1)
    if not is_null.any():
        return values, _NONE
    values = values.copy()
    values[places[is_null]] = np.frombuffer(b"0   ", np.uint8)
    return values, nulls[is_null]


def _of_null(value: memoryview, decoder: str) -> str:
    """What to do where a value is a null of JSON."""
    return f"; say what stands for a null of JSON: decode.{decoder}(null=-1)" if value == _NULL else ""


def shown(value: memoryview) -> str:
    """A value for an error, which may be of any length."""
    return repr(bytes(value[:40])) + (f"... ({len(value)} bytes)" if len(value) > 40 else "")


def integer(default: int | None = None, *, null: int | None = None) -> Decoder:
    """A decimal integer as text, spaces around it allowed: `int` a sample, an int64 tensor a batch.

    Anything else, and what does not fit 64 bits, is a `DecodeError`. `default` stands for the value of samples that
    lack an optional column, `null` for a null of JSON.
    """
    return Integer(_checked_integer("default", default), _checked_integer("null", null))


def _checked_integer(name: str, value: int | None) -> int | None:
    try:
        return None if value is None else int(np.array(value.__index__(), np.int64))
    except (AttributeError, TypeError, OverflowError) as error:
        raise ConfigError(f"{name}={value!r} is not an integer of 64 bits") from error


_DTYPES = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Number(Decoder):
    """See `number`."""

    dtype: np.dtype[Any]
    default: float | None = None
    null: float | None = None

    def missing(self) -> float | None:
        return self.default

    def fixed(self) -> Fixed:
        return (), self.dtype

    def _decode(self, value: memoryview) -> float:
        found = self.null if self.null is not None and value == _NULL else _parsed(bytes(value))
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
        values, nulls = (values, _NONE) if self.null is None else _without_nulls(values, offsets)
        found = _cast(values, offsets)
        for item in np.flatnonzero(np.isnan(found)).tolist():
            value = values.data[offsets[item] : offsets[item + 1]]
            one = _parsed(bytes(value))
            if one is None:
                raise located(_not_a_number(value), where(item))
            found[item] = one
        if len(nulls):
            found[nulls] = self.null
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
    return DecodeError(f"{shown(value)} is not a decimal number{_of_null(value, 'number')}")


def number(dtype: npt.DTypeLike = "float64", *, default: float | None = None, null: float | None = None) -> Decoder:
    """A decimal number as text, such as `-12`, `0.5`, `1e-7`, `inf` or `nan`, spaces around it allowed: `float` a
    sample, a tensor of `dtype` (`"float64"` or `"float32"`) a batch.

    The value is that of Python's `float`, for `"float32"` rounded to that. Anything else is a `DecodeError`.
    `default` stands for the value of samples that lack an optional column, `null` for a null of JSON; `float("nan")` is
    one that can be told from others.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise ConfigError(f'dtype={dtype!r} is neither "float32" nor "float64"; integer() gives int64')
    standing: dict[str, float | None] = {}
    for name, value in (("default", default), ("null", null)):
        if value is not None and not isinstance(value, int | float | np.integer | np.floating):
            raise ConfigError(f"{name}={value!r} is not a number")
        with np.errstate(over="ignore"):
            standing[name] = None if value is None else float(np.array(value, found))
    return Number(found.newbyteorder("="), **standing)
