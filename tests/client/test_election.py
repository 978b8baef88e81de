"""Services that end before they serve."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.client import Handle as Cache
from fastload.client import election
from fastload.errors import CacheError, ServiceError
from fastload.service.host.inprocess import InProcessService
from fastload.service.host.launch import StartError, start_process
from tests.processes import until
from tests.service.helpers import CHUNK_BYTES, service_pid

pytestmark = pytest.mark.usefixtures("real_start")

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


def test_where_all_die_it_runs_in_threads(cache: Cache, deaths: Path) -> None:
    for number in range(10):
        (deaths / str(number)).touch()
    with pytest.warns(RuntimeWarning, match=r"(?s)ended while starting.*service\.log.*runs in threads"):
        consumer = cache.consumer()
    assert len(list(deaths.iterdir())) == 7
    assert service_pid(consumer) == os.getpid()
    assert consumer.stats()["node"]["disk_quota_bytes"] == cache.limits.disk_bytes
    with cache.consumer() as other:  # which finds it there, and is warned of nothing
        assert service_pid(other) == os.getpid()
    consumer.close()


def test_many_that_start_one_at_once_survive_the_deaths_of_all_but_one(cache: Cache, deaths: Path) -> None:
    for number in range(8):
        (deaths / str(number)).touch()
    handles = [Cache(cache.directory) for _ in range(8)]
    pids: list[int] = []

    def run(handle: Cache) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which of them runs it in its threads is chance
            with handle.consumer() as consumer:
                pids.append(service_pid(consumer))
                together.wait(60)

    together = threading.Barrier(len(handles))
    threads = [threading.Thread(target=run, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.close()
    assert len(pids) == 8
    assert len(set(pids)) == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_where_no_process_can_be_made_it_runs_in_threads(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("subprocess.Popen", fails)
    with (
        pytest.warns(RuntimeWarning, match=f"no process can be started.*{os.strerror(number)}.*runs in threads"),
        cache.consumer() as consumer,
    ):
        assert service_pid(consumer) == os.getpid()


def test_what_a_service_says_is_no_silent_end(tmp_path: Path) -> None:
    """Its word is final: it is not started again to hear it twice."""
    cache = Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "", {})
    starts = []

    def start(stop: threading.Event) -> None:
        starts.append(stop)
        raise ServiceError("no")

    with pytest.raises(ServiceError, match="no"):
        election.connect(cache._connector.directory, hello, start, threading.Event())
    assert len(starts) == 1


def test_a_service_that_finds_another_in_its_place_ends_without_an_error(tmp_path: Path) -> None:
    """Who started it connects to the other one; an end without a word would count as a death."""
    directory = CacheDirectory.open(tmp_path / "cache")
    assert directory.try_lock()
    start_process(CacheDirectory.open(tmp_path / "cache"), 0.0, threading.Event())
    directory.unlock()


def test_a_consumer_that_is_closed_does_not_go_on_starting(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "", {})
    closed = threading.Event()

    def start(stop: threading.Event) -> None:
        stop.set()
        raise StartError("killed")

    with pytest.raises(ServiceError, match="the consumer is closed"):
        election.connect(cache._connector.directory, hello, start, closed)


def test_a_service_whose_directory_was_removed_leaves_the_next_one_its_socket(tmp_path: Path) -> None:
    """The next job's processes looked for it in vain for a minute."""

    def cache() -> Cache:
        return Cache(tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)

    with cache() as first:
        first._connector.mode = "inprocess"  # it ends with the handle
        first.consumer().close()
        shutil.rmtree(first.directory)
        with cache() as second, second.consumer() as consumer:
            first.close()
            assert second._connector.directory.socket_path.exists()
            with cache() as third, third.consumer() as other:
                assert service_pid(other) == service_pid(consumer) != os.getpid()


def test_a_service_whose_directory_was_removed_ends_with_its_last_consumer(tmp_path: Path) -> None:
    """It holds the arena, and nobody finds it any more."""
    cache = Cache(
        tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES, service="inprocess"
    )
    with cache:
        consumer = cache.consumer()
        (service,) = cache._connector._services.values()
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
        election.connect(cache._connector.directory, hello, start, threading.Event())


def test_a_service_without_a_thread_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "fastload-service":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    directory = CacheDirectory.open(tmp_path / "cache")
    assert directory.try_lock()
    with pytest.raises(ServiceError, match=r"no thread can be started .* \(ulimit -u"):
        InProcessService(directory)
    other = CacheDirectory.open(tmp_path / "cache")
    assert other.try_lock()
    other.unlock()
