"""What it costs to receive from a store: CPU-seconds a GB of the receiving process alone, plain and over TLS.

    python -m bench.fetch            # every client, plain and TLS, three rounds: about three minutes
    python -m bench.fetch --quick    # a quarter of the bytes, once

A server process holds one object in memory and answers ranged GETs, which is all that it does; over TLS with a
self-signed certificate that the clients check. A client is a process of its own too: it receives ranges of 8 MiB, some
at a time, into buffers of a memfd, used again and again, as the service's arena is. Its CPU time is taken between the
first answer and the last, so imports, handshakes and first touches of memory are left out. Clients alternate, and a
cell is the median of the rounds with their range.

`copies` counts how often a byte is moved in memory between the system call that receives it and the arena: over a plain
socket none where the call is given the arena's address; over TLS OpenSSL decrypts within a buffer of its own, one
record's size, and copies from there. Those of obstore are those that are known of.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bench.http import Head, parse_head
from fastload.bench import measure
from fastload.store import ObjectInfo, StoreOptions

RANGE_BYTES = 8 << 20
OBJECT_BYTES = 256 << 20
# As in a chunk file: one for every so many bytes, taken where chunks are written to disk.
_CHECKED_BYTES = 64 << 10
_KEY = "s3://bench/object.bin"
_GB = 1e9

Receive = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the object is."""

    host: str
    port: int
    certificate: str | None  # PEM, where it is TLS

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.certificate else 'http'}://{self.host}:{self.port}"

    @property
    def options(self) -> StoreOptions:
        """For fastload's store and obstore."""
        extra = (("root_certificate", self.certificate),) if self.certificate else ()
        return StoreOptions(self.url, "K", "S", extra=extra)

    def context(self) -> ssl.SSLContext | None:
        """Trusts the server, and no other."""
        return ssl.create_default_context(cadata=self.certificate) if self.certificate else None


# Clients: each returns a function that fills a buffer from an offset, to be called by several threads.


def fastload_store(place: Place) -> Receive:
    """What fastload does."""
    from fastload.store import RequestOptions, RetryOptions, open_store

    store = open_store(_KEY, place.options, RequestOptions(retry=RetryOptions(deadline_s=0)))
    info = ObjectInfo(_KEY, OBJECT_BYTES, '"e"')
    return lambda start, out: store.read_into(info, start, out)


def obstore_stream(place: Place) -> Receive:
    """A stream of pieces, each copied; two copies, since a piece is gathered from what was received."""
    import obstore

    store = _obstore(place)

    def receive(start: int, out: memoryview) -> None:
        options: Any = {"range": (start, start + len(out)), "if_match": '"e"'}
        got = 0
        for piece in obstore.get(store, "object.bin", options=options).stream(min_chunk_size=256 << 10):
            view = memoryview(piece)
            out[got : got + len(view)] = view
            got += len(view)
        assert got == len(out), f"{got} bytes"

    return receive


def obstore_bytes(place: Place) -> Receive:
    """All of the range as one piece, copied."""
    import obstore

    store = _obstore(place)

    def receive(start: int, out: memoryview) -> None:
        out[:] = memoryview(obstore.get_range(store, "object.bin", start=start, length=len(out)))

    return receive


def _obstore(place: Place) -> Any:
    from obstore.store import S3Store

    client: Any = {"allow_http": True}
    if place.certificate:
        client["root_certificate"] = place.certificate
    return S3Store("bench", endpoint=place.url, access_key_id="K", secret_access_key="S", client_options=client)


def urllib3_readinto(place: Place) -> Receive:
    """urllib3 as it is meant to be used: its `readinto` reads bytes and copies them."""
    pool = _urllib3(place)

    def receive(start: int, out: memoryview) -> None:
        response = pool.request("GET", "/bench/object.bin", headers=_range(start, len(out)), preload_content=False)
        assert response.status == 206, response.status
        got = 0
        while got < len(out):
            got += response.readinto(out[got:])
        response.release_conn()

    return receive


def urllib3_inner(place: Place) -> Receive:
    """urllib3's pool around http.client's `readinto`."""
    pool = _urllib3(place)

    def receive(start: int, out: memoryview) -> None:
        response = pool.request("GET", "/bench/object.bin", headers=_range(start, len(out)), preload_content=False)
        assert response.status == 206, response.status
        got = 0
        while got < len(out):
            got += response._fp.readinto(out[got:])
        response.release_conn()

    return receive


def _urllib3(place: Place) -> Any:
    import urllib3

    if place.certificate:
        return urllib3.HTTPSConnectionPool(place.host, place.port, maxsize=64, ssl_context=place.context())
    return urllib3.HTTPConnectionPool(place.host, place.port, maxsize=64)


def http_client(place: Place) -> Receive:
    """http.client's `readinto`: through its BufferedReader, which passes large reads on to the socket."""
    import http.client

    local = threading.local()

    def receive(start: int, out: memoryview) -> None:
        if not hasattr(local, "connection"):
            context = place.context()
            if context is None:
                local.connection = http.client.HTTPConnection(place.host, place.port, timeout=30)
            else:
                local.connection = http.client.HTTPSConnection(place.host, place.port, timeout=30, context=context)
        local.connection.request("GET", "/bench/object.bin", headers=_range(start, len(out)))
        response = local.connection.getresponse()
        assert response.status == 206, response.status
        got = 0
        while got < len(out):
            got += response.readinto(out[got:])
        assert response.read(1) == b""

    return receive


def bare_socket(place: Place) -> Receive:
    """A socket and nothing else."""
    return _bare(place, lambda connection, out: connection.recv_into(out))


def bare_socket_read(place: Place) -> Receive:
    """A socket and nothing else, over TLS by the method that `recv_into` ends up in."""
    if not place.certificate:
        return bare_socket(place)
    return _bare(place, lambda connection, out: connection.read(len(out), out))


def _bare(place: Place, read: Callable[[Any, memoryview], int]) -> Receive:
    local = threading.local()

    def receive(start: int, out: memoryview) -> None:
        if not hasattr(local, "connection"):
            local.connection = socket.create_connection((place.host, place.port), timeout=30)
            if context := place.context():
                local.connection = context.wrap_socket(local.connection, server_hostname=place.host)
        _ask(local.connection, start, len(out))
        # The server's head is shorter than this, and the body follows in another segment or record.
        got = _behind_head(local.connection.recv(4096), out)
        while got < len(out):
            count = read(local.connection, out[got:])
            assert count > 0, "the connection ended"
            got += count

    return receive


def memory_bio(place: Place) -> Receive:
    """TLS apart from the socket: large receives, fed to OpenSSL through memory; two copies more, fewer system calls."""
    local = threading.local()
    context = place.context()
    if context is None:
        return bare_socket(place)

    def pull() -> None:
        count = local.socket.recv_into(local.buffer)
        assert count > 0, "the connection ended"
        local.incoming.write(memoryview(local.buffer)[:count])

    def connect() -> None:
        local.socket = socket.create_connection((place.host, place.port), timeout=30)
        local.buffer = bytearray(256 << 10)
        local.incoming, local.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        local.tls = context.wrap_bio(local.incoming, local.outgoing, server_hostname=place.host)
        while True:
            try:
                local.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                local.socket.sendall(local.outgoing.read())
                pull()
        local.socket.sendall(local.outgoing.read())

    def read(out: memoryview) -> int:
        while True:
            try:
                return int(local.tls.read(len(out), out))
            except ssl.SSLWantReadError:
                pull()

    def receive(start: int, out: memoryview) -> None:
        if not hasattr(local, "tls"):
            connect()
        local.tls.write(_request(start, len(out)))
        local.socket.sendall(local.outgoing.read())
        head = bytearray(4096)
        count = read(memoryview(head))
        got = _behind_head(bytes(head[:count]), out)
        while got < len(out):
            got += read(out[got:])

    return receive


def _range(start: int, length: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{start + length - 1}"}


def _request(start: int, length: int) -> bytes:
    return b"GET /bench/object.bin HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n\r\n" % (start, start + length - 1)


def _ask(connection: socket.socket, start: int, length: int) -> None:
    connection.sendall(_request(start, length))


def _behind_head(first: bytes, out: memoryview) -> int:
    head, _, body = first.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206"), head
    out[: len(body)] = body
    return len(body)


CLIENTS: dict[str, tuple[Callable[[Place], Receive], str, str]] = {
    "fastload": (fastload_store, "0", "1"),
    "obstore, stream": (obstore_stream, "2", "2"),
    "obstore, bytes": (obstore_bytes, "2", "2"),
    "urllib3, readinto": (urllib3_readinto, "1", "2"),
    "urllib3, _fp": (urllib3_inner, "0", "1"),
    "http.client": (http_client, "0", "1"),
    "socket.recv_into": (bare_socket, "0", "1"),
    "socket.read": (bare_socket_read, "0", "1"),
    "MemoryBIO": (memory_bio, "0", "3"),
}


# The process that receives.


def receive_all(client: str, place: Place, byte_count: int, in_flight: int, check: bool) -> dict[str, float]:
    """Receive so much by `client`; CPU-seconds a GB (user and system), and MB/s."""
    fd = os.memfd_create("bench-fetch")
    os.ftruncate(fd, 2 * in_flight * RANGE_BYTES)
    arena = memoryview(mmap.mmap(fd, 2 * in_flight * RANGE_BYTES))
    os.close(fd)
    buffers = [arena[at : at + RANGE_BYTES] for at in range(0, len(arena), RANGE_BYTES)]
    receive = CLIENTS[client][0](place)
    starts = [number * RANGE_BYTES % OBJECT_BYTES for number in range(byte_count // RANGE_BYTES)]

    def one(start: int) -> None:
        buffer = buffers.pop()
        receive(start, buffer)
        assert bytes(buffer[:8]) == _marked(start), "other bytes than were asked for"
        assert bytes(buffer[-8:]) == _marked(start + RANGE_BYTES - 8), "other bytes than were asked for"
        if check:
            for at in range(0, RANGE_BYTES, _CHECKED_BYTES):
                xxhash.xxh3_64_intdigest(buffer[at : at + _CHECKED_BYTES])
        buffers.append(buffer)

    with ThreadPoolExecutor(in_flight) as pool:
        # Twice as many as there are threads: each has connected then, and every buffer was touched.
        list(pool.map(one, starts[: 2 * in_flight]))
        for buffer in buffers:
            buffer[:: mmap.PAGESIZE] = bytes(len(buffer) // mmap.PAGESIZE)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        list(pool.map(one, starts))
        took_s, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    user = (after.ru_utime - before.ru_utime) * _GB / byte_count
    system = (after.ru_stime - before.ru_stime) * _GB / byte_count
    switches = (after.ru_nvcsw - before.ru_nvcsw) * _GB / byte_count
    return {"cpu": user + system, "user": user, "system": system, "rate": byte_count / took_s / 1e6, "waits": switches}


def _marked(offset: int) -> bytes:
    """What lies at `offset` of the object."""
    return offset.to_bytes(8, "little")


# The server.


def serve(certificate: str, write_bytes: int) -> None:
    """Serve until standard input ends; prints the port."""
    body = bytearray(OBJECT_BYTES)
    view = memoryview(body)
    for offset in range(0, OBJECT_BYTES, RANGE_BYTES):
        view[offset : offset + 8] = _marked(offset)
        view[offset + RANGE_BYTES - 8 : offset + RANGE_BYTES] = _marked(offset + RANGE_BYTES - 8)
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listening, context, view, write_bytes), daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # its threads sit in sockets whose other ends have gone


def _accept(listening: socket.socket, context: ssl.SSLContext | None, body: memoryview, write_bytes: int) -> None:
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_converse, args=(connection, context, body, write_bytes), daemon=True).start()


def _converse(connection: socket.socket, context: ssl.SSLContext | None, body: memoryview, write_bytes: int) -> None:
    with connection:
        try:
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            while head := _next_head(connection):
                first, _, last = head.headers["range"].removeprefix("bytes=").partition("-")
                start, end = int(first), int(last) + 1
                connection.sendall(
                    b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\n"
                    b'ETag: "e"\r\nLast-Modified: Tue, 01 Jan 2030 00:00:00 GMT\r\n\r\n'
                    % (end - start, start, end - 1, len(body))
                )
                for at in range(start, end, write_bytes):
                    connection.sendall(body[at : min(at + write_bytes, end)])
        except ConnectionError:  # the client has gone
            return


def _next_head(connection: socket.socket) -> Head | None:
    data = b""
    while True:
        more = connection.recv(16384)
        if not more:
            return None
        data += more
        if head := parse_head(data):
            return head


@contextmanager
def server(tls: bool, write_bytes: int = RANGE_BYTES) -> Iterator[tuple[Place, int]]:
    """The server in a process of its own, with its process id."""
    with tempfile.TemporaryDirectory(prefix="fastload-fetch-") as folder:
        certificate = _certificate(Path(folder)) if tls else None
        arguments = ["--serve", str(Path(folder) / "both.pem") if tls else "", "--write-bytes", str(write_bytes)]
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.fetch", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            yield Place("127.0.0.1", int(process.stdout.readline()), certificate), process.pid
            process.stdin.close()


def _certificate(folder: Path) -> str:
    """An authority, and a key and certificate of it for this address in `folder`/both.pem; the authority's certificate.

    Two, since obstore takes no certificate of a server that is an authority itself.
    """
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
    own = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE -CA authority -CAkey authority.key"
    for step in (f"{new} -keyout authority.key -out authority", f"{new} {own} -keyout key -out certificate"):
        subprocess.run(step.split(), cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key").read_text() + (folder / "certificate").read_text())
    return (folder / "authority").read_text()


# The measurement.


def run(client: str, place: Place, options: argparse.Namespace) -> dict[str, float]:
    """One client in a process of its own."""
    command = [sys.executable, "-m", "bench.fetch", "--client", client, "--place", json.dumps(place_fields(place))]
    command += ["--gb", str(options.gb), "--in-flight", str(options.in_flight)] + ["--check"] * options.check
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def place_fields(place: Place) -> dict[str, Any]:
    return {"host": place.host, "port": place.port, "certificate": place.certificate}


def compare(tls: bool, options: argparse.Namespace) -> None:
    """Every client in turn, and a table."""
    have_urllib3 = importlib.util.find_spec("urllib3") is not None
    names = options.clients or [name for name in CLIENTS if have_urllib3 or not name.startswith("urllib3")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    served: list[float] = []
    with server(tls, options.write_bytes) as (place, pid):
        for _ in range(options.rounds):
            for name in names:
                before = measure.cpu_s([pid])
                found[name].append(run(name, place, options))
                byte_count = options.gb * _GB + 2 * options.in_flight * RANGE_BYTES
                served.append((measure.cpu_s([pid]) - before) * _GB / byte_count)
    kind = "TLS" if tls else "plain"
    print(f"\n{kind}: {options.gb:g} GB a run, {options.in_flight} ranges of 8 MiB at a time, {options.rounds} rounds;")
    print(f"the server takes {statistics.median(served):.2f} CPU-s/GB")
    print(f"{'client':20} {'CPU-s/GB':>9} {'range':>12} {'user':>6} {'system':>6} {'MB/s':>6} {'waits/MB':>8} copies")
    for name, runs in found.items():
        values = [each["cpu"] for each in runs]
        middle = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        copies = CLIENTS[name][2 if tls else 1]
        print(
            f"{name:20} {middle['cpu']:9.3f} {min(values):6.3f}-{max(values):5.3f} {middle['user']:6.3f} "
            f"{middle['system']:6.3f} {middle['rate']:6.0f} {middle['waits'] / 1000:8.1f} {copies}",
            flush=True,
        )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="an XXH3-64 of every 64 KiB, as the disk tier takes it")
    parser.add_argument("--write-bytes", type=int, default=RANGE_BYTES, help="what the server writes at a time")
    parser.add_argument("--only", choices=["plain", "tls"])
    parser.add_argument("--clients", nargs="*", choices=list(CLIENTS))
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.write_bytes)
    elif options.client is not None:
        place = Place(**json.loads(options.place))
        byte_count = int(options.gb * _GB) // RANGE_BYTES * RANGE_BYTES
        print(json.dumps(receive_all(options.client, place, byte_count, options.in_flight, options.check)))
    else:
        if options.quick:
            options.rounds, options.gb = 1, 0.5
        for tls in (False, True):
            if options.only in (None, "tls" if tls else "plain"):
                compare(tls, options)


if __name__ == "__main__":
    main()
