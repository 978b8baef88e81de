"""How each failure is told: the type says what to do next, the message names what, where and the cure."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from bench.chaos.store import certify
from fastload.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from fastload.store import Counters, ObjectInfo, RequestOptions, RetryOptions, StoreOptions, direct, open_store
from fastload.store.answers import HopelessError, ResolverError
from fastload.store.objectstore import ObjectStore, describe_credentials
from tests.conftest import Bucket
from tests.store.servers import Behaviour, answer, good, hang_up, server

SLOW_WAY = (("read_timeout", "30s"),)  # through obstore instead of our own requests
WAYS = ["direct", "signed-url", "obstore"]
OPERATIONS = ["list", "head", "read"]


def opened(root: str, options: StoreOptions, way: str) -> ObjectStore:
    """A store whose reads go that way; by signed URLs as if the credentials had been found elsewhere."""
    store = ObjectStore(root, replace(options, extra=SLOW_WAY) if way == "obstore" else options)
    if way == "signed-url":
        assert store._direct is not None
        store._direct._ask, store._direct.signs_urls = direct._in_url(store._opened()), True
    return store


def attempt(operation: str, url: str, options: StoreOptions, way: str = "direct") -> None:
    store = opened("/".join(url.split("/")[:3]), options, way)
    try:
        if operation == "list":
            list(store.list(url))
        elif operation == "head":
            store.head(url)
        else:
            store.read_into(ObjectInfo(url, 5, None), 0, memoryview(bytearray(5)))
    finally:
        store.close()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def options(s3: Bucket) -> StoreOptions:
    s3.put("a.tar", b"hello")
    return s3.options


def refused(error: pytest.ExceptionInfo[StoreError], options: StoreOptions, *words: str) -> None:
    message = str(error.value)
    for word in (*words, options.endpoint):
        assert word in message
    for secret in (options.secret_access_key, options.access_key_id, options.session_token):
        assert secret is None or secret not in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_missing_bucket(operation: str, options: StoreOptions, way: str) -> None:
    with pytest.raises(ObjectMissingError) as error:
        attempt(operation, "s3://no-such-bucket/a.tar", options, way)
    refused(error, options, "s3://no-such-bucket/a.tar", "no such bucket", "NoSuchBucket")


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_missing_key(operation: str, options: StoreOptions, way: str, s3: Bucket) -> None:
    with pytest.raises(ObjectMissingError) as error:
        attempt(operation, f"{s3.url}/b.tar", options, way)
    refused(error, options, f"{s3.url}/b.tar", "no such object", "NoSuchKey")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_denied(operation: str, options: StoreOptions, way: str, s3: Bucket) -> None:
    denied = s3.denied_options
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", denied, way)
    refused(error, denied, f"{s3.url}/a.tar", "access denied", "AccessDenied", "the keys from storage_options")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_secret(operation: str, options: StoreOptions, way: str, s3: Bucket) -> None:
    wrong = replace(options, secret_access_key="not-the-secret")
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", wrong, way)
    refused(error, wrong, f"{s3.url}/a.tar", "wrong credentials", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_access_key(operation: str, options: StoreOptions, way: str, s3: Bucket) -> None:
    wrong = replace(options, access_key_id="NOBODY")
    with pytest.raises(AccessDeniedError) as error:
        attempt(operation, f"{s3.url}/a.tar", wrong, way)
    refused(error, wrong, f"{s3.url}/a.tar", "no such access key", "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_unreachable_endpoint(operation: str, endpoint: str, options: StoreOptions, way: str, s3: Bucket) -> None:
    away = replace(options, endpoint_url=endpoint)
    with pytest.raises(StoreUnavailableError) as error:
        attempt(operation, f"{s3.url}/a.tar", away, way)
    refused(error, away, f"{s3.url}/a.tar", "cannot reach the store", "the request used the keys from storage_options")
    if endpoint.endswith("invalid"):
        assert re.search(r"name no-such-host.invalid (does not resolve|cannot be looked up now)", str(error.value))


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (socket.EAI_AGAIN, ResolverError, "host's name h.example cannot be looked up now"),
        (socket.EAI_NONAME, HopelessError, "host's name h.example does not resolve; check endpoint_url"),
        (socket.EAI_NODATA, HopelessError, "host's name h.example does not resolve"),
    ],
)
def test_a_name_that_does_not_resolve(
    number: int, kind: type[HopelessError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our own requests, and in obstore's words, which are the C library's."""
    said = ctypes.CDLL(None)
    said.gai_strerror.restype = ctypes.c_char_p
    text = f"failed to lookup address information: {said.gai_strerror(number).decode()}"
    debug = f'source: ConnectError("dns error", Custom {{ kind: Uncategorized, error: "{text}" }})'

    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(number, text)

    monkeypatch.setattr(socket, "getaddrinfo", fails)

    def fails_in_obstore(*_: object, **__: object) -> None:
        raise GenericError(f"Error performing HEAD http://h.example/b/a in 1ms\n{debug}")

    monkeypatch.setattr(obstore, "head", fails_in_obstore)
    options = StoreOptions("http://h.example", "K", "S")
    for operation in ("head", "read"):
        with pytest.raises(HopelessError, match=words) as error:
            attempt(operation, "s3://b/a", options)
        assert type(error.value) is kind
    proxied = replace(options, extra=(("proxy_url", "http://user:secret@proxy.example:1"),))
    with pytest.raises(HopelessError, match=r"the proxy's name proxy\.example") as error:
        attempt("read", "s3://b/a", proxied)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "given", "environ", "words"),
    [
        ("s3", {}, {"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S"}, "the keys from AWS_ACCESS_KEY_ID"),
        ("s3", {"key": "K", "secret": "S", "token": "T"}, {}, "the keys and the session token from storage_options"),
        ("s3", {"anon": True}, {}, "no signature, as storage_options says"),
        ("s3", {}, {"AWS_SKIP_SIGNATURE": "1"}, "no signature, as AWS_SKIP_SIGNATURE says"),
        (
            "s3",
            {},
            {"AWS_ROLE_ARN": "S", "AWS_WEB_IDENTITY_TOKEN_FILE": "S"},
            "identity of AWS_WEB_IDENTITY_TOKEN_FILE",
        ),
        ("s3", {}, {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "S"}, "from AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
        ("s3", {}, {}, "this machine's role, since no keys are in .*AWS_ACCESS_KEY_ID or profile 'default'"),
        ("gs", {}, {"GOOGLE_APPLICATION_CREDENTIALS": "S"}, "default credentials from GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs", {"service_account_key": "S"}, {}, "the service account's key from storage_options"),
        ("gs", {}, {"AWS_SKIP_SIGNATURE": "1"}, "this machine's identity, since"),
        ("az", {}, {"AZURE_STORAGE_SAS_TOKEN": "S"}, "the shared access signature from AZURE_STORAGE_SAS_TOKEN"),
        (
            "az",
            {},
            {"AZURE_CLIENT_ID": "S"},
            r"this machine's identity, since neither storage_options nor AZURE_\* names",
        ),
    ],
)
def test_who_asked(kind: str, given: dict[str, Any], environ: dict[str, str], words: str) -> None:
    options = StoreOptions.from_environment(given, {"HOME": "/none", **environ}).of_scheme(kind)
    assert re.search(words, describe_credentials(kind, options))


def test_changed_since_listing(options: StoreOptions, way: str, s3: Bucket) -> None:
    store = opened(s3.url, options, way)
    (info,) = store.list(f"{s3.url}/a.tar")
    s3.put("a.tar", b"world")
    with pytest.raises(ObjectChangedError, match=r"a\.tar.*list again"):
        store.read_into(info, 0, memoryview(bytearray(5)))
    store.close()


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_requests_of_a_forked_child_are_refused_and_do_not_hang(options: StoreOptions, s3: Bucket) -> None:
    url = s3.put("a", b"a")
    attempt("head", url, options)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            attempt("head", url, options)
        except StoreError as error:
            status = 0 if "was forked from one that had asked a store" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("way", ["direct", "obstore"])
def test_anonymous_is_refused_by_a_private_bucket(options: StoreOptions, way: str, s3: Bucket) -> None:
    unsigned = StoreOptions(endpoint_url=options.endpoint_url, anonymous=True)
    with pytest.raises(AccessDeniedError, match="access denied"):
        attempt("read", f"{s3.url}/a.tar", unsigned, way)


# What a healthy server never does.

cut_short = answer(206, b"he", Content_Length="5")
too_short = answer(206, b"he")
too_long = answer(206, b"hello, world")
slow_down = answer(503, b"<Error><Code>SlowDown</Code><Message>Please.</Message></Error>")


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (cut_short, "truncated answer|cannot reach the store"),
        (too_short, "a bad reply.*a body of 2|truncated answer|cannot reach the store"),
        (too_long, "a bad reply.*a body of 12|a bad reply.*continues"),
        (slow_down, "cannot serve it now.*SlowDown"),
        (answer(500, b"oops"), "cannot serve it now.*500"),
        (answer(429, b""), "cannot serve it now.*429"),
        (hang_up, "cannot reach the store"),
    ],
    ids=["cut-short", "too-short", "too-long", "slow-down", "500", "429", "hang-up"],
)
def test_for_the_moment(behaviour: Behaviour, words: str, way: str) -> None:
    with server(behaviour) as options, pytest.raises(StoreUnavailableError, match=rf"s3://b/a\.tar.*({words})"):
        attempt("read", "s3://b/a.tar", options, way)


def test_a_store_without_ranges() -> None:
    with server(answer(200, b"hello", Content_Range="")) as options:
        store = ObjectStore("s3://b", options)
        with pytest.raises(
            StoreUnavailableError, match=r"received 200 with no range and 5 bytes.*the server must serve ranges"
        ):
            store.read_into(ObjectInfo("s3://b/a.tar", 5, '"e"'), 0, memoryview(bytearray(3)))
        store.close()


def test_another_version_than_asked_for(way: str) -> None:
    """A server that ignores If-Match."""
    with server(answer(206, b"hello", ETag='"new"')) as options:
        store = opened("s3://b", options, way)
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
    assert counters.values() == {"requests": 4, "bytes": 5, "retries": 3, "bad_replies": 0, "errors": 3}


def test_a_kept_connection_that_the_server_closed_is_no_failure() -> None:
    with server(good, hang_up, good) as options:
        store = ObjectStore("s3://b", options)
        for _ in range(2):
            out = bytearray(5)
            store.read_into(ObjectInfo("s3://b/a.tar", 5, '"e"'), 0, memoryview(out))
            assert bytes(out) == b"hello"
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
@pytest.mark.parametrize("way", ["direct", "obstore"])
def test_tls(tmp_path: Path, way: str) -> None:
    both, authority = certify(tmp_path)
    info, out = ObjectInfo("s3://b/a.tar", 5, '"e"'), bytearray(5)
    with server(good, certificate=both) as options:
        with pytest.raises(StoreUnavailableError, match=r"TLS certificate is not accepted.*root_certificate"):
            attempt("read", info.url, options, way)
        trusting = StoreOptions.from_environment(
            {"endpoint": options.endpoint, "key": "K", "secret": "S"},
            {"AWS_CA_BUNDLE": str(authority), "HOME": "/none"},
        )
        trusting = replace(trusting, extra=(*trusting.extra, *(SLOW_WAY if way == "obstore" else ())))
        store = ObjectStore("s3://b", trusting)
        store.read_into(info, 0, memoryview(out))
        store.close()
    assert bytes(out) == b"hello"


def test_a_lack_of_descriptors_says_nothing_of_a_web_servers_certificate() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        store = open_store("https://localhost/a", StoreOptions(), RequestOptions(retry=RetryOptions(deadline_s=0.05)))
        with pytest.raises(StoreUnavailableError, match=r"no descriptors left to open it; .*ulimit -n"):
            store.head("https://localhost/a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    store.close()


def test_a_lack_of_descriptors_says_nothing_of_the_settings(s3: Bucket) -> None:
    """A store that cannot be opened for it is opened when there are some again."""
    url = s3.put("a", b"hello")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    out = memoryview(bytearray(5))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        store = open_store(url, s3.options, RequestOptions(retry=RetryOptions(deadline_s=0.05)))
        with pytest.raises(StoreUnavailableError, match=r"no descriptors left to open it; .*ulimit -n"):
            store.head(url)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    info = store.head(url)
    store.read_into(info, 0, out)
    assert bytes(out) == b"hello"
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.head(url)
