"""Retrying, limiting and counting around small fakes, with time passed in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastload.errors import AccessDeniedError, StoreUnavailableError
from fastload.store import Counters, Limited, ObjectInfo, Retrying, RetryOptions
from fastload.store.answers import HopelessError, NoCredentialsError, ResolverError
from fastload.store.types import Store
from tests.patience import PATIENCE_S

INFO = ObjectInfo("s3://b/k", 1)


class Fails:
    """Fails so many times, and then works."""

    def __init__(self, times: int, error: type[Exception] = StoreUnavailableError) -> None:
        self.left, self.error, self.calls = times, error, 0

    def _try(self) -> None:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise self.error("s3://b/k: no")

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        yield INFO
        self._try()
        yield INFO

    def head(self, url: str) -> ObjectInfo:
        self._try()
        return INFO

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        self._try()

    def close(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def patient(store: Store, options: RetryOptions, clock: Clock, counters: Counters | None = None) -> Retrying:
    return Retrying(store, options, counters=counters, sleep=clock.sleep, now=clock.now, uniform=lambda low, high: high)


def test_waits_twice_as_long_each_time_up_to_a_limit() -> None:
    clock, counters = Clock(), Counters()
    store = patient(Fails(6), RetryOptions(deadline_s=60, delay_s=1, delay_s_max=10), clock, counters)
    assert store.head("s3://b/k") == INFO
    assert clock.slept == [1, 2, 4, 8, 10, 10]
    assert counters.values()["retries"] == 6


@pytest.mark.parametrize(
    ("error", "ends_as", "patience_s"),
    [
        (HopelessError, StoreUnavailableError, 3),
        (ResolverError, StoreUnavailableError, 15),
        (NoCredentialsError, AccessDeniedError, 30),
    ],
)
def test_what_is_most_likely_a_typo_is_given_up_soon_unless_it_worked_before(
    error: type[HopelessError], ends_as: type[Exception], patience_s: float
) -> None:
    for answers, most_s in ((False, patience_s), (True, 60)):
        clock, fails = Clock(), Fails(0, error)
        store = patient(fails, RetryOptions(), clock)
        if answers:
            store.head("s3://b/k")
        fails.left = 1000
        with pytest.raises(ends_as, match="gave up after") as raised:
            store.head("s3://b/k")
        assert type(raised.value) is ends_as  # one that crosses the socket
        assert most_s / 3 < clock.now_s <= most_s


def test_gives_up_at_the_deadline() -> None:
    clock = Clock()
    store = patient(Fails(100), RetryOptions(deadline_s=10, delay_s=1), clock)
    with pytest.raises(StoreUnavailableError, match=r"s3://b/k: no \[gave up after 4 attempts in 7\.0 s\]"):
        store.read_into(INFO, 0, memoryview(bytearray(1)))
    assert clock.now_s <= 10


def test_the_log_hears_of_long_patience_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    store = patient(Fails(100), RetryOptions(deadline_s=60, delay_s=1, delay_s_max=4), clock)
    with pytest.raises(StoreUnavailableError):
        store.head("s3://b/k")
    said = [each.getMessage() for each in caplog.records]
    assert said == [f"s3://b/k: no [for {seconds} s; tried again for up to 60 s]" for seconds in (7, 39)]


def test_what_will_not_pass_is_not_tried_again() -> None:
    inner = Fails(1, AccessDeniedError)
    with pytest.raises(AccessDeniedError):
        Retrying(inner).head("s3://b/k")
    assert inner.calls == 1


def test_a_listing_is_tried_as_a_whole() -> None:
    store = patient(Fails(2), RetryOptions(), Clock())
    assert list(store.list("s3://b/")) == [INFO, INFO]


def test_close_ends_the_patience() -> None:
    store = Retrying(Fails(10**9), RetryOptions(deadline_s=3600, delay_s=3600, delay_s_max=3600))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.head, "s3://b/k")
        store.close()
        with pytest.raises(StoreUnavailableError):
            waiting.result(timeout=PATIENCE_S)


def test_no_more_requests_than_the_limit() -> None:
    lock, here, most = threading.Lock(), 0, 0
    full = threading.Event()

    class Slow(Fails):
        def head(self, url: str) -> ObjectInfo:
            nonlocal here, most
            with lock:
                here += 1
                most = max(most, here)
                if here == 3:
                    full.set()
            assert full.wait(PATIENCE_S)
            with lock:
                here -= 1
            return INFO

    store = Limited(Slow(0), 3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.head, ["s3://b/k"] * 9))
    assert most == 3
