"""A consumer and a real service, on a real store: what it reads is what is there, and each byte is fetched once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.client.consumer import WaitInterruptedError
from fastload.errors import ObjectMissingError, ServiceError, WaitTimeoutError
from fastload.service import queries
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.service.helpers import (
    CHUNK_BYTES,
    chunks_of,
    contents,
    eventually,
    read,
    read_epoch,
    read_object,
    service_pid,
)

ENDINGS = (".tar",)


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_reads_what_is_there_and_fetches_it_once(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer(name="train") as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        assert [info.url for info in objects] == list(shards)
        consumer.attach(objects)
        for epoch, order in enumerate(([0, 1, 2, 3, 4, 5], [3, 1, 5, 0, 2, 4])):
            found = read_epoch(consumer, objects, order, epoch)
            assert found == [shards[objects[number].url] for number in order]
        stats = consumer.stats()
        assert stats["node"]["fetched_bytes"] == stats["store"]["bytes"] == sum(map(len, shards.values()))
        own = stats["consumer"]
        assert own["remote_bytes"] == stats["node"]["fetched_bytes"]
        assert own["ram_bytes"] == own["remote_bytes"]  # the second epoch


def test_patterns_and_missing_objects(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        assert len(consumer.resolve([f"{s3.url}/shard-{{0..3}}.tar"], ENDINGS)) == 4
        with pytest.raises(ObjectMissingError, match=r"shard-6\.tar"):
            consumer.resolve([f"{s3.url}/shard-{{0..6}}.tar"], ENDINGS)


def test_relative_paths_are_those_of_the_consumer(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.tar").write_bytes(b"x" * 100)
    monkeypatch.chdir(tmp_path)
    with cache.consumer() as consumer:
        objects = consumer.resolve(["one.tar"], ENDINGS)
        assert objects[0].url == str(tmp_path / "one.tar")
        consumer.attach(objects)
        assert read_object(consumer, objects, 0) == b"x" * 100


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_a_second_service_run_finds_the_disk(cache: Cache, s3: Bucket, shards: dict[str, bytes], mode: str) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read_epoch(consumer, objects, range(6))
        chunk_count = sum(len(chunks_of(objects, number)) for number in range(6))
        eventually(lambda: consumer.stats()["node"]["written_chunks"] == chunk_count, "all is on disk")
    cache.close()
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    with cache.consumer() as consumer:
        consumer.attach(objects)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        stats = consumer.stats()
        assert stats["node"]["fetched_bytes"] == 0
        assert stats["consumer"]["disk_bytes"] == sum(map(len, shards.values()))


def test_prefetch_follows_the_plan(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        consumer.set_plan([4, 2])
        eventually(
            lambda: consumer.stats()["node"]["fetched_bytes"] == objects[4].size + objects[2].size,
            "the plan's two objects are there",
        )
        assert consumer.counts()["leased"] == 0
        consumer.want(chunks_of(objects, 2))
        eventually(lambda: consumer.counts()["leased"] == len(chunks_of(objects, 2)), "wants are leased")


@pytest.mark.parametrize("buffer_count", [2, 3])
def test_any_arena_will_do(tmp_path: Path, s3: Bucket, shards: dict[str, bytes], buffer_count: int) -> None:
    """Several threads of several consumers want more than the arena holds, at once and for long."""
    ram_bytes = buffer_count * CHUNK_BYTES
    with Cache(tmp_path / "cache", ram_bytes=ram_bytes, disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES) as cache:
        consumers = [cache.consumer(name=str(number)) for number in range(2)]
        objects = consumers[0].resolve([f"{s3.url}/"], ENDINGS)
        wrong: list[object] = []

        def work(consumer: Consumer, seed: int) -> None:
            try:
                for number in np.random.default_rng(seed).permutation(6).tolist():
                    if read_object(consumer, objects, number) != shards[objects[number].url]:
                        wrong.append(number)
            except Exception as error:  # reported by the test's own thread
                wrong.append(error)

        for consumer in consumers:
            consumer.attach(objects)
            consumer.set_plan(range(6))
        threads = [threading.Thread(target=work, args=(consumers[n % 2], n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for consumer in consumers:
            consumer.close()
        assert not wrong


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_two_consumers_share_each_fetch(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as first, cache.consumer() as second:
        objects = first.resolve([f"{s3.url}/"], ENDINGS)
        for consumer in (first, second):
            consumer.attach(objects)
            consumer.set_plan(range(6))
        for number in range(6):
            for consumer in (first, second):
                assert read_object(consumer, objects, number) == shards[objects[number].url]
        assert first.stats()["node"]["fetched_bytes"] == sum(map(len, shards.values()))


def test_an_object_named_twice_has_two_numbers_and_one_chunk(
    cache: Cache, s3: Bucket, shards: dict[str, bytes]
) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/shard-1.tar"] * 2, ENDINGS)
        consumer.attach(objects)
        first, second = read_epoch(consumer, objects, [0, 1])
        assert first == second == shards[objects[0].url]
        assert consumer.stats()["node"]["fetched_bytes"] == objects[0].size


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_indexes_are_kept(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        assert consumer.get_indexes(range(6)) == ({}, [0, 1, 2, 3, 4, 5])
        large = bytes(5 << 20)
        for number in (1, 3, 4):
            consumer.put_index(number, large + bytes([number]))
        found, make = consumer.get_indexes(range(6))
        assert {number: data[-1] for number, data in found.items()} == {1: 1, 3: 3, 4: 4}
        assert make == [0, 2, 5]
        eventually(lambda: consumer.stats()["node"]["disk_used_bytes"] > 3 * len(large), "they are on disk")
    cache.close()
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    with cache.consumer() as consumer:
        consumer.attach(objects)
        assert sorted(consumer.get_indexes(range(6))[0]) == [1, 3, 4]


@pytest.mark.parametrize("mode", ["inprocess"])
def test_indexes_are_not_left_to_a_call_that_was_interrupted(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "SILENT_S", 10 * PATIENCE_S)
    with cache.consumer() as maker, cache.consumer() as interrupted, cache.consumer() as other:
        objects = maker.resolve([f"{s3.url}/"], ENDINGS)
        for consumer in (maker, interrupted, other):
            consumer.attach(objects)
        assert maker.get_indexes([0]) == ({}, [0])
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                interrupted.get_indexes([0])
            except WaitInterruptedError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: bool(interrupted._requests), "it waits")
        with interrupted.interrupted():
            thread.join()
        assert errors
        interrupted.stats()  # by then the service has its request
        maker.give_up_indexes([0])
        assert other.get_indexes([0], deadline_s=PATIENCE_S) == ({}, [0])


def test_reports_are_shown(cache: Cache) -> None:
    with cache.consumer(name="train") as consumer:
        consumer.report(samples=12, stalls={"fetch": 0.5})
        (line,) = consumer.stats()["consumers"]
        assert (line["name"], line["pid"]) == ("train", os.getpid())
        assert line["report"] == {"samples": 12, "stalls": {"fetch": 0.5}}


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_closing_ends_waits(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    consumer = cache.consumer()
    threading.Timer(0.1, consumer.close).start()
    with pytest.raises(ServiceError, match="closed"):
        consumer.wait_progress(None)


def test_a_closed_consumer_says_so(cache: Cache) -> None:
    """Also where a call only sends: what is never sent would be missed without a word."""
    consumer = cache.consumer()
    consumer.close()
    for call in (
        lambda: consumer.attach([]),
        lambda: consumer.keep([], "pin"),
        lambda: consumer.set_plan([]),
        lambda: consumer.wait_progress(None),
        lambda: consumer.want([]),
        lambda: consumer.acquire([0]),
        lambda: consumer.put_index(0, b""),
        lambda: consumer.stats(),
    ):
        with pytest.raises(ServiceError, match="closed"):
            call()


def test_interrupted_waits_end_and_the_consumer_goes_on(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=2 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
        cache.consumer() as other,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        for each in (consumer, other):
            each.attach(objects)
        read(other, [0, 1])
        with other.acquire([0]), other.acquire([1]):
            errors: list[BaseException] = []

            def work() -> None:
                try:
                    consumer.acquire([2])
                except WaitInterruptedError as error:
                    errors.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            eventually(lambda: other.stats()["node"]["recalls"] > 0, "it waits for room")
            with consumer.interrupted():
                thread.join()
                assert "shard-0.tar from byte 131072" in str(errors[0])
                with pytest.raises(WaitInterruptedError, match="figures"):
                    consumer.stats()
                with consumer.interrupted():
                    pass
                with pytest.raises(WaitInterruptedError):  # the outer block has not ended
                    consumer.wait_progress(None)
        assert read_object(consumer, objects, 0) == shards[objects[0].url]
        (chunk,) = read(consumer, [0])
        with consumer.interrupted(), consumer.acquire([chunk]) as held:  # what is here needs no wait
            assert held.chunk_nos.tolist() == [chunk]


def test_a_wait_names_what_it_waited_for(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=2 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
        cache.consumer() as other,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        other.attach(objects)
        found: set[int] = set()
        held = []
        while len(found) < 2:  # holds the whole arena, which a user must not while waiting
            held.append(consumer.acquire([chunk for chunk in (0, 1) if chunk not in found]))
            found |= set(contents(held[-1]))
        with pytest.raises(WaitTimeoutError, match=r"shard-1\.tar from byte 65536"):
            other.acquire([chunks_of(objects, 1)[1]], 0.2)
        for each in held:
            each.close()
        assert len(read(other, [chunks_of(objects, 1)[1]])) == 1


def test_chunks_that_are_not_there(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        with pytest.raises(ValueError, match="chunk 10000"):
            consumer.want([0, 10000])
        with pytest.raises(ValueError, match="object 6"):
            consumer.set_plan([6])
        with pytest.raises(ValueError, match="no chunks"):
            consumer.acquire([])


def _read_in_child(cache: Cache, url: str, results: multiprocessing.SimpleQueue[object]) -> None:
    with cache.consumer(name="child") as consumer:
        objects = consumer.resolve([url], ENDINGS)
        consumer.attach(objects)
        results.put((service_pid(consumer), read_object(consumer, objects, 0)))


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_a_spawned_process_uses_the_same_service(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    url = f"{s3.url}/shard-2.tar"
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    with cache.consumer() as consumer:
        child = context.Process(target=_read_in_child, args=(cache, url, results))
        child.start()
        assert results.get() == (service_pid(consumer), shards[url])
        child.join()
        results.close()
        child.close()


def test_a_handle_pickles_as_its_settings(cache: Cache) -> None:
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.directory, copy.limits) == (cache.directory, cache.limits)
    assert repr(copy) == repr(cache)
    copy.close()
