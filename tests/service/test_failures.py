"""Whatever dies, breaks or refuses: consumers get their bytes or a clear error, and nothing hangs."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastload import protocol
from fastload.client import Handle as Cache
from fastload.client.handshake import greet
from fastload.errors import (
    AccessDeniedError,
    CacheError,
    ConfigError,
    ObjectChangedError,
    ObjectMissingError,
    ServiceError,
)
from tests.cache.faults import failing
from tests.conftest import Bucket
from tests.service.helpers import (
    CHUNK_BYTES,
    chunks_of,
    contents,
    eventually,
    kill_service,
    random_bytes,
    read,
    read_epoch,
    read_object,
    service_pid,
)

ENDINGS = (".tar",)


def test_a_killed_service_is_replaced(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer, cache.consumer() as other:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        for each in (consumer, other):
            each.attach(objects)
            each.set_plan(range(6))
        other.want(chunks_of(objects, 5))
        first = chunks_of(objects, 0)
        found = read(consumer, first)
        with consumer.acquire(first) as held:
            killed = kill_service(consumer)
            # What was held stays readable while another service takes over, and after.
            assert read_object(consumer, objects, 1) == shards[objects[1].url]
            assert contents(held) == {chunk: found[chunk] for chunk in held.chunk_nos.tolist()}
        assert [read_object(consumer, objects, number) for number in range(6)] == list(shards.values())
        assert read_object(other, objects, 5) == shards[objects[5].url]
        assert service_pid(consumer) == service_pid(other) != killed


def test_an_answer_outlives_the_connection_it_came_by(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another connection may be made between the answer and the moment in which the thread that asked takes it: only
    here can a test be between them.
    """
    with cache.consumer() as consumer:
        wait = consumer._wait

        def wait_and_reconnect(*arguments: Any) -> None:
            wait(*arguments)
            consumer._send_everything()

        monkeypatch.setattr(consumer, "_wait", wait_and_reconnect)
        assert consumer.stats()["node"]["pid"] == service_pid(consumer)


def test_old_and_new_arena_at_once(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read(consumer, [0])
        pid = kill_service(consumer)
        eventually(lambda: service_pid(consumer) != pid, "another service runs")
        read(consumer, [1])
        with consumer.acquire([0, 1]) as held:
            assert len(held.groups) == 2
            found = contents(held)
        assert found[0] + found[1] == shards[objects[0].url][: 2 * CHUNK_BYTES]
        consumer.release([0, 1])


def test_a_service_that_is_told_to_end_ends_clean(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read_object(consumer, objects, 0)
        pid = service_pid(consumer)
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: service_pid(consumer) != pid, "another service runs")
        assert read_object(consumer, objects, 1) == shards[objects[1].url]
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    assert "ended" in (cache.directory / "service.log").read_text()


_HOLD = """
import sys
from fastload.client import Handle as Cache
cache = Cache(sys.argv[1])
consumer = cache.consumer(name="holder")
objects = consumer.resolve([sys.argv[2]], (".tar",))
consumer.attach(objects)
held = []
left = {0, 1}
while left:
    held.append(consumer.acquire(sorted(left)))
    left -= set(held[-1].chunk_nos.tolist())
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_killed_consumer_lets_go(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=2 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
    ):
        command = [sys.executable, "-c", _HOLD, str(cache.directory), f"{s3.url}/shard-0.tar"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holding\n"
            objects = consumer.resolve([f"{s3.url}/shard-1.tar"], ENDINGS)
            consumer.attach(objects)
            got: list[bytes] = []
            thread = threading.Thread(target=lambda: got.append(read_object(consumer, objects, 0)))
            thread.start()
            eventually(lambda: consumer.stats()["node"]["recalls"] > 0, "its leases are asked back")
            assert not got
            holder.kill()
            thread.join()
        assert got == [shards[objects[0].url]]


def test_denied_and_then_not(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache.consumer() as allowed:
        objects = allowed.resolve([f"{s3.url}/"], ENDINGS)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.server.denied_access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.server.denied_secret_access_key)
        with cache.consumer() as consumer:
            with pytest.raises(AccessDeniedError):
                consumer.resolve([f"{s3.url}/"], ENDINGS)
            consumer.attach(objects)
            consumer.set_plan(range(6))
            with pytest.raises(AccessDeniedError, match=r"shard-0\.tar"):
                consumer.acquire([0])
            # One who may is not troubled by one who may not.
            allowed.attach(objects)
            assert read_object(allowed, objects, 1) == shards[objects[1].url]
            # Credentials that changed in the environment are found at the next denial.
            for name, value in s3.server.environment().items():
                monkeypatch.setenv(name, value)
            assert read_object(consumer, objects, 2) == shards[objects[2].url]
            assert len(consumer.resolve([f"{s3.url}/"], ENDINGS)) == 6


def test_no_credentials_are_written(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read_epoch(consumer, objects, range(6))
        s3.delete("shard-0.tar")
    secret = s3.server.secret_access_key.encode()
    for path in cache.directory.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path


def test_objects_that_went_or_changed(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        s3.delete("shard-0.tar")
        s3.put("shard-1.tar", random_bytes(99, objects[1].size))
        consumer.set_plan(range(6))  # prefetching meets both, and says nothing
        with pytest.raises(ObjectMissingError, match=r"shard-0\.tar"):
            consumer.acquire(chunks_of(objects, 0))
        with pytest.raises(ObjectChangedError, match=r"shard-1\.tar"):
            consumer.acquire(chunks_of(objects, 1))
        assert read_object(consumer, objects, 2) == shards[objects[2].url]


def _fill_disk(cache: Cache, s3: Bucket) -> int:
    """Bring all chunks to the disk and let the arena go; returns how many."""
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        read_epoch(consumer, objects, range(6))
        count = sum(len(chunks_of(objects, number)) for number in range(6))
        eventually(lambda: consumer.stats()["node"]["written_chunks"] == count, "all is on disk")
    cache.close()
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    return count


def test_a_damaged_chunk_is_fetched_again(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    _fill_disk(cache, s3)
    files = sorted(cache.directory.rglob("*.chunk"))
    for path in files[:3]:
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cache.consumer() as consumer:
            objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
            consumer.attach(objects)
            assert read_epoch(consumer, objects, range(6)) == list(shards.values())
            stats = consumer.stats()
            assert stats["node"]["disk_damaged"] == 3
            assert stats["node"]["fetched_chunks"] == 3
            eventually(lambda: consumer.stats()["node"]["written_chunks"] == 3, "they are on disk again")
    assert [str(each.message) for each in caught if "damaged" in str(each.message)] == [
        str(each.message) for each in caught
    ]
    assert len(caught) == 1


def test_a_full_disk_is_one_warning(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    """In process, where the system calls can be made to fail."""
    writes = frozenset({"pwritev"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Cache(
            tmp_path / "cache", ram_bytes="1MiB", disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES, service="inprocess"
        ) as cache:
            for _ in range(2):
                with failing(0, errno.ENOSPC, writes, times=1 << 30), cache.consumer() as consumer:
                    objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
                    consumer.attach(objects)
                    assert read_epoch(consumer, objects, range(6)) == list(shards.values())
                    consumer.stats()
    assert [each.category for each in caught] == [RuntimeWarning]
    assert "No space left" in str(caught[0].message)


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(CacheError, match="chmod 700"):
        Cache(path)
    with pytest.raises(ConfigError, match="below two chunks"):
        Cache(tmp_path / "other", ram_bytes="1MiB", chunk_bytes="1MiB", disk_bytes=0)
    with pytest.raises(ConfigError, match="inprocess"):
        Cache(tmp_path / "other", service="thread")  # type: ignore[arg-type]


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """The service's own error reaches whoever started it."""
    with Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0) as cache:
        (cache.directory / "cache.json").write_text('{"format": 2}')
        with pytest.raises(CacheError, match="format 2"):
            cache.consumer()


def test_garbage_on_the_socket_harms_nobody(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer() as consumer:
        for garbage in (b"\xff" * 100, struct.pack("<I", 3) + b"abc", protocol.frame(protocol.Stats(1))):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(cache.directory / "socket"))
                sock.sendall(garbage)
                sock.settimeout(10)
                assert b"ended the conversation" in sock.recv(1000)
                assert sock.recv(100) == b""
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        assert read_object(consumer, objects, 0) == shards[objects[0].url]


def test_another_version_is_refused(cache: Cache) -> None:
    with cache.consumer():
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(cache.directory / "socket"))
        with pytest.raises(ServiceError, match=f"protocol {protocol.VERSION}.* 99"):
            greet(sock, protocol.Hello(99, os.getpid(), "", {}), "here")


def test_a_long_path(tmp_path: Path, s3: Bucket, shards: dict[str, bytes]) -> None:
    with (
        Cache(tmp_path / ("x" * 100) / "cache", ram_bytes="1MiB", disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        cache.consumer() as consumer,
    ):
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        assert read_object(consumer, objects, 0) == shards[objects[0].url]


def test_other_limits_than_the_running_service_has(cache: Cache) -> None:
    with cache.consumer():
        with pytest.warns(RuntimeWarning, match="ram_bytes"):
            other = Cache(cache.directory, ram_bytes="8MiB")
        with pytest.warns(RuntimeWarning, match="keeps its arena"):
            other.consumer()
        other.close()
        with pytest.warns(RuntimeWarning, match="chunk_bytes"):
            other = Cache(cache.directory, chunk_bytes=2 * CHUNK_BYTES)
        with pytest.warns(RuntimeWarning, match="has chunk_bytes='64KiB', and this job '128KiB'"):
            consumer = other.consumer()
        assert consumer.chunk_bytes == 2 * CHUNK_BYTES
        assert consumer.stats()["node"]["disk_quota_bytes"] == 0
        other.close()
