"""Objects that consumers open one by one: their version is found out, and they join the consumer's list.

Each is asked for once, however many consumers open it at the same time. Files of this machine are looked at each time,
which costs nothing. Asking a store costs a request, as much as a small object itself, and a data set of single objects
opens each of them in every epoch and from any of its processes. So `Versions` remembers for an hour which version a URL
stands for, or until the store says that the object is another by now; and only for those who would ask the same store
as the same person, by their store options: others may not see the object, or see another. About 200 bytes each, and at
most a million.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import Counter, deque
from collections.abc import Callable

from fastload import protocol
from fastload.errors import ObjectChangedError, to_wire
from fastload.service import bounded
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, ConsumerState, ObjectPiece
from fastload.store.types import ObjectInfo
from fastload.store.urls import scheme, store_root

# Readers that open what is not cached wait for one question and one fetch each, so as many of either are under way; of
# one endpoint no more than this, since one that hangs should hold up no others.
_HEADS_MAX, _HEAD_THREADS = 32, 96


class Openings:
    """Used by the loop's thread only."""

    def __init__(self, resources: Resources, shared: SharedState, versions: Versions) -> None:
        self._consumers, self._objects, self._stores = shared.consumers, shared.objects, resources.stores
        self._heads = resources.pools.make("head", _HEAD_THREADS)
        self._versions = versions
        self._waiting: dict[tuple[str, str], list[tuple[ConsumerState, int]]] = {}  # by options and URL
        self._under_way: Counter[str] = Counter()  # by endpoint
        self._queued: dict[str, deque[tuple[str, str]]] = {}
        resources.events.load_failed.connect(self.failed)
        resources.events.cache_cleared.connect(versions.clear)

    def open(self, consumer: ConsumerState, message: protocol.Open) -> None:
        """Answer, now or later."""
        url = message.url
        known = self._versions.get(consumer.options_key, url)
        if known is not None:
            self._answer(consumer, message.request, known)
            return
        self._wait(consumer, message.request, url)

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        """A chunk could not be had: a version that is gone is forgotten."""
        if isinstance(error, ObjectChangedError):
            self._versions.forget(chunk.fetched_as, chunk.entry.info.url)

    def _wait(self, consumer: ConsumerState, request: int, url: str) -> None:
        place = consumer.options_key, url
        self._waiting.setdefault(place, []).append((consumer, request))
        if len(self._waiting[place]) == 1:
            self._ask(*place)

    def _ask(self, options_key: str, url: str) -> None:
        endpoint = self._stores.endpoint(options_key)  # the consumer may be gone when the answer is here
        origin = endpoint or store_root(url)
        if self._under_way[origin] >= _HEADS_MAX:
            self._queued.setdefault(origin, deque()).append((options_key, url))
            return
        self._under_way[origin] += 1

        def done(info: ObjectInfo | None, error: BaseException | None) -> None:
            self._answered(origin)
            if info is not None and info.url == url and scheme(url) != "file":
                self._versions.learn(options_key, info)
            for consumer, request in self._waiting.pop((options_key, url)):
                if info is not None:
                    self._answer(consumer, request, info)
                elif error is not None:
                    consumer.send(protocol.RequestFailed(request, *to_wire(error)))

        self._heads.submit(self._stores.head, options_key, url, done=done)

    def _answered(self, origin: str) -> None:
        """One question less is under way there: the next, of those that a consumer still waits for."""
        self._under_way[origin] -= 1
        queue = self._queued.get(origin)
        while queue and self._under_way[origin] < _HEADS_MAX:
            options_key, url = queue.popleft()
            waiting = [each for each in self._waiting[options_key, url] if each[0] in self._consumers]
            if any(consumer.options_key == options_key for consumer, _ in waiting):
                self._ask(options_key, url)
                continue
            del self._waiting[options_key, url]
            for consumer, request in waiting:  # their credentials have changed meanwhile, and the old ones are gone
                self._wait(consumer, request, url)
        if not queue:
            self._queued.pop(origin, None)
        if not self._under_way[origin]:
            del self._under_way[origin]

    def _answer(self, consumer: ConsumerState, request: int, info: ObjectInfo) -> None:
        if consumer not in self._consumers:  # it has gone meanwhile, and the object would stay on its list for ever
            return
        endpoint = self._stores.endpoint(consumer.options_key)
        object_no = len(consumer.entries)
        consumer.append(ObjectPiece([self._objects.use_info(info, endpoint)]))
        consumer.send(protocol.Opened(request, object_no, info.url, info.size, info.etag, info.mtime_ns))


FRESH_S = 3600.0
_COUNT_MAX = 1 << 20
_HEAD = struct.Struct("<qqd?")  # size, modification time, when it was asked for, whether there is an ETag


class Versions:
    """Used by the loop's thread only."""

    def __init__(self, now: Callable[[], float] = time.monotonic, count_max: int = _COUNT_MAX) -> None:
        self._now, self._count_max = now, count_max
        self._by_url: dict[bytes, bytes] = {}

    def get(self, options_key: str, url: str) -> ObjectInfo | None:
        """The version, where it was asked for with these store options, and not too long ago."""
        packed = self._by_url.get(_digest(options_key, url))
        if packed is None:
            return None
        size, mtime_ns, asked, has_etag = _HEAD.unpack_from(packed)
        if self._now() - asked > FRESH_S:
            return None
        return ObjectInfo(url, size, packed[_HEAD.size :].decode() if has_etag else None, mtime_ns)

    def learn(self, options_key: str, info: ObjectInfo) -> None:
        """The store has said this just now."""
        head = _HEAD.pack(info.size, info.mtime_ns, self._now(), info.etag is not None)
        packed = head + (info.etag or "").encode()
        bounded.put(self._by_url, _digest(options_key, info.url), packed, self._count_max)

    def clear(self) -> None:
        self._by_url.clear()

    def forget(self, options_key: str, url: str) -> None:
        self._by_url.pop(_digest(options_key, url), None)


def _digest(options_key: str, url: str) -> bytes:
    return hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16, key=options_key.encode()).digest()
