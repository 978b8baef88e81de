"""The service's socket: who says nothing, and what it does where there are no descriptors left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.client import Handle as Cache
from fastload.service.host import server
from fastload.service.host.server import Server
from tests.service.helpers import CHUNK_BYTES, eventually

HELLO = protocol.Hello(protocol.VERSION, os.getpid(), "test", {})


def _serve(path: Path, work: Callable[[Server], Awaitable[None]], idle_s: float = 0.0) -> None:
    """Run a service in this thread, `work` beside it, and wait for its end."""

    async def main() -> None:
        directory = CacheDirectory.open(path, ram_bytes=4 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES)
        assert directory.try_lock()
        serving = Server(directory, idle_s)
        started = asyncio.Event()

        def ready() -> bool:
            started.set()
            return True

        running = asyncio.create_task(serving.run(ready))
        await started.wait()
        await work(serving)
        assert await asyncio.wait_for(running, 60)
        directory.unlock()

    asyncio.run(main())


async def _connect(path: Path, hello: protocol.Hello | None = HELLO) -> socket.socket:
    """A connection that has said hello and was welcomed; or one that says nothing."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, str(path / "socket"))
        if hello is not None:
            await loop.sock_sendall(sock, protocol.frame(hello))
            assert await asyncio.wait_for(loop.sock_recv(sock, 1), 60)
    except BaseException:
        sock.close()
        raise
    return sock


async def _end_of(sock: socket.socket) -> None:
    """Wait until the other side has closed it."""
    loop = asyncio.get_running_loop()
    while await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), 60):
        pass


def test_who_says_nothing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_HELLO_S", 0.2)

    async def work(serving: Server) -> None:
        consumer = await _connect(tmp_path)
        silent, halting = await _connect(tmp_path, None), await _connect(tmp_path, None)
        await asyncio.get_running_loop().sock_sendall(halting, bytes(protocol.frame(HELLO))[:7])
        with silent, halting, consumer:
            await _end_of(silent)
            await _end_of(halting)
            # Whoever said hello may be silent for as long as it likes.
            await asyncio.get_running_loop().sock_sendall(consumer, protocol.frame(protocol.Stats(1)))
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(consumer, 1), 60)

    _serve(tmp_path, work)
    assert [record.message for record in caplog.records if "no hello" in record.message]


def test_who_says_nothing_keeps_no_service_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by coming again as soon as it was closed."""
    monkeypatch.setattr(server, "_HELLO_S", 0.2)
    comers: list[asyncio.Task[None]] = []
    count = 0

    async def come_again() -> None:
        nonlocal count
        with contextlib.suppress(OSError):  # it has ended
            while True:
                with await _connect(tmp_path, None) as sock:
                    count += 1
                    await _end_of(sock)

    async def work(serving: Server) -> None:
        (await _connect(tmp_path)).close()
        comers.extend(asyncio.create_task(come_again()) for _ in range(3))

    _serve(tmp_path, work)
    assert count >= 3


def test_who_has_just_come_may_say_hello(tmp_path: Path) -> None:
    """The end of idleness meets a connection that is about to begin."""

    async def work(serving: Server) -> None:
        first, second = await _connect(tmp_path), await _connect(tmp_path, None)
        loop = asyncio.get_running_loop()
        first.close()
        while not serving._is_ending:
            await asyncio.sleep(0)
        with second:
            await loop.sock_sendall(second, protocol.frame(HELLO))
            assert await asyncio.wait_for(loop.sock_recv(second, 1), 60)
            assert not serving._is_ending

    _serve(tmp_path, work)


class _Exhausted:
    """A listening socket where no connection can be accepted until `lack` is over."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self.lack, self.accept_count = listener, True, 0

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()

    def accept(self) -> tuple[socket.socket, object]:
        self.accept_count += 1
        if self.lack:
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()


def test_without_descriptors_it_looks_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ACCEPT_AGAIN_S", 0.2)

    async def work(serving: Server) -> None:
        loop = asyncio.get_running_loop()
        assert serving._listener is not None
        exhausted = serving._listener = _Exhausted(serving._listener)  # type: ignore[assignment]
        with await _connect(tmp_path, None) as sock:
            for count in (1, 2):
                while exhausted.accept_count < count:
                    await asyncio.sleep(0)
                # Nobody looks at the listening socket before the timer does.
                assert not loop.remove_reader(exhausted.fileno())
            exhausted.lack = False
            await loop.sock_sendall(sock, protocol.frame(HELLO))
            assert await asyncio.wait_for(loop.sock_recv(sock, 1), 60)

    _serve(tmp_path, work)


def test_a_service_that_may_open_nothing_more(cache: Cache) -> None:
    """It serves those that it has, says so in a few lines, and takes who waits when there is room."""
    log = cache.directory / "service.log"
    with cache.consumer() as consumer, contextlib.ExitStack() as stack:
        pid = int(consumer.stats()["node"]["pid"])
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        for _ in range(20):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(cache.directory / "socket"))
            sock.sendall(protocol.frame(HELLO))
        eventually(lambda: "Too many open files" in log.read_text(), "it has no descriptors left")
        for _ in range(200):
            consumer.stats()
        assert log.read_text().count("\n") < 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        sock.settimeout(60)
        assert sock.recv(1)


NONSENSE = {
    "no msgpack": b"\xc1\xc1",
    "no hello": protocol.Stats(1),
    "another endpoint than a text": protocol.Hello(protocol.VERSION, 1, "", {"endpoint_url": 5}),
    "settings that are no pairs": protocol.Hello(protocol.VERSION, 1, "", {"extra": [[[], {}]]}),
    "unknown settings": protocol.Hello(protocol.VERSION, 1, "", {"x" * 100_000: 1}),
    "a chunk that is nowhere": protocol.Want([1 << 62], 1, True),
    "counts of more objects than it names": protocol.PutCounts([], b"12345678"),
    "credentials of no form": protocol.Credentials({"deadline_s": [1]}),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_conversation_that_makes_no_sense_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    said = NONSENSE[what]
    frame = len(said).to_bytes(4, "little") + said if isinstance(said, bytes) else protocol.frame(said)
    begins = "no " in what or isinstance(said, protocol.Hello)

    async def work(serving: Server) -> None:
        with await _connect(tmp_path), await _connect(tmp_path, None if begins else HELLO) as sock:
            await asyncio.get_running_loop().sock_sendall(sock, frame)
            await _end_of(sock)

    _serve(tmp_path, work)
    (record,) = [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]
    assert "a consumer was cut off: " in record.message
    assert record.exc_info is None
    assert "\n" not in record.message
    assert len(record.message) < 500
