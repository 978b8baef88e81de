"""The shards of MosaicML's streaming that are text (`streaming/base/format/json` and `xsv`): JSON, CSV, TSV and those
of other separators.

A sample is a line. Lines end in `newline`, the last one, too; where there is a `separator`, the first line names the
columns, and values are the text between separators, of which none is quoted: the writer refuses values that hold one.
All this is said by the folder's index. Where lines begin is found by reading a shard once, as of JSON lines; the files
beside the shards that say it as well (`.meta`) are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.errors import DecodeError, ShardError
from fastload.formats.indexers import WholeIndexer
from fastload.formats.jsonl import find_values
from fastload.formats.record_index import RecordIndex, shard_name
from fastload.formats.records import Bytes, Int64s, RecordReader, Where, layout_of, number_of, read_layout

_COLUMNS_MAX = 4096
_LINE_BYTES_MAX = (1 << 32) - 1
_DECODERS: dict[str, Callable[[], Decoder]] = {"str": decode.text, "int": decode.integer, "float": decode.number}


class LinesIndexer(WholeIndexer):
    """Makes the index of one shard from all of its bytes. Used by one thread."""

    def __init__(self, url: str, size: int, layout: bytes) -> None:
        super().__init__(url, size)
        reader = LinesReader.of(read_layout(layout)[1])
        self._layout, self._newline, self._head = layout, reader.newline, reader.head
        self._begin = b""  # the first bytes, as many as the head has
        self._rest = b""  # the last bytes that were read, where a newline may have begun
        self._ends: list[NDArray[np.int64]] = []

    def _read(self, chunk: NDArray[np.uint8], start: int) -> None:
        if len(self._begin) < len(self._head):
            self._begin += chunk[: len(self._head) - len(self._begin)].tobytes()
        if len(self._newline) == 1:
            self._ends.append(np.flatnonzero(chunk == self._newline[0]) + start + 1)
        else:
            data, first = self._rest + chunk.tobytes(), start - len(self._rest)
            ends = [found.end() for found in re.finditer(re.escape(self._newline), data)]
            self._ends.append(first + np.array(ends, np.int64))
            self._rest = data[max(ends[-1] if ends else 0, len(data) - len(self._newline) + 1) :]

    def finish(self) -> RecordIndex:
        """The index. ShardError: it is none of these shards, or was cut short."""
        if self._begin != self._head:
            raise ShardError(
                f"{self._url} begins with {self._begin[:60]!r}, and its columns are {self._head[:60]!r}: it is another "
                "one; upload it and its index again"
            )
        ends = np.concatenate([np.empty(0, np.int64), *self._ends])
        ends = np.concatenate([[len(self._head)], ends[ends > len(self._head)]])
        if ends[-1] != self._size:
            raise ShardError(
                f"{self._url} has {self._size} bytes, and its last line ends at {ends[-1]}: it was cut short; upload "
                "it again"
            )
        sizes = np.diff(ends) - len(self._newline)
        if len(sizes) and sizes.max() > _LINE_BYTES_MAX:
            start = ends[sizes.argmax()]
            raise ShardError(f"{self._url}: the line at byte {start} has {sizes.max()} bytes, above 4 GiB")
        return RecordIndex(self._layout, ends[:-1].copy(), sizes.astype(np.uint32), self._size, shard_name(self._url))


@dataclass(frozen=True, slots=True)
class LinesReader:
    """Reads lines of one set of columns; see `records.RecordReader`. `separator` is None where a line is JSON."""

    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    separator: bytes | None
    newline: bytes

    sizes = None

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> LinesReader:
        """From the description that indexes hold. ShardError where it is none."""
        try:
            columns = msgspec.convert(fields.get("columns"), list[tuple[str, str]])
            separator = msgspec.convert(fields.get("separator"), str | None)
            newline = msgspec.convert(fields.get("newline"), str)
        except msgspec.ValidationError as error:
            raise ShardError(f"its columns are described by what is no description ({error})") from error
        names = [name for name, _ in columns]
        for name, encoding in columns:
            if encoding not in _DECODERS:
                raise ShardError(f"column {name!r} has the encoding {encoding!r}; lines have {sorted(_DECODERS)}")
        if len(columns) > _COLUMNS_MAX or len(set(names)) < len(names):
            twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
            raise ShardError(f"it has {len(names)} columns, above {_COLUMNS_MAX}, or one twice: {twice!r}")
        if not newline or separator == "" or (separator is not None and (separator in newline or newline in separator)):
            raise ShardError(
                f"its lines end in {newline!r}, and its values in {separator!r}: they cannot be told apart"
            )
        try:
            ends = newline.encode(), None if separator is None else separator.encode()
            "".join(names).encode()
        except UnicodeEncodeError as error:
            raise ShardError(f"its columns are described by what is no text ({error})") from error
        return cls(tuple(names), tuple(encoding for _, encoding in columns), ends[1], ends[0])

    @property
    def head(self) -> bytes:
        """The first line, which names the columns; none of JSON."""
        if self.separator is None:
            return b""
        return self.separator.join(name.encode() for name in self.columns) + self.newline

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        return f"{self.encodings[number_of(self.columns, column)]} as {'JSON' if self.separator is None else 'text'}"

    def decoder(self, column: str) -> Decoder:
        encoding = self.encodings[number_of(self.columns, column)]
        return decode.json() if encoding == "str" and self.separator is None else _DECODERS[encoding]()

    def joined(self, other: RecordReader) -> bytes | None:
        return None

    def find(self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where) -> None:
        numbers = [number_of(self.columns, column) for column in columns]
        if self.separator is None:
            find_values(records, offsets, [self.columns[number] for number in numbers], places, where)
            return
        begins, ends = self._values(records, offsets, self.separator, where)
        places[0], places[1] = begins.T[numbers], (ends - begins).T[numbers]

    def _values(self, records: Bytes, offsets: Int64s, separator: bytes, where: Where) -> tuple[Int64s, Int64s]:
        """Where values begin and end, both int64[n, columns]."""
        count, inner = len(offsets) - 1, len(self.columns) - 1
        if len(separator) == 1:
            at = np.flatnonzero(records == separator[0])
            counts = np.diff(np.searchsorted(at, offsets))
        else:  # as str.split, record by record: a separator may overlap with itself
            data, found = records.tobytes(), re.compile(re.escape(separator))
            each = [[hit.start() for hit in found.finditer(data, *ends)] for ends in _pairs(offsets)]
            at, counts = (
                np.array([hit for hits in each for hit in hits], np.int64),
                np.array([*map(len, each)], np.int64),
            )
        if (counts != inner).any():
            wrong = int((counts != inner).argmax())
            raise DecodeError(
                f"{where(wrong)}: it has {counts[wrong] + 1} values where there are {inner + 1} columns: it is "
                "damaged; write the shard again"
            )
        separators = at.reshape(count, inner)
        begins = np.column_stack([offsets[:-1], separators + len(separator)])
        return begins, np.column_stack([separators, offsets[1:]])


def _pairs(offsets: Int64s) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def lines_layout(columns: Sequence[tuple[str, str]], separator: str | None, newline: str) -> bytes:
    """The stored form of a layout. ShardError for one that makes no sense."""
    fields = {"columns": [list(column) for column in columns], "separator": separator, "newline": newline}
    LinesReader.of(fields)
    return layout_of("lines", fields)
