"""A service that does not answer, or cannot be had: another one stands in for it, and nothing that was read changes."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastload
from fastload import protocol
from fastload.cache import Arena, ArenaView, CacheDirectory
from fastload.client import Handle as Cache
from fastload.client import connection, connector, election, handshake
from fastload.client.connection import Connection, ConnectionEvents
from fastload.client.handshake import Welcomed
from fastload.config import CacheLimits
from fastload.errors import CacheError, ServiceError
from fastload.rendezvous import StandIn
from fastload.service.core import Core
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.processes import kill_service, service_pids, until
from tests.service.helpers import (
    CHUNK_BYTES,
    chunks_of,
    contents,
    read,
    read_epoch,
    read_object,
    service_pid,
)
from tests.shards import check_samples, corpus, samples_of

ENDINGS = (".tar",)
# A write that meets the removal of its directory is left out, and is told of once.
pytestmark = pytest.mark.filterwarnings("ignore:a write to the disk cache .* was left out:RuntimeWarning")

LIMITS = {"ram_bytes": 8 * CHUNK_BYTES, "disk_bytes": 64 << 20, "chunk_bytes": CHUNK_BYTES}


@pytest.fixture
def cache(tmp_path: Path, mode: Any) -> Iterator[Cache]:
    with Cache(tmp_path / "folder" / "cache", service=mode, **LIMITS) as cache:
        yield cache


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds where a job waits for half a minute."""
    monkeypatch.setattr(connection, "QUIET_S", 0.25)
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    monkeypatch.setattr(handshake, "HELLO_DEADLINE_S", 1.0)


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    """Processes that go on at the end, whatever happens."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it went on, and has ended
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The warnings of the block, which are no errors there."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield told
        finally:
            told += [str(each.message) for each in caught]


def stop(cache: Cache, stopped: list[int]) -> int:
    (pid,) = service_pids(cache.directory)
    stopped.append(pid)
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.usefixtures("impatient")
def test_a_service_that_is_stopped_is_bypassed_and_goes_on(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], stopped: list[int]
) -> None:
    """What was leased of it stays as it is until its readers are done, although it goes on, and has others to serve."""
    with cache.consumer() as consumer, Cache(cache.directory) as rank, rank.consumer() as other:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        for each in (consumer, other):
            each.attach(objects)
        first = read(consumer, chunks_of(objects, 0))
        held = consumer.acquire(chunks_of(objects, 0))
        assert len(held.chunk_nos) == len(first)
        pid = stop(cache, stopped)
        with noted() as told:
            assert read_epoch(consumer, objects, range(1, 6)) == list(shards.values())[1:]
            assert read_epoch(other, objects, range(6)) == list(shards.values())
            stats = consumer.stats()
        assert "cannot be used for now" in told[0]
        assert "has not answered for 1 s" in told[0]
        assert len(told) == 1
        assert stats["node"]["pid"] == service_pid(other) != pid
        assert stats["node"]["disk_quota_bytes"] == 0
        assert contents(held) == first
        os.kill(pid, signal.SIGCONT)
        with Cache(cache.directory) as late, late.consumer() as another:
            assert service_pid(another) == pid
            another.attach(objects)
            for _ in range(2):  # the arena is a third of that
                assert read_epoch(another, objects, range(6)) == list(shards.values())
            assert contents(held) == first
            held.close()
            until(lambda: len(another.stats()["consumers"]) == 1)
        assert read_epoch(consumer, objects, range(6)) == list(shards.values())


@pytest.mark.usefixtures("impatient")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*cannot be used for now")
def test_a_child_does_not_keep_what_its_parent_held_of_a_stopped_service(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], stopped: list[int]
) -> None:
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        with consumer.acquire(chunks_of(objects, 0)):
            pid = stop(cache, stopped)
            read_object(consumer, objects, 1)
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            os.close(reading)
        os.kill(pid, signal.SIGCONT)
        with Cache(cache.directory) as late, late.consumer() as another:
            until(lambda: len(another.stats()["consumers"]) == 1)
        os.close(writing)
        os.waitpid(child, 0)


@pytest.mark.usefixtures("impatient")
def test_a_job_that_begins_beside_a_stopped_service(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], stopped: list[int]
) -> None:
    data = corpus(shard_count=3)
    with cache.consumer(), fastload.Cache(cache.directory) as named:
        pid = stop(cache, stopped)
        dataset = fastload.StreamingDataset(data.put(s3, "stopped"), cache=named, shuffle=True)
        with noted() as told:
            with fastload.DataLoader(dataset, batch_size=8) as loader:
                keys = [key for batch in loader for key in check_samples(data, samples_of(batch))]
            with pytest.raises(ServiceError, match=r"cannot be cleared.*has not answered"):
                cache.clear()
            assert "has not answered" in loader.stats()["node"]["beside"]
            assert "has not answered" in named.stats()["beside"]
        assert sorted(keys) == sorted(data.samples)
        assert len(told) == 1
        os.kill(pid, signal.SIGCONT)
        with Cache(cache.directory) as late:
            assert late.clear() >= 0
    for name in data.shards:
        s3.delete(f"stopped/{name}")


def test_the_one_that_was_avoided_is_tried_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, stopped: list[int]
) -> None:
    monkeypatch.setattr(handshake, "HELLO_DEADLINE_S", 0.5)
    with cache.consumer():
        pid = stop(cache, stopped)
        with pytest.warns(RuntimeWarning, match="cannot be used for now"), cache.consumer() as consumer:
            assert consumer.beside
        os.kill(pid, signal.SIGCONT)
        with cache.consumer() as consumer:
            assert consumer.beside  # it is left alone for a while
            assert consumer.stats()["node"]["beside"] == consumer.beside
        monkeypatch.setattr(cache._connector, "_avoid_until_s", 0.0)
        with cache.consumer() as consumer:
            assert not consumer.beside
            assert consumer.stats()["node"]["beside"] == ""
            assert service_pid(consumer) == pid


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_a_directory_that_cannot_be_made_again(cache: Cache, s3: Bucket, shards: dict[str, bytes], mode: Any) -> None:
    """A file lies in the way, as a stand-in for rights that were taken away, which root does not feel."""
    folder = cache.directory.parent
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        found = read(consumer, chunks_of(objects, 0))
        with consumer.acquire(chunks_of(objects, 0)) as held:
            wire = pickle.dumps(cache)
            gone = folder.rename(folder.with_name("gone"))  # at once, whatever the service writes meanwhile
            folder.write_text("in the way")
            if mode == "auto":
                kill_service(cache.directory)
            else:
                for service in list(cache._connector._services.values()):
                    service.close()
            shutil.rmtree(gone)
            with pytest.warns(RuntimeWarning, match="cannot be used.*Not a directory.*fetches into RAM"):
                assert read_epoch(consumer, objects, range(6)) == list(shards.values())
            assert contents(held) == {chunk: found[chunk] for chunk in held.chunk_nos.tolist()}
        worker = pickle.loads(wire)
        with worker.consumer() as other:
            other.attach(objects)
            assert read_epoch(other, objects, range(6)) == list(shards.values())
            assert (service_pid(other) == service_pid(consumer)) == (mode == "auto" or other.beside != "")
        worker.close()
        with pytest.raises(CacheError, match="cannot be used"):
            Cache(cache.directory)
        folder.unlink()
        with cache.consumer() as again:
            assert not again.beside
            again.attach(objects)
            assert read_epoch(again, objects, range(6)) == list(shards.values())


@pytest.mark.parametrize("mode", ["inprocess"])
def test_a_service_that_ends_whenever_it_is_used_is_avoided(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried some times, and not for ever."""
    receive, tries = Core.receive, []

    def breaks(core: Core, consumer: Any, message: Any) -> None:
        if core.disk.quota_bytes and isinstance(message, protocol.Want):
            tries.append(core)
            raise ZeroDivisionError("a defect")
        receive(core, consumer, message)

    monkeypatch.setattr(Core, "receive", breaks)
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        with pytest.warns(RuntimeWarning, match="without serving anything"):
            assert read_epoch(consumer, objects, range(6)) == list(shards.values())
        assert consumer.beside
        assert len(tries) == connection.RESTARTS_MAX + 1


@pytest.mark.parametrize("mode", ["inprocess"])
@pytest.mark.parametrize(
    "message",
    [
        protocol.Grants([0], [1], [0], []),
        protocol.Grants([0, 1], [1], [0, 1], [0, 0]),
        protocol.Grants([0], [1], [0], [len(protocol.SOURCES)]),
        protocol.Failed([0], [], "FetchError", "no"),
        protocol.Indexes(1, [0], [], [], True),
    ],
)
def test_an_answer_that_makes_no_sense_costs_the_connection_and_no_more(
    cache: Cache, message: protocol.FromService
) -> None:
    with cache.consumer() as consumer:
        service_connection, first = consumer._connection, consumer._arena
        (service,) = cache._connector._services.values()
        server = service._server
        assert server is not None
        (peer,) = server._peers
        server._loop.call_soon_threadsafe(peer.send, message)
        until(lambda: consumer._arena is not first or consumer.is_ended)
        assert not consumer.is_ended
        assert consumer._connection is service_connection
        assert consumer.stats()["node"]["pid"] == os.getpid()


@pytest.mark.parametrize("mode", ["inprocess"])
@pytest.mark.parametrize(("stored", "make"), [([], []), ([], [2]), ([2], [0])])
def test_indexes_of_other_objects_than_were_asked_for_are_an_error(
    cache: Cache,
    s3: Bucket,
    shards: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    stored: list[int],
    make: list[int],
) -> None:
    receive = Core.receive

    def answers_wrongly(core: Core, consumer: Any, message: Any) -> None:
        if isinstance(message, protocol.GetIndexes):
            consumer.send(protocol.Indexes(message.request, stored, [b"index"] * len(stored), make, True))
        else:
            receive(core, consumer, message)

    monkeypatch.setattr(Core, "receive", answers_wrongly)
    with cache.consumer() as consumer:
        consumer.attach(consumer.resolve([f"{s3.url}/"], ENDINGS))
        with pytest.raises(ServiceError, match="asked for indexes of 2 objects"):
            consumer.get_indexes([0, 1])


@pytest.mark.parametrize("mode", ["inprocess"])
def test_a_service_that_refuses_a_message_after_it_has_granted_is_avoided(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it grants each time is no progress: it has taken that back with the connection."""
    receive, tries = Core.receive, []

    def breaks(core: Core, consumer: Any, message: Any) -> None:
        if core.disk.quota_bytes and isinstance(message, protocol.GetCounts):
            tries.append(core)
            consumer.send(protocol.Grants([0], [0], [0], [0]))
            raise ZeroDivisionError("a defect")
        receive(core, consumer, message)

    monkeypatch.setattr(Core, "receive", breaks)
    with noted() as told, cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], ENDINGS)
        consumer.attach(objects)
        assert consumer.get_counts([0], deadline_s=60).tolist() == [-1]
        assert consumer.beside
        consumer.stats()
    assert any("without serving anything" in each for each in told)
    assert len(tries) == connection.RESTARTS_MAX + 1


@pytest.mark.parametrize("mode", ["inprocess"])
def test_one_that_ends_even_then_is_an_error(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(core: Core, consumer: Any, message: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Core, "receive", breaks)
    with noted(), cache.consumer() as consumer, pytest.raises(ServiceError, match="ended 11 times in a row without"):
        consumer.resolve([f"{s3.url}/"], ENDINGS)


# Stand-ins


def test_a_stand_in_is_one_for_all_and_leaves_nothing(tmp_path: Path) -> None:
    limits = CacheLimits(ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES, history_bytes=0)
    one, two = StandIn(tmp_path, limits), StandIn(tmp_path, limits)
    other, alone = StandIn(tmp_path / "other", limits), StandIn(tmp_path, limits, alone=True)
    assert one.try_lock()
    assert one.try_lock()
    assert not two.try_lock()
    assert other.try_lock()
    assert alone.try_lock()
    with one.listen(), pytest.raises(OSError, match="in use"):
        two.listen()
    one.unlock()
    one.unlock()
    assert two.try_lock()
    for each in (two, other, alone):
        each.unlock()
    assert not list(tmp_path.iterdir())


def test_stand_ins_of_containers_that_share_a_network_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = CacheLimits(ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES, history_bytes=0)
    here, stat = StandIn(tmp_path, limits), os.stat

    def elsewhere(path: Any, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(st_ino=1) if path == "/proc/self/ns/mnt" else stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", elsewhere)
    there = StandIn(tmp_path, limits)
    monkeypatch.undo()
    assert here.try_lock()
    assert there.try_lock()
    for each in (here, there):
        each.unlock()


def test_where_the_stand_in_hangs_too_each_process_has_its_own(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, stopped: list[int]
) -> None:
    monkeypatch.setattr(handshake, "HELLO_DEADLINE_S", 0.5)
    with cache.consumer():
        stop(cache, stopped)
        with pytest.warns(RuntimeWarning, match="cannot be used for now"):
            beside = cache.consumer()
        second = service_pid(beside)
        stopped.append(second)
        os.kill(second, signal.SIGSTOP)
        with Cache(cache.directory) as other, other.consumer() as consumer:
            assert service_pid(consumer) == os.getpid()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        beside.close()


def test_a_start_that_is_stopped_holding_the_lock_is_bypassed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has the lock and does not listen: nobody else can serve there, and no start succeeds."""
    holder = CacheDirectory.open(cache.directory)
    assert holder.try_lock()
    connect = election.connect
    monkeypatch.setattr(connector.election, "connect", lambda *args: connect(*args, deadline_s=1.0))
    with pytest.warns(RuntimeWarning, match="could be reached within 1 s"), cache.consumer() as consumer:
        assert consumer.beside
    holder.unlock()


# The heartbeat


class Talk:
    """A connection to a service that is played by the test. Where it ends, another service says welcome and is left."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(PATIENCE_S)
        self.lost: list[socket.socket | None] = []
        self.was_refused = False
        self.ended = threading.Event()
        self.first = welcomed(b"first", self.ours)
        events = ConnectionEvents(
            self._connect, self._connected, self.lost.append, self._take, lambda error: self.ended.set()
        )
        self.connection = Connection(events, threading.Condition(), "")
        self.connection.start()

    def _connect(self, stop: threading.Event, avoid: str) -> Welcomed:
        if not self.lost:
            return self.first
        other, theirs = socket.socketpair()
        theirs.close()
        return welcomed(b"second", other)

    def _connected(self, connection: Connection, found: Welcomed) -> None:
        if found is self.first:
            connection.adopt(found)
            return
        found.close()
        self.was_refused = connection.was_refused
        raise ServiceError("once is enough")

    def _take(self, message: protocol.FromService) -> None:
        assert isinstance(message, protocol.Pong)

    def close(self) -> None:
        self.connection.close()
        for sock in self.lost:
            if sock is not None:
                sock.close()
        self.theirs.close()
        self.first.view.close()


def welcomed(service_id: bytes, sock: socket.socket) -> Welcomed:
    arena = Arena(2 * CHUNK_BYTES, CHUNK_BYTES)
    view = ArenaView(arena.fd, 2 * CHUNK_BYTES)
    arena.close()
    welcome = protocol.Welcome(protocol.VERSION, service_id, os.getpid(), CHUNK_BYTES, 2, [])
    return Welcomed(sock, welcome, view, protocol.FrameReader())


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    monkeypatch.setattr(connection, "QUIET_S", 0.05)
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    talk = Talk()
    yield talk
    talk.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The connection's clock, which only the test moves: however late the test's thread runs, no time has passed."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def test_a_service_that_answers_pings_is_never_given_up(clock: SimpleNamespace, talk: Talk) -> None:
    ping = bytes(protocol.frame(protocol.Ping()))
    for _ in range(30):
        clock.now_s += connection.QUIET_S
        assert talk.theirs.recv(len(ping), socket.MSG_WAITALL) == ping  # there may be two
        talk.theirs.sendall(protocol.frame(protocol.Pong()))
    assert not talk.lost


def test_time_in_which_nobody_ran_does_not_count(clock: SimpleNamespace, talk: Talk) -> None:
    """A job that is suspended and goes on after an hour, as its service does, finds that silent for a moment only."""
    ping = bytes(protocol.frame(protocol.Ping()))
    for _ in range(5):
        clock.now_s += 3600.0
        for _ in range(3):
            assert talk.theirs.recv(len(ping), socket.MSG_WAITALL) == ping  # there may be two
            talk.theirs.sendall(protocol.frame(protocol.Pong()))
    assert not talk.lost


def test_a_service_that_says_nothing_is_left_with_its_socket_open(talk: Talk) -> None:
    assert talk.ended.wait(60)
    assert talk.lost == [talk.ours]
    assert not talk.was_refused
    assert talk.ours.fileno() >= 0
    pings = talk.theirs.recv(1 << 16)
    assert len(pings) > 3 * len(protocol.frame(protocol.Ping()))


def test_drips_are_no_answer(talk: Talk) -> None:
    """Bytes that never make a message."""
    talk.theirs.sendall((1 << 20).to_bytes(4, "little"))
    while not talk.ended.wait(0.01):
        talk.theirs.sendall(b"x")
    assert talk.lost == [talk.ours]


def test_a_service_that_takes_nothing_is_silent_too(talk: Talk) -> None:
    """Half of a message may be on its way, so nothing follows it; and nobody waits for longer than that."""
    for _ in range(100):
        talk.connection.send(protocol.PutIndex(0, bytes(1 << 20)))
    assert talk.ended.wait(60)
    assert talk.lost == [talk.ours]


@pytest.mark.parametrize("data", [b"\1\0\0\0\xc0", b"\xff\xff\xff\xff"])
def test_a_message_that_is_not_known_costs_the_connection_and_no_more(talk: Talk, data: bytes) -> None:
    talk.theirs.sendall(data)
    assert talk.ended.wait(60)
    assert talk.lost == [None]
    assert talk.was_refused  # it lives, and takes its leases back


@pytest.mark.parametrize(("data", "cut_off"), [(b"", False), (b"\5\0", True)])
def test_an_end_in_the_middle_of_a_message_is_none(talk: Talk, data: bytes, cut_off: bool) -> None:
    talk.theirs.sendall(data)
    talk.theirs.shutdown(socket.SHUT_RDWR)
    assert talk.ended.wait(60)
    assert talk.lost == [None]
    assert talk.was_refused == cut_off
