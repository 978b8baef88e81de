"""Runs that are built to be bound by each cause say so, and their parts add up; on real stores, disks and processes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

import fastload
from fastload import loader_stream
from fastload.cache import syscalls
from fastload.client.operator import Operator
from fastload.pipeline import shards
from fastload.service.core import Core
from fastload.timing.activity import CAUSES
from fastload.timing.verdict import KEEPS_UP_SHARE
from tests.processes import until
from tests.shards import tar_of
from tests.store.servers import Handler, answer, server, whole

KIB = 1 << 10


def tar(shard: int, count: int = 32, value: bytes = b"", columns: dict[str, bytes] | None = None) -> bytes:
    """A shard; about a MiB where nothing else is said."""
    values = columns or {"bin": value or os.urandom(32 * KIB)}
    return tar_of({f"{shard}/{number:04}": values for number in range(count)})


@pytest.fixture
def local(tmp_path: Path) -> list[str]:
    """Four shards in files."""
    (tmp_path / "data").mkdir()
    paths = [tmp_path / "data" / f"{shard}.tar" for shard in range(4)]
    for shard, path in enumerate(paths):
        path.write_bytes(tar(shard))
    return list(map(str, paths))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with cache_of(tmp_path) as cache:
        yield cache


def cache_of(folder: Path, **limits: Any) -> fastload.Cache:
    """With the service in this process."""
    limits = {"ram_bytes": "64MiB", "disk_bytes": "64MiB", "chunk_bytes": "256KiB", **limits}
    return fastload.Cache(folder / "cache", service="inprocess", **limits)


def checked(stats: dict[str, Any]) -> dict[str, Any]:
    """Figures whose parts add up."""
    parts = stats["work_s"] + sum(stats[f"stall_{cause}_s"] for cause in CAUSES)
    assert parts == pytest.approx(stats["elapsed_s"], rel=0.02)
    assert min(stats["work_s"], *(stats[f"stall_{cause}_s"] for cause in CAUSES)) >= 0.0
    assert stats["wait_batch_p50_s"] <= stats["wait_batch_p99_s"] <= stats["wait_batch_max_s"]
    return stats


def read(
    loader: fastload.DataLoader[Any], epochs: int = 1, step: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """The figures of the last of some epochs, with a step after each batch."""
    with loader:
        for _ in range(epochs):
            for _ in loader:
                step()
                checked(loader.stats())
        return checked(loader.stats())


@contextmanager
def store(before: Callable[[Handler], bool], count: int = 4) -> Iterator[dict[str, Any]]:
    """What makes a data set over a store of some shards. `before` may delay a reply, and says whether it is to come."""
    objects = {f"/b/{number}.tar": tar(number) for number in range(count)}

    def behave(handler: Handler) -> None:
        if before(handler):
            whole(objects[handler.path.split("?")[0]])(handler)

    with server(behave) as options:
        names = ("endpoint_url", "access_key_id", "secret_access_key")
        storage_options = {name: getattr(options, name) for name in names}
        yield {"urls": [f"s3:/{name}" for name in objects], "storage_options": storage_options}


class Link:
    """All replies pass it, 32 KiB at a time."""

    def __init__(self, seconds: float) -> None:
        self._free, self._seconds = threading.Lock(), seconds

    def __call__(self, handler: Handler) -> bool:
        """Send the reply's body slowly."""
        handler.wfile = _Slowly(handler.connection, self._free, self._seconds)  # type: ignore[assignment]
        return True


class _Slowly:
    def __init__(self, connection: socket.socket, free: threading.Lock, seconds: float) -> None:
        self._connection, self._free, self._seconds = connection, free, seconds
        self.closed = False

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), 32 * KIB):
            if len(data) > 8 * KIB:
                with self._free:
                    time.sleep(self._seconds)
            self._connection.sendall(data[start : start + 32 * KIB])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def is_read(handler: Handler) -> bool:
    return handler.command == "GET" and handler.headers.get("Range") is not None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slow_link(tmp_path: Path, num_workers: int) -> None:
    with store(Link(0.015), count=8) as data, cache_of(tmp_path) as cache:
        stats = read(fastload.DataLoader(fastload.StreamingDataset(**data, cache=cache), 8, num_workers=num_workers))
    # On a machine that is loaded, not enough requests may be alike to tell the link.
    assert stats["bound_by"] in ("link", "fetch"), stats["verdict"]


@pytest.mark.thorough
def test_a_store_that_answers_late(tmp_path: Path) -> None:
    def late(handler: Handler) -> bool:
        if is_read(handler):
            time.sleep(0.15)
        return True

    with store(late, count=8) as data, cache_of(tmp_path, requests_in_flight=2) as cache:
        stats = read(fastload.DataLoader(fastload.StreamingDataset(**data, cache=cache), 8, num_workers=2))
        with Operator.connect(cache.directory, "test") as operator:
            (endpoint,) = operator.snapshot().endpoints
    assert stats["bound_by"] == "latency", stats["verdict"]
    for times in (endpoint.request_times, endpoint.first_byte_times):
        assert times.count == endpoint.requests > 30
        assert times.sum_s >= 0.15 * times.count
        assert dict(zip(times.bounds_s, times.counts, strict=True))[0.1] == 0
        assert times.counts == sorted(times.counts)


@pytest.mark.thorough
def test_a_store_that_refuses(tmp_path: Path) -> None:
    count = iter(range(1 << 30))

    def refuses(handler: Handler) -> bool:
        if is_read(handler) and next(count) % 3:
            answer(503, b"<Error><Code>SlowDown</Code></Error>", ETag="", Content_Range="")(handler)
            return False
        return True

    with store(refuses, count=8) as data, cache_of(tmp_path) as cache:
        stats = read(fastload.DataLoader(fastload.StreamingDataset(**data, cache=cache), 8, num_workers=2))
    assert stats["bound_by"] == "throttled", stats["verdict"]


@pytest.mark.thorough
def test_a_store_that_is_slow_to_say_what_there_is(tmp_path: Path) -> None:
    def late(handler: Handler) -> bool:
        if handler.command == "HEAD":
            time.sleep(1.0)
        return True

    with store(late, count=2) as data, cache_of(tmp_path) as cache:
        stats = read(fastload.DataLoader(fastload.StreamingDataset(**data, cache=cache), 8, num_workers=2))
    assert stats["bound_by"] == "listing", stats["verdict"]


def test_a_slow_disk(tmp_path: Path, local: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = syscalls.preadv

    def slow(*arguments: Any) -> int:
        time.sleep(0.6)
        return preadv(*arguments)

    with cache_of(tmp_path) as cache, fastload.DataLoader(fastload.StreamingDataset(local, cache=cache), 8) as loader:
        list(loader)
        until(lambda: cache.stats()["disk_used_bytes"] > 4 << 20)
    monkeypatch.setattr(syscalls, "preadv", slow)
    with cache_of(tmp_path) as cache:
        stats = read(fastload.DataLoader(fastload.StreamingDataset(local, cache=cache), 8, num_workers=2))
    assert stats["bound_by"] == "disk", stats["verdict"]
    assert stats["remote_bytes"] == 0


def sleep_a_sample(sample: Any) -> Any:
    time.sleep(0.02)
    return sample


def sleep_a_batch(samples: list[Any]) -> Any:
    time.sleep(0.05)
    return len(samples)


@pytest.mark.parametrize(("workers", "num_workers"), [("auto", 0), ("process", 2), ("side", 2), ("thread", 2)])
def test_slow_functions(cache: fastload.Cache, local: list[str], workers: Any, num_workers: int) -> None:
    dataset = fastload.StreamingDataset(local, cache=cache).map(sleep_a_sample)
    stats = read(fastload.DataLoader(dataset, 8, num_workers=num_workers, workers=workers), epochs=2)
    assert stats["bound_by"] == "map", stats["verdict"]
    assert "wait or sleep for" in stats["verdict"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slow_collate_function(cache: fastload.Cache, local: list[str], num_workers: int) -> None:
    dataset = fastload.StreamingDataset(local, cache=cache)
    stats = read(fastload.DataLoader(dataset, 2, num_workers=num_workers, collate_fn=sleep_a_batch), epochs=2)
    assert stats["bound_by"] == "collate", stats["verdict"]


@pytest.mark.parametrize(("workers", "num_workers"), [("auto", 0), ("thread", 1), ("process", 1)])
def test_large_images(cache: fastload.Cache, tmp_path: Path, workers: Any, num_workers: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    path = tmp_path / "images.tar"
    path.write_bytes(tar(0, 40, columns={"jpg": simplejpeg.encode_jpeg(noise, quality=90)}))
    dataset = fastload.StreamingDataset(path, cache=cache, decode={"jpg": fastload.decode.image(size=512)})
    stats = read(fastload.DataLoader(dataset, 2, num_workers=num_workers, workers=workers), epochs=2)
    assert stats["bound_by"] == "decode", stats["verdict"]
    assert "images" in stats["verdict"]


def assert_consumer(stats: dict[str, Any]) -> None:
    """The trainer's work takes most of the time; on a machine that is loaded, waits may take some all the same."""
    assert stats["work_s"] > 0.5 * stats["elapsed_s"]
    is_kept_up = stats["elapsed_s"] - stats["work_s"] < KEEPS_UP_SHARE * stats["elapsed_s"]
    assert (stats["bound_by"] == "consumer") == is_kept_up, stats["verdict"]


def test_a_slow_trainer(cache: fastload.Cache, local: list[str]) -> None:
    dataset = fastload.StreamingDataset(local, cache=cache)
    stats = read(fastload.DataLoader(dataset, 8, num_workers=2), epochs=2, step=lambda: time.sleep(0.1))
    assert stats["work_s"] > 1.4
    assert_consumer(stats)


@pytest.mark.thorough
def test_a_slow_way_to_the_device(cache: fastload.Cache, local: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowMover:
        def begin(self, batch: Any) -> Any:
            time.sleep(0.05)
            return batch

        def deliver(self, batch: Any) -> Any:
            time.sleep(0.05)
            return batch

    monkeypatch.setattr(loader_stream, "mover_to", lambda device: SlowMover())
    stats = read(fastload.DataLoader(fastload.StreamingDataset(local, cache=cache), 4, num_workers=1), epochs=2)
    assert stats["bound_by"] == "transfer", stats["verdict"]


@pytest.mark.thorough
def test_slow_indexing(cache: fastload.Cache, local: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    indexer_for = shards.indexer_for

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return indexer_for(*arguments)

    monkeypatch.setattr(shards, "indexer_for", slow)
    stats = read(fastload.DataLoader(fastload.StreamingDataset(local, cache=cache), 8, num_workers=2))
    assert stats["bound_by"] == "index", stats["verdict"]


@pytest.mark.thorough
def test_a_service_that_hardly_gets_to_it(
    cache: fastload.Cache, local: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Core.receive

    def late(*arguments: Any) -> None:
        time.sleep(0.2)
        receive(*arguments)

    with fastload.DataLoader(fastload.StreamingDataset(local, cache=cache), 8, num_workers=2) as loader:
        list(loader)
        monkeypatch.setattr(Core, "receive", late)
        for _ in loader:
            pass
        monkeypatch.setattr(Core, "receive", receive)
        stats = checked(loader.stats())
    assert stats["bound_by"] == "service", stats["verdict"]


@pytest.mark.thorough
def test_an_arena_that_is_too_small(tmp_path: Path, local: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = syscalls.preadv

    def slow(*arguments: Any) -> int:
        time.sleep(0.02)
        return preadv(*arguments)

    monkeypatch.setattr(syscalls, "preadv", slow)
    with cache_of(tmp_path, ram_bytes="1MiB", chunk_bytes="256KiB") as cache:
        dataset = fastload.StreamingDataset(local, cache=cache, shuffle="global")
        stats = read(fastload.DataLoader(dataset, 8, num_workers=2), epochs=2)
    assert stats["bound_by"] == "memory", stats["verdict"]


class Slow(torch.utils.data.Dataset[int]):
    """A data set that is not ours."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> int:
        time.sleep(self.seconds)
        return number


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("workers", "num_workers", "persistent"), [("auto", 0, False), ("process", 1, True), ("thread", 1, False)]
)
def test_other_data_sets(workers: Any, num_workers: int, persistent: bool) -> None:
    options = {"num_workers": num_workers, "workers": workers, "persistent_workers": persistent}
    stats = read(fastload.DataLoader(Slow(0.05), 4, **options), epochs=2)
    assert (stats["epoch"], stats["batches"]) == (1, 8)
    assert stats["bound_by"] == "map", stats["verdict"]
    assert "own code" in stats["verdict"]
    quick = read(fastload.DataLoader(Slow(0.0), 4, **options), epochs=2, step=lambda: time.sleep(0.2))
    assert_consumer(quick)


def test_without_workers_a_collate_function_counts_for_itself() -> None:
    stats = read(fastload.DataLoader(Slow(0.0), 2, collate_fn=sleep_a_batch))
    assert stats["stall_collate_s"] >= 0.8
    assert stats["stall_collate_s"] > stats["stall_map_s"]


def test_operators_see_how_each_rank_is_doing(tmp_path: Path, local: list[str]) -> None:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB") as cache:
        dataset = fastload.StreamingDataset(local, cache=cache, rank=1, world_size=2).map(sleep_a_sample)
        with fastload.DataLoader(dataset, 4, num_workers=0) as loader, ExitStack() as stack:
            iterator = iter(loader)
            next(iterator)
            operator = stack.enter_context(Operator.connect(cache.directory, "test"))
            first = reported(operator)
            assert (first["rank"], first["world_size"], first["epoch"]) == (1, 2, 0)
            for _ in iterator:
                pass
            until(lambda: reported(operator)["batches"] == loader.stats()["batches"])
            last = reported(operator)
            assert last["samples"] == loader.stats()["samples"]
            assert last["work_s"] + sum(last["stalls"].values()) == pytest.approx(last["elapsed_s"], rel=0.02)
            assert last["batch_wait"]["count"] == last["batches"]
            assert last["bound_by"] in (*CAUSES, "unknown")
            assert last["verdict"]


def reported(operator: Operator) -> dict[str, Any]:
    """What the one loader says, once it has said something."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = [each.report for each in operator.snapshot().consumers if each.report]
        return bool(found)

    until(is_there)
    return found[0]
