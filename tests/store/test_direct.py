"""Reads by requests of our own: where they go, who signs them, how the body comes."""

from __future__ import annotations

import logging
import select
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.chaos.store import certify
from fastload.errors import AccessDeniedError, ConfigError, StoreUnavailableError
from fastload.store import ObjectInfo, Store, StoreOptions, httpclient, open_store
from fastload.store.answers import NoCredentialsError
from fastload.store.direct import place
from fastload.store.objectstore import ObjectStore
from fastload.store.proxies import Proxy, proxy_for
from tests.store.servers import Behaviour, Handler, answer, good, handed_out, server

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")

INFO = ObjectInfo("s3://bucket/a b.tar", 5, '"e"')


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither proxies nor credentials of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Seen:
    """Remembers requests, and how many connections they took; answers as it is told."""

    def __init__(self, behave: Behaviour = good) -> None:
        self._behave = behave
        self.targets: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[object] = set()

    def __call__(self, handler: Handler) -> None:
        self.targets.append(handler.path)
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        self.connections.add(handler.client_address)
        self._behave(handler)


def read(store: Store, info: ObjectInfo = INFO) -> bytes:
    out = bytearray(info.size)
    store.read_into(info, 0, memoryview(out))
    return bytes(out)


def read_once(options: StoreOptions) -> bytes:
    store = ObjectStore("s3://bucket", options)
    try:
        return read(store)
    finally:
        store.close()


@pytest.mark.parametrize(
    ("bucket", "options", "virtual_host", "origin", "path"),
    [
        ("b", StoreOptions(), False, "https://s3.us-east-1.amazonaws.com", "/b"),
        ("b.c", StoreOptions(region="eu-west-1"), False, "https://s3.eu-west-1.amazonaws.com", "/b.c"),
        ("b", StoreOptions(region="eu-west-1"), True, "https://b.s3.eu-west-1.amazonaws.com", ""),
        ("b", StoreOptions("http://h:9000/"), False, "http://h:9000", "/b"),
        ("a--b--z1--x-s3", StoreOptions(), False, "https://a--b--z1--x-s3.s3express-z1.us-east-1.amazonaws.com", ""),
        ("b", StoreOptions("https://h/gate/way"), False, "https://h", "/gate/way/b"),
        ("b", StoreOptions("https://b.h"), True, "https://b.h", ""),
    ],
)
def test_where_a_bucket_is(bucket: str, options: StoreOptions, virtual_host: bool, origin: str, path: str) -> None:
    assert place(bucket, options, virtual_host) == (origin, path)


@pytest.mark.parametrize(
    ("extra", "way"),
    [
        ((), "headers"),
        ((("virtual_hosted_style_request", "true"),), "headers"),
        ((("role_arn", "r"), ("web_identity_token_file", "f")), "headers"),
        ((("request_payer", "true"),), "obstore"),
        ((("sse_customer_key_base64", "AAAA"),), "obstore"),
        ((("proxy_url", "socks5://h"),), "obstore"),
    ],
)
def test_which_settings_leave_reading_to_obstore(extra: tuple[tuple[str, str], ...], way: str) -> None:
    known = StoreOptions("http://h", "K", "S", extra=extra)
    for options, signs_urls in ((known, False), (StoreOptions("http://h", extra=extra), True)):
        store = ObjectStore("s3://b", options)
        assert (store._direct is None) == (way == "obstore")
        assert store._direct is None or store._direct.signs_urls is signs_urls
        store.close()
    for root in ("s3://b--use1-az1--x-s3", "gs://b", "az://b"):
        store = ObjectStore(root, StoreOptions(extra=(("account_name", "a"),) if root.startswith("az") else ()))
        assert store._direct is None
        store.close()


def test_a_python_without_certificates_leaves_tls_to_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its OpenSSL was built to look for them elsewhere, as that of some distributions of Python is."""
    nowhere = ssl.DefaultVerifyPaths(None, None, "SSL_CERT_FILE", "/nowhere", "SSL_CERT_DIR", "/nowhere")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    for endpoint, direct in (("https://h", False), ("http://h", True)):
        store = ObjectStore("s3://b", StoreOptions(endpoint, "K", "S"))
        assert (store._direct is not None) == direct
        store.close()


def test_a_machine_without_certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no CA certificates; install ca-certificates or set SSL_CERT_FILE"):
        ObjectStore("s3://b", StoreOptions("http://h", "K", "S"))


def test_addresses_as_obstore_writes_them(tmp_path: Path) -> None:
    """Paths before the bucket, buckets in the host's name, odd keys: both ways ask for the same."""
    seen = Seen()
    with server(seen) as known, handed_out(tmp_path) as found:
        gateway = replace(known, endpoint_url=f"{known.endpoint_url}/gate")
        virtual = replace(known, extra=(("virtual_hosted_style_request", "true"),))
        for options in (known, gateway, virtual):
            theirs = replace(found, endpoint_url=options.endpoint_url, extra=(*found.extra, *options.extra))
            assert read_once(options) == read_once(theirs) == b"hello"
    ours, signed = seen.targets[::2], seen.targets[1::2]
    assert ours == ["/bucket/a%20b.tar", "/gate/bucket/a%20b.tar", "/a%20b.tar"]
    assert [target.partition("?")[0] for target in signed] == ours
    assert all("X-Amz-Signature=" in target for target in signed)
    assert all("authorization" in headers for headers in seen.headers[::2])
    assert all("authorization" not in headers for headers in seen.headers[1::2])
    assert {headers["if-match"] for headers in seen.headers} == {'"e"'}
    # All of it is asked for with its checksum, where the header can be signed, and then without a range.
    assert {(headers.get("range"), headers["x-amz-checksum-mode"]) for headers in seen.headers[::2]} == {
        (None, "ENABLED")
    }
    assert {(headers["range"], headers.get("x-amz-checksum-mode")) for headers in seen.headers[1::2]} == {
        ("bytes=0-4", None)
    }


def test_a_session_token_is_sent_by_both_signatures(tmp_path: Path) -> None:
    seen = Seen()
    with server(seen) as options, handed_out(tmp_path, "to/ken") as found:
        read_once(replace(options, session_token="to/ken"))
        read_once(replace(found, endpoint_url=options.endpoint_url))
    assert seen.headers[0]["x-amz-security-token"] == "to/ken"
    assert "X-Amz-Security-Token=to%2Fken" in seen.targets[1]


def test_a_bucket_that_refuses_signed_urls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = answer(403, b"<Error><Code>AccessDenied</Code><Message>No.</Message></Error>")
    seen = Seen(lambda handler: (refused if "X-Amz-Signature" in handler.path else good)(handler))
    with server(seen) as options, handed_out(tmp_path) as found, caplog.at_level(logging.WARNING):
        store = ObjectStore("s3://bucket", replace(found, endpoint_url=options.endpoint_url))
        assert read(store) == read(store) == b"hello"
        store.close()
        assert ["X-Amz-Signature" in target for target in seen.targets] == [True, True, False, False]
        assert [record.getMessage() for record in caplog.records if "signed URLs" in record.getMessage()] == [
            "s3://bucket refuses signed URLs and is read through obstore, for more CPU time"
        ]
    with server(refused) as options, handed_out(tmp_path) as found:
        store = ObjectStore("s3://bucket", replace(found, endpoint_url=options.endpoint_url))
        with pytest.raises(AccessDeniedError, match=r"a b\.tar: access denied"):
            read(store)
        assert store._direct is not None
        store.close()


def test_no_credentials_to_be_found() -> None:
    for more, reason in (
        ({"metadata_endpoint": "http://127.0.0.1:1"}, "http://127.0.0.1: Connection refused"),
        ({"AWS_EC2_METADATA_DISABLED": "true"}, "AWS_EC2_METADATA_DISABLED forbids requests"),
        ({"role_arn": "r", "web_identity_token_file": "/nonexistent"}, "Failed to read token file '/nonexistent'"),
    ):
        environ = {"HOME": "/none", **{name: value for name, value in more.items() if name.isupper()}}
        given = {"endpoint_url": "http://127.0.0.1:2", **{n: v for n, v in more.items() if not n.isupper()}}
        with pytest.raises(NoCredentialsError, match=r"a b\.tar: no credentials .* http://127.0.0.1:2") as error:
            read_once(StoreOptions.from_environment(given, environ).of_scheme("s3"))
        assert reason in str(error.value)
        whose = "web identity of storage_options" if "role_arn" in more else "profile 'default' (/none/.aws/credentials"
        assert whose in str(error.value)


# How the body comes.


def chunked(handler: Handler) -> None:
    handler.send_response(206)
    for name, value in (("Transfer-Encoding", "chunked"), ("Content-Range", "bytes 0-4/5"), ("ETag", '"e"')):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")


def in_pieces(handler: Handler) -> None:
    """The body behind the head, and then byte by byte."""
    body, handler.wfile = handler.wfile, _Gathered()
    answer(206, b"hello")(handler)
    data, handler.wfile = handler.wfile.data, body
    body.write(data[:-4])
    for byte in data[-4:]:
        body.write(bytes([byte]))
        body.flush()


class _Gathered:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


@pytest.mark.parametrize(
    ("behave", "connections"),
    [
        (good, 1),
        (in_pieces, 1),
        (chunked, 1),
        (answer(206, b"hello", Connection="close"), 3),
        (answer(206, b"hello", Connection="close", Content_Length=""), 3),
    ],
    ids=["whole", "in-pieces", "chunked", "last", "last-of-no-length"],
)
def test_bodies_of_all_kinds_and_the_connection_after_them(behave: Behaviour, connections: int) -> None:
    seen = Seen(behave)
    with server(seen) as options:
        store = ObjectStore("s3://bucket", options)
        assert [read(store) for _ in range(3)] == [b"hello"] * 3
        store.close()
    assert len(seen.connections) == connections


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=needs_openssl)], ids=["plain", "tls"])
def test_bytes_are_received_where_they_belong(tls: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but what came with the head: sockets, and OpenSSL, are given addresses within `out`."""
    size, with_head_max = 1 << 20, 1 << 15
    out = np.zeros(size, np.uint8)
    received = 0

    def count(buffer: memoryview | None, length: int) -> int:
        nonlocal received
        at = np.frombuffer(buffer, np.uint8).ctypes.data - out.ctypes.data if buffer is not None else -1
        received += length if 0 <= at < size else 0
        return length

    plain_receive, tls_read = socket.socket.recv_into, ssl.SSLSocket.read
    monkeypatch.setattr(
        socket.socket, "recv_into", lambda sock, buffer, *more: count(buffer, plain_receive(sock, buffer, *more))
    )
    monkeypatch.setattr(
        ssl.SSLSocket,
        "read",
        lambda sock, length=1024, buffer=None: (
            tls_read(sock, length) if buffer is None else count(buffer, tls_read(sock, length, buffer))
        ),
    )
    both, authority = certify(tmp_path) if tls else (None, None)
    extra = (("root_certificate", authority.read_text()),) if authority is not None else ()
    data = bytes(range(256)) * (size // 256)
    with server(answer(206, data, Content_Range=f"bytes 0-{size - 1}/{size}"), certificate=both) as options:
        store = ObjectStore("s3://bucket", replace(options, extra=extra))
        store.read_into(ObjectInfo("s3://bucket/a", size, '"e"'), 0, memoryview(out))
        store.close()
    assert out.tobytes() == data
    assert size - with_head_max <= received <= size


def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpclient, "_ANSWER_S", -1.0)
    size = 1 << 20  # more than comes with the head
    endless = answer(206, bytes(size), Content_Range=f"bytes 0-{size - 1}/{size}")
    with server(endless) as options:
        store = ObjectStore("s3://bucket", options)
        with pytest.raises(StoreUnavailableError, match=r"cannot reach the store.* of 1048576 bytes came within -1 s"):
            read(store, ObjectInfo("s3://bucket/a", size, '"e"'))
        store.close()


# Proxies.


@contextmanager
def tunnels(requests: list[str]) -> Iterator[int]:
    """A proxy that opens one tunnel; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += client.recv(4096)
                requests.append(data.decode())
                host, _, port = data.split(b" ")[1].decode().rpartition(":")
                with socket.create_connection((host, int(port))) as upstream:
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    others = {client: upstream, upstream: client}
                    while True:
                        for one in select.select(list(others), [], [])[0]:
                            if not (data := one.recv(1 << 16)):
                                return
                            others[one].sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_proxy_before_a_plain_server() -> None:
    seen = Seen()
    with server(seen) as proxy:
        extra = (("http_proxy", str(proxy.endpoint_url).replace("//", "//user:pass%21@")),)
        assert read_once(StoreOptions("http://store.invalid:81", "K", "S", extra=extra)) == b"hello"
        web = open_store("http://web.invalid/x/a.tar", StoreOptions(extra=extra))
        assert read(web, ObjectInfo("http://web.invalid/x/a.tar", 5, '"e"', 1893456000 * 10**9)) == b"hello"
        web.close()
    assert seen.targets == ["http://store.invalid:81/bucket/a%20b.tar", "http://web.invalid/x/a.tar"]
    assert [headers["host"] for headers in seen.headers] == ["store.invalid:81", "web.invalid"]
    assert {headers["proxy-authorization"] for headers in seen.headers} == {"Basic dXNlcjpwYXNzIQ=="}


@needs_openssl
def test_a_proxy_before_a_server_with_tls(tmp_path: Path) -> None:
    both, authority = certify(tmp_path)
    requests: list[str] = []
    seen = Seen()
    with server(seen, certificate=both) as options, tunnels(requests) as port:
        extra = (("proxy_url", f"http://u:p@127.0.0.1:{port}"), ("root_certificate", authority.read_text()))
        assert read_once(replace(options, extra=extra)) == b"hello"
    assert requests[0].startswith(f"CONNECT {str(options.endpoint_url).removeprefix('https://')} HTTP/1.")
    assert "Proxy-Authorization: Basic dTpw" in requests[0]
    assert seen.targets == ["/bucket/a%20b.tar"]
    assert "proxy-authorization" not in seen.headers[0]


@pytest.mark.parametrize(
    ("environment", "url", "host"),
    [
        ({}, "http://h", None),
        ({"http_proxy": "p:1"}, "http://h", "p"),
        ({"http_proxy": "p:1"}, "https://h", None),
        ({"https_proxy": "http://p"}, "https://h", "p"),
        ({"HTTPS_PROXY": "http://p"}, "https://h", "p"),
        ({"all_proxy": "http://p"}, "https://h", "p"),
        ({"http_proxy": "p", "no_proxy": "a.b, h"}, "http://h:9000", None),
        ({"http_proxy": "p", "no_proxy": "example.org"}, "http://s3.example.org", None),
        ({"http_proxy": "p", "NO_PROXY": "10.0.0.0/8,nonsense/99"}, "http://10.1.2.3:9000", None),
        ({"http_proxy": "p", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3:9000", "p"),
        ({"http_proxy": "p", "no_proxy": "*"}, "http://h", None),
    ],
)
def test_which_proxy(environment: dict[str, str], url: str, host: str | None) -> None:
    said = dict(StoreOptions.from_environment(None, {"HOME": "/none", **environment}).extra)
    proxy = proxy_for(url, said)
    assert (proxy.host if proxy is not None else None) == host


def test_proxies_that_cannot_be_used() -> None:
    assert "secret" not in repr(Proxy.parse("http://user:secret@h", "proxy_url"))
    for text in ("http://", "http://user:secret@h:port"):
        with pytest.raises(ConfigError, match="proxy_url is not the address of a proxy") as error:
            Proxy.parse(text, "proxy_url")
        assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match=r"the kind socks5:// is not supported") as error:
        open_store("http://web.invalid/a.tar", StoreOptions(extra=(("http_proxy", "socks5://user:secret@h"),)))
    assert "secret" not in str(error.value)
    with server(answer(407, b"")) as proxy, pytest.raises(AccessDeniedError, match="the proxy requires credentials"):
        read_once(StoreOptions("http://store.invalid", "K", "S", extra=(("proxy_url", str(proxy.endpoint_url)),)))
