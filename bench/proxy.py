"""A store that is far away and not endless: a proxy between client and object store, with delay, caps and counters.

It holds each request back by a round trip, lets bodies through no faster than a cap (over all connections, and over
each), counts what passes, and costs little CPU, since it shares the cores with what is measured. So one epoll loop in
one thread; only heads are read, and bodies of known length go from socket to pipe to socket with splice(2), without
entering this process. A client's connection has one of its own to the store, kept alive with it. The Host header
passes unchanged, because a request's signature covers it. Clients do not pipeline, so a connection carries one request
at a time.

A body moves in grants. Where there is a cap, a grant is booked on a clock that runs at the cap's rate, so connections
get their turns in the order in which they ask. `SO_RCVLOWAT` on the store's socket lets the loop sleep until a good
part of a grant is there: that is what keeps the CPU low. TCP slow start, TLS and losses are not modelled.

As a process (`Proxy`) it answers one command a line on standard input with one line of JSON on standard output, and
ends when standard input does, and so with its parent, or on SIGTERM:

    counters   connections, requests, request_bytes, response_bytes (heads included), body_bytes, cpu_s
    log        the requests that were answered since the last `log`: began and done (seconds, time.monotonic()),
               method, path, range (as asked), body_bytes
    change     followed by a profile as JSON: be like that from now on
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from bench.http import Body, Head, Sized, parse_head, response_body
from bench.loop import READABLE, WRITABLE, Loop, Task

# What a connection moves at a time, and the size of its pipe: the most that Linux lets anybody have. Small against a
# chunk of 8 MiB, so that connections share a cap evenly; a quarter of it doubled the CPU-seconds.
GRANT_BYTES = 1 << 20
# How far a capped connection may lag behind the clock and still catch up: covers late wake-ups, no more.
SLACK_S = 0.01


@dataclass(frozen=True, slots=True)
class Profile:
    """What the way to the store is like: seconds held back a request, bytes a second in all and a connection.

    Of every `slow_every` requests one is held back for `slow_s` instead, and of every `refuse_every` one is answered
    503 SlowDown; 0 for none.
    """

    delay_s: float = 0.02
    total_bytes_per_s: float | None = None
    connection_bytes_per_s: float | None = None
    slow_every: int = 0
    slow_s: float = 0.0
    refuse_every: int = 0


class RateClock:
    """A token bucket, kept as the time up to which its tokens are spoken for."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._booked_until = 0.0

    def change(self, bytes_per_s: float | None) -> None:
        """Run at another rate from now on; what is booked stays."""
        self._bytes_per_s = bytes_per_s

    def book(self, count: int, now: float) -> float:
        """Speak for `count` bytes; the time at which they may move."""
        if self._bytes_per_s is None:
            return now
        begins = max(self._booked_until, now - SLACK_S)
        self._booked_until = begins + count / self._bytes_per_s
        return begins

    def give_back(self, count: int) -> None:
        """`count` of what was booked last did not move."""
        if self._bytes_per_s is not None:
            self._booked_until -= count / self._bytes_per_s


class Counters:
    """What has passed."""

    def __init__(self) -> None:
        self.connections = self.requests = 0
        self.request_bytes = self.response_bytes = self.body_bytes = 0
        self.log: list[dict[str, object]] = []

    def as_dict(self) -> dict[str, float]:
        """All but the log, with the CPU-seconds of this process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        counts = {name: value for name, value in vars(self).items() if name != "log"}
        return {**counts, "cpu_s": usage.ru_utime + usage.ru_stime}

    def take_log(self) -> list[dict[str, object]]:
        """The log since the last call."""
        log, self.log = self.log, []
        return log


class Pipe:
    """The pipe that a spliced body goes through."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, GRANT_BYTES)

    def close(self) -> None:
        """Let go of both ends."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class Connection:
    """One client connection and its own to the store: request, delay, response, and again."""

    def __init__(self, client: socket.socket, store_address: tuple[str, int], server: Server) -> None:
        self._client, self._store_address, self._server = client, store_address, server
        self._store: socket.socket | None = None
        self._pipe = Pipe()
        self._clocks = (server.clock, RateClock(server.profile.connection_bytes_per_s))

    def serve(self) -> Task[None]:
        """The task: until either end goes away."""
        try:
            received = b""
            while True:
                head, received = yield from self._read_head(self._client, received)
                began = time.monotonic()
                self._clocks[1].change(self._server.profile.connection_bytes_per_s)
                yield began + self._server.delay_s()
                body_bytes = yield from self.answer(head, received)
                received = b""
                self._log(head, began, body_bytes)
        except OSError:  # an end went away, or spoke something else than HTTP: the other sees a closed connection
            pass
        finally:
            self._close()

    def answer(self, head: Head, received: bytes) -> Task[int]:
        """Answer the request that begins with `received`, by the store's answer; the bytes of its body."""
        if self._server.refuses():
            return (yield from self.refuse(head, "503"))
        store = yield from self._send_request(head, received)
        return (yield from self._pass_response(store, head))

    def refuse(self, head: Head, status: str) -> Task[int]:
        """Answer with this status, as S3 does; the bytes of the body."""
        name, code = {
            "500": ("Internal Server Error", "InternalError"),
            "503": ("Service Unavailable", "SlowDown"),
            "403": ("Forbidden", "AccessDenied"),
        }[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
        body = b"" if head.first == "HEAD" else body
        kind = "Content-Type: application/xml\r\n"
        yield from self._pass_bytes(f"HTTP/1.1 {status} {name}\r\n{kind}Content-Length: {len(body)}\r\n\r\n".encode())
        yield from self._pass_bytes(body)
        return len(body)

    def _log(self, head: Head, began: float, body_bytes: int) -> None:
        self._server.counters.requests += 1
        self._server.counters.log.append(
            {
                "began": began,
                "done": time.monotonic(),
                "method": head.first,
                "path": head.second,
                "range": head.headers.get("range", ""),
                "body_bytes": body_bytes,
            }
        )

    def _read_head(self, end: socket.socket, received: bytes) -> Task[tuple[Head, bytes]]:
        """The next head, and all that has been received, the head included."""
        head = parse_head(received)
        while head is None:
            received += yield from _receive(end)
            head = parse_head(received)
        return head, received

    def _send_request(self, head: Head, received: bytes) -> Task[socket.socket]:
        """Send head and body on to the store; which is connected to with the first request."""
        if self._store is None:
            self._store = _connection(socket.create_connection(self._store_address, timeout=10))
        left = head.byte_count + int(head.headers.get("content-length", "0"))
        if "expect" in head.headers:
            yield from _send(self._client, b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            yield from _send(self._store, received)
            self._server.counters.request_bytes += len(received)
            left -= len(received)
            if left <= 0:
                return self._store
            received = yield from _receive(self._client)

    def _pass_response(self, store: socket.socket, request: Head) -> Task[int]:
        """Pass one response on; the bytes of its body."""
        store.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        head, received = yield from self._read_head(store, b"")
        while head.second == "100":  # the client has had it from here, before the store had to say it
            head, received = yield from self._read_head(store, received[head.byte_count :])
        body = response_body(head, request.first)
        body_bytes = body.feed(received[head.byte_count :])
        yield from self._pass_bytes(received)
        if isinstance(body, Sized):
            body_bytes += yield from self._splice_body(store, body)
        else:
            body_bytes += yield from self._pass_body(store, body)
        self._server.counters.body_bytes += body_bytes
        return body_bytes

    def _pass_bytes(self, data: bytes) -> Task[None]:
        yield from self._turn(len(data))
        yield from _send(self._client, data)
        self._server.counters.response_bytes += len(data)

    def _pass_body(self, store: socket.socket, body: Body) -> Task[int]:
        """A body whose length its head did not say."""
        body_bytes = 0
        while not body.done:
            data = yield from _receive(store)
            body_bytes += body.feed(data)
            yield from self._pass_bytes(data)
        return body_bytes

    def _splice_body(self, store: socket.socket, body: Sized) -> Task[int]:
        body_bytes = body.left
        low_water = 0
        while body.left:
            want = min(GRANT_BYTES, body.left)
            if low_water != min(body.left, GRANT_BYTES // 2):
                low_water = min(body.left, GRANT_BYTES // 2)
                store.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            yield store.fileno(), READABLE
            yield from self._turn(want)
            count = _splice(store.fileno(), self._pipe.write_fd, want)
            self._give_back(want - count)
            body.left -= count
            self._server.counters.response_bytes += count
            yield from self._drain(count)
        return body_bytes

    def _drain(self, count: int) -> Task[None]:
        """Empty the pipe, which holds `count` bytes, into the client's socket."""
        while count:
            sent = _splice(self._pipe.read_fd, self._client.fileno(), count)
            count -= sent
            if count and not sent:
                yield self._client.fileno(), WRITABLE

    def _turn(self, count: int) -> Task[None]:
        """Book `count` bytes, and wait until they may move."""
        now = time.monotonic()
        begins = max(clock.book(count, now) for clock in self._clocks)
        if begins > now:
            yield begins

    def _give_back(self, count: int) -> None:
        for clock in self._clocks:
            clock.give_back(count)

    def _close(self) -> None:
        for end in (self._client, self._store):
            if end is not None:
                self._server.loop.forget(end.fileno())
                end.close()
        self._pipe.close()


class Server:
    """Listens on 127.0.0.1 and starts a `Connection` for each that comes."""

    def __init__(self, store_address: tuple[str, int], profile: Profile, port: int = 0) -> None:
        self.profile, self.loop, self.counters = profile, Loop(), Counters()
        self.clock = RateClock(profile.total_bytes_per_s)
        self._store_address = store_address
        self._delayed = self._asked = 0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]

    def delay_s(self) -> float:
        """How long the next request is held back."""
        self._delayed += 1
        profile = self.profile
        slow = profile.slow_every and self._delayed % profile.slow_every == 0
        return profile.slow_s if slow else profile.delay_s

    def refuses(self) -> bool:
        """Whether the next request is refused."""
        self._asked += 1
        every = self.profile.refuse_every
        return bool(every) and self._asked % every == 0

    def change(self, profile: Profile) -> dict[str, object]:
        """Be like this from now on; a connection keeps its own rate until the next request on it."""
        self.profile = profile
        self.clock.change(profile.total_bytes_per_s)
        return {}

    def accept(self) -> Task[None]:
        """The task that takes connections."""
        with self._listener:
            while True:
                yield self._listener.fileno(), READABLE
                client, _ = self._listener.accept()
                self.counters.connections += 1
                self.loop.spawn(self.connection(_connection(client)).serve())

    def connection(self, client: socket.socket) -> Connection:
        """What serves a client."""
        return Connection(client, self._store_address, self)

    def answer(self, commands: dict[str, Callable[..., object]]) -> Task[None]:
        """The task that serves standard input, and ends the loop with it."""
        pending = b""
        while not self.loop.stopped:
            yield 0, READABLE
            data = os.read(0, 4096)
            self.loop.stopped = not data
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                name, _, argument = line.decode().partition(" ")
                given = [Profile(**json.loads(argument))] if argument else []
                print(json.dumps(commands[name](*given)), flush=True)


def _connection(end: socket.socket) -> socket.socket:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def _receive(end: socket.socket, byte_count_max: int = 8 << 10) -> Task[bytes]:
    """At least one byte; ConnectionError where the other side has closed."""
    while True:
        yield end.fileno(), READABLE
        try:
            data = end.recv(byte_count_max)
        except BlockingIOError:  # woken for nothing
            continue
        if not data:
            raise ConnectionError("closed")
        return data


def _send(end: socket.socket, data: bytes) -> Task[None]:
    left = memoryview(data)
    while left:
        try:
            left = left[end.send(left) :]
        except BlockingIOError:  # the socket's buffer is full
            yield end.fileno(), WRITABLE


def _splice(from_fd: int, to_fd: int, byte_count: int) -> int:
    """How many bytes moved; 0 where none can for now. ConnectionError where the source has ended."""
    try:
        count = os.splice(from_fd, to_fd, byte_count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
    except BlockingIOError:  # nothing there, or no room
        return 0
    if count == 0:
        raise ConnectionError("closed in the middle of a body")
    return count


class Proxy:
    """A proxy process in front of the store at `store_url` (http://host:port). A context manager.

    `port` is where it listens; 0 for any.
    """

    def __init__(self, store_url: str, profile: Profile, port: int = 0) -> None:
        self._start("bench.proxy", json.dumps({"store": store_url, "port": port, **asdict(profile)}))

    def _start(self, module: str, settings: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.ports = dict(self._answer())
        self.port = int(self.ports["port"])
        self.url = f"http://127.0.0.1:{self.port}"

    def counters(self) -> dict[str, float]:
        """What has passed since the start."""
        return dict(self._ask("counters"))

    def log(self) -> list[dict[str, Any]]:
        """The requests answered since the last call."""
        return list(self._ask("log"))

    def change(self, profile: Profile) -> None:
        """Be like this from now on."""
        self._ask(f"change {json.dumps(asdict(profile))}")

    def _ask(self, command: str) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and gives no answer
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process. May be called twice."""
        for end in (self._process.stdin, self._process.stdout):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):  # what it had not read before it ended
                    end.close()
        self._process.wait(timeout=10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    """Serve until standard input ends or SIGTERM comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", type=json.loads, help='JSON: {"store": "http://127.0.0.1:8333", "delay_s": 0.02}')
    settings = parser.parse_args().settings
    host, _, port = settings.pop("store").removeprefix("http://").rstrip("/").partition(":")
    own_port = settings.pop("port", 0)
    server = Server((host, int(port)), Profile(**settings), own_port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the starter closes standard input
    server.loop.spawn(server.accept())
    commands: dict[str, Callable[..., object]] = {
        "counters": server.counters.as_dict,
        "log": server.counters.take_log,
        "change": server.change,
    }
    server.loop.spawn(server.answer(commands))
    print(json.dumps({"port": server.port}), flush=True)
    server.loop.run()


if __name__ == "__main__":
    main()
