"""Tables of Arrow in LitData's chunks, as its own writer makes them, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats import (
    Described,
    MixedLayoutsError,
    TableIndex,
    indexer_for,
    joined,
    record_reader,
    stored_index,
)
from fastload.formats.litdata import layout as described_layout
from fastload.formats.placed_index import stored_placed_count
from fastload.formats.records import TableReader, layout_of
from tests.formats.test_litdata import LAYOUT, URL, index_json

# Written by litdata 0.2.76, whose tables have pieces of 256 rows: rows i from 0 to 699, as `expected` has them.
WRITTEN = Path(__file__).parent / "written" / "litdata_table"
COUNT = 700
READ = ["id", "text", "note", "score", "ok", "raw", "ids", "meta/a", "meta/b/c", "words"]


def expected(i: int) -> dict[str, Any]:
    return {
        "id": i - 3,
        "text": f"né{i}" * (i % 5),
        "note": None if i % 3 else f"note {i}",
        "score": i / 7,
        "ok": i % 4 == 0,
        "raw": bytes(range(i % 9)),
        "ids": list(range(i % 4)),
        "meta/a": i * i,
        "meta/b/c": f"c{i}",
        "words": ["x"] * (i % 3),
    }


def check(sample: Mapping[str, Any], i: int) -> None:
    for name, value in expected(i).items():
        found = sample[name]
        found = bytes(found) if name == "raw" else list(found) if name == "ids" else found
        assert found == value, (name, i)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


def test_samples_are_what_was_written(cache: fastload.Cache) -> None:
    for _ in range(2):  # the second time from the stored index
        dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=False, columns=READ)
        assert len(dataset) == COUNT
        for i, sample in enumerate(dataset):
            check(sample, i)
        assert sample["__key__"] == "chunk-0-2.bin/99"
    assert dataset[300]["text"] == expected(300)["text"]


def test_batches_hold_tensors_where_samples_are_alike(cache: fastload.Cache) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=True, seed=3, columns=READ)
    seen = []
    for batch in fastload.DataLoader(dataset, batch_size=64, num_workers=2):
        assert [batch[name].dtype for name in ("id", "score", "ok")] == [torch.int64, torch.float64, torch.bool]
        assert isinstance(batch["ids"], fastload.Ragged)
        assert isinstance(batch["raw"], fastload.Ragged)
        assert isinstance(batch["note"], list)
        for at, number in enumerate(batch["id"].tolist()):
            check({name: values[at] for name, values in batch.items()}, number + 3)
            seen.append(number + 3)
    assert sorted(seen) == list(range(COUNT))
    assert seen != sorted(seen)


def test_columns_that_are_not_read_are_refused_by_name(cache: fastload.Cache, tmp_path: Path) -> None:
    schema = pa.schema({"a": pa.int64(), "when": pa.timestamp("us"), "whens": pa.list_(pa.date32())})
    data = chunk(1, table([{"a": 1, "when": datetime(2020, 1, 1), "whens": [date(2020, 1, 1)]}], schema))
    url = folder(tmp_path, data)
    for name, kind in (("when", r"timestamp\[us\]"), ("whens", "a list<item: date32")):
        says = rf"column '{name}' is {kind}.*, which fastload does not read; leave it out \(columns=\[...\]\), or"
        with pytest.raises(ConfigError, match=says):
            list(fastload.StreamingDataset(url, cache=cache, columns=[name]))
    assert [sample["a"] for sample in fastload.StreamingDataset(url, cache=cache, columns=["a"])] == [1]


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None, **options: Any) -> bytes:
    """A table in pieces of three rows, as a file or `stream`."""
    whole = pa.Table.from_pylist(list(rows), schema=schema)
    sink, new = pa.BufferOutputStream(), pa.ipc.new_stream if options.pop("stream", False) else pa.ipc.new_file
    with new(sink, whole.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(whole, max_chunksize=3)
    made: bytes = sink.getvalue().to_pybytes()
    return made


def chunk(count: int, ipc: bytes) -> bytes:
    head = struct.pack(f"<{count + 2}I", count, *[8 + 4 * count] * (count + 1))
    return head + ipc + struct.pack("<I", len(ipc)) + b"LDARW01\0"


def folder(tmp_path: Path, *chunks: bytes, **config: Any) -> str:
    """The URL of a folder with these chunks."""
    (tmp_path / "data").mkdir()
    counts = [int.from_bytes(data[:4], "little") for data in chunks]
    for number, data in enumerate(chunks):
        (tmp_path / "data" / f"chunk-0-{number}.bin").write_bytes(data)
    listed = {
        f"chunk-0-{n}.bin": (len(data), count) for n, (data, count) in enumerate(zip(chunks, counts, strict=True))
    }
    (tmp_path / "data" / "index.json").write_bytes(index_json(listed, **config))
    return f"{tmp_path}/data/"


def index_of(data: bytes, step: int = 1000) -> TableIndex:
    indexer = indexer_for(URL, len(data), Described(LAYOUT))
    start = 0
    while not indexer.done and start < len(data):
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
        start += step
    index = indexer.finish()
    assert isinstance(index, TableIndex)
    return index


def read(data: bytes, index: TableIndex) -> dict[str, list[Any]]:
    """The values by column, None where there is none."""
    found = {}
    for name, stored in stored_values(data, index).items():
        decoder = record_reader(index.layout).decoder(name)
        values = [None if each is None else decoder.decode_one(each, "") for each in stored]
        found[name] = [each.tolist() if isinstance(each, np.ndarray | np.generic) else each for each in values]
    return found


def stored_values(data: bytes, index: TableIndex) -> dict[str, list[bytes | None]]:
    """What decoders get: of several pieces, their sizes before them."""
    reader = record_reader(index.layout)
    assert isinstance(reader, TableReader)
    found = {}
    for name in reader.columns:
        names, values = reader.parts(name), list[bytes | None]()
        for row in range(index.sample_count):
            at = [index.columns.index(part) if part in index.columns else -1 for part in names]
            places = [(int(index.offset[n, row]), int(index.size[n, row])) if n >= 0 else (-1, 0) for n in at]
            pieces = [data[start : start + size] for start, size in places]
            sizes = struct.pack(f"<{len(pieces)}I", *map(len, pieces)) if len(pieces) > 1 else b""
            values.append(sizes + b"".join(pieces) if places[0][0] >= 0 else None)
        found[name] = values
    return found


SMALL = st.integers(-(1 << 63), (1 << 63) - 1)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "n": st.none() | SMALL,
            "f": st.none() | st.floats(allow_nan=False),
            "b": st.none() | st.booleans(),
            "t": st.none() | st.text(max_size=9),
            "r": st.none() | st.binary(max_size=9),
            "ns": st.none() | st.lists(SMALL, max_size=4),
            "s": st.none() | st.fixed_dictionaries({"x": st.none() | SMALL, "y": st.text(max_size=3)}),
        }
    ),
    max_size=10,
)
SCHEMA = pa.schema(
    {
        "n": pa.int64(), "f": pa.float64(), "b": pa.bool_(), "t": pa.string(), "r": pa.binary(),
        "ns": pa.list_(pa.int64()), "s": pa.struct({"x": pa.int64(), "y": pa.string()}),
    }
)  # fmt: skip
LARGE = pa.schema(
    {
        "n": pa.int64(), "f": pa.float64(), "b": pa.bool_(), "t": pa.large_string(), "r": pa.large_binary(),
        "ns": pa.large_list(pa.int64()), "s": pa.struct({"x": pa.int64(), "y": pa.large_string()}),
    }
)  # fmt: skip


@given(ROWS, st.integers(1, 3000), st.booleans(), st.sampled_from([SCHEMA, LARGE]))
def test_what_was_written_is_found(rows: list[dict[str, Any]], step: int, stream: bool, schema: pa.Schema) -> None:
    if not rows:
        return  # a chunk without items is none with a table
    data = chunk(len(rows), table(rows, schema, stream=stream))
    index = index_of(data, step)
    assert stored_index(index.to_bytes(), URL, len(data)) == index
    found = read(data, index)
    structs = [row["s"] or {"x": None, "y": None} for row in rows]
    assert found == {
        **{name: [row[name] for row in rows] for name in ("n", "f", "b", "t", "r", "ns")},
        "s/x": [each["x"] for each in structs],
        "s/y": [each["y"] for each in structs],
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_tables_that_are_compressed_are_unpacked(
    cache: fastload.Cache, tmp_path: Path, codec: str, stream: bool
) -> None:
    rows = [{"t": f"text {i} " * 40, "i": i, "w": ["a", None] * i} for i in range(20)]
    made = chunk(20, table(rows, compression=codec, stream=stream))
    url = folder(tmp_path, made, made, ipc_compression=codec)
    samples = list(fastload.StreamingDataset(url, cache=cache, shuffle=False))
    assert [{name: sample[name] for name in rows[0]} for sample in samples] == rows + rows
    assert samples[-1]["__key__"] == "chunk-0-1.bin/19"


def test_tables_that_are_compressed_and_damaged_are_errors_that_name_them(tmp_path: Path) -> None:
    good = chunk(20, table([{"t": f"text {i} " * 40} for i in range(20)], compression="zstd"))
    at = good.index(b"\x28\xb5\x2f\xfd", 200)
    for number, (data, says) in enumerate(
        [
            (good[:-1], "it has no table of Arrow at its end"),
            (good[:-12] + struct.pack("<I", 1 << 31) + b"LDARW01\0", "it has no table of Arrow"),
            (b"\xff\xff\xff\xff" + good[4:], "it has no table of Arrow"),
            (good[:at] + bytes(40) + good[at + 40 :], "its table of Arrow: "),
            (struct.pack("<I", 19) + good[4:], "which no chunk of LitData does"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        url = folder(tmp_path / str(number), data, ipc_compression="zstd")
        with (
            fastload.Cache(tmp_path / f"c{number}", ram_bytes="16MiB", disk_bytes=0, service="inprocess") as cache,
            pytest.raises(ShardError, match=rf"chunk-0-0\.bin.*({says})"),
        ):
            list(fastload.StreamingDataset(url, cache=cache))


def test_numbers_of_all_kinds() -> None:
    for kind in ("int8", "uint16", "int32", "uint64", "float32", "float16"):
        values: Any = np.arange(7).astype(kind)
        rows = pa.table({"x": pa.array(values)}).to_pylist()
        data = chunk(7, table(rows, pa.schema({"x": pa.from_numpy_dtype(kind)})))
        index = index_of(data)
        assert read(data, index)["x"] == values.tolist()
        assert record_reader(index.layout).decoder("X").fixed() == ((), np.dtype(kind))


def test_a_number_that_is_null_needs_a_default(cache: fastload.Cache, tmp_path: Path) -> None:
    rows = [{"n": 1, "t": "a"}, {"n": None, "t": None}]
    url = folder(tmp_path, chunk(2, table(rows)))

    def batch(**options: Any) -> Any:
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=False, **options)
        return next(iter(fastload.DataLoader(dataset, batch_size=2)))

    with pytest.raises(
        ConfigError, match=r"column 'n': the sample has none.*'n\?': .*flat\('int64', \(\), default=-1\)"
    ):
        batch()
    decode = {"n?": fastload.decode.flat("int64", (), default=-1)}
    found = batch(columns=["n?", "t"], decode=decode)
    assert (found["n"].tolist(), found["t"]) == ([1, -1], ["a", None])


GOOD = table([{"a": 1, "t": "x"}, {"a": 2, "t": "yy"}])


def with_invalid_text() -> bytes:
    return table([{"t": "abcdefgh"}]).replace(b"abcdefgh", b"abc\xffefgh")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (chunk(2, GOOD)[:-1], "its items are empty, and behind them is no table: it was cut short"),
        (chunk(2, GOOD)[:40], "its items are empty, and behind them is no table"),
        (chunk(3, GOOD), "its table has 2 rows where its head says 3"),
        (chunk(2, GOOD[:-30]), "its table, at byte 16, cannot be read .*: it is damaged"),
        (chunk(2, b"ARROW1" + bytes(90)), "cannot be read"),
        (chunk(2, b"\xff\xff\xff\xff" + bytes(90)), "cannot be read|has 0 rows"),
        (chunk(2, b""), "cannot be read|has 0 rows"),
        (chunk(2, GOOD)[:-12] + struct.pack("<I", 1 << 31) + b"LDARW01\0", "behind them is no table"),
        (chunk(1, with_invalid_text()), "cannot be read .*UTF8"),
        (chunk(9, table([{"t": "text " * 40}] * 9, compression="zstd")), "its table is compressed, which"),
        (chunk(1, table([{f"c{n}": 1 for n in range(5000)}])), "has 5000 columns, above"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_it(data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=says) as raised:
        index_of(data)
    assert URL in str(raised.value)
    with pytest.raises(ConfigError, match=r"index\.json: its tables are compressed by brotli, which fastload does not"):
        described_layout(index_json(ipc_compression="brotli"), "s3://b/index.json")


NESTED = st.recursive(
    st.sampled_from([pa.int16(), pa.float64(), pa.bool_(), pa.string(), pa.large_binary(), pa.null()]),
    lambda kinds: kinds.map(pa.list_) | kinds.map(pa.large_list)
    | st.lists(kinds, min_size=1, max_size=3).map(lambda each: pa.struct([(f"m{n}", k) for n, k in enumerate(each)])),
    max_leaves=4,
)  # fmt: skip


def value_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.none() | st.lists(value_of(kind.value_type), max_size=12)
    if pa.types.is_struct(kind):
        fields = {kind.field(n).name: value_of(kind.field(n).type) for n in range(kind.num_fields)}
        return st.none() | st.fixed_dictionaries(fields)
    of_leaf: dict[Any, st.SearchStrategy[Any]] = {
        pa.int16(): st.integers(-5, 5), pa.float64(): st.floats(allow_nan=False), pa.bool_(): st.booleans(),
        pa.string(): st.text(max_size=3), pa.large_binary(): st.binary(max_size=3),
    }  # fmt: skip
    return st.none() | of_leaf.get(kind, st.none())


@given(st.data(), NESTED, st.booleans())
def test_nested_lists_are_what_arrow_gives(data: st.DataObject, item: pa.DataType, is_large: bool) -> None:
    kind = (pa.large_list if is_large else pa.list_)(item)
    rows = [{"x": data.draw(value_of(kind))} for _ in range(data.draw(st.integers(1, 10)))]
    made = chunk(len(rows), table(rows, pa.schema({"x": kind})))
    index = index_of(made)
    assert stored_index(index.to_bytes(), URL, len(made)) == index
    assert read(made, index)["x"] == [row["x"] for row in rows]


def test_nested_lists_of_batches_and_of_several_chunks(cache: fastload.Cache, tmp_path: Path) -> None:
    """In some of which lists are empty, or none is null, so that their types differ."""
    rows: list[dict[str, Any]] = [
        {"words": [], "ids": [], "rows": [], "i": 0},
        {"words": ["a", None, "né"], "ids": [1, 2], "rows": [{"k": "v", "more": [[True], []]}], "i": 1},
        {"words": None, "ids": [3, None], "rows": [{"k": None, "more": None}] * 9, "i": 2},
        {"words": ["b"] * 300, "ids": [4], "rows": None, "i": 3},
    ]
    schemas = [None, None, None, None]
    parts = [rows[:1], rows[1:2], rows[2:], [row for _ in range(5) for row in rows]]
    chunks = [chunk(len(part), table(part, schema)) for part, schema in zip(parts, schemas, strict=True)]
    url = folder(tmp_path, *chunks)
    expected = [row for part in parts for row in part]
    samples = list(fastload.StreamingDataset(url, cache=cache, shuffle=False))
    for found, row in zip(samples, expected, strict=True):
        made = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}
        assert {name: made[name] for name in row} == row
    shuffled = fastload.StreamingDataset(url, cache=cache, shuffle="global", seed=1, columns=["i", "WORDS", "rows"])
    for batch in fastload.DataLoader(shuffled, batch_size=7, num_workers=2):
        for i, words, of_row in zip(batch["i"].tolist(), batch["WORDS"], batch["rows"], strict=True):
            assert (words, of_row) == (rows[i]["words"], rows[i]["rows"])


def test_an_index_of_a_version_that_read_no_nested_lists_is_made_again() -> None:
    good = index_of(chunk(2, GOOD))
    old = layout_of("arrow", {"columns": [["a", "int64"], ["t", "not read: list<item: string>"]]})
    stored = replace(good, layout=old).to_bytes()
    with pytest.raises(ShardError, match="stored index is damaged"):
        stored_index(stored, URL, len(chunk(2, GOOD)))


@given(st.binary(max_size=80), st.integers(0, 99), st.integers(0, 255))
def test_lists_of_any_bytes_are_decoded_or_refused(noise: bytes, at: int, byte: int) -> None:
    rows = [{"x": [{"w": ["a", None], "n": [1, 2], "f": [True], "z": [None]}, None]}]
    made = chunk(1, table(rows))
    index = index_of(made)
    (value,) = stored_values(made, index)["x"]
    assert value is not None
    changed = bytearray(value)
    changed[at % len(value)] = byte
    decoder = record_reader(index.layout).decoder("x")
    for each in (noise, bytes(changed), value[:at], value + noise):
        try:
            decoder.decode_one(each, "here")
        except DecodeError as error:
            assert str(error).startswith("here: ")  # noqa: PT017


@given(st.binary(max_size=200), st.booleans())
def test_a_stored_index_that_is_damaged_is_refused(noise: bytes, is_layout: bool) -> None:
    stored = bytearray(index_of(chunk(2, GOOD)).to_bytes())
    for number, byte in enumerate(noise):
        stored[-1 - number % 40 if is_layout else (number * 7) % len(stored)] ^= byte
    if bytes(stored) != index_of(chunk(2, GOOD)).to_bytes():
        with pytest.raises(ShardError, match="stored index is damaged"):
            stored_index(bytes(stored), URL, len(chunk(2, GOOD)))


def test_the_head_of_a_stored_index_says_how_many_rows_there_are() -> None:
    stored = index_of(chunk(2, GOOD)).to_bytes()
    assert stored_placed_count(stored[:64], len(stored)) == 2
    assert stored_placed_count(stored[:63], len(stored)) == stored_placed_count(stored[:64], len(stored) + 1) == -1
    assert stored_placed_count(b"FLRECRDX" + stored[8:64], len(stored)) == -1


def test_layouts_are_joined_where_kinds_are_the_same() -> None:
    one, null, other, more = (
        index_of(chunk(1, table([row], schema))).layout
        for row, schema in (
            ({"x": 1}, None), ({"x": None}, None), ({"x": 1.5}, None), ({"y": "t", "x": 3}, None),
        )
    )  # fmt: skip
    assert record_reader(joined((null, one))) == record_reader(one)
    assert record_reader(joined((one, null))) == record_reader(one)
    assert record_reader(joined((one, more))).columns == ("x", "y")
    with pytest.raises(MixedLayoutsError):
        joined((one, more, other))


def test_chunks_may_lack_a_column(cache: fastload.Cache, tmp_path: Path) -> None:
    url = folder(tmp_path, *(chunk(1, table([row])) for row in ({"x": 1, "t": "a"}, {"x": 2}, {"x": 3, "t": None})))
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle=False)
    (batch,) = fastload.DataLoader(dataset, batch_size=3)
    assert (batch["x"].tolist(), batch["t"]) == ([1, 2, 3], ["a", None, None])
