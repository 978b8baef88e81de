"""The file of indexes: what is written is read, and holds for the right objects only; nothing is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import ConfigError, ObjectMissingError, ShardError
from fastload.formats import ShardIndex
from fastload.formats.sidecar import SCHEMA, SidecarSummary, SidecarWriter, read_summary
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from tests.formats.archives import Member, index, write

COUNT = 9


def shard(number: int) -> tuple[ObjectInfo, ShardIndex]:
    """A shard of `number` samples."""
    found = index(write([Member(f"{number}-{sample}.x", b"x" * number) for sample in range(number)]))
    etag = None if number % 3 == 0 else f'"e{number}"'
    return ObjectInfo(f"s3://bucket/{number}.tar", found.object_size, etag, 1000 + number), found


SHARDS = [shard(number) for number in range(COUNT)]
OBJECTS = ObjectTable.of([info for info, _ in SHARDS])


class Bytes:
    """Reads from bytes, and counts them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read_bytes = data, 0

    def __call__(self, start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(self.data)
        self.read_bytes += length
        return self.data[start : start + length]

    def summary(self) -> SidecarSummary:
        return read_summary(self, len(self.data), "s3://bucket/x.arrow")


def written(folder: Path, batch_bytes: int = 1 << 20, shards: list[tuple[ObjectInfo, ShardIndex]] = SHARDS) -> bytes:
    path = folder / "x.arrow"
    with SidecarWriter(path, batch_bytes) as writer:
        for info, found in shards:
            writer.add(info, found)
        writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("sidecar"))


@pytest.mark.parametrize("batch_bytes", [1, 500, 1 << 20])
def test_what_is_written_is_read(tmp_path: Path, batch_bytes: int) -> None:
    read = Bytes(written(tmp_path, batch_bytes))
    summary = read.summary()
    assert list(summary.objects) == list(OBJECTS)
    assert summary.sample_counts.tolist() == list(range(COUNT))
    for row, (_, found) in enumerate(SHARDS):
        assert summary.index(row, read) == found
    rows, others = summary.rows_of(OBJECTS)
    assert rows.tolist() == list(range(COUNT))
    assert others.tolist() == []
    assert os.listdir(tmp_path) == ["x.arrow"]


def test_a_summary_is_read_without_the_indexes(tmp_path: Path) -> None:
    many = index(write([Member(f"{number}.x") for number in range(5000)]))
    read = Bytes(written(tmp_path, shards=[(ObjectInfo(f"s3://b/{n}", many.object_size, "e"), many) for n in range(5)]))
    assert read.summary().sample_counts.tolist() == [5000] * 5
    assert read.read_bytes < 5000 < len(read.data) / 100


def test_no_shards(tmp_path: Path) -> None:
    summary = Bytes(written(tmp_path, shards=[])).summary()
    assert len(summary.objects) == 0
    assert summary.rows_of(OBJECTS)[0].tolist() == [-1] * COUNT


def test_the_example_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fastload-index.arrow").write_bytes(written(tmp_path, shards=SHARDS[3:5]))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "index.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    *urls, first, second, third = capsys.readouterr().out.splitlines()
    assert urls == ["s3://bucket/3.tar 3", "s3://bucket/4.tar 4"]
    assert (first, second, third) == ("0 [512] [3]", "1 [1536] [3]", "2 [2560] [3]")


def test_others_can_read_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.arrow"
    path.write_bytes(data)
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
        table.validate(full=True)
        assert table.schema == SCHEMA
        assert table.column("samples").to_pylist() == list(range(COUNT))
        for row in table.select(["index_offset", "index_bytes", "index", "size", "url"]).to_pylist():
            assert data[row["index_offset"] :][: row["index_bytes"]] == row["index"]
            ShardIndex.from_bytes(row["index"], row["url"], row["size"])
        del table


def test_rows_hold_for_the_very_version(data: bytes) -> None:
    summary = Bytes(data).summary()
    with_etag, without = OBJECTS[1], OBJECTS[3]
    asked = [
        with_etag,
        ObjectInfo("s3://bucket/unknown.tar", with_etag.size, with_etag.etag),
        ObjectInfo(with_etag.url, with_etag.size, "e1", 5),
        ObjectInfo(with_etag.url, with_etag.size, '"other"', with_etag.mtime_ns),
        ObjectInfo(with_etag.url, with_etag.size + 1, with_etag.etag),
        ObjectInfo(with_etag.url, with_etag.size, None, with_etag.mtime_ns),
        without,
        ObjectInfo(without.url, without.size, None, 5),
        ObjectInfo(without.url, without.size, 'W/"weak"', without.mtime_ns),
        ObjectInfo(without.url, without.size, "strong", without.mtime_ns),
    ]
    rows, others = summary.rows_of(ObjectTable.of(asked))
    assert rows.tolist() == [1, -1, 1, -1, -1, -1, 3, -1, 3, -1]
    assert others.tolist() == [3, 4, 5, 7, 9]
    assert list(OBJECTS.identities()) == list(summary.objects.identities())


def test_urls_are_compared_and_kept_without_credentials(tmp_path: Path) -> None:
    info, found = SHARDS[1]
    signed = ObjectInfo("https://user:pass@host/a.tar?X-Amz-Signature=secret&v=1", info.size, "e")
    data = written(tmp_path, shards=[(signed, found)])
    assert b"secret" not in data
    assert b"pass" not in data
    anew = ObjectInfo("https://host/a.tar?v=1&X-Amz-Signature=other", info.size, "e")
    assert Bytes(data).summary().rows_of(ObjectTable.of([signed, anew]))[0].tolist() == [0, 0]


def changed(data: bytes, name: str, change: Callable[[list[Any]], list[Any]]) -> bytes:
    """The file with other values in a column."""
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    at = table.schema.get_field_index(name)
    values = pa.array(change(table.column(name).to_pylist()), table.schema.field(name).type)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.set_column(at, table.schema.field(name), values))
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("size", lambda values: [-1, *values[1:]], "size is negative"),
        ("samples", lambda values: [-1, *values[1:]], "samples is negative"),
        ("index_offset", lambda values: [1 << 62, *values[1:]], "lies outside"),
        ("index_bytes", lambda values: [(1 << 63) - 1, *values[1:]], "lies outside"),
        ("index_offset", lambda values: [-1, *values[1:]], "index_offset is negative"),
        ("url", lambda values: [None, *values[1:]], "url is missing"),
    ],
)
def test_a_summary_that_lies(data: bytes, name: str, change: Callable[[list[Any]], list[Any]], says: str) -> None:
    with pytest.raises(ShardError, match=rf"s3://bucket/x.arrow is no index .*{says}.*fastload index"):
        Bytes(changed(data, name, change)).summary()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("samples", lambda values: [*values[:4], 5, *values[5:]], "has 4 samples, not 5"),
        ("size", lambda values: [*values[:4], values[4] + 1, *values[5:]], "of an object of"),
        ("index_offset", lambda values: [*values[:4], *values[5:], values[4]], "stored index is damaged"),
        ("index_bytes", lambda values: [*values[:4], 0, *values[5:]], "stored index is damaged"),
    ],
)
def test_an_index_that_lies(data: bytes, name: str, change: Callable[[list[Any]], list[Any]], says: str) -> None:
    read = Bytes(changed(data, name, change))
    with pytest.raises(ShardError, match=says):
        read.summary().index(4, read)


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"not arrow",
        b"ARROW1\0\0" + bytes(100) + b"ARROW1",
        pytest.param(None, id="another schema"),
        pytest.param(b"2", id="another version"),
    ],
)
def test_what_is_no_sidecar(other: bytes | None, data: bytes) -> None:
    if other is None or other == b"2":
        fields = [pa.field("url", pa.utf8())] if other is None else list(SCHEMA)
        schema = pa.schema(fields, {b"fastload.index": other or b"1"})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema):
            pass
        other = bytes(sink.getvalue())
    with pytest.raises(ShardError, match="is no index of shards that can be used"):
        Bytes(other).summary()


def test_errors_of_reading_come_as_they_are(data: bytes) -> None:
    def read_at(start: int, length: int) -> bytes:
        raise ObjectMissingError("it has gone")

    with pytest.raises(ObjectMissingError, match="it has gone"):
        read_summary(read_at, len(data), "u")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damage_is_found_or_harmless(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data)))
    damaged = bytearray(data if draw.draw(st.booleans()) else data[:cut])
    for _ in range(draw.draw(st.integers(1, 3))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] ^= draw.draw(st.integers(1, 255))
    read = Bytes(bytes(damaged))
    try:
        summary = read.summary()
    except ShardError:
        return
    rows, _ = summary.rows_of(OBJECTS)
    for number in np.flatnonzero(rows >= 0).tolist():
        try:
            found = summary.index(int(rows[number]), read)
        except ShardError:
            continue
        assert found.object_size == OBJECTS[number].size
        assert found.sample_count == summary.sample_counts[rows[number]]


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"absent/x\.arrow' cannot be written"):
        SidecarWriter(tmp_path / "absent" / "x.arrow")
    with SidecarWriter(tmp_path / "x.arrow", 1) as writer:
        monkeypatch.setattr(writer._writer, "write_batch", lambda batch: os.write(-1, b""), raising=False)
        with pytest.raises(ConfigError, match=r"x\.arrow' cannot be written"):
            writer.add(*SHARDS[1])
    assert os.listdir(tmp_path) == []


def test_a_writer_that_was_not_closed_leaves_what_was_there(tmp_path: Path) -> None:
    before = written(tmp_path)
    with SidecarWriter(tmp_path / "x.arrow", 1) as writer:
        writer.add(*SHARDS[1])
    assert (tmp_path / "x.arrow").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.arrow"]
