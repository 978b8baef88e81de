"""How each failure is told: the type says what to do next, the message names what, where and the cure."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fastload.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from fastload.store import Counters, ObjectInfo, RequestOptions, RetryOptions, StoreOptions, open_store
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket

SLOW_WAY = (("virtual_hosted_style_request", "false"),)  # through obstore instead of our own requests
OPERATIONS = ["list", "head", "read"]


def attempt(operation: str, url: str, options: StoreOptions) -> None:
    store = ObjectStore("/".join(url.split("/")[:3]), options)
    try:
        if operation == "list":
            list(store.list(url))
        elif operation == "head":
            store.head(url)
        else:
            store.read_into(ObjectInfo(url, 5, None), 0, memoryview(bytearray(5)))
    finally:
        store.close()


@pytest.fixture(params=[(), SLOW_WAY], ids=["direct", "obstore"])
def options(request: pytest.FixtureRequest, s3: Bucket) -> StoreOptions:
    s3.put("a.tar", b"hello")
    return replace(s3.options, extra=request.param)


def refused(error: pytest.ExceptionInfo[StoreError], options: StoreOptions, *words: str) -> None:
    message = str(error.value)
    for word in (*words, options.endpoint):
        assert word in message
    for secret in (options.secret_access_key, options.access_key_id, options.session_token):
        assert secret is None or secret not in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_missing_bucket(operation: str, options: StoreOptions) -> None:
    with pytest.raises(ObjectMissingError) as error:
        attempt(operation, "s3://no-such-bucket/a.tar", options)
    refused(error, options, "s3://no-such-bucket/a.tar", "no such bucket", "NoSuchBucket")


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_missing_key(operation: str, options: StoreOptions, s3: Bucket) -> None:
    with pytest.raises(ObjectMissingError) as error:
        attempt(operation, f"{s3.url}/b.tar", options)
    refused(error, options, f"{s3.url}/b.tar", "no such object", "NoSuchKey")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_denied(operation: str, options: StoreOptions, s3: Bucket) -> None:
    denied = replace(s3.denied_options, extra=options.extra)
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", denied)
    refused(error, denied, f"{s3.url}/a.tar", "access denied", "AccessDenied")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_secret(operation: str, options: StoreOptions, s3: Bucket) -> None:
    wrong = replace(options, secret_access_key="not-the-secret")
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", wrong)
    refused(error, wrong, f"{s3.url}/a.tar", "wrong credentials", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_access_key(operation: str, options: StoreOptions, s3: Bucket) -> None:
    wrong = replace(options, access_key_id="NOBODY")
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", wrong)
    refused(error, wrong, f"{s3.url}/a.tar", "no such access key", "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_unreachable_endpoint(operation: str, endpoint: str, options: StoreOptions, s3: Bucket) -> None:
    away = replace(options, endpoint_url=endpoint)
    with pytest.raises(StoreUnavailableError) as error:
        attempt(operation, f"{s3.url}/a.tar", away)
    refused(error, away, f"{s3.url}/a.tar", "cannot reach the store")


def test_changed_since_listing(options: StoreOptions, s3: Bucket) -> None:
    store = ObjectStore(s3.url, options)
    (info,) = store.list(f"{s3.url}/a.tar")
    s3.put("a.tar", b"world")
    with pytest.raises(ObjectChangedError, match=r"a\.tar.*list again"):
        store.read_into(info, 0, memoryview(bytearray(5)))
    store.close()


def test_anonymous_is_refused_by_a_private_bucket(options: StoreOptions, s3: Bucket) -> None:
    unsigned = StoreOptions(endpoint_url=options.endpoint_url, anonymous=True, extra=options.extra)
    with pytest.raises(AccessDeniedError, match="access denied"):
        attempt("read", f"{s3.url}/a.tar", unsigned)


# What a healthy server never does: a server of ours, on a real socket, that does it.

Behaviour = Callable[[http.server.BaseHTTPRequestHandler, int], None]


@contextmanager
def server(*behaviours: Behaviour, certificate: Path | None = None) -> Iterator[StoreOptions]:
    """Answers request n as the nth of `behaviours` does, the last one for ever; over TLS with a
    certificate.
    """
    number = iter(range(1 << 30))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            behaviours[min(next(number), len(behaviours) - 1)](self, 5)

        def log_message(self, *_: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        kind = "http" if certificate is None else "https"
        yield StoreOptions(
            endpoint_url=f"{kind}://127.0.0.1:{listening.server_port}", access_key_id="K", secret_access_key="S"
        )
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def answer(status: int, body: bytes, **more: str) -> Behaviour:
    def behave(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Range": "bytes 0-4/5", "ETag": '"e"', **more}
        headers.setdefault("Last-Modified", "Tue, 01 Jan 2030 00:00:00 GMT")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        if int(headers["Content-Length"]) != len(body):
            handler.close_connection = True

    return behave


def hang_up(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
    handler.close_connection = True


good = answer(206, b"hello")
cut_short = answer(206, b"he", Content_Length="5")
too_short = answer(206, b"he")
too_long = answer(206, b"hello, world")
slow_down = answer(503, b"<Error><Code>SlowDown</Code><Message>Please.</Message></Error>")


@pytest.mark.parametrize("extra", [(), SLOW_WAY], ids=["direct", "obstore"])
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (cut_short, "truncated answer|cannot reach the store"),
        (too_short, "truncated answer|cannot reach the store"),
        (too_long, "truncated answer"),
        (slow_down, "cannot serve it now.*SlowDown"),
        (answer(500, b"oops"), "cannot serve it now.*500"),
        (answer(429, b""), "cannot serve it now.*429"),
        (hang_up, "cannot reach the store"),
    ],
    ids=["cut-short", "too-short", "too-long", "slow-down", "500", "429", "hang-up"],
)
def test_for_the_moment(behaviour: Behaviour, words: str, extra: tuple[tuple[str, str], ...]) -> None:
    with server(behaviour) as options, pytest.raises(StoreUnavailableError, match=rf"s3://b/a\.tar.*({words})"):
        attempt("read", "s3://b/a.tar", replace(options, extra=extra))


def test_a_server_without_ranges_is_not_asked_again() -> None:
    with server(answer(200, b"hello, world")) as options, pytest.raises(StoreError, match="does not serve ranges"):
        attempt("read", "s3://b/a.tar", options)


@pytest.mark.parametrize("extra", [(), SLOW_WAY], ids=["direct", "obstore"])
def test_another_version_than_asked_for(extra: tuple[tuple[str, str], ...]) -> None:
    """A server that ignores If-Match."""
    with server(answer(206, b"hello", ETag='"new"')) as options:
        store = ObjectStore("s3://b", replace(options, extra=extra))
        with pytest.raises(ObjectChangedError, match='ETag was "old" and is "new"'):
            store.read_into(ObjectInfo("s3://b/a.tar", 5, '"old"'), 0, memoryview(bytearray(5)))
        store.close()


def test_what_passes_is_tried_again() -> None:
    out = bytearray(5)
    counters = Counters()
    with server(slow_down, cut_short, hang_up, good) as options:
        requests = RequestOptions(retry=RetryOptions(delay_s=0.001), counters=counters)
        store = open_store("s3://b", options, requests)
        store.read_into(ObjectInfo("s3://b/a.tar", 5, '"e"'), 0, memoryview(out))
        store.close()
    assert bytes(out) == b"hello"
    assert counters.values() == {"requests": 4, "bytes": 5, "retries": 3, "errors": 3}


def test_a_kept_connection_that_the_server_closed_is_no_failure() -> None:
    with server(good, hang_up, good) as options:
        store = ObjectStore("s3://b", options)
        for _ in range(2):
            store.read_into(ObjectInfo("s3://b/a.tar", 5, '"e"'), 0, memoryview(bytearray(5)))
        store.close()


def test_a_web_server() -> None:
    with server(good) as options:
        url = f"{options.endpoint_url}/x/a.tar"
        store = open_store(url, StoreOptions())
        out = bytearray(5)
        info = ObjectInfo(url, 5, '"e"', 1893456000 * 10**9)
        store.read_into(info, 0, memoryview(out))
        assert bytes(out) == b"hello"
        store.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path: Path) -> None:
    path = tmp_path / "both.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", path, "-out", tmp_path / "c"], check=True, capture_output=True)
    certificate = (tmp_path / "c").read_text()
    path.write_text(path.read_text() + certificate)
    info, out = ObjectInfo("s3://b/a.tar", 5, '"e"'), bytearray(5)
    with server(good, certificate=path) as options:
        with pytest.raises(StoreUnavailableError, match="certificate"):
            attempt("read", info.url, options)
        store = ObjectStore("s3://b", replace(options, extra=(("root_certificate", certificate),)))
        store.read_into(info, 0, memoryview(out))
        store.close()
    assert bytes(out) == b"hello"
