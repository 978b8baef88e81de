"""What is known of samples before a shard is read: indexes made ahead, files of them, and lists with counts."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fastload
from fastload import prepare
from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.demo.weed import WeedServer
from fastload.errors import ConfigError, FastloadError, ObjectChangedError, ObjectMissingError, ShardError
from fastload.pipeline.source import Source, SourceOptions
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket
from tests.processes import service_pids, until
from tests.programs import run_cli
from tests.shards import check_samples, corpus, samples_of, tar_of

LIMITS: dict[str, Any] = {
    "ram_bytes": "2MiB",
    "disk_bytes": "64MiB",
    "chunk_bytes": "64KiB",
    "service": "inprocess",  # it starts in no time
}
DATA = corpus(shard_count=5)
NAMES = list(DATA.shards)
COUNTS = [20, 21, 22, 20, 21]


@pytest.fixture(scope="session")
def bucket_name(weed: WeedServer) -> str:
    """One bucket for all these tests: the first object in a new one takes the server a quarter of a second."""
    weed.make_bucket("index-tests")
    return "index-tests"


@pytest.fixture
def url(s3: Bucket, bucket_name: str, tmp_path: Path) -> str:
    """A prefix of its own with the corpus."""
    return DATA.put(replace(s3, name=bucket_name), prefix=tmp_path.name)


@pytest.fixture
def put(s3: Bucket, bucket_name: str) -> Any:
    """Upload something to a URL."""
    return lambda url, data: s3.server.put(url, data)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        yield cache


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks that were waited for while indexing, in this process: with a sidecar's they are few."""
    chunks: list[int] = []
    acquire = Consumer.acquire

    def counted(self: Consumer, chunk_nos: Any, *args: Any, **options: Any) -> Any:
        if options.get("reason") == "index":
            chunks.extend(chunk_nos)
        return acquire(self, chunk_nos, *args, **options)

    monkeypatch.setattr(Consumer, "acquire", counted)
    return chunks


def sidecar(url: str, path: Path) -> Path:
    """Indexes in a file, made elsewhere."""
    with Cache(path.parent / "elsewhere", **LIMITS) as elsewhere:
        prepare.index([url], elsewhere, output=path)
    return path


def counts(source: Source) -> list[int] | None:
    found = source.sample_counts()
    source.close()
    return None if found is None else found.tolist()


def read_all(urls: Any, cache: Cache) -> None:
    dataset = fastload.StreamingDataset(urls, cache=cache, shuffle=True)
    assert len(dataset) == len(DATA.samples)
    loader = fastload.DataLoader(dataset, batch_size=16)
    keys = [key for batch in loader for key in check_samples(DATA, samples_of(batch))]
    loader.close()
    assert sorted(keys) == sorted(DATA.samples)


# fastload index


def test_a_job_that_follows_parses_nothing(url: str, tmp_path: Path) -> None:
    limits = ("--ram-bytes=2MiB", "--disk-bytes=64MiB", "--chunk-bytes=64KiB")
    done = run_cli("index", url, "--cache", tmp_path / "cache", *limits, "--output", tmp_path / "x.arrow")
    until(lambda: not service_pids(tmp_path / "cache"))
    said = " ".join(done.stderr.split())
    assert f"5 shards, 104 samples, {DATA.byte_count / 1024:.1f} KiB: indexed, " in said
    again = json.loads(run_cli("index", url, "--cache", tmp_path / "cache", "--json").stdout)
    assert again == {
        "shard_count": 5,
        "sample_count": 104,
        "total_bytes": DATA.byte_count,
        "fetched_bytes": 0,
        "bad": [],
    }
    until(lambda: not service_pids(tmp_path / "cache"))
    with Cache(tmp_path / "cache") as cache:
        assert counts(Source(SourceOptions([url], cache))) == COUNTS
        assert prepare.index([url], cache, output=tmp_path / "x.arrow").fetched_bytes == 0
    with pa.memory_map(str(tmp_path / "x.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
        assert table.column("url").to_pylist() == [f"{url}{name}" for name in NAMES]
        assert table.column("samples").to_pylist() == COUNTS
        del table


def test_chunks_without_headers_are_not_fetched(put: Any, url: str, cache: Cache) -> None:
    size = 1 << 20
    for number in range(3):
        put(f"{url}large/{number}.tar", tar_of({f"{number}": {"bin": bytes(size)}, f"{number}b": {"bin": bytes(size)}}))
    seen = []
    done = prepare.index([f"{url}large/"], cache, on_progress=seen.append)
    assert (done.shard_count, done.sample_count) == (3, 6)
    assert done.total_bytes > 6 * size
    assert done.fetched_bytes <= 3 * 4 * cache.limits.chunk_bytes
    assert [(each.done_count, each.sample_count) for each in seen] == [(0, 0), (1, 2), (2, 4), (3, 6)]
    again = prepare.index([f"{url}large/"], cache)
    assert (again.sample_count, again.fetched_bytes) == (6, 0)


def test_more_shards_than_chunks_in_the_arena(tmp_path: Path) -> None:
    data = corpus(shard_count=100, samples_per_shard=3)
    with Cache(tmp_path / "cache", **{**LIMITS, "ram_bytes": "128KiB", "disk_bytes": 0}) as cache:
        done = prepare.index([data.write(tmp_path / "data")], cache, output=tmp_path / "x.arrow")
    assert (done.shard_count, done.sample_count) == (100, len(data.samples))


@pytest.mark.parametrize("bad", [0, 50, 99])
def test_a_damaged_shard_ends_it(tmp_path: Path, bad: int) -> None:
    data = corpus(shard_count=100, samples_per_shard=2)
    data.write(tmp_path / "data")
    (tmp_path / "data" / f"shard-{bad:04d}.tar").write_bytes(b"\x5a" * 20_000)
    with (
        Cache(tmp_path / "cache", **LIMITS) as cache,
        pytest.raises(ShardError, match=f"shard-{bad:04d}"),
    ):
        prepare.index([f"{tmp_path}/data/"], cache, output=tmp_path / "x.arrow")
    assert not (tmp_path / "x.arrow").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("s3://bucket/x/", "is not the name of an object"),
        ("ftp://bucket/x", "is not the name of an object"),
        ("/absent/x.arrow", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written(url: str, cache: Cache, output: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare.index([url], cache, output=output)


def test_bad_shards_are_named_and_the_others_indexed(s3: Bucket, tmp_path: Path, cache: Cache) -> None:
    data = corpus(shard_count=6, samples_per_shard=2)
    data.write(tmp_path / "data")
    for number in (0, 4):
        (tmp_path / "data" / f"shard-{number:04d}.tar").write_bytes(b"\x5a" * 20_000)
    done = prepare.index([f"{tmp_path}/data/"], cache, output=tmp_path / "x.arrow", skips_bad=True)
    assert [f"shard-{number:04d}" in bad for number, bad in zip((0, 4), done.bad, strict=True)] == [True, True]
    count = sum(not key.startswith(("s00", "s04")) for key in data.samples)
    assert done.sample_count == count
    assert pa.ipc.open_file(tmp_path / "x.arrow").read_all().num_rows == 4
    said = run_cli("index", f"{tmp_path}/data/", "--skip-bad", "--cache", cache.directory, check=False)
    assert said.returncode == 3
    assert f"2 bad shards; 6 shards, {count} samples" in said.stderr
    assert said.stderr.count("shard-000") == 2


def test_an_object_is_written_in_the_end_and_only_over_what_was_there(
    s3: Bucket, url: str, cache: Cache, bucket_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"{url}fastload-index.arrow"
    prepare.index([url], cache, output=target)
    read_all(url, cache)
    prepare.index([f"{url}{NAMES[0]}"], cache, output=target)  # over the version that is there
    store = ObjectStore(f"s3://{bucket_name}", s3.options)
    first = store.head(target).etag
    began = prepare._index_ahead

    def written_meanwhile(*arguments: Any) -> Any:
        s3.server.put(target, b"another's")
        return began(*arguments)

    monkeypatch.setattr(prepare, "_index_ahead", written_meanwhile)
    with pytest.raises(ObjectChangedError, match=r"fastload-index\.arrow was written by another meanwhile"):
        prepare.index([url], cache, output=target)
    assert store.head(target).etag != first
    s3.server.delete(target)
    with pytest.raises(ObjectChangedError, match="was written by another meanwhile"):
        prepare.index([url], cache, output=target)  # where there was none at first
    store.close()


# Files of indexes


def test_a_sidecar_beside_the_shards_is_found(
    put: Any, url: str, cache: Cache, tmp_path: Path, parsed: list[int]
) -> None:
    put(f"{url}fastload-index.arrow", sidecar(url, tmp_path / "x.arrow").read_bytes())
    parsed.clear()
    read_all(url, cache)
    assert len(set(parsed)) == 1, "chunks of shards were looked through, not the sidecar's only one"
    parsed.clear()
    read_all(url, cache)
    assert not parsed, "the service has the indexes by now"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_sidecar_that_is_named(
    put: Any, url: str, cache: Cache, tmp_path: Path, parsed: list[int], place: str
) -> None:
    index = str(sidecar(url, tmp_path / "x.arrow"))
    if place == "s3":
        put(f"{url}else/x.arrow", Path(index).read_bytes())
        index = f"{url}else/x.arrow"
    parsed.clear()
    pattern = f"{url}shard-{{0000..0004}}.tar"
    source = Source(SourceOptions([pattern, f"{url}shard-0002.tar"], cache, index=index))
    assert counts(source) == [*COUNTS, COUNTS[2]]
    attached = source.open()
    indexes = source.shards.get(attached.consumer, [5, 0])
    assert [each.sample_count for each in indexes] == [22, 20]
    source.give_back(attached)
    source.close()
    assert min(parsed) >= source.first_chunk[-1]
    with pytest.raises(ObjectMissingError, match="absent"):
        Source(SourceOptions([pattern], cache, index=f"{url}absent.arrow")).list_shards()


def test_rows_of_other_versions_are_not_used(put: Any, url: str, cache: Cache, tmp_path: Path) -> None:
    index = str(sidecar(url, tmp_path / "x.arrow"))
    put(f"{url}{NAMES[1]}", tar_of({"new": {"bin": b"1", "cls": b"2"}}))
    put(f"{url}{NAMES[3]}", DATA.shards[NAMES[4]])
    source = Source(SourceOptions([url], cache, index=index))
    with pytest.warns(RuntimeWarning, match=rf"x\.arrow was made of other versions of .*{NAMES[1]} and 1 more"):
        assert counts(source) is None
    attached = source.open()
    assert source.shards.known_counts(attached.consumer).tolist() == [20, -1, 22, -1, 21]
    indexes = source.shards.get(attached.consumer, range(5))
    assert [each.sample_count for each in indexes] == [20, 1, 22, 21, 21]
    source.give_back(attached)
    assert counts(source) == [20, 1, 22, 21, 21]


def test_a_sidecar_with_damage_costs_no_more_than_a_warning(url: str, cache: Cache, tmp_path: Path) -> None:
    index = sidecar(url, tmp_path / "x.arrow")
    data = bytearray(index.read_bytes())
    at = data.find(b"FLSHARDX", data.find(b"FLSHARDX") + 1)
    data[at + 100] ^= 1
    index.write_bytes(data)
    source = Source(SourceOptions([url], cache, index=str(index)))
    attached = source.open()
    with pytest.warns(
        RuntimeWarning, match=rf"x\.arrow has a damaged index .*{NAMES[1]}.*the shard is indexed by reading"
    ):
        indexes = source.shards.get(attached.consumer, range(5))
    assert [each.sample_count for each in indexes] == COUNTS
    source.give_back(attached)
    source.close()


def test_a_sidecar_that_is_replaced_while_it_is_read(url: str, tmp_path: Path) -> None:
    index = sidecar(url, tmp_path / "x.arrow")
    with Cache(tmp_path / "ram", **{**LIMITS, "ram_bytes": "128KiB", "disk_bytes": 0}) as small:
        source = Source(SourceOptions([url], small, index=str(index)))
        assert counts(source) == COUNTS
        attached = source.open()
        os.utime(index, (1, 1))
        with attached.consumer.acquire([0]), attached.consumer.acquire([1]):  # two fill the arena
            pass
        attached.consumer.release([0, 1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            indexes = source.shards.get(attached.consumer, range(5))
        assert [each.sample_count for each in indexes] == COUNTS
        assert [str(each.message).split(" (")[0] for each in caught] == [f"{index} cannot be read any more"]
        source.give_back(attached)
        source.close()


# What an earlier run has read


def test_the_length_is_known_before_the_first_batch_of_a_later_run(url: str, tmp_path: Path) -> None:
    """So that `tqdm(loader)` has a total. It does not matter how the earlier run read."""
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=7)
        with pytest.raises(TypeError, match="fastload index"):
            len(loader)
        assert sum(1 for _ in loader) == len(loader)
        loader.close()
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=16)
        expected = -(-len(DATA.samples) // 16)
        assert len(loader) == expected
        assert loader.stats()["fetched_bytes"] == 0
        assert sum(1 for _ in loader) == expected
        loader.close()


def test_what_other_nodes_told_is_known_to_the_next_run(url: str, tmp_path: Path) -> None:
    """A node reads a part of the shards; it hears how many samples the others hold, and its cache keeps that."""
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        source = Source(SourceOptions([url], cache))
        assert counts(source) is None
        attached = source.open()
        source.shards.get(attached.consumer, [0, 1])
        source.learn_counts(np.array([2, 3, 4], np.int32), np.array(COUNTS[2:], np.int64))
        source.give_back(attached)
        source.close()
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        assert counts(Source(SourceOptions([url], cache))) == COUNTS


def test_what_is_no_sidecar_is_an_error(put: Any, url: str, cache: Cache) -> None:
    put(f"{url}fastload-index.arrow", b"something else")
    dataset = fastload.StreamingDataset(url, cache=cache)
    with pytest.raises(ShardError, match=rf"{url}fastload-index\.arrow is no index of shards .* remove it"):
        len(dataset)
    dataset.close()


# Lists of shards


def wids(counts: list[int], names: list[str] = NAMES, **more: Any) -> bytes:
    rows = [{"url": name, "nsamples": count} for name, count in zip(names, counts, strict=True)]
    return json.dumps({"wids_version": 1, "shardlist": rows, **more}).encode()


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_list_of_shards(put: Any, url: str, cache: Cache, tmp_path: Path, parsed: list[int], place: str) -> None:
    folder = url if place == "s3" else DATA.write(tmp_path / "data")
    if place == "s3":
        put(f"{url}index.json", wids(COUNTS))
    else:
        Path(folder, "index.json").write_bytes(wids(COUNTS))
    read_all(f"{folder}index.json", cache)
    assert parsed


def test_lists_in_lists_and_beside_shards(put: Any, url: str, cache: Cache) -> None:
    put(f"{url}a/inner.json", wids([20], ["../" + NAMES[0]]))
    more = [{"source_url": "a/inner.json"}, {"base": url, "shardlist": [{"url": NAMES[1], "nsamples": 21}]}]
    put(f"{url}outer.json", wids([22], [NAMES[2]], datasets=more))
    urls = [f"{url}shard-0003.tar", f"{url}outer.json", f"{url}shard-0004.tar"]
    source = Source(SourceOptions(urls, cache))
    manifest = source.list_shards()
    assert [info.url.rpartition("/")[2] for info in manifest.objects] == [NAMES[n] for n in (3, 2, 0, 1, 4)]
    assert manifest.promised is not None
    assert manifest.promised.tolist() == [-1, 22, 20, 21, -1]
    assert source.counts_in_memory()[0].tolist() == [1, 2, 3]
    source.close()


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"{}", ConfigError, "neither shardlist nor datasets"),
        (wids([], []), ObjectMissingError, "no shards at all"),
        (wids([1], ["absent.tar"]), ObjectMissingError, "absent.tar"),
        (wids([1], ["shard-{0000..0001}.tar"]), ConfigError, "a pattern or prefix"),
        (wids([1], ["./"]), ConfigError, "a pattern or prefix"),
        (
            json.dumps({"shardlist": [{"url": NAMES[0], "filesize": 5}]}).encode(),
            ConfigError,
            f"{NAMES[0]} has 5 bytes, and it has {len(DATA.shards[NAMES[0]])}",
        ),
        (wids([], [], datasets=[{"source_url": "index.json"}]), ConfigError, "is named by a list and names another"),
    ],
)
def test_lists_that_cannot_be_used(
    put: Any, url: str, cache: Cache, data: bytes, error: type[FastloadError], says: str
) -> None:
    put(f"{url}index.json", data)
    with pytest.raises(error, match=says):
        Source(SourceOptions([f"{url}index.json"], cache)).list_shards()


def test_a_count_that_is_wrong_is_an_error_that_names_both(put: Any, url: str, cache: Cache) -> None:
    put(f"{url}index.json", wids([20, 21, 23, 20, 21]))
    dataset = fastload.StreamingDataset(f"{url}index.json", cache=cache)
    says = rf"{NAMES[2]} holds 22 samples, but the list of shards .* says 23"
    with pytest.raises(ShardError, match=says):
        list(dataset)
    dataset.close()
    # Now its index is known, and it is an error before anything is read.
    prepare.index([url], cache)
    source = Source(SourceOptions([f"{url}index.json"], cache))
    attached = source.open()
    with pytest.raises(ShardError, match=says):
        source.shards.known_counts(attached.consumer)
    source.give_back(attached)
    source.close()


def test_each_node_may_have_its_own_copy_of_a_sidecar(
    url: str, cache: Cache, tmp_path: Path, parsed: list[int]
) -> None:
    index = sidecar(url, tmp_path / "x.arrow")
    first = Source(SourceOptions([url], cache, index=str(index)))
    manifest = first.list_shards()
    (tmp_path / "copy.arrow").write_bytes(index.read_bytes())
    index.unlink()
    parsed.clear()
    second = Source(SourceOptions([url], cache, index=str(tmp_path / "copy.arrow")))
    second.adopt(manifest)
    assert counts(second) == COUNTS
    assert len(set(parsed)) == 1
    first.close()
