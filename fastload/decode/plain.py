"""Bytes, text and JSON: columns that are Python objects in the end.

JSON is read by msgspec, several times faster than the standard library and strict. What it refuses goes to
the standard library as well: `json.dumps` writes `NaN` and `Infinity`, which JSON does not know, and many
data sets hold such files.
"""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Keys, Offsets, Where
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged, unchecked

__all__ = ["Json", "Raw", "Text", "json", "raw", "text"]


@dataclass(frozen=True, slots=True)
class Raw(Decoder):
    """See `raw`."""

    default: bytes | None = None

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
