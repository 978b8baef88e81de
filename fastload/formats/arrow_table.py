"""Tables of Arrow within a shard (IPC, as a file or as a stream): where the bytes of each value lie, and what they are.

Arrow keeps the values of a column end to end, so numbers, texts and lists of numbers are pieces of the shard as they
are, and so are the members of structs, which are columns by their path. A boolean is a bit, which no piece is: its
place is a byte of the shard that is zero, or one that is not. Lists of anything else have several pieces
(`arrow_nested`). What is compressed is not read. pyarrow reads the table once, when the shard is indexed, and checks
all of it.
"""

from __future__ import annotations

import functools
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
from fastload.formats.arrow_nested import NUMBERS, NestedList, checked, in_words, merged, number, suffixes, tree
from fastload.formats.record_index import shard_name
from fastload.formats.records import Bytes, Fill, Int64s, RecordReader, TableReader, Where, layout_of, number_of
from fastload.formats.table_index import TableIndex

_LIST, _NESTED, _PIECE, _NOT_READ = "list of ", "nested: ", "piece", "not read: "
_EMPTY = _LIST + "null"  # of which all are empty
_FILE_MAGIC = b"ARROW1"
_COLUMNS_MAX = 4096


_Piece = tuple[str, tuple[Int64s, Int64s]]
"""A piece of a column: its suffix, and of each row where it lies and its size."""


@dataclass(frozen=True)
class ArrowReader(TableReader):
    """What the columns of a table hold; see `records.RecordReader`."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]

    sizes = None  # it has no records

    @property
    def stored(self) -> tuple[str, ...]:
        return self.names

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name, kind in zip(self.stored, self.kinds, strict=True) if kind != _PIECE)

    def parts(self, column: str) -> tuple[str, ...]:
        name, kind = self._stored(column)
        if not kind.startswith(_NESTED):
            return (name,)
        return tuple(_piece(name, suffix) for suffix in suffixes(_root(kind)))

    def _stored(self, column: str) -> tuple[str, str]:
        name = self.columns[number_of(self.columns, column)]
        return name, self.kinds[self.stored.index(name)]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> ArrowReader:
        """From the description that indexes hold. ShardError for one that makes no sense."""
        try:
            columns = msgspec.convert(fields.get("columns"), list[tuple[str, str]])
        except msgspec.ValidationError as error:
            raise ShardError(f"its columns are described by what is no description ({error})") from error
        known = {"bytes", "text", "bool", "null", _EMPTY, _PIECE, *NUMBERS, *(_LIST + each for each in NUMBERS)}
        odd = next((kind for _, kind in columns if kind not in known and not _is_known(kind)), None)
        if set(fields) != {"columns"} or odd is not None or len({name for name, _ in columns}) < len(columns):
            raise ShardError(f"its columns are described by {str(fields)[:100]}, which makes no sense")
        return cls(tuple(name for name, _ in columns), tuple(kind for _, kind in columns))

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        kind = self._stored(column)[1]
        return in_words(_root(kind)) if kind.startswith(_NESTED) else kind

    def decoder(self, column: str) -> Decoder:
        _, kind = self._stored(column)
        if kind.startswith(_NOT_READ):
            raise ConfigError(
                f"column {column!r} is {kind.removeprefix(_NOT_READ)}, which fastload does not read; leave it out "
                "(columns=[...]), or write it as numbers, text, or lists and dicts of these"
            )
        if kind.startswith(_NESTED) or kind == _EMPTY:
            return NestedList(msgspec.json.encode(_root(kind)))
        if kind in ("bytes", "text", "null"):
            return decode.raw() if kind == "bytes" else decode.text()
        if kind == "bool":
            return Flat(np.dtype("?"), ())
        return Flat(np.dtype(kind.removeprefix(_LIST)).newbyteorder("<"), None if kind.startswith(_LIST) else ())

    def joined(self, other: RecordReader) -> bytes | None:
        """A column that only one has, or that has no value in one, is lacking there."""
        if not isinstance(other, ArrowReader):
            return None
        found = dict(zip(self.stored, self.kinds, strict=True))
        for name, kind in zip(other.stored, other.kinds, strict=True):
            both = _of_both(found.setdefault(name, kind), kind)
            if both is None:
                return None
            found[name] = both
        return layout_of("arrow", {"columns": [list(column) for column in found.items()]})

    def find(
        self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where
    ) -> Fill | None:
        raise AssertionError("values of a table are gathered one by one")


def _of_both(one: str, other: str) -> str | None:
    """The kind of columns of both; None where there is none."""
    if one == other:
        return one
    lists = _LIST, _NESTED
    for first, second in ((one, other), (other, one)):
        if first == "null" or (first == _EMPTY and second.startswith(lists)):
            return second
    not_read = next((kind for kind in (one, other) if kind.startswith(_NOT_READ)), None)
    if not_read is not None:
        return not_read
    roots = [_root(kind) for kind in (one, other)]
    if None in roots:
        return None
    for at, kind in enumerate((one, other)):
        if kind.startswith(_LIST):  # it has no offsets, which might be large
            roots[at] = [roots[1 - at][0], roots[at][1]]
    both = merged(*roots)
    if both is None:
        return None
    # Plain numbers of which none is null are as they are among those of which some are.
    is_plain = all(kind.startswith(_LIST) for kind in (one, other)) and both[1] in NUMBERS
    return _LIST + both[1] if is_plain else _NESTED + msgspec.json.encode(both).decode()


def _root(kind: str) -> Any:
    """The tree of a list's kind; None for others."""
    if kind.startswith(_LIST):
        return ["list", kind.removeprefix(_LIST)]
    return msgspec.json.decode(kind.removeprefix(_NESTED)) if kind.startswith(_NESTED) else None


def _is_known(kind: str) -> bool:
    """Of the kinds that say more. Versions that read no nested lists said so of them: what they found is of no use."""
    if kind.startswith(_NOT_READ):
        return not kind.removeprefix(_NOT_READ).startswith(("list<", "large_list<"))
    try:
        root = _root(kind) if kind.startswith(_NESTED) else None
    except (msgspec.DecodeError, RecursionError):
        return False
    return isinstance(root, list) and checked(root) and root[0] in ("list", "large list")


def _piece(column: str, suffix: str) -> str:
    return f"{column}\0{suffix}" if suffix else column


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
            both = _of_both(kinds.setdefault(path, kind), kind)
            assert both is not None, f"{path}: {kinds[path]} and {kind} in one table"
            kinds[path] = both
    if len(kinds) > _COLUMNS_MAX:
        raise ShardError(f"{url}: its table has {len(kinds)} columns, above {_COLUMNS_MAX}")
    layout = layout_of("arrow", {"columns": [list(column) for column in kinds.items()]})
    offsets, sizes = np.empty((len(kinds), rows), np.int64), np.empty((len(kinds), rows), np.uint32)
    places_of = [{path: place for path, _, *place in table} for table in tables]
    for row, path in enumerate(kinds):
        found_at = [
            each.get(path, (np.full(batch.num_rows, -1), np.zeros(batch.num_rows)))
            for each, batch in zip(places_of, batches, strict=True)
        ]
        offsets[row] = np.concatenate([offset for offset, _ in found_at])
        sizes[row] = np.concatenate([size for _, size in found_at])
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
            for field in range(kind.num_fields):
                yield from self.of(f"{path}/{kind.field(field).name}", array.field(field), is_null)
            return
        rows = np.arange(array.offset, array.offset + count, dtype=np.int64)
        name = str(kind)
        if pa.types.is_null(kind):
            yield self._column(path, "null", rows, rows, is_null)
        elif pa.types.is_boolean(kind):
            is_true = array.fill_null(False).to_numpy(zero_copy_only=False)
            at = np.where(is_true, self.object_size - 8, self.object_size - 1)
            yield self._column(path, "bool", at, np.ones(count, np.int64), is_null)
        elif number(kind):
            width = kind.bit_width // 8
            at = self._at(array.buffers()[1], (array.offset + count) * width) + rows * width
            yield self._column(path, number(kind), at, np.full(count, width), is_null)
        elif any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string)):
            yield self._column(path, "text", *self._pieces(array, 1, array.buffers()[2], "large" in name), is_null)
        elif any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
            yield self._column(path, "bytes", *self._pieces(array, 1, array.buffers()[2], "large" in name), is_null)
        elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            yield self._column(path, _NOT_READ + name, rows, rows, np.ones(count, np.bool_))
        elif number(kind.value_type) and not array.values.null_count and not array.values.offset:
            width = kind.value_type.bit_width // 8
            at, size = self._pieces(array, width, array.values.buffers()[1], pa.types.is_large_list(kind))
            yield self._column(path, _LIST + number(kind.value_type), at, size, is_null)
        elif pa.types.is_null(kind.value_type) and not len(array.values):
            yield self._column(path, _EMPTY, np.full(count, self.start), np.zeros(count, np.int64), is_null)
        else:
            yield from self._nested(path, array, is_null)

    def _nested(
        self, path: str, array: Any, is_null: NDArray[np.bool_]
    ) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.int64]]]:
        """The pieces of a column of lists."""
        root, rows = tree(array.type), np.arange(len(array), dtype=np.int64)
        if root is None or not _is_from_start(array):
            kind = f"a {array.type}".replace("_", " ")  # which earlier versions did not call it
            yield self._column(path, _NOT_READ + kind, rows, rows, np.ones(len(array), np.bool_))
            return
        found = dict(self._of_list(array, "", rows, rows + 1))
        found[""] = found.pop("[]=" if root[1] in NUMBERS else "#")
        if root[1] in NUMBERS:
            found["#"] = self._offsets(array, rows, rows + 1)
        for suffix, (at, size) in found.items():
            kind = _PIECE if suffix else _NESTED + msgspec.json.encode(root).decode()
            yield self._column(_piece(path, suffix), kind, at, size, is_null)

    def _of_list(self, array: Any, path: str, begin: Int64s, end: Int64s) -> Iterator[_Piece]:
        """The pieces of values from `begin` up to `end` of an array of lists, one range a row, but for their bits."""
        yield f"{path}#", self._offsets(array, begin, end)
        ends = _offsets_of(array)
        is_any = end > begin
        first, last = (np.where(is_any, ends[np.where(is_any, at, 0)], 0) for at in (begin, end))
        yield from self._of_values(array.values, f"{path}[]", first, last)

    def _of_values(self, array: Any, path: str, begin: Int64s, end: Int64s) -> Iterator[_Piece]:
        import pyarrow as pa

        kind, count = array.type, len(array)
        if array.null_count and not pa.types.is_null(kind):
            yield f"{path}?", self._bits(array.buffers()[0], count, begin, end)
        if pa.types.is_struct(kind):
            for number_of_field in range(kind.num_fields):
                field = array.field(number_of_field)
                yield from self._of_values(field, f"{path}.{kind.field(number_of_field).name}", begin, end)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            yield from self._of_list(array, path, begin, end)
        elif pa.types.is_boolean(kind):
            yield f"{path}=", self._bits(array.buffers()[1], count, begin, end)
        elif number(kind):
            width = kind.bit_width // 8
            yield f"{path}=", (self._at(array.buffers()[1], count * width) + begin * width, (end - begin) * width)
        elif not pa.types.is_null(kind):
            yield f"{path}#", self._offsets(array, begin, end)
            ends = _offsets_of(array)
            is_any = end > begin
            first, last = (np.where(is_any, ends[np.where(is_any, at, 0)], 0) for at in (begin, end))
            yield f"{path}=", (self._at(array.buffers()[2], int(ends[-1])) + first, last - first)

    def _offsets(self, array: Any, begin: Int64s, end: Int64s) -> tuple[Int64s, Int64s]:
        """Of the offsets of such values."""
        width, count = _offset_bytes(array), len(array)
        at = self._at(array.buffers()[1], (count + 1) * width if count else 0)
        return at + begin * width, np.where(end > begin, (end - begin + 1) * width, 0)

    def _bits(self, buffer: Any, count: int, begin: Int64s, end: Int64s) -> tuple[Int64s, Int64s]:
        at = self._at(buffer, (count + 7) // 8)
        return at + begin // 8, np.where(end > begin, (end + 7) // 8 - begin // 8, 0)

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


def _offset_bytes(array: Any) -> int:
    return 8 if str(array.type).startswith("large_") else 4


def _offsets_of(array: Any) -> Int64s:
    """The offsets of an array of lists or texts."""
    if not len(array):
        return np.zeros(1, np.int64)
    return np.frombuffer(array.buffers()[1], f"<i{_offset_bytes(array)}", len(array) + 1).astype(np.int64)


def _is_from_start(array: Any) -> bool:
    """Whether arrays begin where their buffers do, as all do that are read from a shard."""
    import pyarrow as pa

    kind = array.type
    inner = [array.values] if pa.types.is_list(kind) or pa.types.is_large_list(kind) else []
    if pa.types.is_struct(kind):
        inner = [array.field(number) for number in range(kind.num_fields)]
    return array.offset == 0 and all(map(_is_from_start, inner))
