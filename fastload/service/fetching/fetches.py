"""Requests to stores: as many at a time as each endpoint's controller allows, and some of them twice.

A fetch runs in a thread, under a watch (`store.watch`) through which the controller hears of each attempt, retries
included. One that is late for a chunk that is wanted is sent again, on another connection and into another buffer,
since two writers cannot share one, and once more where that is late too: whichever comes first gives the chunk its
buffer. The others are cancelled, and the buffers that they may still write to are free when their threads have left
them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastload.redaction import redact
from fastload.service.fetching.request_limit import Endpoint, Endpoints
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk
from fastload.store.watch import Attempt, Watch
from fastload.timing import trace

# A second request hangs as often as a first one does. Where many nodes wait for each other, one always does.
_REQUESTS_OF_CHUNK_MAX = 3
# Threads for second requests, beside those that the limits allow.
_HEDGES_MAX = 16
_LOOK_S_MIN, _LOOK_S_MAX = 0.01, 1.0
Ended = Callable[[Chunk, BaseException | None], None]


@dataclass(slots=True, eq=False)
class _FetchRequest:
    chunk: Chunk
    buffer: int
    endpoint: Endpoint
    watch: Watch
    began_s: float
    is_hedge: bool
    lost: bool = False  # another one was quicker


def _trace(to: trace.Trace, request: _FetchRequest, now_s: float, error: BaseException | None) -> None:
    chunk = request.chunk
    more = {"chunk": chunk.index, "bytes": chunk.length, "hedge": request.is_hedge, "error": type(error).__name__}
    to.request(redact(chunk.entry.origin), request.began_s, now_s, **(more if error else {**more, "error": ""}))


class Fetches:
    """Used by the loop's thread only, except for what the watches call."""

    def __init__(self, resources: Resources, shared: SharedState, endpoints: Endpoints) -> None:
        self._arena, self._stores = resources.arena, resources.stores
        self._now, self._loop = resources.now, resources.pools.loop
        self._waited_for_core = resources.waited_for_core
        self._events, self._shared, self._table = resources.events, shared, shared.table
        self._endpoints = endpoints
        self._pool = resources.pools.make("fetch", endpoints.requests_max + _HEDGES_MAX)
        self._requests: dict[Chunk, list[_FetchRequest]] = {}
        self._ended: dict[Chunk, Ended] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter(hedged_requests=0, hedges_won=0)

    @property
    def idle(self) -> int:
        """How many threads are free for first requests."""
        return max(0, min(self._endpoints.requests_max - self._endpoints.in_flight, self._pool.idle))

    # Requests

    def start(self, chunk: Chunk, ended: Ended) -> None:
        """Fill the chunk's buffer from its store; `ended(chunk, error)` follows."""
        self._ended[chunk] = ended
        self._begin(chunk, chunk.buffer, is_hedge=False)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_S_MIN, self._look)

    def _begin(self, chunk: Chunk, buffer: int, *, is_hedge: bool) -> None:
        endpoint = self._endpoints.begin(chunk.entry.origin, self._now())
        watch = Watch(partial(self._tell, endpoint, False), self._now, self._waited_for_core)
        request = _FetchRequest(chunk, buffer, endpoint, watch, self._now(), is_hedge)
        self._requests.setdefault(chunk, []).append(request)

        def done(_: None, error: BaseException | None) -> None:
            self._done(request, error)

        out = self._arena.buffer(buffer)[: chunk.length]
        start = chunk.index * self._arena.chunk_bytes
        what = chunk.fetched_as, chunk.entry.info, start, out
        if chunk.entry.info.packing:
            tell = partial(self._tell, self._endpoints.use(chunk.entry.store_origin), True)
            watches = partial(Watch, tell, self._now, self._waited_for_core)
            self._pool.submit(self._stores.read_unpacked, watch, watches, *what, done=done)
        else:
            self._pool.submit(self._stores.read_watched, watch, *what, done=done)

    def _tell(self, endpoint: Endpoint, is_packed: bool, attempt: Attempt) -> None:
        """In a thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._attempted, endpoint, is_packed, attempt)

    def _attempted(self, endpoint: Endpoint, is_packed: bool, attempt: Attempt) -> None:
        endpoint.ended(attempt, self._now())
        if is_packed:  # it brought no chunk, of which the end would count
            self._endpoints.came(endpoint, attempt.byte_count, self._now())

    def _done(self, request: _FetchRequest, error: BaseException | None) -> None:
        if request.lost:
            self._give_back(request.buffer)
            return
        request.endpoint.in_flight -= 1
        if (found := trace.trace()) is not None:
            _trace(found, request, self._now(), error)
        chunk, others = request.chunk, self._requests[request.chunk]
        others.remove(request)
        if error is not None and others:  # it is not lost yet
            self._take(chunk, others[0].buffer)
            self._give_back(request.buffer)
            return
        del self._requests[chunk]
        for other in others:
            other.lost = True
            other.endpoint.in_flight -= 1
            other.watch.cancel()
        if error is None:
            if not chunk.entry.info.packing:
                self._endpoints.came(request.endpoint, chunk.length, self._now())
            self._take(chunk, request.buffer)
            self.counters["hedges_won"] += request.is_hedge
        self._ended.pop(chunk)(chunk, error)

    def give_up(self, chunk: Chunk) -> None:
        """End its requests; `ended` is not called, and their buffers are given back when their threads have left."""
        for request in self._requests.pop(chunk):
            request.lost = True
            request.endpoint.in_flight -= 1
            request.watch.cancel()
        del self._ended[chunk]

    def _take(self, chunk: Chunk, buffer: int) -> None:
        """The chunk is in `buffer` from now on; the one that it had is that of a request which will give it back."""
        if chunk.buffer != buffer:
            self._table.quarantine(chunk)
            self._table.release(buffer)
            self._table.place(chunk, buffer)

    def _give_back(self, buffer: int) -> None:
        self._table.release(buffer)
        self._events.changed()

    # Second requests

    def _look(self) -> None:
        """Send again what is late; look again when the next may be."""
        self._timer = None
        if not self._requests:
            return
        soonest_s = _LOOK_S_MAX
        for requests in list(self._requests.values()):
            if requests[0].chunk.entry.info.packing:  # it waits for what comes before it, and so would another one
                continue
            late_after_s = requests[0].endpoint.hedger.late_after_s(requests[0].chunk.length)
            if late_after_s is not None:
                soonest_s = min(soonest_s, late_after_s / 4)
                self._consider(requests, late_after_s)
        self._timer = self._loop.call_later(max(_LOOK_S_MIN, soonest_s), self._look)

    def _consider(self, requests: list[_FetchRequest], late_after_s: float) -> None:
        newest, now = requests[-1], self._now()
        endpoint, chunk = newest.endpoint, newest.chunk
        late = len(requests) < _REQUESTS_OF_CHUNK_MAX and chunk.wanters and now - newest.began_s > late_after_s
        if not late or not self._pool.idle or not endpoint.hedger.has_budget or endpoint.controller.throttling(now):
            return
        buffer = self._shared.borrow_buffer()
        if buffer is not None:
            endpoint.hedger.hedge_count += 1
            self.counters["hedged_requests"] += 1
            self._begin(chunk, buffer, is_hedge=True)
