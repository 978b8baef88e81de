"""TFRecord, the files of TensorFlow: records, each with checks of its length and of its data.

    u64     length of the data
    u32     check of the length
    bytes   the data
    u32     check of the data

All integers are little-endian. A check is the CRC-32C of the bytes, turned right by 15 bits, plus 0xA282EAD8. Where the
records are is found by reading all of a file once, and both checks are made then.

The data is mostly an `Example`, a message of protocol buffers that holds features by name, each a list of bytes, floats
or integers; the layout says which there are (see `fastload.kernels.examples`). The first record that is not empty
decides: if it is no Example, then records are columns of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.decode.flat import Flat
from fastload.errors import DecodeError, ShardError
from fastload.formats.indexers import WholeIndexer
from fastload.formats.mds import Several
from fastload.formats.record_index import RecordIndex, shard_name
from fastload.formats.records import Bytes, Fill, Int64s, RecordReader, Where, copy_out, layout_of, number_of
from fastload.kernels import examples
from fastload.kernels.crc import CRC32C, tables_of

WHOLE = "bytes"
"""The column that has all of a record, where records are no Examples."""

_KINDS = {"bytes": examples.BYTES, "float32": examples.FLOATS, "int64": examples.INTEGERS}
_NAMES = {number: name for name, number in _KINDS.items()}
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
_Count = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]

_RECORD_BYTES_MAX = (1 << 31) - 1  # as protocol buffers have it
# More features, or longer names, are more than a layout holds.
_FEATURES_MAX, _NAME_BYTES_MAX = 4096, 1 << 18
_AT_ONCE = 1 << 14

_PACKED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


class TfRecordIndexer(WholeIndexer):
    """Makes the index of one file from all of its bytes. Used by one thread."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(url, size)
        self._open = bytearray()  # the record that goes on beyond what was read, as far as it was
        self._starts: list[Int64s] = []
        self._sizes: list[Int64s] = []
        self._features: _Features | None = None
        self._is_raw = False

    def _read(self, chunk: NDArray[np.uint8], start: int) -> None:
        at = 0
        while self._open and at < len(chunk):
            more = chunk[at : at + self._open_bytes() - len(self._open)]
            self._open += more.data
            at += len(more)
            if self._walk(np.frombuffer(self._open, np.uint8), start + at - len(self._open)):
                self._open = bytearray()
        if at < len(chunk):
            at += self._walk(chunk[at:], start + at)
            self._open = bytearray(chunk[at:].data)

    def _open_bytes(self) -> int:
        """How many bytes the open record takes, or its head, where that is not there yet; it has been checked."""
        if len(self._open) < examples.HEAD_BYTES:
            return examples.HEAD_BYTES
        return examples.HEAD_BYTES + int.from_bytes(self._open[:8], "little") + examples.TAIL_BYTES

    def _walk(self, data: NDArray[np.uint8], start: int) -> int:
        """Note the records that lie in `data` as a whole, which begins at `start` in the object; where they end."""
        tables = tables_of(CRC32C)
        state = np.zeros(2, np.int64)
        found = _AT_ONCE
        while found == _AT_ONCE:
            starts, sizes = np.empty((2, _AT_ONCE), np.int64)
            found = examples.find_framed(data, self._size - start, _RECORD_BYTES_MAX, tables, state, starts, sizes)
            starts, sizes = starts[:found].copy(), sizes[:found].copy()
            self._note(data, starts, sizes, start)
            self._starts.append(starts + start)
            self._sizes.append(sizes)
        at = int(state[0])
        if state[1]:
            raise ShardError(self._damage(int(state[1]), data[at : at + 8].tobytes(), start + at))
        return at

    def _damage(self, what: int, head: bytes, at: int) -> str:
        number = sum(map(len, self._starts))
        place = f"{self._url}: record {number}, at byte {at},"
        size = int.from_bytes(head, "little")
        if what == examples.LENGTH and number == 0 and head[:2] in _PACKED:
            return (
                f"{self._url} is compressed with {_PACKED[head[:2]]}, and its name does not say so; gzip is read "
                "where it ends in .gz; write it so, or without compression"
            )
        if what == examples.LENGTH:
            return (
                f"{place} has a length ({size}) that its check says is wrong: the file is damaged, or no TFRecord; "
                "write it again, or name another format"
            )
        if what == examples.DATA:
            return f"{place} has data that its check says is wrong: the file is damaged; upload it again"
        if what == examples.CUT:
            return f"{place} has {size} bytes, and the file ends at {self._size}: it was cut short; upload it again"
        return f"{place} has {size} bytes, above {_RECORD_BYTES_MAX}; write it in smaller records"

    def _note(self, data: NDArray[np.uint8], starts: Int64s, sizes: Int64s, offset: int) -> None:
        """Look at the messages in these records."""
        if self._features is None and not self._is_raw:
            first = np.flatnonzero(sizes)[:1]
            if not len(first):
                return
            features = _Features()
            is_example = features.note(data, starts[first], sizes[first]) < 0 and features.count > 0
            self._is_raw = not is_example and features.wrong != examples.FULL
            self._features = None if self._is_raw else _Features()
        if self._features is None:
            return
        wrong = self._features.note(data, starts, sizes)
        if wrong >= 0:
            number = sum(map(len, self._starts)) + wrong
            raise ShardError(
                f"{self._url}: record {number}, at byte {offset + starts[wrong]}, {self._features.error()}"
            )

    def finish(self) -> RecordIndex:
        """The index. ShardError: the file ends within a record, or names of features are no text."""
        if self._open:
            at = self._size - len(self._open)
            raise ShardError(
                f"{self._url}: its last {len(self._open)} bytes, from {at} on, are no record: it was cut short; upload "
                "it again"
            )
        none = np.empty(0, np.int64)
        starts, sizes = np.concatenate([none, *self._starts]), np.concatenate([none, *self._sizes])
        columns: object = WHOLE
        if not self._is_raw:
            try:
                columns = [] if self._features is None else self._features.columns()
            except UnicodeDecodeError as error:
                raise ShardError(
                    f"{self._url}: a feature has the name {error.object!r}, which is no UTF-8; write it again"
                ) from error
        layout = layout_of("tfrecord", {"columns": columns})
        return RecordIndex(layout, starts, sizes.astype(np.uint32), self._size, shard_name(self._url))


class _Features:
    """Which features there are in messages."""

    def __init__(self) -> None:
        self._state = np.zeros(3, np.int64)
        self._names = np.empty(_NAME_BYTES_MAX, np.uint8)
        self._name_offsets = np.zeros(_FEATURES_MAX + 1, np.int64)
        self._kinds, self._counts = np.empty((2, _FEATURES_MAX), np.int64)

    def note(self, data: NDArray[np.uint8], starts: Int64s, sizes: Int64s) -> int:
        """Those of these messages; -1, or the number of one that cannot be."""
        return int(
            examples.note_features(
                data, starts, sizes, self._state, self._names, self._name_offsets, self._kinds, self._counts
            )
        )

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._state[0])

    @property
    def wrong(self) -> int:
        """What is wrong with the message that `note` ended at."""
        return int(self._state[1])

    def error(self) -> str:
        """The same in words."""
        if self.wrong == examples.MIXED:
            number = int(self._state[2])
            name, kind = str(self._name(number), errors="backslashreplace"), _NAMES[int(self._kinds[number])]
            return f"has values of another kind in {name[:100]!r}, which is {kind} in those before; write them alike"
        if self.wrong == examples.FULL:
            return (
                f"has yet other features: more than {_FEATURES_MAX}, or of names longer than {_NAME_BYTES_MAX} bytes "
                "together; put what differs from record to record into a value"
            )
        return "is no Example, as those before are; write Examples alone, or read these from files of their own"

    def columns(self) -> list[list[object]]:
        """Name, kind and count (-1: it differs) of each, by name. UnicodeDecodeError."""
        found = [
            [self._name(number).decode(), _NAMES[int(self._kinds[number])], int(self._counts[number])]
            for number in range(self.count)
        ]
        return sorted(found)

    def _name(self, number: int) -> bytes:
        start, end = self._name_offsets[number : number + 2]
        return self._names[start:end].tobytes()


@dataclass(frozen=True, slots=True)
class TfRecordReader:
    """Reads Examples, or records as they are; see `records.RecordReader`."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    is_raw: bool = False

    sizes = None

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> TfRecordReader:
        """From the description that indexes hold. ShardError for one that makes no sense."""
        columns = fields.get("columns")
        if set(fields) == {"columns"} and columns == WHOLE:
            return cls((WHOLE,), ("bytes",), (1,), is_raw=True)
        try:
            found = msgspec.convert(columns, list[tuple[str, Literal["bytes", "float32", "int64"], _Count]])
        except msgspec.ValidationError as error:
            raise ShardError(f"its records are described by what is no description ({error})") from error
        if set(fields) != {"columns"} or len({name for name, _, _ in found}) < len(found):
            raise ShardError(f"its records are described by {str(fields)[:100]}, which makes no sense")
        return cls(
            tuple(name for name, _, _ in found), tuple(kind for _, kind, _ in found), tuple(n for *_, n in found)
        )

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        return "a whole record" if self.is_raw else self.kinds[number_of(self.columns, column)]

    def decoder(self, column: str) -> Decoder:
        number = number_of(self.columns, column)
        kind, count = self.kinds[number], self.counts[number]
        if kind == "bytes":
            return decode.raw() if count == 1 else Several(decode.raw())
        return Flat(_DTYPES[kind], None if count < 0 else () if count == 1 else (count,))

    def find(
        self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where
    ) -> Fill | None:
        if self.is_raw:
            places[0], places[1] = offsets[:-1], np.diff(offsets)
            return None
        numbers = [number_of(self.columns, column) for column in columns]
        kinds = [_KINDS[self.kinds[number]] for number in numbers]
        singles = [kind == examples.BYTES and self.counts[at] == 1 for kind, at in zip(kinds, numbers, strict=True)]
        names = [self.columns[number].encode() for number in numbers]
        name_offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
        text = np.frombuffer(b"".join(names), np.uint8)
        place, size, counts, totals = np.empty((4, *places.shape[1:]), np.int64)
        wrong = examples.find_features(
            records, offsets, text, name_offsets, np.array(kinds, np.int64), np.array(singles, np.int64),
            place, size, counts, totals,
        )  # fmt: skip
        if wrong >= 0:
            raise DecodeError(
                f"{where(wrong)}: its {offsets[wrong + 1] - offsets[wrong]} bytes are no Example with these features, "
                f"of these kinds: {dict(zip(self.columns, self.kinds, strict=True))}; write the file again"
            )
        places[0] = place
        for row, (kind, is_single) in enumerate(zip(kinds, singles, strict=True)):
            is_there = place[row] >= 0
            if is_single:
                places[1, row] = size[row]
            elif kind == examples.BYTES:
                places[1, row] = np.where(is_there, 4 * (1 + counts[row]) + totals[row], 0)
            else:
                places[1, row] = counts[row] * _DTYPES[_NAMES[kind]].itemsize

        def fill(out_offset: Int64s, outs: Sequence[Bytes]) -> None:
            alone = [row for row, is_single in enumerate(singles) if is_single]
            if alone:
                copy_out(records, place[alone], size[alone], out_offset[alone], [outs[row] for row in alone])
            for row, kind in enumerate(kinds):
                if not singles[row]:
                    odd = examples.copy_lists(records, place[row], size[row], kind, out_offset[row], outs[row])
                    assert odd < 0, f"the values of record {odd} take other room than was found"

        return fill

    def joined(self, other: RecordReader) -> bytes | None:
        """A feature that only one has may be lacking, and one of as many values in each record may be of any number;
        but kinds have to be the same.
        """
        if not isinstance(other, TfRecordReader):
            return None
        if not self.columns or not other.columns or self.is_raw or other.is_raw:
            return (self if other == _EMPTY else other)._layout() if _EMPTY in (self, other) else None
        found = {
            name: (name, kind, count) for name, kind, count in zip(self.columns, self.kinds, self.counts, strict=True)
        }
        for name, kind, count in zip(other.columns, other.kinds, other.counts, strict=True):
            _, mine, number = found.get(name, (name, kind, count))
            if mine != kind:
                return None
            found[name] = name, kind, number if number == count else -1
        names, kinds, counts = zip(*sorted(found.values()), strict=True)
        return TfRecordReader(names, kinds, counts)._layout()

    def _layout(self) -> bytes:
        columns = [list(column) for column in zip(self.columns, self.kinds, self.counts, strict=True)]
        return layout_of("tfrecord", {"columns": WHOLE if self.is_raw else columns})


_EMPTY = TfRecordReader((), (), ())
"""Of a file in which no record says anything."""
