"""A consumer's process forks: parent and child go on, each with a connection of its own."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable

import pytest

from fastload.client import Handle as Cache
from tests.conftest import Bucket
from tests.service.helpers import chunks_of, read, read_epoch, read_object, service_pid

ENDINGS = (".tar",)


def in_child(work: Callable[[], object]) -> str:
    """Run `work` in a forked child; "" or what went wrong there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            work()
            text = ""
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_parent_and_child_read_on(cache: Cache, s3: Bucket, shards: dict[str, bytes]) -> None:
    with cache.consumer(name="parent") as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        consumer.set_plan(range(6))
        read(consumer, chunks_of(objects, 0))
        pid = service_pid(consumer)

        def child() -> None:
            assert consumer.counts()["leased"] == 0
            assert read_epoch(consumer, objects, range(6)) == list(shards.values())
            assert service_pid(consumer) == pid
            assert len(consumer.stats()["consumers"]) == 2
            with cache.consumer(name="another") as another:
                assert service_pid(another) == pid
            cache.close()

        assert in_child(child) == ""
        assert consumer.counts()["leased"] == len(chunks_of(objects, 0))
        assert read_object(consumer, objects, 5) == shards[objects[5].url]
        assert service_pid(consumer) == pid


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_of_a_child_share_one_connection(cache: Cache) -> None:
    """Whichever of them is the first to need it."""
    with cache.consumer(name="parent") as consumer:

        def child() -> None:
            together = threading.Barrier(8)

            def ask() -> None:
                together.wait()
                consumer.stats()

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(consumer.stats()["consumers"]) == 2
            cache.close()

        assert in_child(child) == ""


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_stays_does_not_hold_what_the_parent_closed(
    cache: Cache, s3: Bucket, shards: dict[str, bytes]
) -> None:
    """Sockets that a child inherited would keep the parent's leases, and its socket's place, alive."""
    cache.consumer()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    cache.close()
    with cache.consumer() as again:
        objects = again.resolve([f"{s3.url}/"], ENDINGS)
        again.attach(objects)
        assert read_object(again, objects, 0) == shards[objects[0].url]
        assert len(again.stats()["consumers"]) == 1
    os.close(writing)
    os.waitpid(pid, 0)
