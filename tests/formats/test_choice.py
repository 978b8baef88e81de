"""Which shards a prefix has, which format they are of, and what is said where that cannot be."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastload
from fastload.errors import ConfigError, ObjectMissingError, ShardError
from fastload.formats import format_of, shard_name, wids
from fastload.prepare import index
from fastload.store.packing import packing_of
from tests.formats import test_contract
from tests.shards import tar_of

LINES = b"".join(b'{"id": %d}\n' % number for number in range(20))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, service="inprocess") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def ids(urls: Any, cache: fastload.Cache, **options: Any) -> list[int]:
    dataset = fastload.StreamingDataset(urls, cache=cache, **{"shuffle": False, "columns": ["id"], **options})
    return [int(sample["id"]) for sample in dataset]


@pytest.mark.parametrize("name", ["x.bin", "x", "x.txt", "x.json", "x.tar", "chunk-0-1.bin", "shard.00000.json"])
@pytest.mark.parametrize("is_pattern", [False, True])
def test_a_format_that_is_named_counts_whatever_the_name(
    name: str, is_pattern: bool, folder: Path, cache: fastload.Cache
) -> None:
    (folder / name).write_bytes(LINES)
    (folder / f"2{name}").write_bytes(LINES)
    urls: Any = f"{folder}/{{,2}}{name}" if is_pattern else [folder / name, folder / f"2{name}"]
    assert ids(urls, cache, format="jsonl") == [*range(20)] * 2
    assert list(fastload.schema(urls, cache=cache, format="jsonl")) == ["json"]
    assert fastload.warm(urls, cache=cache, format="jsonl").sample_count == 40
    assert index([str(url) for url in ([urls] if is_pattern else urls)], cache, how="jsonl").sample_count == 40


@pytest.mark.parametrize("name", ["tar", "mds", "tfrecord"])
def test_so_does_each_format(name: str, tmp_path: Path, folder: Path, cache: fastload.Cache) -> None:
    test_contract.FORMATS[name](folder, [range(10)])
    (shard,) = [path for path in folder.iterdir() if path.name != "index.json"]
    shard.rename(tmp_path / "odd.bin")
    dataset = test_contract.data_set(name, str(tmp_path / "odd.bin"), cache, format=name)  # type: ignore[arg-type]
    assert len(list(dataset)) == 10


def test_large_files_are_cut_by_the_format_that_is_named(
    folder: Path, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastload.formats.pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(fastload.formats.pieces, "TAIL_BYTES", 20)
    (folder / "x.bin").write_bytes(LINES)
    dataset = fastload.StreamingDataset(folder / "x.bin", cache=cache, format="jsonl", columns=["id"], shuffle=False)
    keys = [sample["__key__"] for sample in dataset]
    assert keys[0] == "x.bin/0"
    assert any(key.startswith("x.bin@100/") for key in keys)
    assert len(set(keys)) == 20


def test_a_list_names_shards_of_the_format_that_is_named(folder: Path, cache: fastload.Cache) -> None:
    (folder / "x.bin").write_bytes(LINES)
    for number in range(2):
        about = {"wids_version": 1, "shardlist": [{"url": "x.bin", "nsamples": 20}]}
        (folder / f"list-{number}.json").write_text(json.dumps(about))
    assert ids(folder / "list-0.json", cache, format="jsonl") == [*range(20)]
    assert ids(f"{folder}/list-{{0,1}}.json", cache, format="jsonl") == [*range(20)] * 2


def test_the_first_of_many_files_says_that_none_is_a_list(
    folder: Path, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins, heads = wids.begins_as_list, []
    monkeypatch.setattr(wids, "begins_as_list", lambda head: heads.append(head) or begins(head))  # type: ignore[func-returns-value]
    for number in range(5):
        (folder / f"{number}.json").write_bytes(LINES)
    assert len(ids([folder / f"{number}.json" for number in range(5)], cache, format="jsonl")) == 100
    assert heads == [LINES]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("p.jsonl", "p.jsonl.gz"),
        ("p.jsonl.zst", "p.jsonl.gz"),
        ("p.tar", "p.tar.gz"),
        ("p.tar", "p.tgz"),
        ("p.tfrecord", "p.tfrecord.bz2"),
        ("sub/p.mds", "sub/p.mds.zstd"),
    ],
)
def test_a_shard_that_lies_there_packed_as_well_is_an_error_that_names_both(
    one: str, other: str, folder: Path, cache: fastload.Cache
) -> None:
    (folder / "sub").mkdir()
    for name in (one, other):
        (folder / name).write_bytes(b"any")
    with pytest.raises(ConfigError, match="have the same samples") as caught:
        ids(f"{folder}/", cache)
    assert f"{folder}/{one} " in str(caught.value)
    assert f"{folder}/{other} " in str(caught.value)
    assert "delete" in str(caught.value)


def test_one_of_both_can_be_named(folder: Path, cache: fastload.Cache) -> None:
    (folder / "p.jsonl").write_bytes(LINES)
    (folder / "p.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "p.json.gz").write_bytes(gzip.compress(LINES))
    (folder / "p.json").write_bytes(b"{}")
    assert ids(folder / "p.jsonl.gz", cache) == [*range(20)]
    (folder / "p.jsonl").unlink()
    assert sorted(ids(f"{folder}/", cache)) == sorted([*range(20)] * 2)


def test_packed_json_beside_other_shards_is_not_taken_for_data(folder: Path, cache: fastload.Cache) -> None:
    (folder / "0.tar").write_bytes(tar_of({str(number): {"id": b"%d" % number} for number in range(5)}))
    for name in ("0.json", "about.json"):
        (folder / name).write_bytes(b"{}")
        (folder / f"{name}.gz").write_bytes(gzip.compress(LINES))
    assert ids(f"{folder}/", cache, decode={"id": int}) == [*range(5)]
    assert ids([f"{folder}/", folder / "0.tar"], cache, decode={"id": int}) == [*range(5)] * 2
    assert ids(f"{folder}/", cache, format="jsonl") == [*range(20)] * 2
    (folder / "0.tar").unlink()
    assert ids(f"{folder}/", cache) == [*range(20)] * 2


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["a.bin", "b.bin", "c.txt"],
            [r"3 other objects \(2 \.bin, 1 \.txt\), the first: a\.bin", r"tokens\("],
        ),
        (["a.npy"], [r"1 other object \(1 \.npy\)", r'format="tokens\(LENGTH, DTYPE\)"']),
        (["a.json", "b"], [r"1 \.json, 1 without an ending", r'format="jsonl"']),
        (["a.parquet"], [r"1 \.parquet", r"tables \(\.parquet\) are not read", r"\.to_json\("]),
        (["a.jpg", "b.jpg", "labels.csv"], [r"2 \.jpg, 1 \.csv", "tar --sort=name"]),
    ],
)
def test_a_prefix_without_shards_says_what_it_has_and_what_to_do(
    names: list[str], says: list[str], folder: Path, cache: fastload.Cache
) -> None:
    for name in names:
        (folder / name).write_bytes(b"1234")
    with pytest.raises(ObjectMissingError) as caught:
        ids(f"{folder}/", cache)
    for each in says:
        assert re.search(each, str(caught.value)), caught.value
    assert ".jsonl" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert ".jsonl.gz" not in str(caught.value)


@pytest.mark.parametrize("name", ["tar", "mds", "tfrecord", "litdata"])
def test_where_shards_of_another_format_lie_the_cure_is_to_leave_out_the_format(
    name: Any, folder: Path, cache: fastload.Cache
) -> None:
    (folder / "0.jsonl").write_bytes(LINES)
    (folder / "index.json").write_bytes(b"{}")
    with pytest.raises(
        ObjectMissingError, match=r"1 \.jsonl.*; check its name, or leave out the format, which then goes"
    ):
        ids(f"{folder}/", cache, format=name)


def test_windows_that_no_file_fills_name_the_length_and_the_longest_file(folder: Path, cache: fastload.Cache) -> None:
    for number, count in enumerate((30, 50, 40)):
        np.arange(count, dtype=np.uint16).tofile(folder / f"{number}.bin")
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, format=fastload.formats.tokens(64, "uint16"))
    with pytest.raises(ConfigError, match=r"length=64.*1\.bin, has 50 tokens; give a length of at most 50"):
        list(dataset)


def test_so_does_a_warning_where_only_headers_say_how_long_files_are(folder: Path, cache: fastload.Cache) -> None:
    np.save(folder / "0.npy", np.arange(50, dtype=np.uint16))
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, format=fastload.formats.tokens(64))
    with pytest.warns(UserWarning, match="shorter than the length= of a sample"):
        assert list(dataset) == []


def nothing(data: bytes) -> None:
    return None


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_decode_function_that_returns_none_is_named(as_tuple: bool, folder: Path, cache: fastload.Cache) -> None:
    (folder / "0.tar").write_bytes(tar_of({str(number): {"id": b"1", "x": b"2"} for number in range(4)}))
    dataset = fastload.StreamingDataset(
        f"{folder}/", cache=cache, columns=["id", "x"], decode={"x": nothing}, as_tuple=as_tuple, shuffle=False
    )
    says = r"decode=\{'x': nothing\}: it returned None for column 'x' of sample '0' of .*0\.tar; .*filter"
    for count in (0, 1):
        with pytest.raises(ConfigError, match=says):
            list(fastload.DataLoader(dataset, batch_size=4, num_workers=count))
    assert len(list(fastload.DataLoader(dataset, batch_size=4, collate_fn=list))) == 1


def test_what_was_read_in_another_format_does_not_count(folder: Path, cache: fastload.Cache) -> None:
    path = folder / "x.tar"
    path.write_bytes(LINES)
    assert ids(path, cache, format="jsonl") == [*range(20)]
    with pytest.raises(ShardError, match=r"x\.tar, offset 0"):
        ids(path, cache)
    sidecar = folder / "indexes.arrow"
    index([str(path)], cache, how="jsonl", output=str(sidecar))
    with pytest.raises(ShardError, match=r"x\.tar, offset 0"):
        ids(path, cache, index=str(sidecar))
    assert ids(path, cache, format="jsonl", index=str(sidecar)) == [*range(20)]


def test_an_index_that_was_mended_counts(folder: Path, cache: fastload.Cache) -> None:
    shutil.copytree(Path(__file__).parent / "written" / "litdata", folder, dirs_exist_ok=True)
    (before,) = [sample for sample, _ in zip(fastload.StreamingDataset(f"{folder}/", cache=cache), "x", strict=False)]
    about = json.loads((folder / "index.json").read_bytes())
    about["config"]["data_spec"] = None
    (folder / "index.json").write_text(json.dumps(about))
    names = {str(number) for number in range(len(before) - 2)}
    assert {*fastload.schema(f"{folder}/", cache=cache)} == names
    (after,) = [sample for sample, _ in zip(fastload.StreamingDataset(f"{folder}/", cache=cache), "x", strict=False)]
    assert {*after} == {"__key__", "__url__"} | names


@pytest.mark.parametrize(
    ("url", "name", "form", "packing"),
    [
        ("s3://b/x/a#b?c.jsonl", "a#b?c.jsonl", "jsonl", ""),
        ("gs://b/a?b.mds.zstd", "a?b.mds", "mds", "zstd"),
        ("/x/a#b.jsonl.gz", "a#b.jsonl", "jsonl", "gzip"),
        ("https://h/a.jsonl.gz?token=x.tar#y", "a.jsonl", "jsonl", "gzip"),
        ("HTTP://h/a.jsonl?x=/y.tar", "a.jsonl", "jsonl", ""),
    ],
)
def test_only_on_web_servers_a_name_ends_before_a_query(url: str, name: str, form: str, packing: str) -> None:
    assert (shard_name(url), format_of(url), packing_of(url)) == (name, form, packing)


def test_endings_are_in_any_case(folder: Path, cache: fastload.Cache) -> None:
    (folder / "A.JSONL").write_bytes(LINES)
    (folder / "b.JsonL.GZ").write_bytes(gzip.compress(LINES))
    (folder / "README.MD").write_bytes(b"x")
    assert ids(f"{folder}/", cache) == [*range(20)] * 2
    assert ids(f"{folder}/", cache, format="jsonl") == [*range(20)] * 2
