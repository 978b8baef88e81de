"""Other users of the machine: whatever they put in the way of a cache, they learn nothing and change nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import Arena, ArenaView, CacheDirectory, syscalls
from fastload.client import Handle as Cache
from fastload.client.handshake import greet
from fastload.errors import CacheError, ServiceError
from fastload.rendezvous import StandIn
from tests.service.helpers import CHUNK_BYTES, service_pid

OTHER = 65534
LIMITS = {"ram_bytes": 4 * CHUNK_BYTES, "disk_bytes": 0, "chunk_bytes": CHUNK_BYTES}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which everybody may rename everything."""
    folder = Path(tempfile.mkdtemp(prefix="fastload-shared-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


class Other:
    """Another user's process, which does one thing and stays until it is told to end."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self.sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.sock.close()
                os.setgid(OTHER)
                os.setuid(OTHER)
                act(theirs)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self.sock.settimeout(60)

    def end(self) -> bytes:
        """All that it has to say."""
        self.sock.shutdown(socket.SHUT_WR)
        said = b""
        while piece := self.sock.recv(1 << 16):
            said += piece
        self.sock.close()
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0
        return said


def listening_at(path: Path) -> Callable[[socket.socket], None]:
    """Listen there, say so, and tell at the end what came."""

    def act(told: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            os.chmod(path, 0o777)
            sock.listen()
            told.send(b"!")
            told.recv(1)
            sock.settimeout(0)
            while True:
                try:
                    peer, _ = sock.accept()
                    peer.settimeout(0.1)
                    told.sendall(b"a peer:" + peer.recv(1 << 16))
                except OSError:
                    return

    return act


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_who_puts_a_directory_in_its_place_is_told_nothing(shared: Path) -> None:
    secret = {"key": "AKIAPLANTED", "secret": "planted"}
    with Cache(shared / "cache", **LIMITS) as cache:
        cache.consumer(secret).close()

        def replace(told: socket.socket) -> None:
            (shared / "cache").rename(shared / "moved")
            (shared / "cache").mkdir(mode=0o777)
            listening_at(shared / "cache" / "socket")(told)

        other = Other(replace)
        assert other.sock.recv(1) == b"!"
        with pytest.warns(RuntimeWarning, match=f"belongs to user {OTHER}"):  # a job that has begun goes on
            consumer = cache.consumer(secret)
        assert consumer.beside
        consumer.close()
        with pytest.raises(CacheError, match=f"belongs to user {OTHER}"):
            Cache(shared / "cache")
        assert other.end() == b""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_another_users_process_behind_the_socket_is_told_nothing(shared: Path) -> None:
    directory = CacheDirectory.open(shared / "cache", **LIMITS)
    other = Other(listening_at(shared / "socket"))
    assert other.sock.recv(1) == b"!"
    (shared / "socket").rename(directory.socket_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(directory.socket_path))
        with pytest.raises(ServiceError, match=rf"belongs to user {OTHER}.*no data or credentials were sent"):
            greet(sock, protocol.Hello(protocol.VERSION, 1, "", {"secret_access_key": "planted"}), "here")
    assert other.end() == b"a peer:"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stand_in_of_another_user_is_told_nothing(shared: Path) -> None:
    """Its name is anybody's to take."""
    with Cache(shared / "cache", **LIMITS) as cache:
        cache.consumer().close()
        stand_in, _ = cache._connector._make_stand_ins()

        def squat(told: socket.socket) -> None:
            place = StandIn(cache.directory, stand_in.limits)
            place._address = stand_in._address  # it says whose it is, which is no secret
            assert place.try_lock()
            with place.listen() as sock:
                told.send(b"!")
                told.recv(1)
                while True:
                    try:
                        peer, _ = sock.accept()
                        peer.settimeout(0.1)
                        told.sendall(b"a peer:" + peer.recv(1 << 16))
                    except OSError:
                        return

        other = Other(squat)
        assert other.sock.recv(1) == b"!"
        shutil.rmtree(cache.directory)
        cache.directory.write_text("in the way")
        with (
            pytest.warns(RuntimeWarning, match="cannot be used"),
            cache.consumer({"key": "AKIAPLANTED", "secret": "planted"}) as consumer,
        ):
            assert service_pid(consumer) == os.getpid()
        assert set(other.end().split(b"a peer:")) == {b""}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_arena_of_another_user_is_refused() -> None:
    """Who owns it may have kept a way to write to it, and so to batches."""

    def send(told: socket.socket) -> None:
        arena = Arena(2 * CHUNK_BYTES, CHUNK_BYTES)
        socket.send_fds(told, [b"!"], [arena.fd])
        told.recv(1)

    other = Other(send)
    _, (fd,), _, _ = socket.recv_fds(other.sock, 1, 1)
    with pytest.raises(CacheError, match=f"the arena received belongs to user {OTHER}"):
        ArenaView(fd, 2 * CHUNK_BYTES)
    assert syscalls.get_seals(fd) & fcntl.F_SEAL_SHRINK
    os.close(fd)
    other.end()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_service_reads_what_it_checked_whatever_is_put_in_its_place(shared: Path) -> None:
    """Whoever replaces the directory of a service can neither have it read other bytes nor write elsewhere."""
    directory = CacheDirectory.open(shared / "cache", **LIMITS)
    assert directory.try_lock()
    (directory.root / "chunks").write_text("ours")

    def replace(told: socket.socket) -> None:
        (shared / "cache").rename(shared / "moved")
        (shared / "cache").mkdir(mode=0o777)
        (shared / "cache" / "chunks").write_text("theirs")

    Other(replace).end()
    assert (shared / "cache" / "chunks").read_text() == "theirs"
    assert (directory.root / "chunks").read_text() == "ours"
    with directory.opened() as root:
        assert (root / "chunks").read_text() == "ours"
    assert directory.is_lost
    directory.unlock()
    with pytest.raises(CacheError, match=f"belongs to user {OTHER}"):
        directory.try_lock()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_a_link_of_another_user_leads_nobody_astray(shared: Path, inside: bool) -> None:
    """What a link leads to is what is checked: it can only be a directory that is ours alone anyway."""
    (shared / "theirs").mkdir()
    os.chown(shared / "theirs", OTHER, OTHER)
    place = shared / "link" / "cache" if inside else shared / "link"

    def link(told: socket.socket) -> None:
        if inside:
            (shared / "theirs" / "cache").mkdir()
        (shared / "link").symlink_to("theirs")

    Other(link).end()
    with pytest.raises(CacheError, match=f"{place} belongs to user {OTHER}"):
        Cache(place, **LIMITS)
