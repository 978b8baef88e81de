"""`make fuzz`: damaged files of records through what indexes them, finds their columns and decodes these. See `fuzzing`
for how.

    python -m tests.formats.fuzz_records --seconds 120

What must hold, whatever the bytes: an error of the kind that the reader documents, with the name of the object or the
place in it; or records that lie in the object, and values that are those of a reader in plain Python.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from fastload import unpacker
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats import (
    RecordIndex,
    StoredIndex,
    StridedIndex,
    TableIndex,
    described,
    indexer_for,
    jsonl,
    listed_shards,
    litdata,
    mds,
    mds_lines,
    pieces,
    record_reader,
    records,
    stored_index,
    tfrecord,
    tokens,
    zstd,
)
from fastload.formats.pieces import in_pieces
from fastload.formats.records import layout_of, read_layout, split
from fastload.store.packing import FRAMES, TABLE, packing_of
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from tests.formats import fuzzing, protobuf, test_arrow_table, test_mds, token_writer
from tests.formats.fuzz_readers import changed
from tests.formats.packing import PACK, framed, twice

URL = "s3://bucket/shard"


@contextmanager
def guarding(rng: random.Random, module: Any, **limits: int) -> Iterator[None]:
    """All arrays that a module makes are guarded, and it has these limits."""
    numpy: Any = fuzzing.Guarding(rng)
    kept = {name: getattr(module, name) for name in limits}
    try:
        module.np = records.np = numpy
        for name, limit in limits.items():
            setattr(module, name, limit)
        yield
    finally:
        module.np = records.np = np
        for name, limit in kept.items():
            setattr(module, name, limit)


def guarded_bytes(data: bytes, at_end: bool) -> npt.NDArray[np.uint8]:
    array = fuzzing.guarded(len(data), np.uint8, at_end)
    array[:] = np.frombuffer(data, np.uint8)
    return array


def index_of(indexer: Any, data: bytes, rng: random.Random) -> StoredIndex | str:
    """The index or the error of a shard that comes in pieces."""
    step, at_end = rng.choice([1 if len(data) < 200 else 31, 64, 1000, 1 << 16]), rng.random() < 0.7
    try:
        for start in range(0, len(data), step):
            if indexer.done:
                break
            indexer.feed(guarded_bytes(data[start : start + step], at_end), start)
        assert indexer.done, f"byte {indexer.next_offset} is said to be needed of {len(data)}"
        index: StoredIndex = indexer.finish()
    except ShardError as error:
        assert str(error).startswith(indexer._url), error  # noqa: PT017
        return str(error)
    assert stored_index(index.to_bytes(), indexer._url, len(data)) == index
    return index


def values_of(index: RecordIndex, data: bytes, rng: random.Random) -> dict[str, list[Any]] | str:
    """The values of all columns, None where a record lacks one; or the error."""
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    pieces = [data[start : start + size] for start, size in places]
    assert sum(map(len, pieces)) == int(index.size.sum()), "a record that leaves the object"
    reader = record_reader(index.layout)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    at_end = rng.random() < 0.7

    def take(name: str, count: int) -> npt.NDArray[np.uint8]:
        return fuzzing.guarded(count, np.uint8, at_end)

    try:
        found, is_there = split(
            reader,
            guarded_bytes(b"".join(pieces), at_end),
            offsets,
            reader.columns,
            take,
            lambda number: f"at {number}",
        )
    except DecodeError as error:
        assert str(error).startswith("at "), error  # noqa: PT017
        return str(error)
    made: dict[str, list[Any]] = {}
    for name, there in zip(reader.columns, is_there, strict=True):
        decoder, (values, ends) = reader.decoder(name), found[name]
        made[name] = []
        for (start, end), has in zip(pairwise(ends.tolist()), there.tolist(), strict=True):
            try:
                made[name].append(decoder.decode_one(values[start:end].data, "here") if has else None)
            except DecodeError as error:
                assert str(error).startswith("here: "), error  # noqa: PT017
                made[name].append(error)
    return made


# TFRecord.


def make_tfrecord(rng: random.Random) -> bytes:
    """A file of a few records, whose messages are damaged behind their checks, or which is damaged anywhere."""
    messages = []
    for _ in range(rng.choice([0, 1, 2, 5])):
        numbers = [rng.getrandbits(64) >> rng.randrange(64) for _ in range(rng.choice([0, 1, 2, 9]))]
        pieces = [rng.randbytes(rng.choice([0, 1, 200])) for _ in range(rng.choice([1, 1, 3]))]
        message = protobuf.example(rng, n=numbers, f=[rng.random() for _ in range(rng.choice([1, 4]))], b=pieces)
        if rng.random() < 0.05:
            message = rng.randbytes(rng.randrange(30))
        messages.append(changed(message, rng) if rng.random() < 0.4 else message)
    data = protobuf.tfrecord(messages)
    return changed(data, rng) if rng.random() < 0.3 else data


def check_tfrecord(data: bytes, rng: random.Random) -> None:
    """Indexed and read, it is what plain Python makes of it."""
    limits = {"_AT_ONCE": rng.choice([1, 2, 100]), "_FEATURES_MAX": rng.choice([2, 50, 50])}
    with guarding(rng, tfrecord, **limits, _NAME_BYTES_MAX=rng.choice([1, 100, 100])):
        index = index_of(tfrecord.TfRecordIndexer(URL, len(data)), data, rng)
        if isinstance(index, str):
            refused = re.search(r"at byte (\d+), is no Example", index)
            if refused:
                start = int(refused[1])
                check_refused(data[start : start + int.from_bytes(data[start - 12 : start - 4], "little")])
            return
        made = values_of(index, data, rng)
    assert isinstance(made, dict), f"what could be indexed cannot be read: {made}"
    if list(made) == [tfrecord.WHOLE]:
        return
    for number, (start, size) in enumerate(zip(index.offset.tolist(), index.size.tolist(), strict=True)):
        expected = protobuf.parse(data[start : start + size])
        for name, values in made.items():
            assert as_list(values[number]) == as_list(expected.get(name.encode(), (0, None))[1]), (name, number)


def check_refused(message: bytes) -> None:
    """It is no Example."""
    try:
        found = protobuf.parse(message)
    except ValueError:
        return
    raise AssertionError(f"{message!r} is refused, and is {found}")


def as_list(values: Any) -> bytes | None:
    """Values to compare, also those that are not equal to themselves."""
    if values is None or isinstance(values, list):
        return repr([np.float32(each) if isinstance(each, float) else each for each in values or ()]).encode()
    return as_list([values] if isinstance(values, bytes) else np.atleast_1d(values).tolist())


# Tables of Arrow in LitData's chunks.


def make_table(rng: random.Random) -> bytes:
    """A chunk of a few rows, as a file or a stream, that is damaged mostly in what describes it."""
    rows = [{name: rng.choice(values) for name, values in _VALUES.items()} for _ in range(rng.choice([1, 2, 9]))]
    whole = pa.Table.from_pylist(rows, schema=_SCHEMA)
    sink, is_file = pa.BufferOutputStream(), rng.random() < 0.7
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, None, None, "zstd", "lz4"]))
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, whole.schema, options=options) as writer:
        writer.write_table(whole, max_chunksize=rng.choice([1, 4]))
    ipc: bytes = sink.getvalue().to_pybytes()
    head = struct.pack(f"<{len(rows) + 2}I", len(rows), *[8 + 4 * len(rows)] * (len(rows) + 1))
    if rng.random() < 0.8:
        ipc = changed(ipc, rng, rng.choice([0, 0, max(0, len(ipc) - 700)]))
    data = head + ipc + struct.pack("<I", len(ipc)) + b"LDARW01\0"
    return changed(data, rng) if rng.random() < 0.2 else data


_VALUES: dict[str, list[Any]] = {
    "n": [None, 0, -5, 1 << 40], "t": [None, "", "text", "é" * 40], "r": [b"", b"x" * 9], "b": [None, True, False],
    "ns": [None, [], [1, 2, 3]], "s": [None, {"x": 1.5, "y": "s"}, {"x": None, "y": ""}],
    "words": [["a", None], [], None],
}  # fmt: skip
_SCHEMA = pa.schema(
    {
        "n": pa.int64(), "t": pa.string(), "r": pa.large_binary(), "b": pa.bool_(), "ns": pa.list_(pa.int16()),
        "s": pa.struct({"x": pa.float64(), "y": pa.string()}), "words": pa.list_(pa.string()),
    }
)  # fmt: skip


def check_table(data: bytes, rng: random.Random) -> None:
    """Its index leads nobody out of the chunk, and what lies there is decoded or refused."""
    try:
        indexer = litdata.LitDataIndexer(URL, len(data), _ANY_LAYOUT)
    except ShardError as error:
        assert str(error).startswith(URL), error  # noqa: PT017
        return
    index = index_of(indexer, data, rng)
    if not isinstance(index, TableIndex):
        return
    for offset, size in zip(index.offset.reshape(-1).tolist(), index.size.reshape(-1).tolist(), strict=True):
        assert (offset, size) == (-1, 0) or 0 <= offset <= offset + size <= len(data), "a value that leaves the chunk"
    for name, values in test_arrow_table.stored_values(data, index).items():
        try:
            decoder = record_reader(index.layout).decoder(name)
        except ConfigError:
            continue
        for value in values:
            if value is not None:
                decoder.decode_one(value, "what Arrow has checked")


_ANY_LAYOUT = layout_of("litdata", {"columns": [["a", "bytes"]], "is_packed": False})


# LitData.


def make_litdata(rng: random.Random) -> bytes:
    """The index and a chunk, of which one is damaged, or the items of the chunk. In front of both the index's size."""
    leaves = rng.choices(["bytes", "int", "tensor", "numpy", "no_header_tensor:18", "json", "str", "bool"], k=3)
    is_packed = rng.random() < 0.3
    items = []
    for _ in range(rng.choice([0, 1, 2, 5])):
        parts = [rng.choice(_LEAVES) for _ in leaves]
        item = b"".join(struct.pack("<I", len(part)) for part in parts) + b"".join(parts)
        item = changed(item, rng) if rng.random() < 0.4 else item
        packed = pa.Codec("zstd").compress(item, asbytes=True) if is_packed else item
        items.append(changed(packed, rng) if rng.random() < 0.2 else packed)
    first = 8 + 4 * len(items)
    chunk = struct.pack(f"<{2 + len(items)}I", len(items), *accumulate(map(len, items), initial=first))
    chunk += b"".join(items)
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": '["a", "b", "c"]', "children_spec": [leaf] * 3}
    config = {"data_format": leaves, "data_spec": json.dumps([1, spec]), "compression": None}
    if is_packed:
        config |= {"compression": "zstd", "compression_level": "sample"}
    rows = [{"filename": "chunk-0-0.bin", "chunk_bytes": len(chunk), "chunk_size": len(items)}]
    about = json.dumps({"chunks": rows, "config": config}).encode()
    about, chunk = (changed(each, rng) if rng.random() < 0.3 else each for each in (about, chunk))
    return struct.pack("<I", len(about)) + about + chunk


_LEAVES = [
    b"", b"text", bytes(8), b"\1", struct.pack(">III", 17, 1, 2) + bytes(16), struct.pack("<III", 3, 1, 2) + bytes(16),
    b"\5" + struct.pack("<II", 1, 1) + b"k\2" + struct.pack("<Iq", 1, 7), b'{"a": 1}',
    b"\6" + struct.pack("<III", 2, 1, 1) + b"k\x10\x12" + bytes(8),
]  # fmt: skip


def check_litdata(data: bytes, rng: random.Random) -> None:
    """Index and chunk are read, and the values of all columns that are decoded."""
    about_bytes = int.from_bytes(data[:4], "little")
    about, chunk = data[4 : 4 + about_bytes], data[4 + about_bytes :]
    try:
        shards = listed_shards(about, URL)
        layout = litdata.layout(about, URL)
    except ConfigError as error:
        assert str(error).startswith(URL), error  # noqa: PT017
        return
    assert all(shard.samples >= 0 <= min(shard.sizes, default=0) for shard in shards)
    with guarding(rng, litdata):
        try:
            indexer = litdata.LitDataIndexer(URL, len(chunk), layout)
        except ShardError as error:
            assert str(error).startswith(URL), error  # noqa: PT017
            return
        index = index_of(indexer, chunk, rng)
        if isinstance(index, RecordIndex):
            try:
                values_of(index, chunk, rng)
            except ConfigError as error:
                assert "a column has the serializer" in str(error) or "column '" in str(error)  # noqa: PT017


def make_frames(rng: random.Random) -> bytes:
    """A chunk whose items are packed in frames, mostly damaged, and what it is unpacked."""
    items = [rng.randbytes(rng.choice([0, 1, 30])) for _ in range(rng.choice([1, 2, 7]))]
    chunk = struct.pack(f"<{2 + len(items)}I", len(items), *accumulate(map(len, items), initial=8 + 4 * len(items)))
    chunk += b"".join(items)
    data = framed(chunk, rng.choice([1, 3, 256]))
    return struct.pack("<I", len(chunk)) + chunk + (changed(data, rng) if rng.random() < 0.8 else data)


class _Held(unpacker._Source):
    """Packed bytes that come some at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step, self.count = data, step, 0

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            return self._data
        data = self._data[self.count : self.count + min(count, self._step)]
        self.count += len(data)
        return data


def check_frames(data: bytes, rng: random.Random) -> None:
    """It is unpacked to a chunk of the size that its head says, or refused."""
    chunk_bytes = int.from_bytes(data[:4], "little")
    chunk, packed = data[4 : 4 + chunk_bytes], data[4 + chunk_bytes :]
    try:
        size = unpacker.framed_size(len(packed), lambda start, length: packed[start : start + length])
        if size > 1 << 20:
            return  # more than the service lets come of so little
        made = b"".join(unpacker.unpacked(_Held(packed, rng.choice([1, 7, 1000])), FRAMES, size))
    except unpacker.DamagedError:
        return
    assert len(made) == size, (len(made), size)
    if packed == framed(chunk, 1):
        assert made == chunk
    assert litdata.LitDataIndexer(URL, len(made), _ANY_LAYOUT).feed(np.frombuffer(made, np.uint8), 0) is None


def make_packed_table(rng: random.Random) -> bytes:
    """A chunk with a compressed table, mostly damaged."""
    rows = [
        {"t": rng.choice(["", "text " * 99]), "w": rng.choice([None, ["a"] * 50])} for _ in range(rng.choice([1, 5]))
    ]
    ipc = test_arrow_table.table(rows, compression=rng.choice(["zstd", "lz4"]), stream=rng.random() < 0.3)
    data = test_arrow_table.chunk(len(rows), ipc)
    return changed(data, rng) if rng.random() < 0.8 else data


def check_packed_table(data: bytes, rng: random.Random) -> None:
    """It is unpacked to a chunk that is read as any, or refused."""
    try:
        made = b"".join(unpacker.unpacked(_Held(data, rng.choice([7, 1000])), TABLE, -1))
    except (unpacker.DamagedError, MemoryError):
        return
    check_table(made, rng)


# What is packed as a whole.


def make_packed(rng: random.Random) -> bytes:
    """Its ending's number and the size of what is in it; that, and it packed as one member or two, mostly damaged."""
    number = rng.randrange(len(_ENDINGS))
    data = rng.choice([b"", b"text " * 99, rng.randbytes(rng.choice([1, 500])), bytes(20_000)])
    pack = PACK[_ENDINGS[number]]
    packed = twice(pack)(data) if number < _MEMBERED and rng.random() < 0.4 else pack(data)
    packed = changed(packed, rng) if rng.random() < 0.8 else packed
    return struct.pack("<BI", number, len(data)) + data + packed


# Of the first ones, several members or frames may follow each other.
_ENDINGS, _MEMBERED = (".gz", ".bz2", ".xz", ".zst", ".br", ".snappy"), 4


def check_packed(data: bytes, rng: random.Random) -> None:
    """It is unpacked or refused; what its heads say of its size is so, where they are whole."""
    number, count = struct.unpack_from("<BI", data)
    ending = _ENDINGS[number % len(_ENDINGS)]
    inner, packed = data[5 : 5 + count], data[5 + count :]
    packing, made = packing_of(f"a.tar{ending}"), b""
    said = zstd.unpacked_bytes(len(packed), lambda start: packed[start : start + 20]) if packing == "zstd" else None
    try:
        for part in unpacker.unpacked(_Held(packed, rng.choice([1, 7, 1000])), packing, -1):
            made += bytes(part)
            if len(made) > 1 << 20:
                return  # the service ends those that give too much
    except (unpacker.DamagedError, MemoryError):
        return
    if packed in (PACK[ending](inner), twice(PACK[ending])(inner)):
        assert made == inner
        assert said in (None, len(inner)), said  # of damaged ones, what was said is compared with what comes


# MDS.


def make_mds(rng: random.Random) -> bytes:
    """A shard, mostly damaged, mostly in its header."""
    columns = rng.choices(_MDS_COLUMNS, k=rng.choice([1, 3, 6]))
    named = [(f"c{number}", *column[:2]) for number, column in enumerate(columns)]
    rows = [[rng.choice(values) for _, _, values in columns] for _ in range(rng.choice([0, 1, 2, 7]))]
    data = test_mds.shard(named, rows)
    return changed(data, rng) if rng.random() < 0.85 else data


_MDS_COLUMNS: list[tuple[str, int | None, list[bytes]]] = [
    ("bytes", None, [b"", b"x" * 40]), ("int", 8, [bytes(8)]), ("str", None, [b"", "é".encode(), b"\xff"]),
    ("uint8", 1, [b"\7"]), ("ndarray:int16:2", 4, [bytes(4)]), ("ndarray:int16", None, [b"\4\2" + bytes(4), b"\4"]),
    ("ndarray", None, [bytes([9, 8, 1, 2]) + bytes(2), b""]), ("json", None, [b"{}", b"[1", b"7"]),
    ("str_int", None, [b"12", b"x"]), ("str_float", None, [b"1.5", b""]), ("str_decimal", None, [b"1.5", b"."]),
    ("list[pil]", None, [struct.pack("<III", 0, 1, 15) + struct.pack("<III", 1, 1, 1) + b"L\7\0", b"1"]),
]  # fmt: skip


def check_mds(data: bytes, rng: random.Random) -> None:
    """Records and values are those of plain Python."""
    with guarding(rng, mds):
        try:
            indexer = mds.MdsIndexer(URL, len(data))
        except ShardError as error:
            assert str(error).startswith(URL), error  # noqa: PT017
            return
        index = index_of(indexer, data, rng)
        if isinstance(index, str):
            return
        assert isinstance(index, RecordIndex)
        made = values_of(index, data, rng)
    (count,) = struct.unpack_from("<I", data)
    ends = struct.unpack_from(f"<{count + 1}I", data, 4)
    assert index.offset.tolist() == list(ends[:-1])
    reader = record_reader(index.layout)
    assert isinstance(reader, mds.MdsReader)
    rows = [_mds_row(data[start:end], reader.sizes) for start, end in pairwise(ends)]
    assert isinstance(made, str) == (None in rows), made
    for number, row in enumerate(rows if isinstance(made, dict) else []):
        for name, value in zip(reader.columns, row or (), strict=True):
            try:
                expected = reader.decoder(name).decode_one(memoryview(value), "here")
            except DecodeError:
                continue
            assert repr(made[name][number]) == repr(expected) or reader.kind(name).startswith("list")


def _mds_row(record: bytes, sizes: tuple[int, ...]) -> list[bytes] | None:
    """The columns of a record; None where its sizes lie."""
    varying = sizes.count(-1)
    if len(record) < 4 * varying:
        return None
    said = iter(struct.unpack_from(f"<{varying}I", record))
    ends = list(accumulate((next(said) if size < 0 else size for size in sizes), initial=4 * varying))
    return [record[start:end] for start, end in pairwise(ends)] if ends[-1] == len(record) else None


# JSON lines.


def make_jsonl(rng: random.Random) -> bytes:
    """Lines of objects, blank ones between them, mostly damaged."""
    lines = []
    for _ in range(rng.choice([0, 1, 3, 9])):
        made = {rng.choice(["a", "b", "é", 'q"']): rng.choice(_JSON_VALUES) for _ in range(rng.choice([0, 1, 3]))}
        line = json.dumps(made, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, "\t"]))
        lines.append(line.replace("\n", "") if rng.random() < 0.9 else "")
    text = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n", "\n\n "])
    data = rng.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode()
    return changed(data, rng) if rng.random() < 0.7 else data


_JSON_VALUES: list[Any] = [None, True, -1.5e300, 7, "", "te\\xt", 'q"\n', "é\U0001f600", [], [1, {"a": "]"}], {"b": {}}]


def check_jsonl(data: bytes, rng: random.Random) -> None:
    """Lines are those of plain Python, in pieces of any size; so are members, where Python reads all lines."""
    piece_bytes, step = rng.choice([5, 40, 1000]), rng.choice([3, 16, 1000])
    found: list[bytes] = []
    at_once = rng.choice([1, 2, 100])
    with mock.patch.multiple(pieces, PIECE_BYTES=piece_bytes, TAIL_BYTES=3), guarding(rng, jsonl, _AT_ONCE=at_once):
        for info in in_pieces(ObjectTable.of([ObjectInfo(f"{URL}.jsonl", len(data))])):
            indexer = jsonl.JsonlIndexer(info.url, info.size, info if info.is_piece else None)
            at = 0
            try:
                while not indexer.done:
                    indexer.feed(guarded_bytes(data[info.start + at :][:step], rng.random() < 0.7), at)
                    at += step
                index = indexer.finish()
            except ShardError as error:
                if "it is JSON of several lines" in str(error):
                    assert data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
                else:
                    assert re.search("text in UTF-16|is compressed with|has a zero at byte", str(error)), error  # noqa: PT017
                    assert data[:1] in (b"\xff", b"\xfe", b"\x1f", b"\x28", b"\xfd", b"B") or 0 in data[:512]
                return
            assert index.reach <= len(data) - info.start
            places = zip((info.start + index.offset).tolist(), index.size.tolist(), strict=True)
            found += [data[start : start + size] for start, size in places]
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert found == [line for line in lines if line.strip()]
    joined, offsets = b"".join(found), np.cumsum([0, *map(len, found)], dtype=np.int64)
    names, places = ["a", "é", "none"], fuzzing.guarded(6 * len(found), np.int64, True).reshape(2, 3, len(found))
    try:
        jsonl.find_values(guarded_bytes(joined, True), offsets, names, places, lambda number: f"at {number}")
    except DecodeError as error:
        assert str(error).startswith("at "), error  # noqa: PT017
        assert None in map(_object, found), error  # noqa: PT017
        return
    starts, sizes = places.tolist()
    for row, name in enumerate(names):
        for line, start, size in zip(found, starts[row], sizes[row], strict=True):
            expected = _object(line)
            assert (start, size) == (-1, 0) or 0 <= start <= start + size <= len(joined)
            if expected is not None:
                value = repr(json.loads(joined[start : start + size])) if start >= 0 else None
                assert value == (repr(expected[name]) if name in expected else None), (name, line)


def _object(line: bytes) -> dict[str, Any] | None:
    """What a line is in Python; None where it is no object."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# MDS's shards of text.


def make_lines(rng: random.Random) -> bytes:
    """The index and a shard, of which one is damaged. In front the index's size."""
    separator, newline = rng.choice([None, ",", "::"]), rng.choice(["\n", "\r\n"])
    rows = [(rng.choice(["", "text", "é", "1|"]), rng.choice([0, -5, 1 << 40])) for _ in range(rng.choice([0, 1, 5]))]
    if separator is None:
        lines = [json.dumps({"a": a, "b": b}) for a, b in rows]
        more: dict[str, Any] = {"format": "json", "columns": {"a": "str", "b": "int"}}
    else:
        lines = [separator.join(["a", "b"]), *(f"{a}{separator}{b}" for a, b in rows)]
        more = {"format": "xsv", "column_names": ["a", "b"], "column_encodings": ["str", "int"], "separator": separator}
    data = "".join(line + newline for line in lines).encode()
    data = changed(data, rng) if rng.random() < 0.5 else data
    hashes = {"xxh64": xxhash.xxh64(data).hexdigest()} if rng.random() < 0.5 else {}
    raw = {"basename": "shard.0.json", "bytes": len(data), "hashes": hashes}
    shard = {"samples": len(rows), "newline": newline, "raw_data": raw, **more}
    about = json.dumps({"version": 2, "shards": [shard]}).encode()
    about = changed(about, rng) if rng.random() < 0.3 else about
    return struct.pack("<I", len(about)) + about + data


def check_lines(data: bytes, rng: random.Random) -> None:
    """Lines and their values are those of plain Python."""
    about_bytes = int.from_bytes(data[:4], "little")
    about, text = data[4 : 4 + about_bytes], data[4 + about_bytes :]
    try:
        listed_shards(about, URL)
        found = described(about, URL).get("shard.0.json")
    except ConfigError as error:
        assert str(error).startswith(URL), error  # noqa: PT017
        return
    if found is None or not found.layout:
        return
    reader = mds_lines.LinesReader.of(read_layout(found.layout)[1])
    try:
        indexer = indexer_for(f"{URL}.0.json", len(text), found)
    except ShardError as error:
        assert str(error).startswith(URL), error  # noqa: PT017
        return
    with guarding(rng, mds_lines):
        index = index_of(indexer, text, rng)
        if isinstance(index, str):
            return
        assert isinstance(index, RecordIndex)
        values = values_of(index, text, rng)
    lines = text.removeprefix(reader.head).split(reader.newline)[:-1]
    assert [text[at : at + size] for at, size in zip(index.offset.tolist(), index.size.tolist(), strict=True)] == lines
    if reader.separator is not None:
        parts = [line.split(reader.separator) for line in lines]
        assert isinstance(values, str) == any(len(each) != len(reader.columns) for each in parts)


# Tokens.


def make_tokens(rng: random.Random) -> bytes:
    """An index of Megatron, mostly damaged, and its data. In front the index's size."""
    documents = [
        [[rng.randrange(256) for _ in range(rng.choice([0, 1, 3, 20]))] for _ in range(rng.choice([1, 1, 2]))]
        for _ in range(rng.choice([0, 1, 5, 12]))
    ]
    modes = [[rng.randrange(3) for _ in each] for each in documents] if rng.random() < 0.4 else None
    dtype = rng.choice(["u1", "<u2", "<i4"])
    about = token_writer.index_bytes(documents, dtype, modes)
    data = np.array([token for each in documents for sequence in each for token in sequence], dtype).tobytes()
    about = changed(about, rng) if rng.random() < 0.8 else about
    data = changed(data, rng) if rng.random() < 0.1 else data
    return struct.pack("<I", len(about)) + about + data


def check_tokens(data: bytes, rng: random.Random) -> None:
    """Read in pieces, whole or packed, samples are those of plain Python."""
    about_bytes = int.from_bytes(data[:4], "little")
    about, text = data[4 : 4 + about_bytes], data[4 + about_bytes :]
    pack, length, overlap = rng.choice([None, "cut", "fit"]), rng.choice([4, 7]), rng.choice([0, 1, 3])
    how = tokens(length, overlap=overlap, pack=pack)
    piece_bytes = rng.choice([4, 12, 40, 1000])
    found: list[dict[str, Any]] = []
    with mock.patch.multiple(pieces, PIECE_BYTES=piece_bytes, TAIL_BYTES=3):
        shards = in_pieces(ObjectTable.of([ObjectInfo(URL, len(text))]))
        for info in shards:
            try:
                index = how.index(info, _reader_of(text), (_reader_of(about), len(about)))
                found += token_writer.samples_of_index(index, text, info.start)
            except ShardError as error:
                assert URL in str(error), error  # noqa: PT017
                return
    documents, modes, item_bytes = token_writer.parse_index(about, text)
    if pack == "cut" and not token_writer.is_consistent(about, item_bytes):
        return  # windows need not know how long sequences are that have none of their bytes
    expected = token_writer.samples(documents, item_bytes, piece_bytes, length, overlap, pack, 0, modes)
    assert len(found) == len(expected), (len(found), len(expected))
    for sample, other in zip(found, expected, strict=True):
        assert repr(sample) == repr({name: other[name] for name in sample})


def make_token_chunk(rng: random.Random) -> bytes:
    """LitData's index of a chunk of tokens, and the chunk, of which one is damaged. In front the index's size."""
    items = [np.arange(rng.choice([0, 1, 9]), dtype="<i4").tobytes() for _ in range(rng.choice([1, 5]))]
    chunk = struct.pack(f"<{2 + len(items)}I", len(items), *accumulate(map(len, items), initial=8 + 4 * len(items)))
    chunk += b"".join(items)
    dim = rng.choice([None, sum(map(len, items)) // 4, 7])
    row = {"filename": "chunk-0-0.bin", "chunk_bytes": len(chunk), "chunk_size": len(items), "dim": dim}
    form = rng.choice(["no_header_tensor:16", "no_header_numpy:2", "no_header_tensor:10", "int"])
    config = {"data_format": [form], "item_loader": "TokensLoader", "types": {}}
    about = json.dumps({"chunks": [row], "config": config}).encode()
    about = changed(about, rng) if rng.random() < 0.5 else about
    chunk = changed(chunk, rng) if rng.random() < 0.5 else chunk
    return struct.pack("<I", len(about)) + about + chunk


def check_token_chunk(data: bytes, rng: random.Random) -> None:
    """Windows are those of plain Python, or an error names the chunk or its index."""
    about_bytes = int.from_bytes(data[:4], "little")
    about, chunk = data[4 : 4 + about_bytes], data[4 + about_bytes :]
    info = ObjectInfo("s3://bucket/chunk-0-0.bin", len(chunk))
    try:
        found = tokens(4, overlap=0).index(info, _reader_of(chunk), (_reader_of(about), len(about)))
    except (ConfigError, ShardError) as error:
        assert str(error).startswith("s3://bucket/"), error  # noqa: PT017
        return
    rows = msgspec.json.decode(about, type=litdata._Index).chunks
    (row,) = (each for each in rows if each.filename == "chunk-0-0.bin")
    start, width = 8 + 4 * row.chunk_size, np.dtype(json.loads(found.layout)["dtype"]).itemsize
    count = (len(chunk) - start) // width if row.dim is None else row.dim
    assert isinstance(found, StridedIndex)
    assert found.sample_count == count // 4
    assert not found.sample_count or (found.first, found.stride) == (start, 4 * width)
    assert found.reach <= len(chunk), "a window that leaves the chunk"


def _reader_of(data: bytes) -> Any:
    def read_at(start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(data), (start, length, len(data))
        return data[start : start + length]

    return read_at


TARGETS = [
    fuzzing.Target("tfrecord", make_tfrecord, check_tfrecord),
    fuzzing.Target("mds", make_mds, check_mds),
    fuzzing.Target("jsonl", make_jsonl, check_jsonl),
    fuzzing.Target("packed", make_packed, check_packed, ("pages",)),
    fuzzing.Target("litdata", make_litdata, check_litdata),
    fuzzing.Target("lines", make_lines, check_lines, ("pages",)),
    fuzzing.Target("frames", make_frames, check_frames, ("pages",)),
    fuzzing.Target("packed-table", make_packed_table, check_packed_table, ("pages",)),
    fuzzing.Target("table", make_table, check_table, ("pages",)),
    fuzzing.Target("tokens", make_tokens, check_tokens),
    fuzzing.Target("token-chunk", make_token_chunk, check_token_chunk, ("pages",)),
]

if __name__ == "__main__":
    fuzzing.main("tests.formats.fuzz_records", *TARGETS)
