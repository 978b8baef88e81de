"""The store of a chaos run: a proxy before a real one, which fails as the schedule says, over HTTP and over TLS.

    python -m bench.chaos.store '{"store": "http://127.0.0.1:8333", "seed": 1, ...}'

says {"port": ..., "tls_port": ...} and then answers one command a line on standard input, as `bench.proxy` does:

    counters   what has passed, and how many faults there were of each kind
    quiet      be a good store from now on

A good answer is the real store's. A bad one to a ranged GET is made here, out of the files that were uploaded.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.chaos.schedule import fault_of
from bench.http import Head
from bench.loop import Task
from bench.proxy import Connection, Profile, Proxy, Server

# Numbers of connections lie beside those of requests, as their faults are drawn in the same way.
_CONNECTIONS, _TLS_CONNECTIONS = 1 << 40, 1 << 41
_TLS_RECORD_BYTES = 1 << 14


@dataclass(frozen=True)
class Stored:
    """An object: its path in requests, its bytes in a file here, and what the store says of it."""

    path: str
    file: str
    etag: str
    modified: str


@dataclass(frozen=True)
class Settings:
    """The settings of such a store. `share` of the requests fail, in one of the ways `kinds`; `stall_s` is the longest
    silence. `certificate` is a PEM file with key and certificate.
    """

    store: str
    seed: int
    share: float
    kinds: tuple[str, ...]
    stall_s: float
    certificate: str
    objects: tuple[Stored, ...]


class BadStore(Server):
    """The proxy, with what goes wrong."""

    def __init__(self, settings: Settings) -> None:
        host, _, port = settings.store.removeprefix("http://").rstrip("/").partition(":")
        super().__init__((host, int(port)), Profile(delay_s=0.002))
        self.settings, self.faults = settings, Counter[str]()
        self.is_quiet = False
        self.objects = [(stored, Path(stored.file).read_bytes()) for stored in settings.objects]
        self.number_of = {stored.path: number for number, (stored, _) in enumerate(self.objects)}
        self._requests = 0

    def fault(self) -> tuple[str, float] | None:
        """That of the next request."""
        self._requests += 1
        kinds = [kind for kind in self.settings.kinds if kind not in ("mute", "tls-flip")]
        return self.drawn(self._requests, self.settings.share, kinds)

    def drawn(self, number: int, share: float, kinds: list[str]) -> tuple[str, float] | None:
        """What happens to request or connection `number`."""
        return None if self.is_quiet else fault_of(self.settings.seed, number, share, kinds)

    def silence_s(self, draw: float) -> float:
        """Mostly short; one in eight is as long as can be."""
        return self.settings.stall_s if draw > 0.875 else min(3.0, self.settings.stall_s) * draw

    def connection(self, client: socket.socket) -> Connection:
        return BadConnection(client, self._store_address, self)

    def counted(self) -> dict[str, Any]:
        """The command `counters`."""
        return {**self.counters.as_dict(), "faults": dict(self.faults)}

    def quiet(self) -> dict[str, Any]:
        """The command `quiet`."""
        self.is_quiet = True
        return {}


class BadConnection(Connection):
    """One client's."""

    _server: BadStore

    def __init__(self, client: socket.socket, store_address: tuple[str, int], server: BadStore) -> None:
        super().__init__(client, store_address, server)
        number = _CONNECTIONS + server.counters.connections
        self._mute = server.drawn(number, server.settings.share / 2, [k for k in server.settings.kinds if k == "mute"])

    def serve(self) -> Task[None]:
        if self._mute is not None:
            self._server.faults["mute"] += 1
            yield time.monotonic() + self._server.silence_s(self._mute[1])
        yield from super().serve()

    def answer(self, head: Head, received: bytes) -> Task[int]:
        fault = self._server.fault()
        if fault is None:
            return (yield from super().answer(head, received))
        kind, draw = fault
        if kind in _ANYWHERE:
            self._server.faults[kind] += 1
            return (yield from self._nothing(kind, draw))
        number = self._server.number_of.get(urllib.parse.unquote(head.second.partition("?")[0]))
        span = head.headers.get("range", "")
        if kind.isdigit():
            self._server.faults[kind] += 1
            return (yield from self.refuse(head, kind))
        if head.first != "GET" or number is None or not span.startswith("bytes="):
            return (yield from super().answer(head, received))
        begin, _, last = span.removeprefix("bytes=").partition("-")
        self._server.faults[kind] += 1
        return (yield from self._wrong(kind, draw, number, int(begin), int(last) + 1))

    def _nothing(self, kind: str, draw: float) -> Task[int]:
        """No answer, in one of four ways."""
        if kind == "reset":
            self._abort()
        if kind == "garbage":
            yield from self._pass_bytes(bytes(int(64 * draw) + 1) + b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        if kind == "stall":
            yield time.monotonic() + self._server.silence_s(draw)
        raise ConnectionError(kind)

    def _abort(self) -> None:
        """End it by a reset."""
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionError("reset")

    def _wrong(self, kind: str, draw: float, number: int, begin: int, end: int) -> Task[int]:
        """Another answer than bytes `begin` to `end` of an object."""
        stored, data = self._server.objects[number]
        other, its_data = self._server.objects[(number + 1 + int(draw * (len(self._server.objects) - 1))) %
                                               len(self._server.objects)]  # fmt: skip
        size, end = len(data), min(end, len(data))
        body, status, etag, said = data[begin:end], 206, stored.etag, (begin, end, size)
        if kind == "whole":
            body, status = data, 200
        elif kind == "shifted":
            # By less than its length, or to the front: what a cache that mixes requests up would give.
            moved = begin - int(draw * begin) if begin else min(512, max(0, size - len(body)))
            body = data[moved : moved + len(body)]
            said = (moved, moved + len(body), size)
        elif kind == "shorter":
            body = body[: max(1, len(body) // 2)]
            said = (begin, begin + len(body), size)
        elif kind == "other":
            body, etag = its_data[begin:end], other.etag
            said = (begin, begin + len(body), len(its_data))
        elif kind == "etag":
            etag = other.etag
        elif kind == "lie":
            moved = int(draw * max(0, size - len(body)))
            body = data[moved : moved + len(body)]
        elif kind == "flip":
            body = _flipped(body, draw)
        lines = [
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Partial Content'}",
            f"Content-Length: {len(body)}",
            f"ETag: {etag}",
            f"Last-Modified: {stored.modified}",
            "Accept-Ranges: bytes",
            "Content-Type: application/octet-stream",
        ]
        if status == 206:
            lines.append(f"Content-Range: bytes {said[0]}-{said[1] - 1}/{said[2]}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if kind == "head-cut":
            yield from self._pass_bytes(head[: int(len(head) * draw)])
            raise ConnectionError(kind)
        yield from self._pass_bytes(head)
        if kind in ("truncate", "cut", "stall-body", "pause"):
            half = int(len(body) * draw)
            yield from self._pass_bytes(body[:half])
            if kind == "cut":
                self._abort()
            if kind != "truncate":
                yield time.monotonic() + self._server.silence_s(draw)
            if kind != "pause":
                raise ConnectionError(kind)
            body = body[half:]
        yield from self._pass_bytes(body)
        return len(body)


_ANYWHERE = ("drop", "reset", "garbage", "stall")


def _flipped(data: bytes, draw: float) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[int(draw * len(changed))] ^= 1 << int(draw * 1e6) % 8
    return bytes(changed)


class TlsFront:
    """Takes TLS off before the store, in a thread a connection, and breaks some of what is on the way."""

    def __init__(self, server: BadStore) -> None:
        self._server = server
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server.settings.certificate)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self._count += 1
            kinds = [kind for kind in self._server.settings.kinds if kind == "tls-flip"]
            fault = self._server.drawn(_TLS_CONNECTIONS + self._count, 2 * self._server.settings.share, kinds)
            at = int(fault[1] ** 2 * (1 << 20)) if fault else None
            threading.Thread(target=self._serve, args=(client, at), daemon=True).start()

    def _serve(self, client: socket.socket, flip_at: int | None) -> None:
        """Pass on both ways, and flip a bit of byte `flip_at` that goes to the client."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        inside = self._context.wrap_bio(incoming, outgoing, server_side=True)
        sent = 0

        def flush() -> None:
            nonlocal sent
            data = bytearray(outgoing.read())
            if flip_at is not None and sent <= flip_at < sent + len(data):
                data[flip_at - sent] ^= 4
                self._server.faults["tls-flip"] += 1
            sent += len(data)
            client.sendall(data)

        def wanted(step: Callable[..., Any], *arguments: Any) -> Any:
            """What a step of TLS gives, once the client has sent what it takes."""
            while True:
                try:
                    return step(*arguments)
                except ssl.SSLWantReadError:
                    flush()
                    data = client.recv(1 << 16)
                    if not data:
                        raise ConnectionError("closed") from None
                    incoming.write(data)

        with client, socket.create_connection(("127.0.0.1", self._server.port)) as store:
            try:
                wanted(inside.do_handshake)
                flush()
                while True:
                    ready = [client] if incoming.pending or inside.pending() else []
                    ready = ready or select.select([client, store], [], [])[0]
                    if client in ready:
                        data = wanted(inside.read, _TLS_RECORD_BYTES)
                        flush()
                        if not data:
                            return
                        store.sendall(data)
                    if store in ready:
                        data = store.recv(1 << 16)
                        if not data:
                            return
                        inside.write(data)
                        flush()
            except OSError:  # ssl.SSLError is one: an end went away, or did not like what came
                return


class BadStoreProcess(Proxy):
    """Such a store in a process of its own. A context manager."""

    def __init__(self, settings: Settings) -> None:
        self._start("bench.chaos.store", json.dumps(asdict(settings)))
        self.tls_url = f"https://127.0.0.1:{self.ports['tls_port']}"

    def faults(self) -> dict[str, int]:
        """How many there were of each kind."""
        return dict(self._ask("counters")["faults"])

    def quiet(self) -> None:
        """Be a good store from now on."""
        self._ask("quiet")


def main() -> None:
    """Serve until standard input ends or SIGTERM comes."""
    given = json.loads(sys.argv[1])
    objects = tuple(Stored(**stored) for stored in given.pop("objects"))
    server = BadStore(Settings(**{**given, "kinds": tuple(given["kinds"]), "objects": objects}))
    front = TlsFront(server)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.loop.spawn(server.accept())
    server.loop.spawn(server.answer({"counters": server.counted, "quiet": server.quiet}))
    print(json.dumps({"port": server.port, "tls_port": front.port}), flush=True)
    server.loop.run()


def certify(folder: Path) -> tuple[Path, Path]:
    """A key with its certificate for 127.0.0.1, and that of the authority behind it, in PEM.

    Two, since obstore takes no certificate of a server that is an authority itself.
    """
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=fastload"
    own = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE -CA authority.pem -CAkey authority.key"
    for step in (f"{new} -keyout authority.key -out authority.pem", f"{new} {own} -keyout key.pem -out server.pem"):
        subprocess.run(step.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "server.pem").read_text())
    return both, folder / "authority.pem"


if __name__ == "__main__":
    main()
