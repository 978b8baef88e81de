"""MDS shards, as MosaicML's writer makes them, and damaged ones."""

from __future__ import annotations

import decimal
import io
import json
import pickle
import shutil
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload.decode import Decoder
from fastload.errors import ConfigError, DecodeError, MissingColumnError, ShardError
from fastload.formats import RecordIndex, difference, indexer_for, record_reader, stored_index
from fastload.formats.mds import MdsArray, Picture, Several
from fastload.formats.records import split
from tests.conftest import Bucket

# Written by mosaicml-streaming 0.13: samples i from 0 to 23, as `expected` has them.
WRITTEN = Path(__file__).parent / "written" / "mds"
COUNT = 24


def expected(i: int) -> dict[str, Any]:
    return {
        "Name": f"näme {i}",
        "id": i - 3,
        "u8": i,
        "f16": np.float16(i / 4),
        "f64": i / 3,
        "raw": bytes(range(i)),
        "fixed": np.arange(6, dtype=np.int16).reshape(2, 3) * i,
        "typed": np.ones((1 + i % 3, 2), np.float32) * i,
        "free": np.arange(1 + i % 5, dtype=np.uint16),
        "doc": {"i": [i, None]},
        "whole": 10**i,
        "part": i / 7,
        "exact": decimal.Decimal(i) / 8,
    }


def check(sample: dict[str, Any], i: int) -> None:
    for name, value in expected(i).items():
        found = sample[name]
        if isinstance(value, np.ndarray):
            assert np.array_equal(found, value), name
            assert np.asarray(found).dtype == value.dtype, name
        else:
            assert (bytes(found) if name == "raw" else found) == value, name


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


def test_samples_are_what_their_own_reader_gives(cache: fastload.Cache) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=False)
    samples = list(dataset)
    assert len(samples) == len(dataset) == COUNT
    for i, sample in enumerate(samples):
        check(sample, i)
        assert sample["png"].size == sample["bare"].size == (3, 2)
        assert sample["png"].getpixel((0, 0)) == sample["bare"].getpixel((0, 0)) == (i, i, i)
        assert len(sample["several"]) == i % 3
    assert samples[0]["__key__"] == "shard.00000.mds/0"
    assert samples[-1]["__url__"].endswith("/shard.00002.mds")


def test_batches_hold_tensors_where_samples_are_alike(cache: fastload.Cache, s3: Bucket) -> None:
    for path in WRITTEN.iterdir():
        s3.put(f"mds/{path.name}", path.read_bytes())
    dataset = fastload.StreamingDataset(f"s3://{s3.name}/mds/", cache=cache, shuffle=True, seed=3)
    seen = []
    for batch in fastload.DataLoader(dataset, batch_size=5, num_workers=2):
        assert isinstance(batch["id"], torch.Tensor)
        assert batch["fixed"].dtype == torch.int16
        assert batch["fixed"].shape[1:] == (2, 3)
        assert isinstance(batch["raw"], fastload.Ragged)
        for at in range(len(batch["id"])):
            i = int(batch["id"][at]) + 3
            check({name: values[at] for name, values in batch.items()}, i)
            seen.append(i)
    assert sorted(seen) == list(range(COUNT))
    assert seen != sorted(seen)


def test_columns_are_chosen_and_decoded_as_the_user_says(cache: fastload.Cache) -> None:
    decode = {"ID": fastload.decode.raw()}
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=False, columns=["u8", "ID"], decode=decode)
    sample = next(iter(dataset))
    assert (sample["ID"], sample["u8"]) == (struct.pack("<q", -3), 0)
    text = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, decode={"ID": fastload.decode.integer()})
    with pytest.raises(
        DecodeError, match=r"column 'ID' \(stored as int of 8 bytes: a number without decode=, so leave"
    ):
        next(iter(fastload.DataLoader(text, batch_size=2)))
    dataset = fastload.StreamingDataset(
        f"{WRITTEN}/", cache=cache, shuffle=False, columns=["Name", "doc", "missing?"], as_tuple=True,
    )  # fmt: skip
    assert list(dataset)[4] == ("näme 4", {"i": [4, None]}, None)


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(cache: fastload.Cache) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, columns=["nam"], shuffle=False)
    with pytest.raises(
        MissingColumnError, match=r"shard\.00000\.mds.*has no such column; it has \['Name', 'bare'.*'name'"
    ):
        list(dataset)


def test_two_formats_under_a_prefix_are_refused(cache: fastload.Cache, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "both" / "b.mds").write_bytes((WRITTEN / "shard.00000.mds").read_bytes())
    with pytest.raises(ConfigError, match=r"a\.tar is tar and .*b\.mds is mds"):
        list(fastload.StreamingDataset(f"{tmp_path}/both/", cache=cache))
    dataset = fastload.StreamingDataset(f"{tmp_path}/both/", cache=cache, format="mds", shuffle=False)
    assert next(iter(dataset))["id"] == -3
    with pytest.raises(ConfigError, match="format='parquet' is not known; there are"):
        fastload.StreamingDataset(f"{tmp_path}/both/", cache=cache, format="parquet")


# By itself


def index_of(data: bytes, url: str = "s3://b/shard.mds", step: int = 1000) -> RecordIndex:
    indexer = indexer_for(url, len(data))
    start = 0
    while not indexer.done and start < len(data):
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
        start += step
    index = indexer.finish()
    assert isinstance(index, RecordIndex)
    return index


def shard(columns: list[tuple[str, str, int | None]], samples: list[list[bytes]]) -> bytes:
    """As MosaicML's writer makes it."""
    names, encodings, sizes = (list(each) for each in zip(*columns, strict=True))
    about = json.dumps({"column_names": names, "column_encodings": encodings, "column_sizes": sizes}).encode()
    records = []
    for values in samples:
        head = b"".join(struct.pack("<I", len(v)) for v, size in zip(values, sizes, strict=True) if size is None)
        records.append(head + b"".join(values))
    first = 4 + 4 * (len(records) + 1) + len(about)
    ends = np.cumsum([first, *map(len, records)]).astype("<u4")
    return struct.pack("<I", len(records)) + ends.tobytes() + about + b"".join(records)


def test_columns_that_differ_in_case_only_are_read_by_their_exact_names(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "shard.00000.mds"
    path.write_bytes(shard([("Text", "str", None), ("text", "str", None)], [[b"one", b"two"]]))

    def read(**options: Any) -> dict[str, Any]:
        (sample,) = fastload.StreamingDataset(path, cache=cache, **options)
        return {name: value for name, value in sample.items() if name[:2] != "__"}

    assert read() == {"Text": "one", "text": "two"}
    assert (read(columns=["text"]), read(columns=["Text"])) == ({"text": "two"}, {"Text": "one"})
    assert read(decode={"text": fastload.decode.raw()}) == {"text": b"two"}
    batch = next(iter(fastload.DataLoader(fastload.StreamingDataset(path, cache=cache), batch_size=1)))
    assert (batch["Text"], batch["text"]) == (["one"], ["two"])


COLUMNS: list[tuple[str, str, int | None]] = [("a", "bytes", None), ("b", "int", 8), ("c", "str", None)]


@given(
    st.lists(st.tuples(st.binary(max_size=40), st.integers(-9, 9), st.text(max_size=9)), max_size=30),
    st.integers(1, 99),
)
def test_what_was_written_is_found_whatever_the_pieces(rows: list[tuple[bytes, int, str]], step: int) -> None:
    samples = [[a, struct.pack("<q", b), c.encode()] for a, b, c in rows]
    data = shard(COLUMNS, samples)
    index = index_of(data, step=step)
    assert index.sample_count == len(rows)
    assert stored_index(index.to_bytes(), "s3://b/shard.mds", len(data)) == index
    records = np.frombuffer(b"".join(data[o : o + s] for o, s in zip(index.offset, index.size, strict=True)), np.uint8)
    offsets = np.concatenate([[0], np.cumsum(index.size)]).astype(np.int64)
    names = ["c", "a", "b"]
    found, there = split(
        record_reader(index.layout), records, offsets, names, lambda name, n: np.empty(n, np.uint8), str
    )
    assert there.all()
    for name, column in zip(names, (2, 0, 1), strict=True):
        values, ends = found[name]
        assert [values[s:e].tobytes() for s, e in pairwise(ends)] == [row[column] for row in samples]


GOOD = shard(COLUMNS, [[b"xy", bytes(8), b"z"], [b"", bytes(8), b"long"]])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes are no MDS shard"),
        (GOOD[:-1], "was cut short"),
        (GOOD + b"x", "was cut short"),
        (struct.pack("<II", 1 << 31, 20) + bytes(100), "which no MDS shard does"),
        (GOOD[:8] + struct.pack("<I", 5) + GOOD[12:], "before it begins"),
        (GOOD.replace(b"column_sizes", b"column_sizez"), "describes no columns"),
        (shard([("a", "no-such", None)], []), "'no-such', which fastload does not know"),
        (shard([("a", "int", 4)], []), "has 4 bytes where that takes 8"),
        (shard([("a", "ndarray:complex64", None)], []), "whose dtype MDS does not know"),
        (shard([("a", "bytes", None), ("a", "int", 8)], []), "the column 'a' twice"),
        (shard([("a", f"ndarray:int8:{'9' * 5000}", None)], []), "which fastload does not know"),
        (shard([("a", "ndarray:int8:0,9999999999", 0)], []), "larger than an array in a shard can be"),
        (shard([("a", f"ndarray:int8:0{',1' * 40}", 0)], []), "larger than an array in a shard can be"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=says) as raised:
        index_of(data)
    assert "s3://b/shard.mds" in str(raised.value)


def test_sizes_that_lie_are_found_in_the_record() -> None:
    index = index_of(GOOD)
    records = np.frombuffer(b"".join(GOOD[o : o + s] for o, s in zip(index.offset, index.size, strict=True)), np.uint8)
    offsets = np.concatenate([[0], np.cumsum(index.size)]).astype(np.int64)
    for at, value in ((0, 200), (0, 3), (offsets[1], 1), (offsets[1] + 7, 255)):
        bad = records.copy()
        bad[at] = value
        with pytest.raises(DecodeError, match="it is damaged"):
            split(record_reader(index.layout), bad, offsets, ["a"], lambda name, n: np.empty(n, np.uint8), str)


@given(st.binary(max_size=200))
def test_a_stored_index_that_is_damaged_is_refused(noise: bytes) -> None:
    stored = bytearray(index_of(GOOD).to_bytes())
    for number, byte in enumerate(noise):
        stored[(number * 7) % len(stored)] ^= byte
    if bytes(stored) != index_of(GOOD).to_bytes():
        with pytest.raises(ShardError, match="stored index is damaged"):
            stored_index(bytes(stored), "s3://b/shard.mds", len(GOOD))


@pytest.mark.parametrize(
    ("decoder", "value"),
    [
        (MdsArray(None, None), bytes([34, 2 << 2 | 3]) + struct.pack("<QQ", 0, 1 << 63)),
        (Picture(is_bare=True), struct.pack("<III", 60_000, 60_000, 3) + b"RGB"),
        (Picture(is_bare=True), struct.pack("<III", 0, 1 << 31, 3) + b"RGB"),
        (Picture(is_bare=True), struct.pack("<III", 2, 2, 3) + b"odd" + bytes(12)),
    ],
)
def test_sizes_that_no_value_can_have_are_refused_before_memory_is_taken(decoder: Decoder, value: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^here: "):
        decoder.decode_one(value, "here")


@given(st.binary(max_size=64))
def test_values_of_any_bytes_are_decoded_or_refused(value: bytes) -> None:
    for decoder in (
        MdsArray(None, None),
        MdsArray(np.dtype("<i2"), None),
        MdsArray(None, (2,)),
        Several(MdsArray(None, None)),
    ):
        try:
            decoder.decode_one(value, "here")
        except DecodeError as error:
            assert str(error).startswith("here")  # noqa: PT017


def test_pickles_are_read_only_where_the_user_allows_it(cache: fastload.Cache, tmp_path: Path) -> None:
    columns: list[tuple[str, str, int | None]] = [("a", "pkl", None), ("b", "int", 8)]
    path = tmp_path / "a.mds"
    path.write_bytes(shard(columns, [[pickle.dumps({"x": 1}), bytes(8)]]))
    refused: list[dict[str, Any]] = [{}, {"allow_pickle": False}, {"columns": ["A"]}]
    for options in refused:
        with pytest.raises(ConfigError, match=r"a\.mds: sample 'a\.mds/0', column '[aA]': it holds pickles.*allow_p"):
            list(fastload.StreamingDataset(str(path), cache=cache, **options))
    raw = {"a": fastload.decode.raw()}
    (sample,) = fastload.StreamingDataset(str(path), cache=cache, columns=["a", "b"], decode=raw)
    assert sample["a"] == pickle.dumps({"x": 1})
    (sample,) = fastload.StreamingDataset(str(path), cache=cache, allow_pickle=True)
    assert (sample["a"], sample["b"]) == ({"x": 1}, 0)
    path.write_bytes(shard(columns, [[b"no pickle", bytes(8)]]))
    with pytest.raises(DecodeError, match=r"'a\.mds/0', column 'a': 9 bytes are no pickle that can be read"):
        list(fastload.StreamingDataset(str(path), cache=cache, allow_pickle=True))
    with pytest.raises(ConfigError, match="allow_pickle=1 must be True"):
        fastload.StreamingDataset(str(path), cache=cache, allow_pickle=1)  # type: ignore[arg-type]


def test_shards_with_other_columns_are_refused_naming_both(cache: fastload.Cache, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mds").write_bytes(shard([("a", "int", 8)], [[bytes(8)]]))
    (tmp_path / "data" / "b.mds").write_bytes(shard([("a", "str", None)], [[b"x"]]))
    dataset = fastload.StreamingDataset(f"{tmp_path}/data/", cache=cache, shuffle=False)
    with pytest.raises(ShardError, match=r"a\.mds and .*b\.mds have other columns: column 'a' is"):
        list(fastload.DataLoader(dataset, batch_size=2))


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (("x", "jpeg", None), ("x", "png", None), "column 'x' is jpeg in the one and png in the other"),
        (("x", "pkl", None), ("x", "bytes", None), "column 'x' is pkl in the one and bytes in the other"),
        (("x", "int", 8), ("y", "int", 8), "column 'x' is int of 8 bytes in the one and missing in the other"),
    ],
)
def test_what_differs_is_said_by_encoding(
    one: tuple[str, str, int | None], other: tuple[str, str, int | None], says: str
) -> None:
    assert difference(index_of(shard([one], [])).layout, index_of(shard([other], [])).layout) == says


def test_shards_of_many_columns_are_read_whole(cache: fastload.Cache, tmp_path: Path) -> None:
    count = 45_000  # enough for a table of all places to be too large for a shard of a tar
    names = [f"c{number:02}" for number in range(40)]
    path = tmp_path / "wide.mds"
    path.write_bytes(shard([(name, "uint8", 1) for name in names], [[bytes([i % 251])] * 40 for i in range(count)]))
    dataset = fastload.StreamingDataset(str(path), cache=cache, shuffle="global")
    batch = next(iter(fastload.DataLoader(dataset, batch_size=64)))
    assert set(names) < set(batch)
    assert fastload.StreamingDataset(str(path), cache=cache)[1000]["c39"] == 1000 % 251


def test_a_column_that_every_sample_has_anyway_is_not_mixed_up_with_that(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.mds"
    path.write_bytes(shard([("__key__", "str", None), ("x", "int", 8)], [[b"k", bytes(8)]]))
    with pytest.raises(ConfigError, match=r"a\.mds: it has a column '__key__', which every sample has anyway"):
        list(fastload.StreamingDataset(str(path), cache=cache))
    (sample,) = fastload.StreamingDataset(str(path), cache=cache, columns=["x"])
    assert (sample["__key__"], sample["x"]) == ("a.mds/0", 0)


def test_images_of_a_column_are_decoded(cache: fastload.Cache, tmp_path: Path) -> None:
    from PIL import Image

    jpg = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(jpg, "JPEG")
    path = tmp_path / "a.mds"
    path.write_bytes(shard([("image", "jpeg", None)], [[jpg.getvalue()]] * 3))
    dataset = fastload.StreamingDataset(str(path), cache=cache, decode={"image": fastload.decode.image(size=8)})
    (batch,) = fastload.DataLoader(dataset, batch_size=3)
    pixels: npt.NDArray[Any] = batch["image"].numpy()
    assert pixels.shape[0] == 3


def test_an_index_beside_the_shards_says_how_many_samples_there_are(cache: fastload.Cache, tmp_path: Path) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache)
    assert len(dataset) == COUNT
    folder = tmp_path / "data"
    shutil.copytree(WRITTEN, folder)
    index = json.loads((folder / "index.json").read_text())

    def refused(says: str, **change: Any) -> None:
        (folder / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises((ConfigError, ShardError), match=says):
            list(fastload.StreamingDataset(f"{folder}/", cache=cache))

    first, *others = index["shards"]
    refused("version 3 of MDS", version=3)
    refused("is no index of MDS shards", shards=7)
    refused("is packed as nothing that is read", shards=[{**first, "zip_data": first["raw_data"]}, *others])
    (folder / "shard.00000.mds.zstd").write_bytes(b"12345")
    packed = {"basename": "shard.00000.mds.zstd", "bytes": 5}
    refused("lies beside it, which has the same samples", shards=[{**first, "zip_data": packed}, *others])
    (folder / "shard.00000.mds.zstd").unlink()
    refused("names hologram shards", shards=[{**first, "format": "hologram"}, *others])
    gone = {**first["raw_data"], "basename": "shard.00009.mds"}
    refused(r"names shard\.00009\.mds, which is not beside it", shards=[{**first, "raw_data": gone}])
    short = {**first["raw_data"], "bytes": 5}
    refused(r"says that shard\.00000\.mds has 5 bytes, and it has", shards=[{**first, "raw_data": short}])
    refused("holds .* samples, but .* says 1", shards=[{**first, "samples": 1}, *others])


@pytest.mark.parametrize("chunk_bytes", ["64KiB", "8MiB"])
def test_large_records_are_found_by_their_heads(cache: fastload.Cache, tmp_path: Path, chunk_bytes: str) -> None:
    """Whose heads and values may lie in any number of chunks."""
    rng = np.random.default_rng(1)
    samples = [
        [rng.bytes(int(rng.integers(0, 90_000))), struct.pack("<q", i), f"é{i}".encode() * (i % 3)] for i in range(40)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.mds").write_bytes(shard(COLUMNS, samples[:25]))
    (folder / "b.mds").write_bytes(shard(COLUMNS, samples[25:]))
    with fastload.Cache(tmp_path / "c", ram_bytes="16MiB", disk_bytes=0, chunk_bytes=chunk_bytes) as other:
        dataset = fastload.StreamingDataset(f"{folder}/", cache=other, shuffle=True)
        batches = list(fastload.DataLoader(dataset, batch_size=7, num_workers=2))
        found = {
            int(number): (bytes(a), c)
            for batch in batches
            for a, number, c in zip(batch["a"], batch["b"], batch["c"], strict=True)
        }
        assert found == {i: (a, c.decode()) for i, (a, _, c) in enumerate(samples)}
        few = fastload.StreamingDataset(f"{folder}/", cache=other, columns=["C", "nothing?"])
        assert [sample["C"] for sample in few] == [c.decode() for _, _, c in samples]
        dataset.close()
        few.close()
    damaged = bytearray(shard(COLUMNS, samples))
    at = damaged.index(samples[3][0]) - 8
    damaged[at : at + 4] = struct.pack("<I", 1 << 30)
    (tmp_path / "bad.mds").write_bytes(damaged)
    with pytest.raises(DecodeError, match=r"bad\.mds: sample 'bad\.mds/3': its \d+ bytes are not what the sizes"):
        list(fastload.StreamingDataset(str(tmp_path / "bad.mds"), cache=cache))
