"""Writes by requests of our own: what is sent, what vouches for it, and every way in which a store may say no."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos.store import certify
from fastload.errors import AccessDeniedError, StoreError, StoreUnavailableError
from fastload.store import Retrying, RetryOptions, StoreOptions, httpupload
from fastload.store.crc32 import crc32
from fastload.store.filemap import FileMap, place_of
from fastload.store.objectstore import ObjectStore
from fastload.store.watch import Watch
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.store.servers import Handler, answer, handed_out, hang_up, server

URL = "s3://b/k"
MIB = 1 << 20
# Of the distances over which a check moves words, and of its blocks.
EDGES = [0, 8, 8 * 9001, 8 * (9001 + 8033), 8 * (9001 + 8 * 8033), 8 * (9001 + 17 * 8033)]
BYTES = os.urandom(EDGES[-1] + 64)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@given(st.sampled_from(EDGES), st.integers(0, 40), st.integers(0, 17))
def test_a_check_is_that_of_zlib(edge: int, more: int, start: int) -> None:
    data = memoryview(BYTES)[start : start + edge + more]
    assert crc32(data) == zlib.crc32(data)


def test_a_part_of_a_mapped_file_knows_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BYTES)
    with path.open("rb") as file:
        mapped = FileMap(file.fileno(), len(BYTES))
    view = memoryview(mapped)[4096:8192]
    mapped.populate(5000, 100_000)
    fd, start = place_of(view) or (-1, -1)
    assert os.pread(fd, len(view), start) == view == BYTES[4096:8192]
    with pytest.raises(BufferError):
        mapped.close()
    os.fstat(fd)
    view.release()
    mapped.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert place_of(memoryview(b"x")) is None


# A server by hand: each connection is one of `turns`, which gets it and the head of the request.

Turn = Callable[[socket.socket, str], None]


@contextlib.contextmanager
def by_hand(*turns: Turn, certificate: Path | None = None) -> Iterator[StoreOptions]:
    failures: list[BaseException] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None:
        context.load_cert_chain(certificate)

    def serve() -> None:
        for turn in turns:
            client, _ = listening.accept()
            client.settimeout(PATIENCE_S)
            with context.wrap_socket(client, server_side=True) if certificate is not None else client as each:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += each.recv(1)
                try:
                    turn(each, head.decode())
                except BaseException as error:
                    failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        kind = "http" if certificate is None else "https"
        yield StoreOptions(f"{kind}://127.0.0.1:{listening.getsockname()[1]}", "K", "S")
        thread.join()
    assert not failures, failures


def receive(connection: socket.socket, byte_count: int) -> bytes:
    data = bytearray()
    while len(data) < byte_count and (more := connection.recv(byte_count - len(data))):
        data += more
    return bytes(data)


def said(head: str, name: str) -> str:
    lines = [line.partition(": ") for line in head.split("\r\n")]
    return next((value for each, _, value in lines if each.lower() == name), "")


def reply(status: str, body: str = "", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n{body}".encode()


def refusal(status: str, code: str) -> bytes:
    return reply(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>")


def says(words: bytes) -> Turn:
    return lambda connection, _: connection.sendall(words)


def takes(bodies: list[bytes], *, goes_on: bool = True) -> Turn:
    """A store that compares the checksum."""

    def turn(connection: socket.socket, head: str) -> None:
        if goes_on and said(head, "expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        bodies.append(receive(connection, int(said(head, "content-length"))))
        checksum = said(head, "x-amz-checksum-crc32")
        connection.sendall(reply("200 OK", ETag='"e"', **({"x_amz_checksum_crc32": checksum} if checksum else {})))

    return turn


def mapped(folder: Path, size: int) -> memoryview:
    """The end of a file."""
    path = folder / "image"
    path.write_bytes(bytes(4096) + (BYTES * (size // len(BYTES) + 1))[:size])
    with path.open("rb") as file:
        return memoryview(FileMap(file.fileno(), size + 4096))[4096:]


@contextlib.contextmanager
def opened(options: StoreOptions, **extra: str) -> Iterator[ObjectStore]:
    store = ObjectStore("s3://b", replace(options, extra=tuple(extra.items())))
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("size", [0, 5, 3 * MIB + 5])
@pytest.mark.parametrize("way", ["memory", "file", pytest.param("tls", marks=needs_openssl)])
def test_every_byte_arrives(tmp_path: Path, way: str, size: int) -> None:
    both, authority = certify(tmp_path) if way == "tls" else (None, None)
    extra = {"root_certificate": authority.read_text()} if authority is not None else {}
    data = mapped(tmp_path, size)
    bodies: list[bytes] = []
    with by_hand(takes(bodies), certificate=both) as options, opened(options, **extra) as store:
        assert store.put(URL, data if way == "file" else bytes(data)) == '"e"'
    assert bodies == [data]


def test_real_stores_compare_the_checksum(s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, url = mapped(tmp_path, 3 * MIB), f"{s3.url}/a.bin"
    store = ObjectStore(s3.url, s3.options)
    etag = store.put(url, data)
    assert store._writes_directly
    info = store.head(url)
    out = bytearray(info.size)
    store.read_into(info, 0, memoryview(out))
    assert (info.etag, out) == (etag, data)
    monkeypatch.setattr("fastload.store.direct.crc32", lambda _: 5)
    with pytest.raises(StoreUnavailableError, match="what arrived is not what was sent"):
        store.put(url, data)
    store.close()


@pytest.mark.parametrize("way", ["plain", pytest.param("tls", marks=needs_openssl)])
@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_refusal_is_read_as_what_it_is(tmp_path: Path, way: str, when: str) -> None:
    """Before any of the body is sent, or in the middle of it, after which the server reads nothing more."""
    both, authority = certify(tmp_path) if way == "tls" else (None, None)
    extra = {"root_certificate": authority.read_text()} if authority is not None else {}
    came: list[int] = []

    def refuses(connection: socket.socket, head: str) -> None:
        if when == "amid":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            came.append(len(receive(connection, MIB)))
        connection.sendall(refusal("503 Slow Down", "SlowDown"))
        if when == "before":
            with contextlib.suppress(ConnectionResetError):
                came.append(len(receive(connection, 1)))

    data = mapped(tmp_path, 32 * MIB)
    refused = pytest.raises(StoreUnavailableError, match="503 SlowDown")
    with by_hand(refuses, certificate=both) as options, opened(options, **extra) as store, refused:
        store.put(URL, data)
    assert sum(came) == (0 if when == "before" else MIB)


def test_a_server_that_does_not_answer_a_question_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpupload, "_ASKED_S", 0.01)
    bodies: list[bytes] = []
    heads: list[str] = []

    def deaf(connection: socket.socket, head: str) -> None:
        heads.append(head)
        takes(bodies, goes_on=False)(connection, head)

    data = bytes(MIB)
    with by_hand(deaf, deaf) as options, opened(options) as store:
        for _ in range(2):
            store.put(URL, data)
            assert store._direct is not None
            store._direct._client(str(options.endpoint_url)).renew()
    assert bodies == [data, data]
    assert [said(head, "expect") for head in heads] == ["100-continue", ""]


def test_all_waits_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(httpupload, "_STALLED_S", 0.1)
    monkeypatch.setattr(httpupload, "_ANSWER_S", 0.1)
    ended = threading.Event()

    def stalls(connection: socket.socket, _: str) -> None:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        ended.wait(PATIENCE_S)

    def is_silent(connection: socket.socket, _: str) -> None:
        ended.wait(PATIENCE_S)

    data = mapped(tmp_path, 32 * MIB)
    with by_hand(stalls) as options, opened(options) as store:
        with pytest.raises(StoreUnavailableError, match=r"it took nothing for 0\.1 s, after \d+ of 33554432 bytes"):
            store.put(URL, data)
        ended.set()
    ended.clear()
    with by_hand(is_silent) as options, opened(options) as store:
        with pytest.raises(StoreUnavailableError, match="timed out"):
            store.put(URL, b"x")
        ended.set()
    monkeypatch.setattr(httpupload, "_BODY_S", -1.0)
    late = pytest.raises(StoreUnavailableError, match="bytes within -1 s")
    with by_hand(says(b"HTTP/1.1 100 Continue\r\n\r\n")) as options, opened(options) as store, late:
        store.put(URL, data)


def test_an_upload_that_is_given_up_is_cut_off(tmp_path: Path) -> None:
    """What the system still holds of it is not sent: the memory may be another's by then."""
    came: list[int] = []
    watch = Watch(lambda _: None)

    def cancelled_amid(connection: socket.socket, _: str) -> None:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        came.append(len(receive(connection, MIB)))
        watch.cancel()
        with contextlib.suppress(ConnectionResetError):
            came.append(len(receive(connection, 32 * MIB)))

    ends = pytest.raises(StoreUnavailableError)
    with by_hand(cancelled_amid) as options, opened(options) as store, watch.over(), ends:
        store.put(URL, mapped(tmp_path, 32 * MIB))
    assert sum(came) < 32 * MIB


def test_an_answer_before_all_was_sent_is_not_believed(tmp_path: Path) -> None:
    early = pytest.raises(StoreUnavailableError, match="before all was sent")
    with by_hand(says(reply("200 OK", ETag='"e"'))) as options, opened(options) as store, early:
        store.put(URL, mapped(tmp_path, 32 * MIB))


def test_a_connection_that_was_closed_meanwhile_is_no_failure(tmp_path: Path) -> None:
    bodies: list[bytes] = []
    data = mapped(tmp_path, 2 * MIB)
    with by_hand(takes(bodies), takes(bodies)) as options, opened(options) as store:
        for _ in range(2):  # the server closes each connection after its turn, and has not said so
            store.put(URL, data)
    assert bodies == [data, data]


# Where obstore has to do it


class Store:
    """Takes what it is sent, and remembers by whom: obstore names itself."""

    def __init__(self, refusal: Callable[[Handler], bool], how: Callable[[Handler], None], **more: str) -> None:
        self.refusal, self.how, self.more = refusal, how, more
        self.ways: list[str] = []

    def __call__(self, handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        self.ways.append("obstore" if handler.headers.get("User-Agent") else "direct")
        checksum = handler.headers.get("x-amz-checksum-crc32") or ""
        taken = answer(200, b"", **{"Content_Range": "", "x-amz-checksum-crc32": checksum, **self.more})
        (self.how if self.refusal(handler) else taken)(handler)


def is_direct(handler: Handler) -> bool:
    return not handler.headers.get("User-Agent")


DENIED = answer(403, b"<Error><Code>AccessDenied</Code></Error>", Content_Range="")


@pytest.mark.parametrize(
    ("store", "ways"),
    [
        (Store(lambda _: False, DENIED), ["direct"] * 2),
        (Store(lambda _: False, DENIED, **{"x-amz-checksum-crc32": ""}), ["direct", "obstore", "obstore"]),
        (Store(is_direct, DENIED), ["direct", "obstore", "obstore"]),
        (Store(is_direct, answer(307, b"", Content_Range="", Location="/")), ["direct", "obstore", "obstore"]),
    ],
    ids=["compares", "does not compare", "wants a hash", "redirects"],
)
def test_what_a_store_takes_from_obstore_alone(store: Store, ways: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with server(store) as options, opened(options) as opened_, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert opened_.put(URL, b"hello") == '"e"'
    assert store.ways == ways
    assert caplog.text.count("is written through obstore, for more CPU time") == (len(ways) == 3)


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", AccessDeniedError, "access denied"),
        (403, "ExpiredToken", AccessDeniedError, "the session token has expired"),
        (301, "PermanentRedirect", StoreError, "the bucket is in another region"),
        (400, "Odd", StoreError, "the store refused"),
    ],
)
def test_what_is_refused_both_ways(status: int, code: str, error: type[StoreError], message: str) -> None:
    store = Store(lambda _: True, answer(status, f"<Error><Code>{code}</Code></Error>".encode(), Content_Range=""))
    with server(store) as options, opened(options) as opened_:
        with pytest.raises(error, match=f"{URL}.*{message}"):
            opened_.put(URL, b"hello")
        assert opened_._writes_directly
    assert store.ways == ["direct", "obstore"]


@pytest.mark.parametrize("way", ["plain", pytest.param("tls", marks=needs_openssl)])
def test_credentials_that_are_handed_out_are_renewed_for_each_upload(tmp_path: Path, way: str) -> None:
    """URLs are signed for it, over TLS; without, nothing would vouch for the bytes."""
    both, authority = certify(tmp_path) if way == "tls" else (None, None)
    targets: list[str] = []

    def put(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        targets.append(handler.path)
        answer(200, b"", Content_Range="")(handler)

    with server(put, certificate=both) as there, handed_out(tmp_path) as found:
        extra = found.extra + ((("root_certificate", authority.read_text()),) if authority is not None else ())
        store = ObjectStore("s3://b", replace(found, endpoint_url=there.endpoint_url, extra=extra))
        assert store.put("s3://b/a b", b"hello") == '"e"'
        store.close()
    assert ["X-Amz-Signature=" in target for target in targets] == [way == "tls"]
    assert targets[0].startswith("/b/a%20b")


def test_what_was_damaged_on_the_way_is_sent_again() -> None:
    damaged = answer(400, b"<Error><Code>BadDigest</Code></Error>", Content_Range="")
    turns = iter([True, False])
    store = Store(lambda _: next(turns), damaged)
    with server(store) as options, opened(options) as opened_:
        soon = Retrying(opened_, RetryOptions(deadline_s=PATIENCE_S, delay_s=0.001))
        assert soon.put(URL, b"hello") == '"e"'
    assert store.ways == ["direct", "direct"]


def test_a_server_that_hangs_up_is_away() -> None:
    away = pytest.raises(StoreUnavailableError, match="cannot reach the store")
    with server(hang_up) as options, opened(options) as store, away:
        store.put(URL, b"hello")
