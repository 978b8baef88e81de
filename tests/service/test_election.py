"""Services that end before they serve."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fastload.errors import ServiceError
from fastload.service import Cache, election, protocol
from fastload.service.election import EndedSilentlyError
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
