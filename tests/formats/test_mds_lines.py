"""Shards of MosaicML's streaming that are text, and digests of shards: as its own writers make them, and damaged."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload import prepare
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats import RecordIndex, described, indexer_for, record_reader, stored_index
from fastload.formats.digests import new_digest
from fastload.formats.records import split
from tests.formats import test_contract

# Written by mosaicml-streaming 0.13: samples i from 0 to 23, as `check` has them.
WRITTEN = Path(__file__).parent / "written"
COUNT = 24
WAYS = ["mds_json", "mds_json_zstd", "mds_csv", "mds_tsv", "mds_xsv"]


def check(sample: dict[str, Any], i: int, name: str) -> None:
    text = f"n{'a' if name == 'mds_xsv' else 'ä'}me {i}" + "|" * (i % 2)
    assert (sample["Name"], int(sample["id"]), int(sample["größe"])) == (text, i - 3, 2**i)
    assert math.isnan(sample["score"]) if i == 0 else sample["score"] == i / 3


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


@pytest.mark.parametrize("name", WAYS)
def test_samples_are_what_their_own_reader_gives(cache: fastload.Cache, name: str) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN / name}/", cache=cache, shuffle=False)
    assert len(dataset) == COUNT  # before a shard is read
    samples = list(dataset)
    for i, sample in enumerate(samples):
        check(sample, i, name)
    assert len(samples) == COUNT
    ending = name.split("_")[1]
    assert samples[1]["__key__"] == f"shard.00000.{ending}/1"
    assert set(samples[0]) == {"__key__", "__url__", "Name", "größe", "id", "score"}
    seen = []
    shuffled = fastload.StreamingDataset(f"{WRITTEN / name}/", cache=cache, shuffle=True, columns=["ID", "name"])
    for batch in fastload.DataLoader(shuffled, batch_size=5):
        assert batch["ID"].dtype == torch.int64
        seen += [(number, text.split()[1].strip("|")) for number, text in zip(batch["ID"], batch["name"], strict=True)]
    assert sorted((int(number), int(text)) for number, text in seen) == [(i - 3, i) for i in range(COUNT)]


def test_it_reads_what_streaming_writes_here(cache: fastload.Cache, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    rows = [{"a": f"é{i}", "b": -i, "c": i / 7} for i in range(100)]
    for name in ("JSON", "CSV", "TSV"):
        folder = tmp_path / name
        options = {"size_limit": 700, "hashes": ["sha1", "xxh64"], "compression": "zstd" if name == "TSV" else None}
        with getattr(streaming, f"{name}Writer")(
            columns={"a": "str", "b": "int", "c": "float"}, out=str(folder), **options
        ) as out:
            for row in rows:
                out.write(row)
        found = list(fastload.StreamingDataset(f"{folder}/", cache=cache, shuffle=False))
        assert [{column: sample[column] for column in row} for sample, row in zip(found, rows, strict=True)] == rows


def test_a_shard_is_named_by_itself(cache: fastload.Cache, tmp_path: Path) -> None:
    url = f"{WRITTEN}/mds_json/shard.00001.json"
    assert [int(sample["id"]) for sample in fastload.StreamingDataset(url, cache=cache, shuffle=False)] == [
        *range(8, 18)
    ]
    shutil.copy(url, tmp_path)
    with pytest.raises(ConfigError, match=r"shard\.00001\.json is mds by its name, whose samples index\.json beside"):
        list(fastload.StreamingDataset(f"{tmp_path}/shard.00001.json", cache=cache))


# By themselves


def about(form: str, name: str, data: bytes, samples: int, **more: Any) -> bytes:
    """An index of one shard."""
    fields: dict[str, Any] = {"column_names": ["a", "b"], "column_encodings": ["str", "int"]}
    fields = {"columns": {"a": "str", "b": "int"}} if form == "json" else fields
    raw = {"basename": name, "bytes": len(data), "hashes": {}}
    shard = {"format": form, "newline": "\n", "samples": samples, "raw_data": raw, "zip_data": None, **fields, **more}
    return json.dumps({"version": 2, "shards": [shard]}).encode()


def index_of(data: bytes, index: bytes, url: str = "s3://b/shard.00000.csv", step: int = 1000) -> RecordIndex:
    indexer = indexer_for(url, len(data), described(index, "s3://b/index.json").get(url.rpartition("/")[2]))
    start = 0
    while not indexer.done:
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
        start += step
    found = indexer.finish()
    assert isinstance(found, RecordIndex)
    assert stored_index(found.to_bytes(), url, len(data)) == found
    return found


def values(data: bytes, index: RecordIndex, columns: Sequence[str]) -> list[list[bytes]]:
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    records = [data[start : start + size] for start, size in places]
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    joined = np.frombuffer(b"".join(records), np.uint8)
    found, there = split(
        record_reader(index.layout),
        joined,
        offsets,
        columns,
        lambda name, n: np.empty(n, np.uint8),
        lambda n: f"at {n}",
    )
    assert there.all()
    return [[part[s:e].tobytes() for s, e in pairwise(ends)] for part, ends in (found[name] for name in columns)]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\n\r,:;"), max_size=9)


@given(
    st.lists(st.tuples(TEXTS, st.integers(-9, 9)), max_size=20),
    st.sampled_from([",", "::", ";"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 99),
)
def test_what_was_written_is_found_whatever_the_pieces(
    rows: list[tuple[str, int]], separator: str, newline: str, step: int
) -> None:
    lines = [separator.join(["a", "b"]), *(separator.join([a, str(b)]) for a, b in rows)]
    data = "".join(line + newline for line in lines).encode()
    index = about("xsv", "shard.0.xsv", data, len(rows), separator=separator, newline=newline)
    found = values(data, index_of(data, index, "s3://b/shard.0.xsv", step), ["B", "a"])
    assert found == [[str(b).encode() for _, b in rows], [a.encode() for a, _ in rows]]
    lines = [json.dumps({"b": b, "a": a}) for a, b in rows]
    data = "".join(line + newline for line in lines).encode()
    index = about("json", "shard.0.json", data, len(rows), newline=newline)
    found = values(data, index_of(data, index, "s3://b/shard.0.json", step), ["A", "b"])
    assert [list(map(json.loads, column)) for column in found] == [[a for a, _ in rows], [b for _, b in rows]]


GOOD = b"a,b\nx,1\ny,2\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "begins with b''"),
        (GOOD[:-1], "its last line ends at 8: it was cut short"),
        (GOOD[4:], r"begins with b'x,1\\n', and its columns are b'a,b\\n'"),
        (b"a,b,c\n1,2,3\n", "it is another one"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=rf"s3://b/shard\.00000\.csv.*{says}"):
        index_of(data, about("csv", "shard.00000.csv", data, 2))


def test_lines_that_are_damaged_are_found_in_them() -> None:
    for data, says in ((b"a,b\nx,1\ny\n", "at 1: it has 1 values"), (b"a,b\nx,1\ny,2,3\n", "at 1: it has 3 values")):
        with pytest.raises(DecodeError, match=says):
            values(data, index_of(data, about("csv", "shard.00000.csv", data, 2)), ["a"])
    data = b'{"a": 1}\n[]\n'
    with pytest.raises(DecodeError, match=r"at 1: b'\[\]' is no JSON object"):
        values(data, index_of(data, about("json", "shard.0.json", data, 2), "s3://b/shard.0.json"), ["a"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"format": "parquet"}, "names parquet shards, which fastload does not know"),
        ({"column_names": []}, "does not say what the columns of its csv shards are"),
        ({"column_encodings": ["str"]}, "does not say what the columns"),
        ({"column_encodings": ["str", "bytes"]}, "column 'b' has the encoding 'bytes'; lines have"),
        ({"column_names": ["a", "a"]}, "or one twice: 'a'"),
        ({"newline": ""}, "they cannot be told apart"),
        ({"newline": "\n,"}, "they cannot be told apart"),
        ({"format": "xsv"}, "does not say what the columns of its xsv shards are"),
        ({"format": "json", "columns": {"a": "list"}}, "column 'a' has the encoding 'list'"),
        ({"column_names": [f"c{n}" for n in range(5000)], "column_encodings": ["str"] * 5000}, "5000 columns, above"),
        ({"version": 7, "raw_data": {"basename": 7}}, "is no index of MDS shards"),
    ],
)
def test_an_index_that_makes_no_sense_is_an_error_that_names_it(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"s3://b/index\.json.*{says}"):
        described(about("csv", "shard.00000.csv", GOOD, 2, **more), "s3://b/index.json")


def test_a_count_that_lies_is_an_error(cache: fastload.Cache, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "shard.00000.csv").write_bytes(GOOD)
    (folder / "index.json").write_bytes(about("csv", "shard.00000.csv", GOOD, 3))
    with pytest.raises(ShardError, match=r"shard\.00000\.csv holds 2 samples, but .* says 3"):
        list(fastload.StreamingDataset(f"{folder}/", cache=cache))


# Digests


def with_digests(folder: Path, digests: dict[str, str]) -> str:
    """The URL of a folder with a shard whose index has these."""
    folder.mkdir()
    test_contract.mds(folder, [range(30)])
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["raw_data"]["hashes"] = digests
    (folder / "index.json").write_text(json.dumps(index))
    return f"{folder}/"


def ids(url: str, cache: fastload.Cache) -> list[int]:
    return [int(sample["id"]) for sample in fastload.StreamingDataset(url, cache=cache, shuffle=False)]


@pytest.mark.parametrize("algorithm", [*sorted(xxhash.algorithms_available), *sorted(hashlib.algorithms_guaranteed)])
def test_a_digest_that_is_wrong_is_an_error_that_names_both(
    algorithm: str, cache: fastload.Cache, tmp_path: Path
) -> None:
    test_contract.mds(tmp_path, [range(30)])
    made = new_digest(algorithm)
    if algorithm.startswith("shake_"):  # streaming does not write them
        assert made is None
        return
    made.update((tmp_path / "0.mds").read_bytes())
    good = made.hexdigest()
    assert ids(with_digests(tmp_path / "good", {algorithm: good}), cache) == list(range(30))
    bad = ("1" if good[0] != "1" else "2") + good[1:]
    with pytest.raises(ShardError, match=rf"bad/0\.mds: its {algorithm} is {good}, and the index beside it says {bad}"):
        ids(with_digests(tmp_path / "bad", {algorithm: bad}), cache)


def test_a_digest_is_checked_once(cache: fastload.Cache, tmp_path: Path) -> None:
    """And the index that was made then is what later data sets read by, without the digest."""
    digest = xxhash.xxh64
    test_contract.mds(tmp_path, [range(30)])
    good = digest((tmp_path / "0.mds").read_bytes()).hexdigest()
    url = with_digests(tmp_path / "data", {"sha1": "0" * 40, "xxh64": good})  # the fastest of several
    assert ids(url, cache) == list(range(30))
    index = json.loads((tmp_path / "data" / "index.json").read_bytes())
    index["shards"][0]["raw_data"]["hashes"] = {"xxh64": "0"}
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    assert ids(url, cache) == list(range(30))


def test_what_is_in_a_packed_shard_has_the_digest(cache: fastload.Cache, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "mds_json_zstd", tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_bytes())
    index["shards"][1]["raw_data"]["hashes"]["md5"] = "0" * 32
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"shard\.00001\.json\.zstd: its md5 is .*says 0000"):
        list(fastload.StreamingDataset(f"{tmp_path}/data/", cache=cache))


def test_a_shard_that_is_damaged_is_found_by_its_digest(cache: fastload.Cache, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "mds_csv", tmp_path / "data")
    path = tmp_path / "data" / "shard.00000.csv"
    path.write_bytes(path.read_bytes().replace(b"23|", b"24|"))
    with pytest.raises(ShardError, match=r"shard\.00000\.csv: its xxh3_64 is"):
        prepare.index([f"{tmp_path}/data/"], cache)


def test_a_digest_that_nothing_here_computes_is_warned_of(cache: fastload.Cache, tmp_path: Path) -> None:
    url = with_digests(tmp_path / "data", {"crc128": "0"})
    with pytest.warns(
        RuntimeWarning, match=r"data/index\.json has digests of shards that nothing here computes \(crc128"
    ):
        assert ids(url, cache) == list(range(30))


def test_a_list_of_shards_knows_the_digests(cache: fastload.Cache, tmp_path: Path) -> None:
    url = with_digests(tmp_path / "data", {"sha1": "0" * 40})
    file = tmp_path / "list.json"
    dataset = fastload.StreamingDataset(url, cache=cache, manifest=file)
    for _ in range(2):  # the second is made from the list that the first wrote
        with pytest.raises(ShardError, match="its sha1 is"):
            list(dataset)
        dataset = fastload.StreamingDataset(url, cache=cache, manifest=file)
