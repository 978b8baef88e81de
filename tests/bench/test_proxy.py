"""The proxy in front of the real store: what passes is unchanged, counted, delayed and capped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import obstore
import pytest
from obstore.store import S3Store

from bench.proxy import GRANT_BYTES, SLACK_S, Profile, Proxy, RateClock
from fastload.store import StoreOptions, open_store
from tests.conftest import Bucket
from tests.patience import PATIENCE_S

NEAR = Profile(delay_s=0.0)


def _store(s3: Bucket, url: str) -> S3Store:
    options = {"allow_http": True, "pool_max_idle_per_host": "0"}
    return S3Store(
        s3.name,
        endpoint=url,
        access_key_id=s3.server.access_key_id,
        secret_access_key=s3.server.secret_access_key,
        region="us-east-1",
        client_options=options,  # type: ignore[arg-type]
        retry_config={"max_retries": 0},
    )


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[Proxy]:
    with Proxy(s3.server.endpoint_url, NEAR) as started:
        yield started


def test_objects_ranges_and_listings_pass_unchanged(s3: Bucket, proxy: Proxy) -> None:
    data = os.urandom(5_000_003)
    s3.put("a.tar", data)
    s3.put("b.tar", b"")
    store = _store(s3, proxy.url)
    assert bytes(obstore.get(store, "a.tar").bytes()) == data
    assert bytes(obstore.get_range(store, "a.tar", start=4097, end=3_000_000)) == data[4097:3_000_000]
    assert bytes(obstore.get(store, "b.tar").bytes()) == b""
    assert obstore.head(store, "a.tar")["size"] == len(data)
    assert [item["path"] for page in obstore.list(store) for item in page] == ["a.tar", "b.tar"]


def test_one_request_of_so_many_is_refused(s3: Bucket) -> None:
    s3.put("a", b"abc")
    with Proxy(s3.server.endpoint_url, Profile(delay_s=0.0, refuse_every=3)) as proxy:
        store, refused = _store(s3, proxy.url), []
        for number in range(6):
            try:
                assert bytes(obstore.get(store, "a").bytes()) == b"abc"
            except obstore.exceptions.BaseError as error:
                refused.append((number, "SlowDown" in str(error)))
    assert refused == [(2, True), (5, True)]


def test_an_upload_passes_unchanged(s3: Bucket, proxy: Proxy) -> None:
    data = os.urandom(300_001)
    obstore.put(_store(s3, proxy.url), "up", data)
    assert bytes(obstore.get(_store(s3, s3.server.endpoint_url), "up").bytes()) == data


def test_a_client_that_asks_before_its_body_is_told_to_go_on_and_gets_the_answer(s3: Bucket, proxy: Proxy) -> None:
    data = os.urandom(3 << 20)
    options = StoreOptions.from_environment({"endpoint_url": proxy.url})
    store = open_store(f"s3://{s3.name}/", options)
    try:
        for name in ("one", "two"):  # over one connection
            store.put(f"s3://{s3.name}/{name}", data)
    finally:
        store.close()
    assert bytes(obstore.get(_store(s3, s3.server.endpoint_url), "two").bytes()) == data


def test_a_missing_object_stays_missing_and_its_connection_useful(s3: Bucket, proxy: Proxy) -> None:
    s3.put("there", b"x")
    store = _store(s3, proxy.url)
    with pytest.raises(FileNotFoundError):
        obstore.get(store, "gone")
    assert bytes(obstore.get(store, "there").bytes()) == b"x"


def test_everything_is_counted_and_logged(s3: Bucket, proxy: Proxy) -> None:
    s3.put("a.tar", os.urandom(100_000))
    store = _store(s3, proxy.url)
    before = time.monotonic()
    obstore.get(store, "a.tar").bytes()
    obstore.get_range(store, "a.tar", start=10, end=20)
    counters = proxy.counters()
    assert counters["requests"] == 2
    assert counters["body_bytes"] == 100_010
    assert counters["response_bytes"] > 100_010
    assert counters["connections"] >= 1
    assert counters["cpu_s"] > 0
    first, second = proxy.log()
    assert (first["method"], first["path"], first["body_bytes"]) == ("GET", f"/{s3.name}/a.tar", 100_000)
    assert (second["range"], second["body_bytes"]) == ("bytes=10-19", 10)
    assert before <= first["began"] <= first["done"] <= second["began"]
    assert proxy.log() == []


def test_many_connections_at_once(s3: Bucket, proxy: Proxy) -> None:
    data = os.urandom(3_000_000)
    s3.put("a.tar", data)
    store = _store(s3, proxy.url)
    good = [False] * 16

    def read(number: int) -> None:
        good[number] = bytes(obstore.get(store, "a.tar").bytes()) == data

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(good))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert all(good)


def test_each_request_is_held_back(s3: Bucket) -> None:
    s3.put("a", b"x")
    with Proxy(s3.server.endpoint_url, Profile(delay_s=0.05)) as proxy:
        store = _store(s3, proxy.url)
        for _ in range(3):
            obstore.get(store, "a").bytes()
        assert all(request["done"] - request["began"] >= 0.05 for request in proxy.log())


@pytest.mark.parametrize("profile", [Profile(0.0, total_bytes_per_s=8e6), Profile(0.0, connection_bytes_per_s=8e6)])
def test_a_cap_is_kept(s3: Bucket, profile: Profile) -> None:
    size = 4_000_000
    s3.put("a", os.urandom(size))
    with Proxy(s3.server.endpoint_url, profile) as proxy:
        obstore.get(_store(s3, proxy.url), "a").bytes()
        (request,) = proxy.log()
        assert request["done"] - request["began"] >= (size - GRANT_BYTES) / 8e6 - SLACK_S


def test_it_changes_in_mid_run_and_holds_some_requests_back_for_longer(s3: Bucket, proxy: Proxy) -> None:
    s3.put("a", b"x")
    store = _store(s3, proxy.url)
    obstore.get(store, "a").bytes()
    proxy.change(Profile(delay_s=0.0, slow_every=2, slow_s=0.2))
    proxy.log()
    for _ in range(4):
        obstore.get(store, "a").bytes()
    assert sum(request["done"] - request["began"] >= 0.2 for request in proxy.log()) == 2


def test_a_rate_clock_books_at_its_rate() -> None:
    clock = RateClock(1000.0)
    assert clock.book(500, 10.0) == pytest.approx(10.0 - SLACK_S)
    assert clock.book(500, 10.0) == pytest.approx(10.5 - SLACK_S)
    clock.give_back(500)
    assert clock.book(1, 10.0) == pytest.approx(10.5 - SLACK_S)
    assert RateClock(None).book(10**9, 3.0) == 3.0


def test_a_client_that_goes_away_takes_nobody_with_it(s3: Bucket, proxy: Proxy) -> None:
    s3.put("a.tar", os.urandom(8_000_000))
    url = obstore.sign(_store(s3, proxy.url), "GET", "a.tar", _minute())
    host, _, rest = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port))) as client:
        client.sendall(f"GET /{rest} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.recv(100)
    assert len(obstore.get(_store(s3, proxy.url), "a.tar").bytes()) == 8_000_000


def test_it_ends_with_sigterm_and_with_its_starter(s3: Bucket) -> None:
    proxy = Proxy(s3.server.endpoint_url, NEAR)
    os.kill(proxy.pid, signal.SIGTERM)
    proxy.close()
    started = subprocess.Popen(
        [sys.executable, "-m", "bench.proxy", f'{{"store": "{s3.server.endpoint_url}"}}'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with started:
        assert started.stdout is not None
        assert b"port" in started.stdout.readline()
        assert started.stdin is not None
        started.stdin.close()
        assert started.wait(timeout=PATIENCE_S) == 0


def _minute() -> object:
    import datetime

    return datetime.timedelta(minutes=1)
