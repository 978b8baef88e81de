"""Records: samples whose columns are found by reading the record, after its bytes were gathered.

A format of records has a `RecordReader` a layout. It says which columns there are and what decodes each, and finds the
values of the columns in gathered records (`find`); `split` copies them out, a column at a time, into memory of the
batch. Nothing is a Python object a sample.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload.decode import Decoder
from fastload.errors import DecodeError, ShardError
from fastload.kernels.gather import gather_columns
from fastload.kernels.records import find_sized

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]
Where = Callable[[int], str]
Fill = Callable[[Int64s, Sequence[Bytes]], None]
"""Writes the values of each column to its `out`, value i from `out_offset[column, i]` on."""


class RecordReader(Protocol):
    """Reads records of one layout. Immutable; used by any number of threads."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a sample where the user names none, in the order in which they are stored."""
        ...

    def may_have(self, column: str) -> bool:
        """Whether some record may have a column of this name, whatever its case."""
        ...

    def kind(self, column: str) -> str:
        """How the values of a column are stored, in words."""
        ...

    def decoder(self, column: str) -> Decoder:
        """What makes of a value what the format's own reader gives."""
        ...

    def joined(self, other: RecordReader) -> bytes | None:
        """The layout of records of both, which differ; None where they cannot be read together."""
        ...

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Of records that begin with the sizes (u32) of the columns of varying size and then hold all columns, one
        after the other: the size of each column, -1 where it varies. None for other records.
        """
        ...

    def find(
        self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where
    ) -> Fill | None:
        """Where the values of these columns lie in `records`, of which number i is from `offsets[i]` up to
        `offsets[i + 1]`: write to `places`, int64[2, columns, n], offset and size of each, -1 and 0 for a column that a
        record lacks.

        Where values do not lie there as they are wanted, it returns what makes them; then sizes are those of what that
        makes, and an offset says no more than whether there is a value.

        DecodeError, with `where(i)` before it, for a record that is none of this layout.
        """
        ...


@runtime_checkable
class LooseReader(RecordReader, Protocol):
    """A `RecordReader` of records of which each has columns of its own."""

    def columns_of(self, record: bytes) -> list[str]:
        """Those of one, for a message."""
        ...


class PartReader(ABC):
    """A `RecordReader` with a column, `whole`, whose values are the records: they are gathered straight to their place.

    Records may be put together of parts (see `PackedIndex`). `of_parts` are the columns that say how: a value of these
    is the bytes and the tag, both int64, of each part of the record.
    """

    @property
    @abstractmethod
    def whole(self) -> str: ...

    @property
    @abstractmethod
    def of_parts(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Pickled(Decoder):
    """A pickle, which may run any code when it is read: only where the user allows that."""

    def _decode(self, value: memoryview) -> Any:
        try:
            return pickle.loads(value)
        except Exception as error:  # what is in it decides what that is
            raise DecodeError(f"{len(value)} bytes are no pickle that can be read: {error!r}") from error


class TableReader(ABC):
    """A `RecordReader` of tables, of which values are gathered one by one (see `TableIndex`), so that it finds nothing
    in records. A value that is null is not there.
    """

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def stored(self) -> tuple[str, ...]:
        """What an index calls the places that it has, some of which are pieces of columns."""
        ...

    @abstractmethod
    def parts(self, column: str) -> tuple[str, ...]:
        """The pieces of a column, as an index calls them. A value of several is the size (u32) of each, and these."""
        ...


def layout_of(format_name: str, fields: Mapping[str, object]) -> bytes:
    """The stored form of a layout; equal layouts are equal bytes."""
    return msgspec.json.encode({"format": format_name, **fields}, order="sorted")


def read_layout(layout: bytes) -> tuple[str, dict[str, object]]:
    """The format's name and the fields that `layout_of` was given; ShardError for what is no layout."""
    try:
        fields = msgspec.json.decode(layout, type=dict[str, object])
        return str(fields.pop("format")), fields
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise ShardError(f"its records are described by what is no description ({error})") from error


def number_of(columns: Sequence[str], name: str) -> int:
    """Which column is meant: the one of this name, or else the first that is, whatever its case; -1: none."""
    if name in columns:
        return columns.index(name)
    lower = name.lower()
    return next((number for number, each in enumerate(columns) if each.lower() == lower), -1)


def find_by_heads(
    heads: Bytes,
    head_offset: Int64s,
    record_bytes: Int64s,
    sizes: Sequence[int],
    numbers: Sequence[int],
    places: Int64s,
    where: Where,
) -> None:
    """Where the columns of these numbers lie in records of so many bytes, from the beginning of each, written to
    `places` as `RecordReader.find` says. Record i begins at `head_offset[i]` of `heads`; `sizes` as
    `RecordReader.sizes` says.
    """
    wanted = np.full(len(sizes), -1, np.int64)
    wanted[list(numbers)] = np.arange(len(numbers))
    wrong = find_sized(heads, head_offset, record_bytes, np.array(sizes, np.int64), wanted, places[0], places[1])
    if wrong >= 0:
        raise DecodeError(
            f"{where(wrong)}: its {record_bytes[wrong]} bytes are not what the sizes of its columns say: it is "
            "damaged; write the shard again"
        )


def find_by_sizes(
    records: Bytes, offsets: Int64s, sizes: Sequence[int], numbers: Sequence[int], places: Int64s, where: Where
) -> None:
    """`RecordReader.find`, of the columns of these numbers, for records that begin with sizes as `RecordReader.sizes`
    says.
    """
    starts = np.ascontiguousarray(offsets[:-1])
    find_by_heads(records, starts, np.diff(offsets), sizes, numbers, places, where)
    places[0] += starts


def split(
    read: RecordReader,
    records: Bytes,
    offsets: Int64s,
    columns: Sequence[str],
    take: Callable[[str, int], Bytes],
    where: Where,
) -> tuple[dict[str, tuple[Bytes, Int64s]], NDArray[np.bool_]]:
    """The values of each of these columns, end to end in memory that `take(column, byte_count)` gives, and their
    offsets;
    and which there are, bool[columns, n].
    """
    count = len(offsets) - 1
    places = np.empty((2, len(columns), count), np.int64)
    fill = read.find(records, offsets, columns, places, where)
    out_offset = np.zeros((len(columns), count + 1), np.int64)
    np.cumsum(places[1], axis=1, out=out_offset[:, 1:])
    outs = [take(name, total) for name, total in zip(columns, out_offset[:, -1].tolist(), strict=True)]
    if count and len(columns):
        if fill is None:
            copy_out(records, places[0], places[1], out_offset, outs)
        else:
            fill(out_offset, outs)
    return dict(zip(columns, zip(outs, out_offset, strict=True), strict=True)), places[0] >= 0


def copy_out(records: Bytes, offset: Int64s, size: Int64s, out_offset: Int64s, outs: Sequence[Bytes]) -> None:
    """Copy values of columns, int64[columns, n], from where they lie in `records` (-1: nowhere) to each column's `out`,
    value i to `out_offset[column, i]`.
    """
    # The records lie in one piece, which is to this kernel an arena of one chunk.
    first_chunk = np.zeros_like(size)
    chunk_offset, chunk_bytes = np.zeros(1, np.int64), max(1, len(records))
    copied = gather_columns(records, chunk_offset, chunk_bytes, first_chunk, offset.clip(0), size, out_offset, outs)
    assert copied == out_offset[:, -1].sum(), f"copied {copied} bytes of {out_offset[:, -1].tolist()}"
