"""Stores around a store: retrying, limiting, looking twice, counting, watching. Each changes one thing and passes the
rest on.

`Retrying(Limited(SecondLook(Counted(Watched(store)))))` is the order that works: who sleeps before a retry holds no
place among the requests in flight, and every attempt is counted, and timed without its wait for a place.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import Buffer

from fastload import waiting
from fastload.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
    WriteConflictError,
)
from fastload.store import watch
from fastload.store.answers import BadReplyError, HopelessError, changed, is_strong
from fastload.store.replies import asked, bad_reply, other_version
from fastload.store.types import ObjectInfo, Store

log = logging.getLogger("fastload.store")

_Result = TypeVar("_Result")

# A store that does not answer is reported after so long, and again after each such time.
_NOTICE_AFTER_S, _NOTICE_EVERY_S = 5.0, 30.0


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """How long to be patient. Attempt n waits a random time up to `delay_s` * 2**n, never over `delay_s_max`.

    Full jitter, since many clients that a store turned away at once must not come back at once. No attempt
    starts after `deadline_s`.
    """

    deadline_s: float = 60.0
    delay_s: float = 0.1
    delay_s_max: float = 10.0


class Counters:
    """What a store was asked for and gave. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = {"requests": 0, "bytes": 0, "retries": 0, "bad_replies": 0, "errors": 0}

    def add(self, **changes: int) -> None:
        """Add to any of these."""
        with self._lock:
            for name, change in changes.items():
                self._values[name] += change

    def values(self) -> dict[str, int]:
        """`requests` sent (a listing counts as one), `bytes` of objects received whole, `retries`, among what they
        repeat the `bad_replies`, which were not what was asked for, and `errors`, requests that failed.
        """
        with self._lock:
            return dict(self._values)


class _Around:
    """A store that passes everything on."""

    def __init__(self, store: Store) -> None:
        self._inner = store

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        return self._inner.list(prefix_url)

    def head(self, url: str) -> ObjectInfo:
        return self._inner.head(url)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        self._inner.read_into(info, start, out)

    def put(self, url: str, data: Buffer) -> str | None:
        return self._inner.put(url, data)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return self._inner.put_if_absent(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        return self._inner.put_if_match(url, data, etag)

    def delete(self, url: str) -> None:
        self._inner.delete(url)

    def close(self) -> None:
        self._inner.close()


class Retrying(_Around):
    """Tries again what failed with `StoreUnavailableError`, until the deadline, and says so in the log; `close()` ends
    the patience at once.

    A listing is tried as a whole, so that no object comes twice. A read that was cancelled (see `watch`) is not tried
    again. The patience with a write begins when it first fails, since to send its bytes may take minutes.

    A conditional write whose answer was lost may have been carried out; the next attempt then meets its own object.
    Such a conflict is settled by what is there: exactly these bytes are taken for ours. So where it matters who has
    written them, the bytes must say it.
    """

    def __init__(
        self,
        store: Store,
        options: RetryOptions | None = None,
        *,
        counters: Counters | None = None,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(store)
        self._options = options or RetryOptions()
        self._counters = counters or Counters()
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._now = now
        self._uniform = uniform
        self._has_answered = False  # the store, with anything
        self._noticed_s = -_NOTICE_EVERY_S  # when the last line was logged, by any thread

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        yield from self._patiently(lambda: list(self._inner.list(prefix_url)))

    def head(self, url: str) -> ObjectInfo:
        return self._patiently(lambda: self._inner.head(url))

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        self._patiently(lambda: self._inner.read_into(info, start, out))

    def put(self, url: str, data: Buffer) -> str | None:
        return self._patiently(lambda: self._inner.put(url, data), is_write=True)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return self._conditionally(url, data, lambda: self._inner.put_if_absent(url, data))

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        return self._conditionally(url, data, lambda: self._inner.put_if_match(url, data, etag))

    def delete(self, url: str) -> None:
        self._patiently(lambda: self._inner.delete(url), is_write=True)

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _conditionally(self, url: str, data: Buffer, put: Callable[[], str | None]) -> str | None:
        may_be_ours = False  # what is there, since an attempt ended without an answer

        def attempt() -> str | None:
            nonlocal may_be_ours
            try:
                return put()
            except StoreUnavailableError:
                may_be_ours = True
                raise
            except WriteConflictError:
                found = self._found(url, memoryview(data).cast("B")) if may_be_ours else None
                if found is None:
                    raise
                return found.etag

        return self._patiently(attempt, is_write=True)

    def _found(self, url: str, data: memoryview) -> ObjectInfo | None:
        """The object at `url`, where it holds exactly `data`."""
        try:
            info = self._inner.head(url)
            if info.size != len(data):
                return None
            there = bytearray(info.size)
            self._inner.read_into(info, 0, memoryview(there))
        except (ObjectMissingError, ObjectChangedError):  # another has written again, or deleted
            return None
        return info if there == data else None

    def _patiently(self, request: Callable[[], _Result], *, is_write: bool = False) -> _Result:
        began = None if is_write else self._now()
        attempt = 0
        while True:
            try:
                result = request()
                self._has_answered = True
                return result
            except StoreUnavailableError as error:
                if watch.cancelled():
                    raise
                is_bad_reply = isinstance(error, BadReplyError)
                self._counters.add(bad_replies=is_bad_reply)
                delay = self._delay(attempt)
                now_s = self._now()
                began = now_s if began is None else began
                spent = now_s - began
                if self._closed.is_set() or spent + delay > self._patience_s(error):
                    ends_as = error.ends_as if isinstance(error, HopelessError) else StoreUnavailableError
                    raise ends_as(f"{error} [gave up after {attempt + 1} attempts in {spent:.1f} s]") from error
                self._notice(error, spent, _NOTICE_AFTER_S if not is_bad_reply else 0.0)
            except StoreError:
                self._has_answered = True
                raise
            self._sleep(delay)
            attempt += 1
            self._counters.add(retries=1)

    def _patience_s(self, error: StoreUnavailableError) -> float:
        """How long this is tried again: what a first request meets may be a typo, which no patience mends."""
        if isinstance(error, HopelessError) and not self._has_answered:
            return min(error.patience_s, self._options.deadline_s)
        return self._options.deadline_s

    def _notice(self, error: StoreUnavailableError, spent_s: float, after_s: float) -> None:
        now_s = self._now()
        if spent_s >= after_s and now_s - self._noticed_s >= _NOTICE_EVERY_S:
            self._noticed_s = now_s
            # Its text alone: who keeps the record would keep the connections, by way of the traceback.
            log.warning("%s [for %.0f s; tried again for up to %.0f s]", str(error), spent_s, self._options.deadline_s)

    def _delay(self, attempt: int) -> float:
        most = min(self._options.delay_s_max, self._options.delay_s * 2 ** min(attempt, 30))
        return self._uniform(0.0, most)


class Limited(_Around):
    """Lets `requests_max` requests be in flight; others wait for a slot. A listing counts while it is read."""

    def __init__(self, store: Store, requests_max: int) -> None:
        super().__init__(store)
        assert requests_max > 0
        self._free = requests_max
        self._changed = threading.Condition()

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        with self._slot(prefix_url):
            yield from self._inner.list(prefix_url)

    def head(self, url: str) -> ObjectInfo:
        with self._slot(url):
            return self._inner.head(url)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        with self._slot(info.url):
            self._inner.read_into(info, start, out)

    def put(self, url: str, data: Buffer) -> str | None:
        with self._slot(url):
            return self._inner.put(url, data)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        with self._slot(url):
            return self._inner.put_if_absent(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        with self._slot(url):
            return self._inner.put_if_match(url, data, etag)

    def delete(self, url: str) -> None:
        with self._slot(url):
            self._inner.delete(url)

    @contextmanager
    def _slot(self, url: str) -> Iterator[None]:
        with self._changed:
            waiting.wait(self._changed, lambda: self._free > 0, "queue", what=f"a free request for {url}")
            self._free -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify()


class SecondLook(_Around):
    """Believes no single reply that would end a job: the store is asked once more, over another connection.

    Another version, or none, of an object that was listed: its head decides, and where it takes the reply back, that
    was a bad one, which is retried. A denial, some other refusal, or nothing under a prefix: the same is asked again.
    Conditional writes are not: were the first reply false, the second attempt would meet its own object.
    """

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        found = _twice(lambda: list(self._inner.list(prefix_url)))
        yield from found or self._inner.list(prefix_url)

    def head(self, url: str) -> ObjectInfo:
        return _twice(lambda: self._inner.head(url))

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        try:
            _twice(lambda: self._inner.read_into(info, start, out))
        except (ObjectChangedError, ObjectMissingError) as error:
            raise self._verdict(info, start, len(out), error) from error

    def put(self, url: str, data: Buffer) -> str | None:
        return _twice(lambda: self._inner.put(url, data))

    def delete(self, url: str) -> None:
        _twice(lambda: self._inner.delete(url))

    def _verdict(self, info: ObjectInfo, start: int, length: int, error: StoreError) -> StoreError:
        try:
            now = self._inner.head(info.url)
        except (StoreUnavailableError, ObjectMissingError, AccessDeniedError) as second:
            return second
        except StoreError as second:
            found = str(second)
        else:
            other = other_version(info, now.size, now.etag, now.mtime_ns)
            if other and not (is_strong(info.etag) and now.etag is None):
                return changed(info.url, other)
            found = "the object as it was listed" if not other else f"a reply without an ETag, as if {other}"
        return bad_reply(info.url, "", asked(info, start, length), f'"{error}", and at a second look {found}')


def _twice(request: Callable[[], _Result]) -> _Result:
    try:
        return request()
    except StoreError as error:
        if type(error) not in (AccessDeniedError, StoreError):
            raise
    return request()


class Counted(_Around):
    """Adds up requests, bytes and errors in `counters`, which several stores may share."""

    def __init__(self, store: Store, counters: Counters) -> None:
        super().__init__(store)
        self._counters = counters

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        with self._counting():
            yield from self._inner.list(prefix_url)

    def head(self, url: str) -> ObjectInfo:
        with self._counting():
            return self._inner.head(url)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        with self._counting():
            self._inner.read_into(info, start, out)
        self._counters.add(bytes=len(out))

    def put(self, url: str, data: Buffer) -> str | None:
        with self._counting():
            return self._inner.put(url, data)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        with self._counting():
            return self._inner.put_if_absent(url, data)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        with self._counting():
            return self._inner.put_if_match(url, data, etag)

    def delete(self, url: str) -> None:
        with self._counting():
            self._inner.delete(url)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self._counters.add(requests=1)
        try:
            yield
        except StoreError:
            self._counters.add(errors=1)
            raise


class Watched(_Around):
    """Notifies the watch over a read or write, if there is one, how each attempt went."""

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        _watching(len(out), lambda: self._inner.read_into(info, start, out))

    def put(self, url: str, data: Buffer) -> str | None:
        return _watching(memoryview(data).nbytes, lambda: self._inner.put(url, data))

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        return _watching(memoryview(data).nbytes, lambda: self._inner.put_if_absent(url, data))

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        return _watching(memoryview(data).nbytes, lambda: self._inner.put_if_match(url, data, etag))


def _watching(byte_count: int, request: Callable[[], _Result]) -> _Result:
    over = watch.current()
    if over is None:
        return request()
    over.attempt_begins()
    try:
        result = request()
    except StoreError as error:
        over.attempt_ended(0, watch.outcome_of(error))
        raise
    over.attempt_ended(byte_count, watch.Outcome.GOOD)
    return result
