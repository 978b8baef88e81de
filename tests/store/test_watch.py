"""Reads that are watched: what is told of each attempt, and how one is ended from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from fastload.errors import StoreUnavailableError
from fastload.store import ObjectInfo, RequestOptions, RetryOptions, StoreOptions, open_store
from fastload.store.watch import Attempt, Outcome, Watch
from tests.patience import PATIENCE_S
from tests.store.servers import Handler, answer, good, hang_up, server

INFO = ObjectInfo("s3://b/a.tar", 5, '"e"')
REQUESTS = RequestOptions(retry=RetryOptions(delay_s=0.001))
OBSTORE = (("request_payer", "true"),)


def watched(options: StoreOptions, watch: Watch) -> bytes:
    out = bytearray(5)
    store = open_store(INFO.url, options, REQUESTS)
    try:
        with watch.over():
            store.read_into(INFO, 0, memoryview(out))
    finally:
        store.close()
    return bytes(out)


@pytest.mark.parametrize("extra", [(), OBSTORE], ids=["direct", "obstore"])
def test_each_attempt_is_told(extra: tuple[tuple[str, str], ...]) -> None:
    slow_down = answer(503, b"<Error><Code>SlowDown</Code></Error>")
    attempts: list[Attempt] = []
    with server(slow_down, hang_up, answer(500, b""), good) as options:
        given = StoreOptions(options.endpoint_url, "K", "S", extra=extra)
        assert watched(given, Watch(attempts.append)) == b"hello"
    failed = [Outcome.THROTTLED, Outcome.FAILED, Outcome.FAILED]
    assert [each.outcome for each in attempts] == [*failed, Outcome.GOOD]
    assert [each.byte_count for each in attempts] == [0, 0, 0, 5]
    assert attempts[-1].first_byte_s is not None
    assert 0 < attempts[-1].first_byte_s <= attempts[-1].seconds
    assert all(before.ended_s <= after.began_s for before, after in pairwise(attempts))


def test_what_a_thread_waited_for_cores_is_told_beside_the_times() -> None:
    """Of the clocks: when the read is asked for, begins, has its first byte, and ends."""
    attempts: list[Attempt] = []
    times, waits = iter([1.0, 1.5, 4.0, 6.0]), iter([10.0, 12.0, 12.5])
    watch = Watch(attempts.append, lambda: next(times), lambda: next(waits))
    watch.attempt_begins()
    watch.first_byte()
    watch.attempt_ended(5, Outcome.GOOD)
    assert attempts == [Attempt(1.5, 6.0, 5, 2.5, Outcome.GOOD, queued_s=0.5, waited_s=2.5, first_waited_s=2.0)]


def test_who_is_not_watched_tells_nobody() -> None:
    attempts: list[Attempt] = []
    with server(good) as options:
        watched(options, Watch(attempts.append))
        store = open_store(INFO.url, options, REQUESTS)
        store.read_into(INFO, 0, memoryview(bytearray(5)))
        store.close()
    assert len(attempts) == 1


@pytest.mark.parametrize("when", ["before the head", "in the body"])
def test_a_read_that_hangs_is_ended_at_once_and_not_tried_again(when: str) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def hang(handler: Handler) -> None:
        if when == "in the body":
            handler.send_response(200)  # the whole object, which is what is asked for
            handler.send_header("ETag", '"e"')
            handler.send_header("Content-Length", "5")
            handler.end_headers()
            handler.wfile.write(b"he")
        arrived.set()
        go_on.wait(PATIENCE_S)
        handler.close_connection = True

    attempts: list[Attempt] = []
    errors: list[Exception] = []
    watch = Watch(attempts.append)
    with server(hang) as options:
        reading = threading.Thread(target=_catching(lambda: watched(options, watch), errors))
        reading.start()
        assert arrived.wait(PATIENCE_S)
        watch.cancel()
        reading.join(PATIENCE_S)
        assert not reading.is_alive()
        go_on.set()
    assert [each.outcome for each in attempts] == [Outcome.CANCELLED]
    assert isinstance(errors[0], StoreUnavailableError)


def test_a_read_that_was_cancelled_before_it_began_asks_for_nothing() -> None:
    watch = Watch(lambda attempt: None)
    watch.cancel()
    asked: list[str] = []
    with server(lambda handler: asked.append(handler.path)) as options, pytest.raises(StoreUnavailableError):
        watched(options, watch)
    assert asked == []


def _catching(call: Callable[[], object], errors: list[Exception]) -> Callable[[], None]:
    def run() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    return run
