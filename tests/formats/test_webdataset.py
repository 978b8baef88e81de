"""fastload and webdataset read the same archives: what webdataset's writer encodes by extension, each decodes alike."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import fastload
from fastload import decode
from fastload.demo import photos
from tests.formats.archives import from_webdataset

LIMITS = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(tmp_path / "cache", **LIMITS, service="inprocess") as cache:
        yield cache


def decoded(*paths: Path) -> list[dict[str, Any]]:
    """The samples of these archives, as webdataset groups and decodes them."""
    decoder = webdataset.autodecode.Decoder([webdataset.autodecode.imagehandler("rgb8")])
    return [decoder(sample) for path in paths for sample in from_webdataset(path.read_bytes())]


def test_what_webdatasets_writer_encodes_is_decoded_alike(cache: fastload.Cache, shards: Path) -> None:
    samples = [
        {
            "__key__": f"deep/{number:03d}",
            "cls": number - 3,
            "txt": "grün" * number,
            "json": {"n": number, "of": [None, 0.5]},
            "left.npy": np.arange(6.0).reshape(2, 3) + number,
            "bin": bytes(range(number)),
        }
        for number in range(8)
    ]
    with webdataset.ShardWriter(str(shards / "%d.tar"), maxcount=5, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    urls = f"{shards}/{{0..1}}.tar"

    columns = {
        "cls": decode.integer(),
        "txt": decode.text(),
        "json": decode.json(),
        "left.npy": decode.array(),
        "bin": decode.raw(),
    }
    with closing(fastload.StreamingDataset(urls, cache=cache, decode=columns)) as dataset:
        ours = list(dataset)
    theirs = decoded(shards / "0.tar", shards / "1.tar")
    assert len(ours) == len(theirs) == len(samples)
    for mine, other, written in zip(ours, theirs, samples, strict=True):
        for name in ("__key__", "cls", "txt", "json", "bin"):
            assert mine[name] == other[name] == written[name]
        np.testing.assert_array_equal(mine["left.npy"], other["left.npy"], strict=False)
        np.testing.assert_array_equal(mine["left.npy"], written["left.npy"])


def test_webdataset_reads_the_demos_data_set(cache: fastload.Cache, shards: Path) -> None:
    paths = photos.write_shards(shards, count=6, shards=2)
    columns = {"jpg": decode.raw(), "cls": decode.integer()}
    with closing(fastload.StreamingDataset(f"{shards}/", cache=cache, decode=columns)) as dataset:
        ours = list(dataset)
    theirs = decoded(*paths)
    assert [sample["__key__"] for sample in ours] == [sample["__key__"] for sample in theirs]
    assert [int(sample["cls"]) for sample in ours] == [sample["cls"] for sample in theirs]
    assert {sample["jpg"].shape for sample in theirs} == {(photos.HEIGHT, photos.WIDTH, 3)}
    encoded = [sample["jpg"] for path in paths for sample in from_webdataset(path.read_bytes())]
    assert [sample["jpg"] for sample in ours] == encoded


@pytest.mark.parametrize("pattern", ["{00..12}", "{b,a}-{1..3}", "{3..1}", "x{01..04..2}y", "{a,b{1,2}}"])
def test_patterns_expand_as_webdataset_expands_them(cache: fastload.Cache, shards: Path, pattern: str) -> None:
    names = [Path(url).name for url in webdataset.shardlists.expand_urls(f"{shards}/{pattern}.tar")]
    assert len(names) > 1
    for name in names:
        with webdataset.TarWriter(str(shards / name)) as writer:
            writer.write({"__key__": name.removesuffix(".tar"), "bin": b""})
    with closing(fastload.StreamingDataset(f"{shards}/{pattern}.tar", cache=cache)) as dataset:
        assert [f"{sample['__key__']}.tar" for sample in dataset] == names
