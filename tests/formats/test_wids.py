"""Lists of shards as webdataset's `wids` writes them."""

from __future__ import annotations

import json

import pytest

from fastload.errors import ConfigError
from fastload.formats.wids import Shards, WidsSource, is_list, parse

URL = "s3://bucket/sets/index.json"


def shards(names: list[str], *counts: int) -> list[dict[str, object]]:
    return [{"url": name, "nsamples": count} for name, count in zip(names, counts, strict=True)]


def parse_one(url: str = URL, **fields: object) -> Shards:
    (part,) = parse(json.dumps(fields).encode(), url)
    assert isinstance(part, Shards)
    return part


def test_a_list_as_wids_index_writes_it() -> None:
    row = {"url": "a.tar", "nsamples": 5, "filesize": 10240, "md5sum": "0123"}
    found = parse_one(__kind__="wids-shard-index-v1", wids_version=1, name="set", info="", shardlist=[row])
    assert found == Shards(["s3://bucket/sets/a.tar"], [5], [10240])
    assert parse_one(shardlist=[{"url": "a.tar"}]).sample_counts == [-1]


@pytest.mark.parametrize(
    ("place", "name", "url"),
    [
        (URL, "a.tar", "s3://bucket/sets/a.tar"),
        (URL, "deep/a.tar", "s3://bucket/sets/deep/a.tar"),
        (URL, "../a.tar", "s3://bucket/a.tar"),
        (URL, "../../../a.tar", "s3://bucket/a.tar"),
        (URL, "/a.tar", "s3://bucket/a.tar"),
        (URL, "gs://other/a.tar", "gs://other/a.tar"),
        ("s3://bucket/index.json", "a.tar", "s3://bucket/a.tar"),
        ("https://host/x/index.json?signature=1#2", "a.tar", "https://host/x/a.tar"),
        ("s3://bucket/what?/index.json", "a.tar", "s3://bucket/what?/a.tar"),
        ("/data/index.json", "a.tar", "/data/a.tar"),
        ("/data/index.json", "../a.tar", "/a.tar"),
        ("/data/index.json", "/else/a.tar", "/else/a.tar"),
        ("/data/index.json", "s3://bucket/a.tar", "s3://bucket/a.tar"),
    ],
)
def test_names_are_relative_to_the_list(place: str, name: str, url: str) -> None:
    assert parse_one(place, shardlist=shards([name], 1)).urls == [url]


def test_a_base_goes_before_the_place() -> None:
    rows = shards(["a.tar"], 1)
    assert parse_one(shardlist=rows, base="s3://other/x").urls == ["s3://other/x/a.tar"]
    assert parse_one(shardlist=rows, base="below/").urls == ["s3://bucket/sets/below/a.tar"]


def test_parts_come_in_order() -> None:
    data = {
        "shardlist": shards(["a.tar"], 1),
        "base": "s3://base/",
        "datasets": [
            {"source_url": "more.json"},
            {"name": "x", "weight": 2, "shardlist": shards(["b.tar"], 2)},
            {"base": "s3://own/", "shardlist": shards(["c.tar"], 3)},
        ],
    }
    assert parse(json.dumps(data).encode(), URL) == [
        Shards(["s3://base/a.tar"], [1], [-1]),
        WidsSource("s3://bucket/sets/more.json"),
        Shards(["s3://base/b.tar"], [2], [-1]),
        Shards(["s3://own/c.tar"], [3], [-1]),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no wids list of shards: Input data was truncated"),
        (b"[1]", "no wids list of shards: Expected `object`"),
        (b"{}", "neither shardlist nor datasets"),
        (b'{"shardlist": [{"nsamples": 1}]}', "missing required field `url`"),
        (
            b'{"shardlist": [{"url": "a", "nsamples": "1"}]}',
            r"Expected `int`, got `str` - at `\$.shardlist\[0\].nsamples`",
        ),
        (b'{"shardlist": [{"url": "a", "nsamples": -5}]}', "a has -5 samples"),
        (b'{"wids_version": 2, "shardlist": []}', "wids_version 2"),
        (b'{"shards": [], "version": 2}', "an index of MosaicML's streaming"),
        (b'{"chunks": [], "config": {}}', "an index of LitData; name the folder that it lies in"),
        (b'{"shardlist": [{"url": "pipe:cat a.tar"}]}', "runs no programs"),
        (b'{"shardlist": [{"url": "file:///etc/a.tar"}]}', "a file of this machine"),
    ],
)
def test_what_is_no_list_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=f"{URL} .*{says}"):
        parse(data, URL)


def test_which_urls_are_lists() -> None:
    assert is_list("s3://b/index.json")
    assert is_list("/data/INDEX.JSON")
    assert is_list("https://h/index.json?x=1")
    for url in ("s3://b/index.json/", "s3://b/a.tar", "https://h/a.tar?x=.json", "s3://b/index.json?x"):
        assert not is_list(url)
