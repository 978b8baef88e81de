"""Shards that are packed as a whole, from a real store: what is in them is read, and each is fetched once a node."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastload
from fastload.client import Handle
from fastload.errors import ConfigError, ObjectChangedError, ShardError
from fastload.plan import RequestedOrder
from fastload.prepare import WarmJob, index, warm
from fastload.protocol import WarmTerms
from fastload.service import queries
from tests.conftest import Bucket
from tests.formats import test_contract
from tests.formats.packing import PACK, twice, zstd_stream
from tests.processes import is_running, kill_service, service_pids, until

LIMITS: dict[str, Any] = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}


def lines(number: int, count: int = 300, size: int = 200) -> bytes:
    """JSON lines of which each has its number, and what packs badly."""
    rng = np.random.default_rng(number)
    texts = (rng.bytes(size // 2).hex() for _ in range(count))
    return b"".join(b'{"id": %d, "text": "%s"}\n' % (number * count + i, t.encode()) for i, t in enumerate(texts))


def put_lines(s3: Bucket, folder: str, ending: str, pack: Callable[[bytes], bytes], count: int = 4) -> int:
    """Pack and store some shards; their sizes, packed."""
    packed = [pack(lines(number)) for number in range(count)]
    for number, data in enumerate(packed):
        s3.put(f"{folder}/{number}{ending}", data)
    return sum(map(len, packed))


def open_handle(directory: Path, **more: Any) -> Handle:
    return Handle(directory, **{**LIMITS, **more})


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Handle]:
    with open_handle(tmp_path / "cache", service="inprocess") as opened:
        yield opened


def data_set(url: str, cache: Handle, **options: Any) -> fastload.StreamingDataset:
    common = {"shuffle": True, "seed": 5, "shuffle_window": "64KiB", "columns": ["id"], **options}
    return fastload.StreamingDataset(url, cache=cache, **common)


def samples(dataset: fastload.StreamingDataset) -> list[tuple[str, int]]:
    return [(sample["__key__"], int(sample["id"])) for sample in dataset]


def listed(s3: Bucket, folder: Path) -> str:
    """A file with the list of shards, made with another cache."""
    file = str(folder / "list.json")
    with open_handle(folder / "other", service="inprocess") as other:
        samples(data_set(f"{s3.url}/x/", other, manifest=file))
    return file


def store_figures(cache: Handle) -> dict[str, int]:
    with cache.consumer() as consumer:
        found: dict[str, int] = consumer.stats()["store"]
        return found


CASES = [
    ("tar", ".gz"), ("tar", ".zst"), ("tar", ".tgz"), ("jsonl", ".zst"), ("tfrecord", ".gz"), ("mds", ".gz"),
    ("mds", ".br"), ("mds", ".snappy"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_it_is_the_same_data_set(name: str, ending: str, s3: Bucket, cache: Handle, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    test_contract.FORMATS[name](tmp_path / "plain", test_contract.PARTS)
    index = json.loads((tmp_path / "plain" / "index.json").read_bytes()) if name == "mds" else {"shards": []}
    for path in sorted((tmp_path / "plain").iterdir()):
        s3.put(f"plain/{path.name}", path.read_bytes())
        if path.name != "index.json":
            packed = PACK[ending](path.read_bytes())
            called = path.stem + ending if ending == ".tgz" else path.name + ending
            s3.put(f"packed/{called}", packed)
            for shard in index["shards"]:
                if shard["raw_data"]["basename"] == path.name:
                    shard["zip_data"] = {"basename": called, "bytes": len(packed)}
    if name == "mds":
        s3.put("packed/index.json", json.dumps(index).encode())

    def read(folder: str) -> list[tuple[str, int, str]]:
        dataset = test_contract.data_set(name, f"{s3.url}/{folder}/", cache)
        return [(each["__key__"], int(each["id"]), each["text"]) for each in dataset]

    found = read("packed")
    assert len(found) == test_contract.COUNT
    assert found == read("plain")


def test_each_shard_is_fetched_once_for_several_consumers(s3: Bucket, tmp_path: Path) -> None:
    byte_count = put_lines(s3, "x", ".json.gz", PACK[".gz"])
    found: list[list[tuple[str, int]]] = [[] for _ in range(3)]
    with open_handle(tmp_path / "cache") as cache, cache.consumer() as consumer:
        manifest = listed(s3, tmp_path)

        def read(rank: int) -> None:
            with open_handle(tmp_path / "cache") as own:
                found[rank] = samples(data_set(f"{s3.url}/x/", own, manifest=manifest))

        threads = [threading.Thread(target=read, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures = consumer.stats()["store"]
    assert found[0] == found[1] == found[2]
    assert sorted(number for _, number in found[0]) == list(range(1200))
    assert (figures["bytes"], figures["requests"]) == (byte_count, 4)


def test_a_shard_is_measured_once_for_all_who_ask(s3: Bucket, tmp_path: Path) -> None:
    """Many ask at once, and more than the service has threads that wait for sizes."""
    byte_count = put_lines(s3, "x", ".json.gz", PACK[".gz"])
    together = threading.Barrier(8)

    def read() -> list[tuple[str, int]]:
        with open_handle(tmp_path / "cache") as own, own.consumer():
            together.wait(60)
            return samples(data_set(f"{s3.url}/x/", own))

    with open_handle(tmp_path / "cache") as cache, cache.consumer() as consumer, ThreadPoolExecutor(8) as pool:
        found = [each.result() for each in [pool.submit(read) for _ in range(8)]]
        figures = consumer.stats()["store"]
    assert all(each == found[0] for each in found)
    assert figures["bytes"] == byte_count


def test_a_list_of_shards_keeps_their_sizes(s3: Bucket, cache: Handle, tmp_path: Path) -> None:
    byte_count = put_lines(s3, "x", ".jsonl.zst", zstd_stream)
    file = tmp_path / "list.json"
    first = samples(data_set(f"{s3.url}/x/", cache, manifest=str(file)))
    rows = json.loads(file.read_bytes())["manifest"]["objects"]
    assert [row[1] for row in rows] == [len(lines(number)) for number in range(4)]
    assert {row[6] for row in rows} == {"zstd"}
    with open_handle(tmp_path / "another", service="inprocess") as another:
        assert samples(data_set(f"{s3.url}/x/", another, manifest=str(file))) == first
        assert store_figures(another)["bytes"] == byte_count


def test_the_packed_object_is_another_one(s3: Bucket, cache: Handle) -> None:
    packed = PACK[".gz"](lines(0))
    url = s3.put("x/0.jsonl.gz", packed)
    assert len(samples(data_set(url, cache))) == 300
    with fastload.open(url, cache=cache) as file:
        assert file.read() == packed
    assert len(samples(data_set(url, cache))) == 300


def test_what_was_warmed_needs_no_store(s3: Bucket, cache: Handle) -> None:
    put_lines(s3, "x", ".jsonl.gz", PACK[".gz"])
    fastload.warm(f"{s3.url}/x/", cache=cache)
    before = store_figures(cache)["bytes"]
    dataset = data_set(f"{s3.url}/x/", cache)
    assert len(samples(dataset)) == 1200
    assert len(dataset) == 1200
    assert store_figures(cache)["bytes"] - before < 2000


@pytest.mark.parametrize("is_killed", [False, True], ids=["child", "service"])
def test_processes_are_killed_in_the_middle(is_killed: bool, s3: Bucket, tmp_path: Path) -> None:
    put_lines(s3, "x", ".jsonl.gz", PACK[".gz"], count=12)
    directory = tmp_path / "cache"
    with open_handle(directory, ram_bytes="1MiB", disk_bytes=0) as cache:
        dataset = data_set(f"{s3.url}/x/", cache)
        iterator = iter(dataset)
        found = [next(iterator)["__key__"] for _ in range(100)]
        children = unpackers(directory)
        assert children
        if is_killed:
            kill_service(directory)
            until(lambda: not any(map(is_running, children)))  # they end with it
        else:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        found += [sample["__key__"] for sample in iterator]
        assert len(set(found)) == len(found) == 3600


def unpackers(directory: Path) -> list[int]:
    services, found = service_pids(directory), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent in services:
                found.append(int(folder.name))
    return found


def test_a_damaged_shard_is_an_error_that_names_it(s3: Bucket, cache: Handle) -> None:
    data = bytearray(PACK[".gz"](lines(0, 3000)))
    data[len(data) // 2] ^= 255
    url = s3.put("x/0.jsonl.gz", bytes(data))
    with pytest.raises(ShardError, match=rf"^{url} cannot be unpacked as gzip.*pack and upload it again"):
        samples(data_set(url, cache))


@pytest.mark.parametrize(("ending", "share"), [(".gz", 0.03), (".gz", 0.97), (".zst", 0.03), (".zst", 0.97)])
def test_members_of_any_sizes_are_one_file(ending: str, share: float, s3: Bucket, cache: Handle) -> None:
    data = lines(0, 3000)
    url = s3.put(f"x/0.jsonl{ending}", twice(PACK[ending], share)(data))
    assert sorted(number for _, number in samples(data_set(url, cache))) == list(range(3000))


def test_sizes_that_take_long_are_waited_for(s3: Bucket, cache: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "_SIZES_PATIENCE_S", 0.0)
    put_lines(s3, "x", ".jsonl.gz", PACK[".gz"])
    with pytest.warns(RuntimeWarning, match="4 packed shards are read to know how large they are unpacked, once"):
        assert len(samples(data_set(f"{s3.url}/x/", cache))) == 1200


def put_bad(s3: Bucket) -> list[str]:
    """Four shards, of which the first and the third are damaged."""
    put_lines(s3, "x", ".jsonl.gz", PACK[".gz"])
    return [s3.put(f"x/{number}.jsonl.gz", b"this is not packed" * 999) for number in (0, 2)]


def test_all_shards_that_cannot_be_unpacked_are_one_error(s3: Bucket, cache: Handle) -> None:
    bad = put_bad(s3)
    with pytest.raises(ShardError, match="2 packed shards") as caught:
        samples(data_set(f"{s3.url}/x/", cache))
    assert all(f"{url} cannot be unpacked as gzip" in str(caught.value) for url in bad)
    assert str(caught.value).count("pack and upload it again") == 2


def test_an_index_is_made_of_the_others(s3: Bucket, cache: Handle, tmp_path: Path) -> None:
    bad = put_bad(s3)
    with pytest.raises(ShardError, match="2 packed shards"):
        index([f"{s3.url}/x/"], cache)
    indexed = index([f"{s3.url}/x/"], cache, skips_bad=True, output=tmp_path / "index.arrow")
    assert (indexed.shard_count, indexed.sample_count) == (4, 600)
    assert [error.partition(" ")[0] for error in indexed.bad] == bad
    none = index([bad[0]], cache, skips_bad=True)
    assert (none.shard_count, none.sample_count, len(none.bad)) == (1, 0, 1)


def test_warming_goes_on_with_the_others(s3: Bucket, cache: Handle) -> None:
    bad = put_bad(s3)
    job = WarmJob([f"{s3.url}/x/"], RequestedOrder(seed=5))
    with pytest.raises(ShardError, match="2 packed shards"):
        warm(job, cache)
    warmed = warm(job, cache, terms=WarmTerms(goes_on=True))
    assert sorted(warmed.failed) == bad
    assert all("cannot be unpacked as gzip" in str(error) for error in warmed.failed.values())
    assert (warmed.object_count, warmed.sample_count, warmed.is_complete) == (2, 600, False)


def test_a_schema_is_that_of_the_first_that_can_be_read(s3: Bucket, cache: Handle) -> None:
    bad = put_bad(s3)
    with pytest.warns(RuntimeWarning, match=rf"{bad[0]} cannot be unpacked"):
        assert list(fastload.schema(f"{s3.url}/x/", cache=cache)) == ["json"]
    assert store_figures(cache)["bytes"] < len(b"this is not packed" * 999) + len(PACK[".gz"](lines(1))) + 1000
    with pytest.raises(ShardError, match=rf"(?s)2 shards.*{bad[0]} cannot.*{bad[1]} cannot"):
        fastload.schema(bad, cache=cache)


def test_a_shard_that_changes_is_another_one(s3: Bucket, cache: Handle, tmp_path: Path) -> None:
    s3.put("x/0.jsonl.gz", PACK[".gz"](lines(0)))
    file = listed(s3, tmp_path)
    s3.put("x/0.jsonl.gz", PACK[".gz"](lines(1)))
    with pytest.raises(ObjectChangedError, match=r"0\.jsonl\.gz"):
        samples(data_set(f"{s3.url}/x/", cache, manifest=file))
    assert len(samples(data_set(f"{s3.url}/x/", cache))) == 300


def test_an_index_that_says_another_size_is_an_error(s3: Bucket, cache: Handle, tmp_path: Path) -> None:
    test_contract.mds(tmp_path, [range(100)])
    data, index = (tmp_path / "0.mds").read_bytes(), json.loads((tmp_path / "index.json").read_bytes())
    s3.put("x/0.mds.zstd", PACK[".zstd"](data))
    (shard,) = index["shards"]
    shard["zip_data"] = {"basename": "0.mds.zstd", "bytes": len(PACK[".zstd"](data))}
    shard["raw_data"]["bytes"] -= 1
    s3.put("x/index.json", json.dumps(index).encode())
    with pytest.raises(ShardError, match=rf"0\.mds\.zstd has .* bytes unpacked, and .* says {len(data) - 1}"):
        list(data_set(f"{s3.url}/x/", cache))


def test_files_of_tokens_are_not_read_packed(s3: Bucket, cache: Handle) -> None:
    url = s3.put("x.bin.gz", PACK[".gz"](bytes(1000)))
    tokens = fastload.formats.tokens(10, dtype="uint16")
    with pytest.raises(ConfigError, match=r"x\.bin\.gz is packed, .* upload it unpacked"):
        list(fastload.StreamingDataset(url, cache=cache, format=tokens))
