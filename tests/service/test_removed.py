"""A cache directory is emptied or removed while it is used: jobs go on, with the limits that they had."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.cache import CacheDirectory
from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.config import CacheLimits
from fastload.service.host import server
from tests.conftest import Bucket
from tests.processes import kill_service, service_pids, until
from tests.service.helpers import CHUNK_BYTES, chunks_of, read, read_epoch, read_object, service_pid
from tests.shards import check_samples, corpus, samples_of

# A write that meets the removal is left out, and is told of once.
pytestmark = pytest.mark.filterwarnings("ignore:a write to the disk cache .* was left out:RuntimeWarning")

ENDINGS = (".tar",)
LIMITS = {
    "ram_bytes": 40 * CHUNK_BYTES,
    "disk_bytes": 64 << 20,
    "chunk_bytes": CHUNK_BYTES,
    "disk_write_bytes_per_s": 1 << 30,
    "requests_in_flight": 3,
    "history_bytes": 1 << 20,
    "checkpoint_ram_bytes": 2 << 20,
    "checkpoint_disk_bytes": 3 << 20,
}


def emptied(directory: Path) -> None:
    """rm -rf directory/*"""
    with contextlib.suppress(FileNotFoundError):  # nobody has made it again yet
        for path in directory.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def removed(directory: Path) -> None:
    """rm -rf directory"""
    shutil.rmtree(directory, ignore_errors=True)  # files come while it goes


def parent_removed(directory: Path) -> None:
    """rm -rf of all above it that is the test's own"""
    shutil.rmtree(directory.parent, ignore_errors=True)


Removal = Callable[[Path], None]
removals = pytest.mark.parametrize("remove", [emptied, removed, parent_removed])


@pytest.fixture
def cache(tmp_path: Path, mode: Any) -> Any:
    with Cache(tmp_path / "folder" / "cache", service=mode, **LIMITS) as cache:
        yield cache


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of services in this process."""
    monkeypatch.setattr(server, "_LOOK_S", 0.05)


def assert_as_before(cache: Cache, consumer: Consumer) -> None:
    node = consumer.stats()["node"]
    assert consumer.chunk_bytes == CHUNK_BYTES
    assert node["buffers"] == 40
    assert node["disk_quota_bytes"] == LIMITS["disk_bytes"]
    assert json.loads((cache.directory / "cache.json").read_text()) == {"format": 1, **LIMITS}
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
    assert CacheDirectory.open(cache.directory).limits == CacheLimits(**LIMITS)


@removals
def test_it_goes_and_its_service_dies(cache: Cache, s3: Bucket, shards: dict[str, bytes], remove: Removal) -> None:
    with cache.consumer() as consumer, cache.consumer() as other:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        for each in (consumer, other):
            each.attach(objects)
        with consumer.acquire(chunks_of(objects, 0)):
            remove(cache.directory)
            kill_service(cache.directory)
            assert read_object(other, objects, 1) == shards[objects[1].url]
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert_as_before(cache, consumer)
        assert service_pid(consumer) == service_pid(other)


@removals
@pytest.mark.parametrize("mode", ["inprocess"])
@pytest.mark.usefixtures("quick_looks")
def test_it_goes_while_its_service_lives(cache: Cache, s3: Bucket, shards: dict[str, bytes], remove: Removal) -> None:
    """The service goes on until it is sure, and leaves its place to one that has a disk tier again."""
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        first = consumer._arena
        read_object(consumer, objects, 0)
        remove(cache.directory)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        until(lambda: consumer._arena is not first)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert_as_before(cache, consumer)
        until(lambda: list(cache.directory.rglob("*.chunk")))


def test_a_process_finds_out_by_itself(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        pid = service_pid(consumer)
        removed(cache.directory)
        until(lambda: service_pid(consumer) != pid)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert_as_before(cache, consumer)


def test_ranks_and_workers_meet_again(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    """Handles of several processes, one of them unpickled just then, find one service, whoever is first."""
    handles = [cache, Cache(cache.directory), Cache(cache.directory)]
    consumers = [handle.consumer() for handle in handles]
    objects = consumers[0].resolve([f"{s3.url}/"], ENDINGS)
    for each in consumers:
        each.attach(objects)
    wire = pickle.dumps(cache)
    removed(cache.directory)
    kill_service(cache.directory)
    handles.append(pickle.loads(wire))
    found: list[list[bytes]] = []

    def run(consumer: Consumer) -> None:
        found.append(read_epoch(consumer, objects, range(6)))

    consumers.append(handles[-1].consumer())
    consumers[-1].attach(objects)
    threads = [threading.Thread(target=run, args=(each,)) for each in consumers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(shards.values())] * 4
    assert len({service_pid(each) for each in consumers}) == 1
    assert_as_before(cache, consumers[0])
    for handle in handles[1:]:
        handle.close()


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
@pytest.mark.usefixtures("quick_looks")
def test_an_epoch_is_read_while_it_goes_again_and_again(cache: Cache, tmp_path: Path, mode: Any) -> None:
    """During fetches, writes, starts and the reading of indexes; with the manifest of the job in it."""
    data = corpus(shard_count=8, samples_per_shard=24)
    manifest = cache.directory / "manifest.json"
    with _named(cache) as named:
        dataset = fastload.StreamingDataset(
            data.write(tmp_path / "data"), cache=named, shuffle=True, shuffle_window="256KiB", manifest=manifest
        )
        with fastload.DataLoader(dataset, batch_size=8, num_workers=2) as loader:
            for epoch in range(3):
                keys: list[str] = []
                for number, batch in enumerate(loader):
                    keys += check_samples(data, samples_of(batch))
                    if number % 5 == epoch:
                        (emptied if number % 2 else removed)(cache.directory)
                    if number % 9 == epoch and mode == "auto":
                        kill_service(cache.directory)
                assert sorted(keys) == sorted(data.samples)


def _named(cache: Cache) -> fastload.Cache:
    return fastload.Cache(cache.directory, service=cache._connector.mode)


def test_open_files_go_on(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(os.urandom(8 * CHUNK_BYTES))
    with _named(cache) as named, fastload.open(path, named) as file:
        assert file.read(1) == path.read_bytes()[:1]
        removed(cache.directory)
        kill_service(cache.directory)
        file.seek(6 * CHUNK_BYTES)
        assert file.read() == path.read_bytes()[6 * CHUNK_BYTES :]
        with fastload.open(path, named) as again:
            assert again.size == 8 * CHUNK_BYTES


def test_what_somebody_changed_meanwhile_holds_but_for_the_chunks(cache: Cache, s3: Bucket, shards: Any) -> None:
    """A job's chunks keep their size as long as it lives; what it did not name is the directory's."""
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read(consumer, chunks_of(objects, 0))
        with pytest.warns(RuntimeWarning, match="were changed"):
            Cache(cache.directory, disk_bytes=32 << 20, chunk_bytes=2 * CHUNK_BYTES)
        written = json.loads((cache.directory / "cache.json").read_text())
        kill_service(cache.directory)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert consumer.chunk_bytes == CHUNK_BYTES
        assert consumer.stats()["node"]["disk_quota_bytes"] == 32 << 20
        assert json.loads((cache.directory / "cache.json").read_text()) == written


def test_limits_that_make_no_sense_with_these_chunks_are_ours(tmp_path: Path) -> None:
    CacheDirectory.open(tmp_path / "cache", ram_bytes=1 << 20, disk_bytes=0, chunk_bytes=1 << 16)
    ours = CacheLimits(ram_bytes=8 << 20, disk_bytes=0, chunk_bytes=4 << 20)
    opened = CacheDirectory.open(tmp_path / "cache", otherwise=ours)
    assert opened.limits == ours
    assert CacheDirectory.open(tmp_path / "cache").limits.chunk_bytes == 1 << 16
    assert asdict(opened.renewed().limits) == asdict(ours)


def test_a_start_meets_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory goes after the lock was taken, before anybody listens."""
    listen = CacheDirectory.listen
    with Cache(tmp_path / "cache", service="inprocess", **LIMITS) as cache:

        def raced(self: CacheDirectory) -> Any:
            monkeypatch.setattr(CacheDirectory, "listen", listen)
            removed(cache.directory)
            return listen(self)

        monkeypatch.setattr(CacheDirectory, "listen", raced)
        with cache.consumer() as consumer:
            assert_as_before(cache, consumer)
    assert not service_pids(cache.directory)
