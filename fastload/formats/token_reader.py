"""What a sample of tokens has: the tokens, and of each its position, document and mode where these are known."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload.decode import Decoder
from fastload.decode.base import Fixed, Keys, Offsets
from fastload.decode.base import Where as WhereOf
from fastload.decode.flat import Flat
from fastload.errors import DecodeError, ShardError
from fastload.formats.records import Bytes, Int64s, PartReader, RecordReader, Where, layout_of
from fastload.kernels.tokens import MODE, POSITION, SEGMENT, fill_from_parts, fill_from_text, pad_rows
from fastload.ragged import Ragged, unchecked

TOKENS = "tokens"
_OF_EACH = {"position": POSITION, "segment": SEGMENT, "mode": MODE}


class _Layout(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`dtype` with its byte order. `length` of a sample, None where they vary; `pad` where some are padded, `end` where
    that token ends a document. `parts` are the columns that say how a sample is put together.
    """

    dtype: str
    length: int | None = None
    pad: int | float | None = None
    end: int | None = None
    parts: tuple[str, ...] = ()


def token_layout(
    dtype: np.dtype[Any],
    length: int | None = None,
    *,
    pad: float | None = None,
    end: int | None = None,
    parts: tuple[str, ...] = (),
) -> bytes:
    """The stored form of a layout."""
    layout = _Layout(dtype.str, length, pad, end, parts)
    return layout_of("tokens", msgspec.structs.asdict(layout))


@dataclass(frozen=True, slots=True)
class TokenReader(PartReader):
    """Reads sequences of one layout; see `records.RecordReader`."""

    layout: _Layout

    sizes = None

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> TokenReader:
        """From the description that indexes hold. ShardError where it is none."""
        try:
            return cls(msgspec.convert(fields, _Layout))
        except msgspec.ValidationError as error:
            raise ShardError(f"its tokens are described by what is no description ({error})") from error

    @property
    def whole(self) -> str:
        return TOKENS

    @property
    def of_parts(self) -> tuple[str, ...]:
        return self.layout.parts

    @property
    def columns(self) -> tuple[str, ...]:
        more = self.layout.parts if self.layout.end is None else ("position", "segment")
        return (TOKENS, *more)

    def may_have(self, column: str) -> bool:
        return column.lower() in self.columns

    def kind(self, column: str) -> str:
        dtype = np.dtype(self.layout.dtype) if column.lower() == TOKENS else "int32"
        return f"{dtype}[{'' if self.layout.length is None else self.layout.length}]"

    def decoder(self, column: str) -> Decoder:
        return _decoder(self.layout, column.lower())

    def joined(self, other: RecordReader) -> bytes | None:
        return None

    def find(self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where) -> None:
        """What is found in the tokens is found in all of them."""
        places[0], places[1] = offsets[:-1], np.diff(offsets)


@functools.lru_cache(maxsize=64)  # each batch asks
def _decoder(layout: _Layout, column: str) -> Decoder:
    dtype = np.dtype(layout.dtype)
    if column != TOKENS:
        if layout.end is not None:
            assert layout.length is not None, "windows have a length"
            return OfText(_OF_EACH[column], np.array(layout.end, dtype).tobytes(), layout.length)
        return OfParts(_OF_EACH[column], dtype.itemsize, layout.length)
    if layout.pad is not None:
        assert layout.length is not None, "what is padded has a length"
        return Padded(dtype, layout.length, np.array(layout.pad, dtype).tobytes())
    return Flat(dtype, None if layout.length is None else (layout.length,))


@dataclass(frozen=True, slots=True)
class Padded(Decoder):
    """Rows of `length` tokens, of which a value may have fewer; `pad` is what follows these, as it is stored."""

    stored: np.dtype[Any]
    length: int
    pad: bytes

    def fixed(self) -> Fixed:
        return (self.length,), self.stored.newbyteorder("=")

    def kernel_modules(self) -> tuple[str, ...]:
        return ("tokens",)

    def _decode(self, value: memoryview) -> NDArray[Any]:
        return _one(self, value)

    def decode_into(
        self, values: Bytes, offsets: Offsets, out: NDArray[Any], where: WhereOf, keys: Keys | None = None
    ) -> None:
        rows = out.view(np.uint8).reshape(-1)
        row_bytes = self.length * self.stored.itemsize
        wrong = pad_rows(values, offsets, np.frombuffer(self.pad, np.uint8), row_bytes, rows)
        if wrong >= 0:
            size = offsets[wrong + 1] - offsets[wrong]
            raise DecodeError(f"{where(wrong)}: {size} bytes, above the {row_bytes} of {self.length} {self.stored}")
        if not self.stored.isnative:
            out.byteswap(inplace=True)


class _OfEach(Decoder):
    """An int32 for each token."""

    def kernel_modules(self) -> tuple[str, ...]:
        return ("tokens",)

    def _decode(self, value: memoryview) -> NDArray[Any]:
        return _one(self, value)


@dataclass(frozen=True, slots=True)
class OfParts(_OfEach):
    """One of the columns that follow from a sample's parts: a value is bytes and tag (int64) of each part."""

    what: int
    item_bytes: int
    length: int | None

    def fixed(self) -> Fixed | None:
        return None if self.length is None else ((self.length,), np.dtype(np.int32))

    def decode_into(
        self, values: Bytes, offsets: Offsets, out: NDArray[Any], where: WhereOf, keys: Keys | None = None
    ) -> None:
        assert self.length is not None, "rows of one length"
        parts = values[offsets[0] : offsets[-1]].copy().view(np.int64)
        row_start = np.arange(len(offsets), dtype=np.int64) * self.length
        self._fill(parts, (offsets - offsets[0]) // 16, row_start, out.reshape(-1), where)

    def decode(
        self, values: Bytes, offsets: Offsets, where: WhereOf, keys: Keys | None = None
    ) -> Ragged | list[Any] | NDArray[Any]:
        if self.length is not None:
            return super(_OfEach, self).decode(values, offsets, where, keys)
        parts, part_start = values[offsets[0] : offsets[-1]].copy().view(np.int64), (offsets - offsets[0]) // 16
        row_start = np.concatenate([[0], np.cumsum(parts[::2] // self.item_bytes)])[part_start]
        out = np.empty(int(row_start[-1]), np.int32)
        self._fill(parts, part_start, row_start, out, where)
        return unchecked(out, row_start, None, "array")

    def _fill(self, parts: Int64s, part_start: Int64s, row_start: Int64s, rows: NDArray[Any], where: WhereOf) -> None:
        wrong = fill_from_parts(parts, part_start, self.what, self.item_bytes, row_start, rows)
        if wrong >= 0:
            raise DecodeError(f"{where(wrong)}: its parts have more tokens than its row")


@dataclass(frozen=True, slots=True)
class OfText(_OfEach):
    """The same where a token, as it is stored, ends a document; a value is the tokens."""

    what: int
    end: bytes
    length: int

    def fixed(self) -> Fixed:
        return (self.length,), np.dtype(np.int32)

    def decode_into(
        self, values: Bytes, offsets: Offsets, out: NDArray[Any], where: WhereOf, keys: Keys | None = None
    ) -> None:
        text = values[offsets[0] : offsets[-1]]
        done = fill_from_text(text, np.frombuffer(self.end, np.uint8), self.length, self.what, out.reshape(-1))
        assert done == out.size, f"{done} of {out.size} tokens"


def _one(decoder: Decoder, value: memoryview) -> NDArray[Any]:
    """A sample by itself, as a row of a batch."""
    values, offsets = np.frombuffer(value, np.uint8), np.array([0, len(value)], np.int64)
    decoded = decoder.decode(values, offsets, lambda _: "by itself")
    return np.array(decoded.values if isinstance(decoded, Ragged) else decoded[0])
