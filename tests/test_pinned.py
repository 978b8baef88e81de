"""Pins with everything real: what they keep through other jobs, kill -9, damaged files, other quotas and clocks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.cache import catalog
from fastload.cache.catalog import Catalog, CatalogPin, Changes
from fastload.client.cache import pin_name
from fastload.client.operator import Operator
from fastload.errors import CacheError, ConfigError
from fastload.plan import RequestedOrder
from fastload.prepare import WarmJob, warm
from fastload.snapshot import DataSet, Snapshot
from tests.processes import kill_service, service_pids, until
from tests.shards import Corpus, corpus

CHUNK_BYTES = 64 << 10
RAM = {"ram_bytes": "2MiB", "chunk_bytes": CHUNK_BYTES}


def read(url: str, cache: fastload.Cache, epochs: int = 1) -> int:
    """Train on it; how many bytes came from the store."""
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, seed=1)
    with fastload.DataLoader(dataset, batch_size=8, num_workers=0) as loader:
        fetched = 0
        for _ in range(epochs):
            for _ in loader:
                pass
            fetched += loader.stats()["remote_bytes"]  # of this epoch
        return int(fetched)


def fill(url: str, cache: fastload.Cache) -> None:
    warmed = warm(WarmJob([url], RequestedOrder(1, "window", None, None)), cache)
    assert warmed.is_complete


def pins_of(directory: Path) -> dict[str, int]:
    """Those that a service would find there, with how much they name."""
    found = Catalog(directory, read_only=True)
    found.open()
    try:
        return {pin.name: sum(pin.sizes.values()) for pin in found.pins()}
    finally:
        found.close()


def seen(cache: fastload.Cache) -> Snapshot:
    with cache._handle.consumer(name="look"), Operator.connect(cache.directory, "test") as operator:
        return operator.snapshot()


def data_sets(cache: fastload.Cache) -> dict[str, DataSet]:
    return {row.name: row for row in seen(cache).data_sets}


@pytest.fixture
def data(s3: Any) -> tuple[Corpus, str]:
    small = corpus(shard_count=4, samples_per_shard=20)
    return small, small.put(s3, "small")


@pytest.fixture
def large(s3: Any) -> tuple[Corpus, str]:
    """Another job's data."""
    other = corpus(shard_count=24, samples_per_shard=20, seed=5)
    return other, other.put(s3, "large")


def test_a_job_on_pinned_data_fetches_nothing_after_epochs_that_would_fill_the_cache_twice(
    tmp_path: Path, data: tuple[Corpus, str], large: tuple[Corpus, str]
) -> None:
    disk_bytes = large[0].byte_count // 2 + 2 * data[0].byte_count
    assert large[0].byte_count > disk_bytes
    with fastload.Cache(tmp_path / "cache", disk_bytes=disk_bytes, **RAM) as cache:
        cache.pin(data[1], name="small")
        fill(data[1], cache)
        assert read(large[1], cache, epochs=2) > 1.1 * large[0].byte_count
        assert read(data[1], cache) == 0
        rows = data_sets(cache)
        assert rows["small"].pinned_bytes == data[0].byte_count
        assert rows["small"].disk_bytes == data[0].byte_count
        assert {tier.name: tier.pinned_bytes for tier in seen(cache).tiers} == {"ram": 0, "disk": data[0].byte_count}


def test_pins_and_names_are_there_after_kill_9(
    tmp_path: Path, data: tuple[Corpus, str], large: tuple[Corpus, str]
) -> None:
    disk_bytes = large[0].byte_count // 2 + 2 * data[0].byte_count
    with fastload.Cache(tmp_path / "cache", disk_bytes=disk_bytes, **RAM) as cache:
        assert cache.pin(data[1], name="small", ttl="14d", quota="1GiB") == data[0].byte_count
        kill_service(tmp_path / "cache")  # at once: a pin that was answered is stored
        assert pins_of(tmp_path / "cache") == {"small": data[0].byte_count}
        fill(data[1], cache)
        kill_service(tmp_path / "cache")
        read(large[1], cache)
        kill_service(tmp_path / "cache")
        read(large[1], cache)
        assert read(data[1], cache) == 0
        assert "small" in data_sets(cache)
        assert cache.unpin("small") == data[0].byte_count
        kill_service(tmp_path / "cache")
        assert pins_of(tmp_path / "cache") == {}


def test_a_damaged_catalog_costs_a_warning_and_the_pins(tmp_path: Path, data: tuple[Corpus, str]) -> None:
    with fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as cache:
        cache.pin(data[1], name="small")
        fill(data[1], cache)
        kill_service(tmp_path / "cache")
        for path in (tmp_path / "cache").glob(f"{catalog.NAME}*"):
            path.write_bytes(os.urandom(50_000))
        with pytest.warns(
            RuntimeWarning, match="catalog of the cache .* cannot be read .* pins that were set are gone"
        ):
            assert read(data[1], cache) == 0
        cache.pin(data[1], name="again")
        kill_service(tmp_path / "cache")
        assert pins_of(tmp_path / "cache") == {"again": data[0].byte_count}


def test_a_quota_below_the_pins_takes_what_is_not_pinned_first_and_is_said(
    tmp_path: Path, data: tuple[Corpus, str], large: tuple[Corpus, str]
) -> None:
    whole, small = 2 * (large[0].byte_count + data[0].byte_count), int(1.4 * data[0].byte_count)
    with fastload.Cache(tmp_path / "cache", disk_bytes=whole, **RAM) as cache:
        cache.pin(data[1], name="small")
        fill(data[1], cache)
        fill(large[1], cache)
    with (
        pytest.warns(RuntimeWarning, match="disk_bytes"),
        fastload.Cache(tmp_path / "cache", disk_bytes=small, **RAM) as cache,
    ):
        assert read(data[1], cache) == 0
    with pytest.warns(RuntimeWarning, match="disk_bytes"):
        cache = fastload.Cache(tmp_path / "cache", disk_bytes=data[0].byte_count // 2, **RAM)
    with cache, pytest.warns(RuntimeWarning, match=r"pins name .*, more than the disk cache .* may hold"):
        read(data[1], cache)
    with cache:
        assert any("pins name" in message for message in seen(cache).troubles)
        with pytest.raises(CacheError, match=r"pin 'small' takes .* on disk, and disk_bytes holds"):
            cache.pin(data[1], name="small")


def test_whose_quota_is_below_the_pins_of_a_running_service_is_warned_and_served(
    tmp_path: Path, data: tuple[Corpus, str]
) -> None:
    with fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as first, first._handle.consumer():
        first.pin(data[1], name="small")
        with pytest.warns(RuntimeWarning, match="disk_bytes"):
            cache = fastload.Cache(tmp_path / "cache", disk_bytes=data[0].byte_count // 2, **RAM)
        with cache, pytest.warns(RuntimeWarning, match=r"pins name .*, more than the disk cache .* may hold") as warned:
            assert any("pins name" in message for message in seen(cache).troubles)
        assert not any("cannot be used" in str(each.message) for each in warned)


def test_a_clock_that_was_set_back_ends_no_pin_early_and_none_for_ever(
    tmp_path: Path, data: tuple[Corpus, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.1")
    directory = tmp_path / "cache"
    with fastload.Cache(directory, disk_bytes="64MiB", **RAM) as cache:
        cache.pin(data[1], name="small", ttl="1h")
    until(lambda: not service_pids(directory))
    for used_at, stays in ((time.time() + 1e7, True), (time.time() - 1800, True), (time.time() - 3700, False)):
        found = Catalog(directory)
        found.open()
        (pin,) = found.pins()
        found.write(Changes(pins=[CatalogPin(pin.name, pin.sizes, pin.ttl_s, pin.quota_bytes, used_at)]))
        found.close()
        with fastload.Cache(directory, disk_bytes="64MiB", **RAM) as cache:
            assert ("small" in data_sets(cache)) is stays
        until(lambda: not service_pids(directory))
    assert pins_of(directory) == {}


def test_pins_without_a_disk_tier_without_a_service_of_the_directory_and_mistakes(
    tmp_path: Path, data: tuple[Corpus, str]
) -> None:
    with fastload.Cache(tmp_path / "ram", disk_bytes=0, **RAM) as cache:
        with pytest.raises(CacheError, match=r"keeps nothing on disk \(disk_bytes=0\).*set disk_bytes"):
            cache.pin(data[1])
        assert cache.unpin("nothing") == 0
    with fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as cache:
        for wrong in ({"ttl": "soon"}, {"ttl": 0}, {"ttl": -1}, {"quota": "much"}, {"name": ""}, {"name": "x" * 501}):
            with pytest.raises(ConfigError):
                cache.pin(data[1], **wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            cache.pin([])
        with pytest.raises(CacheError, match=r"its quota is 1\.0 KiB"):
            cache.pin(data[1], quota="1KiB")
        with pytest.raises(fastload.StoreError):
            cache.pin(data[1].replace("small", "none"))
        assert cache.pin(data[1]) == data[0].byte_count
        assert list(pins_of(tmp_path / "cache")) == [data[1]]
        assert cache.unpin(data[1]) == data[0].byte_count


def test_a_service_that_replaces_another_learns_names_and_says_what_it_holds(
    tmp_path: Path, data: tuple[Corpus, str]
) -> None:
    with (
        fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as cache,
        cache._handle.consumer(name="job") as consumer,
    ):
        consumer.attach(consumer.resolve([data[1]], (".tar",)))
        consumer.label("mine")
        assert consumer.held().held_bytes == 0
        consumer.acquire([0]).close()
        assert list(data_sets(cache)) == ["mine"]
        kill_service(tmp_path / "cache")
        held = consumer.held()
        assert held.byte_count == data[0].byte_count
        assert held.held_bytes in (0, min(CHUNK_BYTES, data[0].byte_count))  # as far as it had come to disk
        consumer.release([0])
        consumer.acquire([1]).close()
        assert "mine" in data_sets(cache)
        fill(data[1], cache)
        held = consumer.held()
        assert held.disk_bytes == held.held_bytes == held.byte_count
        assert held.pinned_bytes == 0
        consumer.pin("mine")
        assert consumer.held().pinned_bytes == data[0].byte_count


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
        until(lambda: not service_pids(place))
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_pin_that_a_full_disk_does_not_store_is_said_to_be_lost_and_can_be_set_again(
    small_disk: Path, data: tuple[Corpus, str]
) -> None:
    with fastload.Cache(small_disk, disk_bytes="2MiB", **RAM) as cache, cache._handle.consumer(name="stays"):
        with (small_disk / "junk").open("wb", buffering=0) as junk, contextlib.suppress(OSError):
            while True:
                junk.write(bytes(4096))
        with pytest.raises(CacheError, match=r"pin 'small' holds, but is lost with the service, .* not be stored"):
            cache.pin(data[1], name="small")
        with pytest.warns(RuntimeWarning) as warned:
            assert read(data[1], cache) == data[0].byte_count  # and the job goes on
        assert any("catalog" in str(each.message) and "cannot be used now" in str(each.message) for each in warned)
        (small_disk / "junk").unlink()
        assert cache.pin(data[1], name="small") == data[0].byte_count
        assert pins_of(small_disk) == {"small": data[0].byte_count}


def test_clearing_leaves_pinned_chunks(tmp_path: Path, data: tuple[Corpus, str], large: tuple[Corpus, str]) -> None:
    with fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as cache:
        cache.pin(data[1], name="small")
        fill(data[1], cache)
        fill(large[1], cache)
        assert cache.clear() >= large[0].byte_count
        assert read(data[1], cache) == 0
        assert cache.clear(pins=True) >= data[0].byte_count
        assert read(data[1], cache) > 0
        assert pins_of(tmp_path / "cache") == {}


def test_a_directory_that_is_removed_gets_no_catalog(
    tmp_path: Path, data: tuple[Corpus, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "600")
    with fastload.Cache(tmp_path / "cache", disk_bytes="64MiB", **RAM) as cache:
        cache.pin(data[1], name="small")
        fill(data[1], cache)
        assert read(data[1], cache) == 0
    until(lambda: len(_described(tmp_path / "cache")) == 4)
    shutil.rmtree(tmp_path / "cache")
    until(lambda: not service_pids(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def _described(directory: Path) -> list[str]:
    found = Catalog(directory, read_only=True)
    found.open()
    try:
        return [each.url for each in found.objects()]
    finally:
        found.close()


def test_pins_without_a_name_are_called_by_the_data_wherever_that_is_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        assert pin_name(["data/"]) == f"{tmp_path}/{folder}/data/"
    many = [f"s3://bucket/{number:06}.tar" for number in range(1000)]
    names = {pin_name(many), pin_name([*many, "s3://bucket/more.tar"])}
    assert len(names) == 2
    assert all(len(name) <= 500 for name in names)
