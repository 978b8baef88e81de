"""Tables of Arrow within a shard (IPC, as a file or as a stream): where the bytes of each value lie, and what they are.

Arrow keeps the values of a column end to end, so numbers, texts and lists of numbers are pieces of the shard as they
are, and so are the members of structs, which are columns by their path. A boolean is a bit, which no piece is: its
place is a byte of the shard that is zero, or one that is not. Lists of anything else are not read, nor what is
compressed. pyarrow reads the table once, when the shard is indexed, and checks all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.decode.flat import Flat
from fastload.errors import ConfigError, ShardError
from fastload.formats.record_index import shard_name
from fastload.formats.records import Bytes, Fill, Int64s, RecordReader, TableReader, Where, layout_of, number_of
from fastload.formats.table_index import TableIndex

_NUMBERS = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
_LIST, _NOT_READ = "list of ", "not read: "
_FILE_MAGIC = b"ARROW1"
_COLUMNS_MAX = 4096


@dataclass(frozen=True)
class ArrowReader(TableReader):
    """What the columns of a table hold; see `records.RecordReader`."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]

    sizes = None  # it has no records

    @property
    def columns(self) -> tuple[str, ...]:
        return self.names

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> ArrowReader:
        """From the description that indexes hold. ShardError for one that makes no sense."""
        try:
            columns = msgspec.convert(fields.get("columns"), list[tuple[str, str]])
        except msgspec.ValidationError as error:
            raise ShardError(f"its columns are described by what is no description ({error})") from error
        known = {"bytes", "text", "bool", "null", *_NUMBERS, *(_LIST + each for each in _NUMBERS)}
        odd = next((kind for _, kind in columns if kind not in known and not kind.startswith(_NOT_READ)), None)
        if set(fields) != {"columns"} or odd is not None or len({name for name, _ in columns}) < len(columns):
            raise ShardError(f"its columns are described by {str(fields)[:100]}, which makes no sense")
        return cls(tuple(name for name, _ in columns), tuple(kind for _, kind in columns))

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        return self.kinds[number_of(self.columns, column)]

    def decoder(self, column: str) -> Decoder:
        kind = self.kind(column)
        if kind.startswith(_NOT_READ):
            raise ConfigError(
                f"column {column!r} is {kind.removeprefix(_NOT_READ)}, which fastload does not read yet; leave it out "
                "(columns=[...])"
            )
        if kind in ("bytes", "text", "null"):
            return decode.raw() if kind == "bytes" else decode.text()
        if kind == "bool":
            return Flat(np.dtype("?"), ())
        return Flat(np.dtype(kind.removeprefix(_LIST)).newbyteorder("<"), None if kind.startswith(_LIST) else ())

    def joined(self, other: RecordReader) -> bytes | None:
        """A column that only one has, or that has no value in one, is lacking there."""
        if not isinstance(other, ArrowReader):
            return None
        found = dict(zip(self.columns, self.kinds, strict=True))
        for name, kind in zip(other.columns, other.kinds, strict=True):
            if found.setdefault(name, kind) == "null":
                found[name] = kind
            elif kind not in (found[name], "null"):
                return None
        return layout_of("arrow", {"columns": [list(column) for column in found.items()]})

    def find(
        self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where
    ) -> Fill | None:
        raise AssertionError("values of a table are gathered one by one")


def index_of_table(data: memoryview, start: int, end: int, url: str, rows: int) -> TableIndex:
    """The index of the shard `data`, which has `rows` rows in a table of Arrow in `data[start:end]`. ShardError.

    A byte that is zero has to lie at the end of `data`, and another before the eight last.
    """
    import pyarrow as pa  # takes a quarter of a second to import

    try:
        with _read(data, start, end) as reader:
            batches = list(reader) if isinstance(reader, pa.RecordBatchStreamReader) else _of_file(reader)
            schema = reader.schema
        for batch in batches:
            batch.validate(full=True)
        places = _Places(pa.py_buffer(data).address, start, end, len(data), url)
        tables = [
            [column for field, array in zip(schema, batch.columns, strict=True)
             for column in places.of(field.name, array, np.zeros(len(array), np.bool_))]
            for batch in batches
        ]  # fmt: skip
    except ShardError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"{url}: its table, at byte {start}, cannot be read ({error}): it is damaged") from error
    found = sum(batch.num_rows for batch in batches)
    if found != rows:
        raise ShardError(f"{url}: its table has {found} rows where its head says {rows}: it is damaged; write it again")
    kinds: dict[str, str] = {}
    for table in tables:
        if len({path for path, *_ in table}) < len(table):
            twice = Counter(path for path, *_ in table).most_common(1)[0][0]
            raise ShardError(f"{url}: its table has the column {twice!r} twice; give them different names")
        for path, kind, _, _ in table:
            # Whether a list has numbers that are null is known only from its values.
            if kinds.setdefault(path, kind) != kind and not kinds[path].startswith(_NOT_READ):
                kinds[path] = kind
    if len(kinds) > _COLUMNS_MAX:
        raise ShardError(f"{url}: its table has {len(kinds)} columns, above {_COLUMNS_MAX}")
    layout = layout_of("arrow", {"columns": [list(column) for column in kinds.items()]})
    offsets, sizes = np.empty((len(kinds), rows), np.int64), np.empty((len(kinds), rows), np.uint32)
    for number, columns in enumerate(zip(*tables, strict=True)):
        offsets[number] = np.concatenate([offset for _, _, offset, _ in columns])
        sizes[number] = np.concatenate([size for _, _, _, size in columns])
    return TableIndex(layout, tuple(kinds), offsets, sizes, len(data), shard_name(url))


def _read(data: memoryview, start: int, end: int) -> Any:
    """A reader of the table, whose arrays lie in `data`."""
    import pyarrow as pa

    part = pa.py_buffer(data).slice(start, end - start)
    is_file = bytes(data[start : start + len(_FILE_MAGIC)]) == _FILE_MAGIC
    return pa.ipc.open_file(part) if is_file else pa.ipc.open_stream(part)


def _of_file(reader: Any) -> list[Any]:
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


@dataclass(frozen=True, slots=True)
class _Places:
    """Finds where values lie in the shard, whose bytes begin at `address`."""

    address: int
    start: int
    end: int
    object_size: int
    url: str

    def of(
        self, path: str, array: Any, is_null: NDArray[np.bool_]
    ) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.int64]]]:
        """The columns that an array of Arrow is: path, kind, and offset and size of each value. `is_null`: rows that
        have none, whatever is in the array.
        """
        import pyarrow as pa

        kind, count = array.type, len(array)
        is_null = is_null | array.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_struct(kind):
            for number in range(kind.num_fields):
                yield from self.of(f"{path}/{kind.field(number).name}", array.field(number), is_null)
            return
        rows = np.arange(array.offset, array.offset + count, dtype=np.int64)
        name = str(kind)
        if pa.types.is_null(kind):
            yield self._column(path, "null", rows, rows, is_null)
        elif pa.types.is_boolean(kind):
            is_true = array.fill_null(False).to_numpy(zero_copy_only=False)
            at = np.where(is_true, self.object_size - 8, self.object_size - 1)
            yield self._column(path, "bool", at, np.ones(count, np.int64), is_null)
        elif _number(kind):
            width = kind.bit_width // 8
            at = self._at(array.buffers()[1], (array.offset + count) * width) + rows * width
            yield self._column(path, _number(kind), at, np.full(count, width), is_null)
        elif any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string)):
            yield self._column(path, "text", *self._pieces(array, 1, array.buffers()[2], "large" in name), is_null)
        elif any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
            yield self._column(path, "bytes", *self._pieces(array, 1, array.buffers()[2], "large" in name), is_null)
        elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _number(kind.value_type):
            values = array.values
            if values.null_count or values.offset:
                yield self._column(path, f"{_NOT_READ}{name} with nulls", rows, rows, np.ones(count, np.bool_))
                return
            width = kind.value_type.bit_width // 8
            at, size = self._pieces(array, width, values.buffers()[1], pa.types.is_large_list(kind))
            yield self._column(path, _LIST + _number(kind.value_type), at, size, is_null)
        else:
            yield self._column(path, _NOT_READ + name, rows, rows, np.ones(count, np.bool_))

    def _pieces(
        self, array: Any, width: int, values: Any, is_large: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offset and size of values that lie between offsets, in elements of `width` bytes."""
        count = len(array)
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        dtype = np.dtype("<i8" if is_large else "<i4")
        ends = np.frombuffer(array.buffers()[1], dtype, count + 1, array.offset * dtype.itemsize).astype(np.int64)
        return self._at(values, int(ends[-1]) * width) + ends[:-1] * width, np.diff(ends) * width

    def _at(self, buffer: Any, byte_count: int) -> int:
        """Where a buffer begins in the shard; it has so many bytes that are used."""
        if not byte_count:
            return self.start
        at = buffer.address - self.address
        if not self.start <= at <= at + byte_count <= self.end:
            raise ShardError(
                f"{self.url}: its table is compressed, which fastload does not read yet; write it without compression"
            )
        return int(at)

    def _column(
        self, path: str, kind: str, at: NDArray[np.int64], size: NDArray[np.int64], is_null: NDArray[np.bool_]
    ) -> tuple[str, str, NDArray[np.int64], NDArray[np.int64]]:
        return path, kind, np.where(is_null, -1, at), np.where(is_null, 0, size)


def _number(kind: Any) -> str:
    """The dtype of a type of numbers; empty for others."""
    name = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return name if name in _NUMBERS else ""
