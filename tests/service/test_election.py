"""Services that end before they serve."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from fastload.errors import CacheError, ServiceError
from fastload.service import Handle as Cache
from fastload.service import election, protocol
from fastload.service.election import EndedSilentlyError
from tests.processes import until
from tests.service.helpers import CHUNK_BYTES, service_pid

# Python runs this in every process that it starts: a service dies at once while there is a file left to take.
_DYING = """
import os, sys
if "fastload.service" in sys.orig_argv:
    try:
        os.unlink(sorted(os.scandir({folder!r}), key=lambda entry: entry.name)[0].path)
    except IndexError:
        pass
    else:
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: for each file in it one service dies while it starts."""
    folder = tmp_path / "deaths"
    folder.mkdir()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(_DYING.format(folder=str(folder)))
    path = [str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return folder


def test_two_that_die_while_starting_are_survived(cache: Cache, deaths: Path) -> None:
    for number in range(2):
        (deaths / str(number)).touch()
    with cache.consumer() as consumer:
        assert service_pid(consumer) != os.getpid()
    assert not list(deaths.iterdir())


def test_one_that_always_dies_is_an_error(cache: Cache, deaths: Path) -> None:
    for number in range(10):
        (deaths / str(number)).touch()
    with pytest.raises(ServiceError, match=r"ended while starting.*service\.log"):
        cache.consumer()
    assert len(list(deaths.iterdir())) == 7


def test_what_a_service_says_is_no_silent_end(tmp_path: Path) -> None:
    """Its word is final: it is not started again to hear it twice."""
    cache = Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "", {})
    starts = []

    def start(stop: threading.Event) -> None:
        starts.append(stop)
        raise ServiceError("no")

    with pytest.raises(ServiceError, match="no"):
        election.connect(cache._directory, hello, start, threading.Event())
    assert len(starts) == 1


def test_a_consumer_that_is_closed_does_not_go_on_starting(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "", {})
    closed = threading.Event()

    def start(stop: threading.Event) -> None:
        stop.set()
        raise EndedSilentlyError("killed")

    with pytest.raises(ServiceError, match="the consumer is closed"):
        election.connect(cache._directory, hello, start, closed)


def test_a_service_whose_directory_was_removed_leaves_the_next_one_its_socket(tmp_path: Path) -> None:
    """The next job's processes looked for it in vain for a minute."""

    def cache() -> Cache:
        return Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)

    with cache() as first:
        first._service_mode = "inprocess"  # it ends with the handle
        first.consumer().close()
        shutil.rmtree(first.directory)
        with cache() as second, second.consumer() as consumer:
            first.close()
            assert second._directory.socket_path.exists()
            with cache() as third, third.consumer() as other:
                assert service_pid(other) == service_pid(consumer) != os.getpid()


def test_a_service_whose_directory_was_removed_ends_with_its_last_consumer(tmp_path: Path) -> None:
    """It holds the arena, and nobody finds it any more."""
    cache = Cache(
        tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES, service="inprocess"
    )
    with cache:
        consumer = cache.consumer()
        service = cache._service
        assert service is not None
        shutil.rmtree(cache.directory)
        assert service.alive
        consumer.close()
        until(lambda: not service.alive)


def test_what_the_system_refuses_is_an_error_of_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "", {})

    def start(stop: threading.Event) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pytest.raises(CacheError, match=r"no cache service for .*cache can be .*Too many open files.*ulimit"):
        election.connect(cache._directory, hello, start, threading.Event())
