"""Data that grows while it is read: versions of the list of shards, and where a state finds the one that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.demo.weed import WeedServer
from fastload.errors import ShardError, StateError
from fastload.formats import ShardIndex
from fastload.pipeline import shards
from fastload.pipeline.source import Source, SourceOptions
from fastload.plan import Manifest
from tests.conftest import Bucket
from tests.formats.archives import index
from tests.shards import corpus, tar_of

DATA = corpus(shard_count=4)
NAMES = list(DATA.shards)
LIMITS: dict[str, Any] = {
    "ram_bytes": "1MiB",
    "disk_bytes": "16MiB",
    "chunk_bytes": "64KiB",
    "service": "inprocess",
}


@pytest.fixture
def put(s3: Bucket, weed: WeedServer, tmp_path: Path) -> Callable[..., str]:
    """Upload shards under a prefix of the test's own; gives the prefix."""
    weed.make_bucket("source-tests")
    bucket = replace(s3, name="source-tests")

    def put(*numbers: int, cut: int = 0) -> str:
        for number in numbers:
            data = DATA.shards[NAMES[number]]
            bucket.put(f"{tmp_path.name}/{NAMES[number]}", data + bytes(512 * cut))
        return f"{bucket.url}/{tmp_path.name}/"

    return put


def names(manifest: Manifest) -> list[str]:
    return [info.url.rpartition("/")[2] for info in manifest.objects]


def test_a_corpus_that_grows_while_it_is_read(put: Callable[..., str], tmp_path: Path) -> None:
    url = put(1, 2)
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        source = Source(SourceOptions([url], cache, grows=True))
        first = source.list_shards()
        assert source.refresh() is first
        reading = source.open()
        put(0, 3)
        second = source.refresh()
        assert source.manifest is first, "it counts once it is adopted"
        source.adopt(second)
        assert names(second) == [NAMES[n] for n in (1, 2, 0, 3)]
        assert second.version_starts == (2,)
        assert (source.manifest_of(first.fingerprint), source.manifest_of(second.fingerprint)) == (first, second)

        # A session that was open belongs to the version before, and is not used again.
        reading.consumer.get_indexes([1])
        source.give_back(reading)
        assert reading.consumer.is_ended
        session = source.open()
        indexes = source.shards.get(session.consumer, range(4))
        assert [each.sample_count for each in indexes] == [21, 22, 20, 20]
        source.give_back(session)
        counts = source.sample_counts()
        assert counts is not None
        assert counts.tolist() == [21, 22, 20, 20]

        put(2, cut=2)
        third = source.refresh()
        source.adopt(third)
        assert names(third) == [NAMES[n] for n in (1, 2, 0, 3, 2)]
        assert third.gone.tolist() == [1]
        assert source.sample_counts() is None, "the shard that changed was not read yet"
        session = source.open()
        source.shards.get(session.consumer, [4])
        source.give_back(session)
        counts = source.sample_counts()
        assert counts is not None
        assert counts.tolist() == [21, 0, 20, 20, 22]
        source.close()

        # A job that begins anew lists what is there now, and finds the version that a state names.
        later = Source(SourceOptions([url], cache, grows=True))
        assert names(later.list_shards()) == NAMES
        for version in (first, second, third):
            assert later.manifest_of(version.fingerprint) == version
        with pytest.raises(StateError, match="feed, which is not among the last 8"):
            later.manifest_of("feed")
        later.adopt(second)
        assert later.refresh() == third
        later.close()


def test_data_that_stays_keeps_nothing(put: Callable[..., str], tmp_path: Path) -> None:
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        source = Source(SourceOptions([put(0)], cache))
        source.list_shards()
        source.close()
        assert not (tmp_path / "cache" / "manifests").exists()


def test_ranks_that_nothing_connects_share_a_file(put: Callable[..., str], tmp_path: Path) -> None:
    url, path = put(0, 1), str(tmp_path / "train.json")
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        ranks = [Source(SourceOptions([url], cache, manifest_file=path, grows=True)) for _ in range(2)]
        for epoch, more in enumerate(((), (2,), (3,))):
            put(*more)
            for number, rank in enumerate(ranks):
                make = rank.refresh if epoch else rank.list_shards
                rank.adopt(rank.shared_manifest(make, is_first=number == 0, epoch=epoch))
            first, second = (rank.manifest for rank in ranks)
            assert first is not None
            assert first == second
            assert names(first) == NAMES[: 2 + epoch]
            assert first.version_starts == ((), (2,), (2, 3))[epoch]
        # Again: what the files say, whatever the bucket holds by now.
        again = Source(SourceOptions([url], cache, manifest_file=path, grows=True))
        assert names(again.shared_manifest(again.list_shards, is_first=True, epoch=0)) == NAMES[:2]
        assert again.manifest_of(first.fingerprint) == first
        for source in (*ranks, again):
            source.close()


def ranks_index(folder: Path, cache: Cache, rank_count: int) -> list[Any]:
    """What each rank of a node finds in all shards of a folder, or the error that it gets."""

    def index(source: Source) -> Any:
        attached = source.open()
        try:
            return [each.sample_count for each in source.shards.get(attached.consumer, range(4))]
        except ShardError as error:
            return error
        finally:
            source.give_back(attached)
            source.close()

    with ThreadPoolExecutor(rank_count) as pool:
        return list(pool.map(index, [Source(SourceOptions([f"{folder}/"], cache)) for _ in range(rank_count)]))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_ranks_of_a_node_parse_each_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_damaged: bool
) -> None:
    parsed = []
    original = shards.indexer_for
    monkeypatch.setattr(shards, "indexer_for", lambda url, *more: parsed.append(url) or original(url, *more))  # type: ignore[func-returns-value]
    folder = tmp_path / "data"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(DATA.shards[name])
    if is_damaged:
        (folder / NAMES[2]).write_bytes(b"no tar" * 1000)
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        found = ranks_index(folder, cache, 6)
    if is_damaged:
        assert [type(each) for each in found] == [ShardError] * 6
        assert Counter(parsed)[str(folder / NAMES[0])] == 1
    else:
        assert found == [[20, 21, 22, 20]] * 6
        assert sorted(parsed) == [str(folder / name) for name in NAMES]


class FromTheEnd:
    """Of a shard whose end says where else to read: in its last chunk, then in its second, then in its fifth."""

    def __init__(self, size: int, chunk_bytes: int) -> None:
        self.fed: list[int] = []
        self._asked = [size - 8, chunk_bytes + 8, 5 * chunk_bytes - 1, size]

    @property
    def next_offset(self) -> int:
        return self._asked[len(self.fed)]

    @property
    def done(self) -> bool:
        return len(self.fed) == 3

    def feed(self, chunk: npt.NDArray[np.uint8], start: int) -> None:
        assert chunk.tobytes() == LARGE[start : start + len(chunk)]
        if start <= self.next_offset < start + len(chunk):
            self.fed.append(start)

    def finish(self) -> ShardIndex:
        return index(LARGE)


LARGE = tar_of({f"{number:03}": {"bin": bytes([number]) * 9000} for number in range(50)})


def test_an_indexer_may_ask_for_the_end_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(LARGE)
    indexer = FromTheEnd(len(LARGE), 64 << 10)
    read: list[int] = []
    acquire = Consumer.acquire
    monkeypatch.setattr(
        Consumer,
        "acquire",
        lambda self, chunks, *more, **options: read.extend(chunks) or acquire(self, chunks, *more, **options),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(shards, "indexer_for", lambda *arguments: indexer)
    with Cache(tmp_path / "cache", **LIMITS) as cache:
        source = Source(SourceOptions([str(tmp_path / "a.tar")], cache))
        attached = source.open()
        (found,) = source.shards.index(attached.consumer, [0])
        source.give_back(attached)
        source.close()
    assert found == index(LARGE)
    assert indexer.fed == [7 << 16, 1 << 16, 4 << 16]
    assert read == [7, 1, 4]
