"""Warming: the cache holds a plan's chunks, and the job that follows fetches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.errors import ObjectMissingError
from fastload.protocol import Progress
from tests.conftest import Bucket
from tests.service.helpers import CHUNK_BYTES, chunks_of, eventually, kill_service, read, read_epoch

ENDINGS = (".tar",)


def warm(consumer: Consumer, order: list[int]) -> Progress:
    """Warm, and follow the news to the end."""
    consumer.set_plan(order, warm=True)
    progress = consumer.wait_progress(None)
    done = progress.done_chunks
    while not progress.finished:
        progress = consumer.wait_progress(progress)
        assert progress.done_chunks >= done
        done = progress.done_chunks
    return progress


def test_a_job_after_it_fetches_nothing(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    total = sum(map(len, shards.values()))
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        first = warm(consumer, [5, 4, 3, 2, 1, 0])
        assert (first.done_bytes, first.held_bytes, first.fetched_bytes) == (total, total, total)
        assert first.held_chunks == first.total_chunks
        again = warm(consumer, [0, 1, 2, 3, 4, 5])
        assert (again.held_bytes, again.fetched_bytes) == (total, 0)
    cache.close()
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    with cache.consumer() as consumer:
        consumer.attach(objects)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert consumer.stats()["node"]["fetched_bytes"] == 0


def test_what_is_in_ram_is_only_written(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read(consumer, chunks_of(objects, 2))
        progress = warm(consumer, [2])
        assert progress.held_bytes == objects[2].size
        assert consumer.stats()["node"]["fetched_bytes"] == objects[2].size


def test_an_arena_far_smaller_than_the_data(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=2 * CHUNK_BYTES, disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        progress = warm(consumer, list(range(6)))
        assert progress.held_bytes == progress.total_bytes == progress.fetched_bytes


def test_a_quota_that_is_too_small(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    """It ends when the disk is full, keeps the front of the plan, and says what is not held."""
    with (
        Cache(
            tmp_path / "cache", ram_bytes=8 * CHUNK_BYTES, disk_bytes=5 * (CHUNK_BYTES + 4096), chunk_bytes=CHUNK_BYTES
        ) as cache,
        cache.consumer() as consumer,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        progress = warm(consumer, [3, 1, 0, 2, 4, 5])
        assert progress.done_chunks == progress.total_chunks
        assert 5 <= progress.held_chunks <= 7
        # What was on its way when the disk was full is all that was fetched for nothing: an arena, at most.
        assert progress.fetched_bytes <= (progress.held_chunks + 8) * CHUNK_BYTES
        consumer.set_plan([])
        read(consumer, chunks_of(objects, 3))
        assert consumer.counts()["granted_remote"] == 0


def test_without_a_disk_it_fills_the_arena(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=8 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        progress = warm(consumer, [1])
        assert progress.held_bytes == progress.total_bytes == objects[1].size
        progress = warm(consumer, [1, 2, 3])
        assert (progress.held_chunks, progress.finished) == (8, True)


def test_errors_end_it(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        s3.delete("shard-3.tar")
        with pytest.raises(ObjectMissingError, match=r"shard-3\.tar"):
            warm(consumer, list(range(6)))


def test_it_outlives_the_service(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        consumer.set_plan(range(6), warm=True)
        kill_service(consumer)
        progress = consumer.wait_progress(None)
        while not progress.finished:
            progress = consumer.wait_progress(progress)
        assert progress.held_bytes == sum(map(len, shards.values()))
