"""The first words: each step has a deadline, and whatever is said that makes no sense is answered with a word."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload import protocol
from fastload.cache import Arena, CacheDirectory, syscalls
from fastload.client import Handle as Cache
from fastload.client import election
from fastload.client.handshake import greet
from fastload.errors import CacheError, FastloadError, ServiceError
from fastload.service.host.launch import start_process
from tests.service.helpers import CHUNK_BYTES, service_pid

HELLO = protocol.Hello(protocol.VERSION, os.getpid(), "", {})
WELCOME = protocol.Welcome(protocol.VERSION, b"id", 1, CHUNK_BYTES, 2, [])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """A service in this process that many may talk to."""
    with Cache(
        tmp_path_factory.mktemp("running") / "cache",
        ram_bytes=4 * CHUNK_BYTES,
        disk_bytes=0,
        chunk_bytes=CHUNK_BYTES,
        service="inprocess",
    ) as cache:
        cache.consumer()
        yield cache


def ask(cache: Cache, data: bytes) -> list[protocol.FromService]:
    """All that the service answers to `data` until it ends the conversation, which we end first."""
    frames, found = protocol.FrameReader(), []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(cache.directory / "socket"))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while True:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)
            for fd in fds:
                os.close(fd)
            if not data:
                return found
            found += [protocol.from_service(payload) for payload in frames.feed(data)]


def framed(*fields: object) -> bytes:
    payload = msgspec.msgpack.encode(fields)
    return struct.pack("<I", len(payload)) + payload


V = protocol.VERSION


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            framed("hello", V - 1, "fields", "of", "old"),
            f"speaks protocol {V}, this fastload {V - 1}: let its jobs end",
        ),
        (framed("hello", V + 1, 1, "", {}, {}, 0, "", "new", 7), f"speaks protocol {V}, this fastload {V + 1}"),
        (framed("hello", V, 1, "", {}, {}, 0, "", "unknown"), "not a message of a consumer"),
        (framed("hello", V, 1, "", {"unknown": 1}), r"unknown store options \['unknown'\]"),
        (framed("hello", V, 1, "", {"endpoint_url": 5.5, "extra": 7}), "ended the conversation"),
        (framed("hello", "five"), "not a message of a consumer"),
        (framed("nothing"), "not a message of a consumer"),
        (framed("ping"), "it began with|not a message"),
        (framed("want", [1], 1, True), "it began with Want"),
        (struct.pack("<I", 1 << 31), "more than may be"),
    ],
)
def test_what_a_service_does_not_know_is_answered(running: Cache, data: bytes, says: str) -> None:
    (answer,) = ask(running, data)
    assert isinstance(answer, protocol.Refused)
    with pytest.raises(ServiceError, match=says):
        raise ServiceError(answer.message)


def test_a_message_that_makes_no_sense_later_is_answered_too(running: Cache) -> None:
    for message in (b"\1\0\0\0\xc0", framed("nobody", 1), protocol.frame(protocol.Want([5], 1, True)), framed("stats")):
        welcome, *rest = ask(running, bytes(protocol.frame(HELLO)) + bytes(message))
        assert isinstance(welcome, protocol.Welcome)
        assert [type(each) for each in rest] == [protocol.Refused]


hello_fields = st.one_of(
    st.integers(-1, 300),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.none(),
    st.booleans(),
    st.dictionaries(st.sampled_from(["disk_bytes", "extra", "endpoint_url", "x"]), st.integers(0, 5), max_size=2),
    st.lists(st.integers(-5, 5), max_size=3),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(hello_fields, max_size=9), st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
def test_whatever_is_said_first_is_answered_or_ended(
    running: Cache, fields: list[object], garbage: bytes, at: int, value: int
) -> None:
    """Fields of any kind, bytes of any kind, and a proper hello with one byte changed, or cut off."""
    spoilt = bytearray(protocol.frame(HELLO))
    spoilt[at % len(spoilt)] = value
    for data in (framed("hello", protocol.VERSION, *fields), garbage, bytes(spoilt), bytes(spoilt[: at % len(spoilt)])):
        answers = ask(running, data)
        assert all(isinstance(answer, protocol.Welcome | protocol.Refused) for answer in answers)
    with running.consumer() as consumer:
        assert service_pid(consumer) == os.getpid()


# The other way round: a service that is none


def sends(data: bytes, fds: Callable[[], list[int]] = list) -> Callable[[socket.socket], None]:
    def act(sock: socket.socket) -> None:
        sent = fds()
        socket.send_fds(sock, [data], sent)
        for fd in sent:
            os.close(fd)

    return act


def drips(sock: socket.socket) -> None:
    """A byte at a time, and never a whole frame."""
    try:
        for byte in framed("welcome", "x" * 1000):
            sock.send(bytes([byte]))
            time.sleep(0.01)
    except OSError:  # it was given up
        pass


def arenas(count: int = 1, *, byte_count: int = 2 * CHUNK_BYTES, seals: int | None = None) -> Callable[[], list[int]]:
    def make() -> list[int]:
        fds = []
        for _ in range(count):
            if seals is None:
                arena = Arena(byte_count, CHUNK_BYTES)
                fds.append(os.dup(arena.fd))
                arena.close()
            else:
                fds.append(syscalls.memfd_create("fake"))
                os.ftruncate(fds[-1], byte_count)
                syscalls.add_seals(fds[-1], seals)
        return fds

    return make


welcome = bytes(protocol.frame(WELCOME))
shrink, both = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda sock: None, "has not answered for 0.3 s"),
        (sends(welcome[: len(welcome) // 2]), "has not answered for 0.3 s"),
        (drips, "has not answered for 0.3 s"),
        (sends(framed("welcome", 99, b"", 1, 1, 1, [])), "speaks protocol 99"),
        (sends(framed("welcome", 99, b"", 1, 1, 1, [], "more")), "not a message of the cache service"),
        (sends(framed("hello")), "not a message of the cache service"),
        (sends(struct.pack("<I", 1 << 31)), "more than may be"),
        (sends(bytes(protocol.frame(protocol.Recall([1])))), "answered with Recall"),
        (sends(bytes(protocol.frame(protocol.Refused("ServiceError", "go away")))), "go away"),
        (sends(welcome), "without its arena"),
        (sends(welcome, arenas(2)), "more descriptors"),
        (sends(welcome, arenas(byte_count=3 * CHUNK_BYTES)), "not a sealed one of"),
        (sends(welcome, arenas(byte_count=CHUNK_BYTES)), "not a sealed one of"),
        (sends(welcome, arenas(seals=0)), "not a sealed one of"),
        (sends(welcome, arenas(seals=shrink)), "not a sealed one of"),
        (sends(welcome, lambda: [os.open("/dev/null", os.O_RDONLY)]), "arena"),
        (sends(framed("welcome", protocol.VERSION, b"", 1, -1, 5, []), arenas()), "not a sealed one of"),
    ],
)
def test_a_service_that_is_none_is_found_out_in_time(act: Callable[[socket.socket], None], says: str) -> None:
    ours, theirs = socket.socketpair()
    before = set(os.listdir("/proc/self/fd"))
    thread = threading.Thread(target=act, args=(theirs,))
    thread.start()
    with pytest.raises((ServiceError, CacheError), match=says):
        greet(ours, HELLO, "here", deadline_s=0.3)
    thread.join()
    theirs.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_real_welcome_on_such_a_socket_is_taken() -> None:
    ours, theirs = socket.socketpair()
    sends(welcome, arenas(seals=both))(theirs)
    connection = greet(ours, HELLO, "here", deadline_s=30)
    assert connection is not None
    assert connection.view.byte_count == 2 * CHUNK_BYTES
    connection.close()
    theirs.close()


def test_nobody_waits_for_an_answer_once_it_is_closed() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(greet(ours, HELLO, "here", stop, deadline_s=600)))
    thread.start()
    stop.set()
    thread.join(60)
    assert answers == [None]
    theirs.close()


def test_descriptors_that_come_with_drips_are_closed() -> None:
    """One with each byte, and never a whole frame."""
    ours, theirs = socket.socketpair()
    before = set(os.listdir("/proc/self/fd"))

    def act() -> None:
        try:
            for byte in framed("welcome", "x" * 1000):
                socket.send_fds(theirs, [bytes([byte])], [0])
        except OSError:  # it was given up
            pass

    thread = threading.Thread(target=act)
    thread.start()
    with pytest.raises(FastloadError, match="more descriptors than one"):
        greet(ours, HELLO, "here", deadline_s=30)
    thread.join()
    theirs.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_service_whose_start_is_stopped_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that is to start it is stopped before it can: nobody waits for it for ever."""
    (tmp_path / "sitecustomize.py").write_text(
        'import os, sys\nif "fastload.service" in sys.orig_argv: os.kill(os.getpid(), 19)\n'
    )
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setattr("fastload.service.host.launch._END_S", 0.2)
    directory = CacheDirectory.open(
        tmp_path / "cache", ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES
    )

    def start(stop: threading.Event) -> None:
        start_process(directory, 0.0, stop, deadline_s=0.5)

    with pytest.raises(ServiceError, match=r"could be reached within 0\.1 s"):
        election.connect(directory, HELLO, start, threading.Event(), deadline_s=0.1)
