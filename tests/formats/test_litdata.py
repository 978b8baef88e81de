"""LitData's chunks, as its own writer makes them, and damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload.decode import Decoder
from fastload.errors import ConfigError, DecodeError, MissingColumnError, ShardError
from fastload.formats import (
    Described,
    RecordIndex,
    format_of,
    indexer_for,
    is_described,
    listed_shards,
    may_be_indexed,
    record_reader,
    stored_index,
)
from fastload.formats.litdata import Array, LitDataReader, Nested, RgbPicture
from fastload.formats.litdata import layout as described_layout
from fastload.formats.records import layout_of, split
from tests.conftest import Bucket
from tests.formats.packing import PACK

# Written by litdata 0.2.76: samples i from 0 to 23, as `expected` has them.
WRITTEN = Path(__file__).parent / "written"
COUNT = 24
WAYS = ["litdata", "litdata_zstd", "litdata_frames", "litdata_whole"]


def expected(i: int) -> dict[str, Any]:
    return {
        "id": i - 3,
        "meta/näme": f"é{i}",
        "meta/ok": i % 3 == 0,
        "meta/pair/0": i / 7,
        "meta/pair/1": bytes(range(i)),
        "words/ids": list(range(i % 4)),
        "words/rows": [{"a": i, "b": None}, {"a": -1, "b": "x"}],
        "matrix": np.arange(6, dtype=np.int16).reshape(2, 3) * i,
        "row": np.arange(i % 5, dtype=np.float32),
        "grid": np.ones((1 + i % 2, 2), np.float16) * np.float16(i),
        "line": np.arange(i % 3, dtype=np.uint16),
        "png": np.array([10 * i, 5 * i, i], np.uint8)[:, None, None] * np.ones((1, 2, 3 + i % 2), np.uint8),
    }


def check(sample: Mapping[str, Any], i: int) -> None:
    for name, value in expected(i).items():
        found = sample[name]
        if isinstance(value, np.ndarray):
            assert np.array_equal(found, value), (name, i)
            assert np.asarray(found).dtype == value.dtype, name
        else:
            assert (bytes(found) if name == "meta/pair/1" else found) == value, (name, i)
    assert sample["bare"].getpixel((0, 0)) == (10 * i, 5 * i, i)
    assert [each.shape for each in sample["jpegs"]] == [(3, 2, 3 + i % 2)] * (1 + i % 2)
    assert np.abs(np.asarray(sample["jpegs"][0], int) - np.asarray(sample["png"], int)).max() < 6


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


@pytest.mark.parametrize("name", WAYS)
def test_samples_are_what_their_own_reader_gives(cache: fastload.Cache, name: str) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN / name}/", cache=cache, shuffle=False)
    assert len(dataset) == COUNT  # before a chunk is read
    samples = list(dataset)
    assert len(samples) == COUNT
    for i, sample in enumerate(samples):  # in the order of the index: chunk-0-10 comes behind chunk-0-9
        check(sample, i)
    assert samples[0]["__key__"] == "chunk-0-0.bin/0"


@pytest.mark.parametrize("name", WAYS)
def test_batches_hold_tensors_where_samples_are_alike(cache: fastload.Cache, s3: Bucket, name: str) -> None:
    for path in (WRITTEN / name).iterdir():
        s3.put(f"lit/{path.name}", path.read_bytes())
    dataset = fastload.StreamingDataset(f"s3://{s3.name}/lit/", cache=cache, shuffle=True, seed=3)
    seen = []
    for batch in fastload.DataLoader(dataset, batch_size=5, num_workers=2):
        assert (batch["id"].dtype, batch["meta/ok"].dtype) == (torch.int64, torch.bool)
        assert (batch["matrix"].dtype, batch["matrix"].shape[1:]) == (torch.int16, (2, 3))
        assert isinstance(batch["row"], fastload.Ragged)
        assert isinstance(batch["grid"], list)
        for at in range(len(batch["id"])):
            i = int(batch["id"][at]) + 3
            check({name: values[at] for name, values in batch.items()}, i)
            seen.append(i)
    assert sorted(seen) == list(range(COUNT))
    assert seen != sorted(seen)


def test_columns_are_chosen_and_decoded_as_the_user_says(cache: fastload.Cache) -> None:
    decode = {"ID": fastload.decode.raw(), "png": fastload.decode.raw()}
    dataset = fastload.StreamingDataset(
        f"{WRITTEN}/litdata/", cache=cache, shuffle=False, columns=["ID", "png", "meta/pair/0"], decode=decode
    )
    sample = next(iter(dataset))
    assert (sample["ID"], sample["png"][:4], sample["meta/pair/0"]) == (struct.pack("<q", -3), b"\x89PNG", 0)
    dataset = fastload.StreamingDataset(f"{WRITTEN}/litdata/", cache=cache, columns=["meta"], shuffle=False)
    with pytest.raises(MissingColumnError, match=r"chunk-0-0\.bin.*has no such column; it has \['id', 'meta/näme'"):
        list(dataset)


def test_chunks_that_are_named_need_their_index_too(cache: fastload.Cache, tmp_path: Path) -> None:
    urls = [f"{WRITTEN}/litdata/chunk-0-{number}.bin" for number in (11, 2)]
    dataset = fastload.StreamingDataset(urls, cache=cache, columns=["id"], shuffle=False)
    assert [sample["id"] for sample in dataset] == [19, 20, 1, 2]
    assert len(dataset) == 4
    shutil.copy(urls[0], tmp_path / "chunk-0-11.bin")
    with pytest.raises(
        ConfigError, match=r"chunk-0-11\.bin is litdata by its name, whose samples index\.json beside it"
    ):
        list(fastload.StreamingDataset(str(tmp_path / "chunk-0-11.bin"), cache=cache))
    with pytest.raises(ConfigError, match=r"is an index of LitData; name the folder that it lies in"):
        list(fastload.StreamingDataset(f"{WRITTEN}/litdata/index.json", cache=cache))


def test_keys_are_those_of_unpacked_chunks(cache: fastload.Cache) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/litdata_whole/", cache=cache, shuffle=False, columns=["id"])
    assert [sample["__key__"] for sample in dataset][-1] == "chunk-0-2.bin/7"
    one = f"{WRITTEN}/litdata_frames/chunk-0-1.bin"
    dataset = fastload.StreamingDataset(one, cache=cache, shuffle=False, columns=["id"])
    assert [sample["id"] for sample in dataset] == list(range(5, 13))


def test_indexes_of_old_versions_leave_out_the_heads_of_chunks(cache: fastload.Cache, tmp_path: Path) -> None:
    for name in ("litdata", "litdata_whole"):
        shutil.copytree(WRITTEN / name, tmp_path / name)
        about = json.loads((tmp_path / name / "index.json").read_bytes())
        del about["config"]["types"]
        for each in about["chunks"]:
            each["chunk_bytes"] -= 8 + 4 * each["chunk_size"]
        (tmp_path / name / "index.json").write_text(json.dumps(about))
        dataset = fastload.StreamingDataset(f"{tmp_path}/{name}/", cache=cache, shuffle=False, columns=["id"])
        assert [sample["id"] for sample in dataset] == list(range(-3, COUNT - 3))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"encryption": {"algorithm": "fernet", "level": "sample"}}, "its chunks are encrypted, .*write them without"),
        ({"encryption": {"algorithm": "fernet", "level": "chunk"}}, "its chunks are encrypted, .*write them without"),
        (
            {"item_loader": "TemporalArrayLoader", "temporal_schema": {"version": 1}, "data_format": ["bytes"]},
            "its chunks are made for TemporalArrayLoader, .*write them with the default item_loader",
        ),
    ],
)
def test_what_is_not_read_is_refused_before_a_chunk_is_read(
    cache: fastload.Cache, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    """As litdata 0.2.76 writes their index.json."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chunk-0-0.bin").write_bytes(bytes(100))
    (tmp_path / "data" / "index.json").write_bytes(index_json({"chunk-0-0.bin": (100, 4)}, **config))
    with pytest.raises(ConfigError, match=rf"data/index\.json: {says}"):
        len(fastload.StreamingDataset(f"{tmp_path}/data/", cache=cache))


# Tokens


def packed_tokens(folder: Path) -> Path:
    """The same chunks, as `compression="zstd", compression_level="chunk"` writes them."""
    folder.mkdir()
    about = json.loads((WRITTEN / "litdata_tokens" / "index.json").read_bytes())
    for listed in about["chunks"]:
        data = (WRITTEN / "litdata_tokens" / listed["filename"]).read_bytes()
        listed["filename"] = listed["filename"].replace(".bin", ".zstd.bin")
        (folder / listed["filename"]).write_bytes(PACK[".zst"](data))
    about["config"]["compression"] = "zstd"
    (folder / "index.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("name", ["litdata_tokens", "litdata_tokens_numpy", "packed"])
@pytest.mark.parametrize(("length", "overlap"), [(16, 0), (9, 1)])
def test_tokens_are_the_blocks_of_each_chunk(
    cache: fastload.Cache, tmp_path: Path, name: str, length: int, overlap: int
) -> None:
    """As litdata's own reader has them, with the block size that is given there, too."""
    folder = packed_tokens(tmp_path / "packed") if name == "packed" else WRITTEN / name
    text = [100 * i + n for i in range(60) for n in range(1 + i * 7 % 40)]
    blocks, stride = [], length - overlap
    for listed in json.loads((folder / "index.json").read_bytes())["chunks"]:
        mine, text = text[: listed["dim"]], text[listed["dim"] :]
        blocks += [mine[at : at + length] for at in range(0, len(mine) - length + 1, stride)]
    how = fastload.formats.tokens(length, overlap=overlap)
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, format=how, shuffle=False)
    assert len(dataset) == len(blocks) > 60
    found = list(dataset)
    assert [sample["tokens"].tolist() for sample in found] == blocks
    assert {sample["tokens"].dtype for sample in found} == {np.dtype("u2" if name == "litdata_tokens_numpy" else "i4")}
    assert found[-1]["__key__"].startswith("chunk-0-13.bin/")
    shuffled = fastload.StreamingDataset(f"{folder}/", cache=cache, format=how, shuffle=True)
    batches = list(fastload.DataLoader(shuffled, batch_size=5))
    assert sorted(row for batch in batches for row in batch["tokens"].tolist()) == sorted(blocks)


def test_tokens_that_cannot_be_read_are_refused_by_name(cache: fastload.Cache, tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def refused(says: str, how: Any = None, chunk: dict[str, Any] | None = None, **config: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(WRITTEN / "litdata_tokens", folder)
        about = json.loads((folder / "index.json").read_bytes())
        about["config"] |= config
        about["chunks"][3] |= chunk or {}
        (folder / "index.json").write_text(json.dumps(about))
        read_refused(says, how)

    def read_refused(says: str, how: Any = None) -> None:
        how = fastload.formats.tokens(16, overlap=0) if how is None else how
        with pytest.raises((ConfigError, ShardError), match=says):
            list(fastload.StreamingDataset(f"{folder}/", cache=cache, format=how))

    refused(r"index\.json: its chunks hold tokens, .*give format=\"tokens\(BLOCK_SIZE", how="auto")
    refused(r"chunk-0-.*\.bin has .*says that from byte .* on 5000 int32 lie in it", chunk={"dim": 5000})
    refused(r"Expected `int` >= 0", chunk={"dim": -1})
    refused(r"says that chunk-0-3\.bin has 3 bytes", chunk={"chunk_bytes": 3})
    refused(r"chunk-0-3\.bin has .* bytes, and its index says", chunk={"chunk_size": 1 << 30})
    refused(r"index\.json: its items are \['int'\], and tokens are one array", data_format=["int"])
    refused(r"index\.json: its items are .*\[.*:10'\], and tokens", data_format=["no_header_tensor:10"])
    refused(r"made for PyTreeLoader, and hold no bare tokens", item_loader="PyTreeLoader")
    refused(r"its tokens are compressed in the way 'batch'", compression="zstd", compression_level="batch")
    refused(r"its chunks are encrypted", encryption={"algorithm": "fernet"})
    refused(r"holds int32, and tokens\(dtype='uint16'\) says otherwise", fastload.formats.tokens(16, "uint16"))
    refused(r"pack='fit' is for other files than LitData's", fastload.formats.tokens(16, pack="fit"))
    (folder / "chunk-0-3.bin").rename(folder / "chunk-0-30.bin")
    read_refused(r"names chunk-0-3\.bin, which is not beside it")
    (folder / "index.json").unlink()
    read_refused(r"chunk-0-0\.bin is litdata by its name, whose tokens index\.json beside it describes, and there is")


def test_a_chunk_whose_tokens_are_not_counted_has_all_that_fit(cache: fastload.Cache, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "litdata_tokens", tmp_path / "data")
    about = json.loads((tmp_path / "data" / "index.json").read_bytes())
    for listed in about["chunks"]:
        listed["dim"] = None
    (tmp_path / "data" / "index.json").write_text(json.dumps(about))
    how = fastload.formats.tokens(16, overlap=0)
    urls = [f"{folder}/litdata_tokens/" if folder == WRITTEN else f"{folder}/data/" for folder in (WRITTEN, tmp_path)]
    found = [
        [sample["tokens"].tolist() for sample in fastload.StreamingDataset(url, cache=cache, format=how, shuffle=False)]
        for url in urls
    ]
    assert found[0] == found[1]
    one = fastload.StreamingDataset(f"{WRITTEN}/litdata_tokens/chunk-0-13.bin", cache=cache, format=how, shuffle=False)
    assert [sample["tokens"].tolist() for sample in one] == found[0][-5:]


def test_names_are_known_whatever_their_case() -> None:
    for name in ("chunk-0-0.bin", "CHUNK-12-3.BIN", "chunk-0-0.zstd.bin", "chunk-0-0.zstd:4.bin"):
        assert is_described(f"s3://b/{name}")
        assert may_be_indexed(f"s3://b/{name}")
    assert format_of("s3://b/chunk-0-0.zstd:4.bin") == "litdata"
    for name in ("chunk-0.bin", "chunk-0-0.bin.tar", "chunk-a-0.bin", "x.bin", "x.tar"):
        assert not is_described(f"s3://b/{name}")
        assert not may_be_indexed(f"s3://b/{name}")
    assert may_be_indexed("s3://b/A.MDS")
    assert not is_described("s3://b/A.MDS")


def test_a_manifest_says_where_the_description_is(cache: fastload.Cache, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    for _ in range(2):  # the second is made from the list that the first wrote
        dataset = fastload.StreamingDataset(f"{WRITTEN}/litdata/", cache=cache, manifest=file, columns=["id"])
        assert sorted(sample["id"] for sample in dataset) == list(range(-3, COUNT - 3))


# By itself


CONFIG = {"data_format": ["bytes", "int"], "data_spec": None, "compression": None, "encryption": None}
LEAF = {"type": None, "context": None, "children_spec": []}


def spec(node: Any) -> str:
    return json.dumps([1, node])


def node(kind: str, context: Any, *children: Any) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": list(children)}


def index_json(chunks: Mapping[str, tuple[int, int]] | None = None, **config: Any) -> bytes:
    rows = [{"filename": name, "chunk_bytes": size, "chunk_size": n} for name, (size, n) in (chunks or {}).items()]
    return json.dumps({"chunks": rows, "config": {**CONFIG, **config}}).encode()


def item(*leaves: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(leaf)) for leaf in leaves) + b"".join(leaves)


def chunk(items: Sequence[bytes]) -> bytes:
    """As litdata's writer makes it."""
    ends = np.cumsum([8 + 4 * len(items), *map(len, items)]).astype("<u4")
    return struct.pack("<I", len(items)) + ends.tobytes() + b"".join(items)


URL = "s3://b/chunk-0-0.bin"
LAYOUT = described_layout(index_json(), "s3://b/index.json")


def index_of(data: bytes, layout: bytes = LAYOUT, step: int = 1000) -> RecordIndex:
    indexer = indexer_for(URL, len(data), Described(layout))
    start = 0
    while not indexer.done and start < len(data):
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
        start += step
    index = indexer.finish()
    assert isinstance(index, RecordIndex)
    return index


def read(items: Sequence[bytes], columns: Sequence[str], layout: bytes = LAYOUT) -> list[list[bytes]]:
    records, offsets = np.frombuffer(b"".join(items), np.uint8), np.cumsum([0, *map(len, items)], dtype=np.int64)
    reader = record_reader(layout)
    found, there = split(reader, records, offsets, columns, lambda name, n: np.empty(n, np.uint8), lambda n: f"at {n}")
    assert there.all()
    return [[values[s:e].tobytes() for s, e in pairwise(ends)] for values, ends in (found[name] for name in columns)]


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=9)), max_size=30), st.integers(1, 99))
def test_what_was_written_is_found_whatever_the_pieces(rows: list[tuple[bytes, bytes]], step: int) -> None:
    items = [item(*row) for row in rows]
    data = chunk(items)
    index = index_of(data, step=step)
    assert stored_index(index.to_bytes(), URL, len(data)) == index
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    assert [data[start : start + size] for start, size in places] == items
    assert read(items, ["1", "0"]) == [[row[1] for row in rows], [row[0] for row in rows]]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (LEAF, ["0"]),
        (node("builtins.dict", '["a", "b"]', LEAF, node("builtins.list", "null", LEAF, LEAF)), ["a", "b/0", "b/1"]),
        (node("builtins.tuple", "null", LEAF, node("collections.OrderedDict", '["x"]', LEAF)), ["0", "1/x"]),
        (node("collections.defaultdict", {"default_factory_name": "int", "dict_context": ["k"]}, LEAF), ["k"]),
        (node("builtins.dict", "[5]", node("collections.namedtuple", '"mine"', LEAF)), ["5/0"]),
    ],
)
def test_columns_are_called_by_their_path(tree: Any, names: list[str]) -> None:
    layout = described_layout(index_json(data_format=["int"] * len(names), data_spec=spec(tree)), "s3://b/index.json")
    assert list(record_reader(layout).columns) == names


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{}", "is no index of"),
        (b'{"chunks": 7, "config": {}}', "is no index of LitData's chunks: Expected `array`"),
        (b'{"chunks": []}', "missing required field `config`"),
        (index_json({"a": (-1, 5)}), "Expected `int` >= 0"),
        (index_json(encryption={"algorithm": "fernet"}), "its chunks are encrypted"),
        (index_json(item_loader="TokensLoader"), r'hold tokens, .*format="tokens\(BLOCK_SIZE, ov'),
        (index_json(item_loader="TemporalArrayLoader"), "are made for TemporalArrayLoader, which fastload"),
        (index_json(compression="zstd", compression_level=3), "compressed by zstd in the way 3, which fastload"),
        (index_json(compression="lz4", compression_level="sample"), r"by lz4 .*with compression=\"zstd\", or without"),
        (index_json(data_format=["int", "hologram"]), "column '1' has the serializer 'hologram', which"),
        (index_json(data_format=["int"] * 5000), "5000 columns, above"),
        (index_json(data_spec="7"), "its data_spec does not describe 2 leaves"),
        (index_json(data_spec="[2, {}]"), "its version is 2, and 1 is known"),
        (index_json(data_spec="[1, {}]"), "does not describe 2 leaves"),
        (index_json(data_spec=spec(LEAF)), r"does not describe 2 leaves \(it has 1\)"),
        (index_json(data_spec=spec(node("builtins.dict", '["a"]', LEAF, LEAF))), "does not describe 2 leaves"),
        (index_json(data_spec=spec(node("builtins.dict", "7", LEAF, LEAF))), "does not describe 2 leaves"),
        (index_json(data_spec=spec(node("builtins.dict", "{", LEAF, LEAF))), "does not describe 2 leaves"),
        (index_json(data_spec=spec(node("os.system", "[]", LEAF, LEAF))), "a 'os.system', which fastload"),
        (index_json(data_spec=spec(node("builtins.dict", '["a", "a"]', LEAF, LEAF))), "it has the column 'a' twice"),
        (index_json(data_spec="[1, " + '{"children_spec": [' * 3000), "does not describe 2 leaves"),
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_an_error_that_names_it(data: bytes, says: str) -> None:
    for call in (listed_shards, described_layout):
        with pytest.raises(ConfigError, match=says if call is described_layout else None) as raised:
            call(data, "s3://b/index.json")
        assert "s3://b/index.json" in str(raised.value)


GOOD = chunk([item(b"xy", bytes(8)), item(b"", bytes(8))])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes are no chunk"),
        (GOOD[:-1], "was cut short"),
        (struct.pack("<II", 1 << 31, 20) + bytes(100), "which no chunk of LitData does"),
        (struct.pack("<II", 2, 16) + bytes(4), "which no chunk of LitData does"),
        (b"LDFZ01\0\0" + bytes(100), "is compressed in frames, which its index does not say"),
        (GOOD[:8] + struct.pack("<I", 5) + GOOD[12:], "before it begins"),
    ],
)
def test_a_damaged_chunk_is_an_error_that_names_it(data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=says) as raised:
        index_of(data)
    assert URL in str(raised.value)


def test_bytes_behind_the_items_are_left_alone() -> None:
    assert index_of(GOOD + b"an Arrow table").sample_count == 2


def test_sizes_that_lie_are_found_in_the_item() -> None:
    good = item(b"xy", bytes(8))
    for at, value in ((0, 200), (0, 3), (4, 1), (7, 255)):
        bad = good[:at] + bytes([value]) + good[at + 1 :]
        with pytest.raises(DecodeError, match="at 1: its 18 bytes are not what the sizes of its columns say"):
            read([good, bad], ["0"])


PACKED = layout_of("litdata", {"columns": [["0", "bytes"], ["1", "int"]], "is_packed": True})


def pack(data: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return packed


@given(st.lists(st.tuples(st.binary(max_size=400), st.binary(max_size=9)), max_size=9))
def test_items_that_are_packed_are_unpacked(rows: list[tuple[bytes, bytes]]) -> None:
    items = [pack(item(*row)) for row in rows]
    assert read(items, ["0", "1"], PACKED) == [[row[0] for row in rows], [row[1] for row in rows]]


def test_items_of_all_sizes_are_unpacked() -> None:
    for size in (0, 1, 200, 240, 256, 257, 65_000, 65_791, 65_792, 70_000):
        row = bytes(size), b"z"
        assert read([pack(item(*row))], ["0", "1"], PACKED) == [[row[0]], [row[1]]]


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (b"", "is no frame of zstd"),
        (zlib.compress(b"x"), "is no frame of zstd"),
        (b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00", "is no frame of zstd that says its size"),
        (b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + bytes(3), "has 1099511627776 bytes unpacked; at most"),
        (b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 20) + b"\x03\x00\x00A", "bytes unpacked, and says|cannot be"),
        (pack(item(b"xy", bytes(8)))[:-3], "cannot be unpacked"),
        (pack(item(b"xy", bytes(8))[:-1]), "not what the sizes of its columns say"),
    ],
)  # fmt: skip
def test_items_that_cannot_be_unpacked_are_refused(packed: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says) as raised:
        read([pack(item(b"", b"")), packed], ["0"], PACKED)
    assert str(raised.value).startswith("at 1: ")


@pytest.mark.parametrize(
    ("decoder", "value", "found"),
    [
        (Array(is_torch=True), struct.pack(">III", 19, 1, 3) + b"\0\1\2", np.array([False, True, True])),
        (Array(is_torch=True), struct.pack(">II", 18, 0) + struct.pack("<q", -7), np.array(-7)),
        (Array(is_torch=True), struct.pack(">IIII", 0, 2, 0, 4), np.empty((0, 4), np.float32)),
        (Array(is_torch=False), struct.pack("<IIII", 11, 2, 1, 1) + np.complex64(2j).tobytes(), np.array([[2j]])),
    ],
)  # fmt: skip
def test_arrays(decoder: Decoder, value: bytes, found: npt.NDArray[Any]) -> None:
    made = decoder.decode_one(value, "here")
    assert np.array_equal(made, found)
    assert made.shape == found.shape


@pytest.mark.parametrize(
    ("decoder", "value"),
    [
        (Array(is_torch=True), b""),
        (Array(is_torch=True), struct.pack(">II", 10, 0)),  # bfloat16
        (Array(is_torch=True), struct.pack(">III", 0, 1, 2) + bytes(7)),
        (Array(is_torch=True), struct.pack(">II", 0, 1 << 31)),
        (Array(is_torch=True), struct.pack(">II32I", 0, 32, *[1 << 31] * 31, 0)),
        (Array(is_torch=False), struct.pack("<II", 14, 0) + bytes(8)),  # object
        (Array(is_torch=False), struct.pack("<III", 0, 1, 1 << 31) + bytes(9)),
        (RgbPicture(), b"\x89PNG"),
        (Nested(), b"\x06" + struct.pack("<II", 1 << 31, 0)),
        (Nested(), b"\x06" + struct.pack("<II", 1 << 31, 1 << 31)),
        (Nested(), b"\x01" + struct.pack("<I", 1 << 31)),
        (Nested(), b"\x02" + struct.pack("<I", 1 << 31)),
        (Nested(), b"\x05\x01\0\0\0\0\0\0\0" * 3000),
        (Nested(), b"\x0b\x0b"),
        (Nested(), b"\x1f"),
        (Nested(), b"{"),
    ],
)
def test_values_that_cannot_be_are_refused_before_memory_is_taken(decoder: Decoder, value: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^here: "):
        decoder.decode_one(value, "here")


@given(st.integers(0, 0x21), st.binary(max_size=40))
def test_nested_values_of_any_bytes_are_decoded_or_refused(tag: int, value: bytes) -> None:
    try:
        Nested().decode_one(bytes([tag]) + value, "here")
    except DecodeError as error:
        assert str(error).startswith("here")  # noqa: PT017


@pytest.mark.parametrize("form", ["video", "tifffile", "audio:wav", "graph:pickle"])
def test_what_is_not_decoded_is_refused_by_name(form: str) -> None:
    reader = LitDataReader.of({"columns": [["a", form]], "is_packed": False})
    with pytest.raises(ConfigError, match=rf"column 'a' holds .*{form[:5]}.*fastload\.decode\.raw\(\)"):
        reader.decoder("a")
    for odd in ("no_header_tensor:10", "no_header_numpy:14", "no_header_tensor:", "no_header_tensor:x"):
        with pytest.raises(ConfigError, match="a column has the serializer 'no_header_"):
            LitDataReader.of({"columns": [["a", odd]], "is_packed": False}).decoder("a")


def test_a_chunk_is_named_whose_values_are_not_decoded(cache: fastload.Cache, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "litdata", tmp_path / "lit")
    about = json.loads((tmp_path / "lit" / "index.json").read_bytes())
    about["config"]["data_format"][0] = "video"
    (tmp_path / "lit" / "index.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"lit/chunk-0-0\.bin: column '\w+' holds a video, which fastload does not"):
        next(iter(fastload.StreamingDataset(f"{tmp_path}/lit/", cache=cache)))


def test_chunks_and_index_that_do_not_fit_are_an_error_that_names_them(cache: fastload.Cache, tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def refused(says: str, chunks: Mapping[str, tuple[int, int]], **config: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "chunk-0-0.bin").write_bytes(GOOD)
        (folder / "chunk-0-1.bin").write_bytes(GOOD)
        (folder / "index.json").write_bytes(index_json(chunks, **config))
        with pytest.raises((ConfigError, ShardError), match=says):
            list(fastload.StreamingDataset(f"{folder}/", cache=cache, shuffle=False))

    first, second = {"chunk-0-0.bin": (len(GOOD), 2)}, {"chunk-0-1.bin": (len(GOOD), 2)}
    refused(r"index\.json does not name chunk-0-1\.bin, which lies beside it", first)
    refused(r"names chunk-0-9\.bin, which is not beside it", {**first, **second, "chunk-0-9.bin": (1, 1)})
    refused(r"names ../x, which is not beside it", {**first, **second, "../x": (1, 1)})
    refused(r"says that chunk-0-1\.bin has 5 bytes, and it has", {**first, "chunk-0-1.bin": (5, 2)})
    refused("holds 2 samples, but .* says 3", {**first, "chunk-0-1.bin": (len(GOOD), 3)})
    refused("no chunk that is packed in frames", {**first, **second}, compression="zstd", compression_level="batch")
    (folder / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"chunk-0-0\.bin is litdata by its name.*and there is none"):
        list(fastload.StreamingDataset(f"{folder}/", cache=cache))
    (folder / "a.tar").write_bytes(bytes(1024))
    (folder / "index.json").write_bytes(index_json({**first, **second}))
    with pytest.raises(ConfigError, match=r"a\.tar is tar and .*chunk-0-0\.bin is litdata"):
        list(fastload.StreamingDataset(f"{folder}/", cache=cache))


def test_folders_with_other_columns_are_refused_naming_both(cache: fastload.Cache, tmp_path: Path) -> None:
    for name, form in (("a", "int"), ("b", "float")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chunk-0-0.bin").write_bytes(GOOD)
        config = {"data_format": ["bytes", form]}
        (tmp_path / name / "index.json").write_bytes(index_json({"chunk-0-0.bin": (len(GOOD), 2)}, **config))
    urls = [f"{tmp_path}/a/", f"{tmp_path}/b/"]
    dataset = fastload.StreamingDataset(urls, cache=cache, shuffle=False)
    says = r"a/chunk-0-0\.bin and .*b/chunk-0-0\.bin have other columns: column '1' is int in the one and float in"
    with pytest.raises(ShardError, match=says):
        list(fastload.DataLoader(dataset, batch_size=4))


def test_it_reads_what_litdata_writes_here(cache: fastload.Cache, tmp_path: Path) -> None:
    litdata = pytest.importorskip("litdata")
    writer = litdata.streaming.cache.Cache(input_dir=str(tmp_path / "made"), chunk_bytes=2000)
    for i in range(200):
        writer[i] = {"x": torch.arange(6).reshape(2, 3) * i, "y": (f"{i}", i / 3)}
    writer.done()
    writer.merge()
    dataset = fastload.StreamingDataset(f"{tmp_path}/made/", cache=cache, shuffle=False)
    assert len(dataset) == 200
    for i, sample in enumerate(dataset):
        assert np.array_equal(sample["x"], np.arange(6).reshape(2, 3) * i)
        assert (sample["y/0"], sample["y/1"]) == (f"{i}", i / 3)
