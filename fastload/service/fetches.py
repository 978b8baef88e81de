"""Requests to stores: as many at a time as each endpoint's controller allows, and some of them twice.

A fetch runs in a thread, under a watch (`store.watch`) through which the controller hears of each attempt, retries
included. One that is late for a chunk that somebody wants is sent again, on another connection and into another buffer,
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
from typing import Any

from fastload.service.buffers import BufferTable
from fastload.service.control import REQUESTS_MAX, Controller, Hedger, Learnt
from fastload.service.ports import Ram
from fastload.service.state import Chunk
from fastload.service.stores import StoreTable
from fastload.service.threads import Pools
from fastload.store.watch import Attempt, Watch

# Single objects may come from any number of hosts, and each turn looks at all that are known.
_ENDPOINTS_MAX = 64
# A second request hangs as often as a first one does. Where many nodes wait for each other, one always does.
_REQUESTS_OF_CHUNK_MAX = 3
# Threads for second requests, beside those that the limits allow.
_HEDGES_MAX = 16
_LOOK_S_MIN, _LOOK_S_MAX = 0.01, 1.0
Ended = Callable[[Chunk, BaseException | None], None]


@dataclass(slots=True)
class _Endpoint:
    controller: Controller
    hedger: Hedger
    in_flight: int = 0  # those that lost to another one do not count: they may hang for long, and nobody waits

    @property
    def free(self) -> int:
        """How many more requests may be started."""
        return max(0, self.controller.limit - self.in_flight)


@dataclass(slots=True, eq=False)
class _FetchRequest:
    chunk: Chunk
    buffer: int
    endpoint: _Endpoint
    watch: Watch
    began_s: float
    is_hedge: bool
    lost: bool = False  # another one was quicker


class Fetches:
    """Used by the loop's thread only, except for what the watches call."""

    def __init__(
        self,
        arena: Ram,
        table: BufferTable,
        stores: StoreTable,
        pools: Pools,
        spare: Callable[[], int | None],
        freed: Callable[[], None],
        now: Callable[[], float],
        most: int = REQUESTS_MAX,
        fixed: int = 0,
        known: Callable[[str], Learnt | None] = lambda endpoint: None,
        hedger: Callable[[], Hedger] = Hedger,
    ) -> None:
        """`spare()` lends a buffer for a second request, if there is one to be had; `freed()` is told when one has come
        back. `most`: at a time, if there are as many buffers. `fixed`: see `Controller`. `known(endpoint)`: what an
        earlier run learnt of it.
        """
        self._arena, self._table, self._stores, self._loop = arena, table, stores, pools.loop
        self._spare, self._freed, self._now, self._fixed = spare, freed, now, fixed
        self._known, self._hedger = known, hedger
        self._max = fixed or max(1, min(most, arena.buffer_count))
        self._pool = pools.make("fetch", self._max + _HEDGES_MAX)
        self._endpoints: dict[str, _Endpoint] = {}  # the one used last is the last
        self._forgotten: Counter[str] = Counter()  # what was refused by those that are not known any more
        self._requests: dict[Chunk, list[_FetchRequest]] = {}
        self._ended: dict[Chunk, Ended] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter(hedged_requests=0, hedges_won=0)

    # How many

    @property
    def limit(self) -> int:
        """How many requests may be in flight, over all endpoints."""
        return sum(each.controller.limit for each in self._endpoints.values()) or self._new("").controller.limit

    @property
    def idle(self) -> int:
        """How many threads are free for first requests."""
        in_flight = sum(endpoint.in_flight for endpoint in self._endpoints.values())
        return max(0, min(self._max - in_flight, self._pool.idle))

    def free_at(self, endpoint: str) -> int:
        """How many more requests may be sent to an endpoint now."""
        found = self._endpoints.get(endpoint)
        return self._new(endpoint).controller.limit if found is None else found.free

    def settled(self) -> None:
        """All that there is to ask for now has been started."""
        now = self._now()
        for endpoint in self._endpoints.values():
            if endpoint.free:
                endpoint.controller.slack(now)

    def _use(self, name: str) -> _Endpoint:
        """The endpoint, which was used last from now on. Of many, the one that was used longest ago is forgotten."""
        endpoint = self._endpoints.pop(name, None) or self._new(name)
        if len(self._endpoints) >= _ENDPOINTS_MAX:
            idle = next((other for other, each in self._endpoints.items() if not each.in_flight), None)
            if idle is not None:
                self._forgotten.update(_refusals(self._endpoints.pop(idle)))
        self._endpoints[name] = endpoint
        return endpoint

    def _new(self, name: str) -> _Endpoint:
        return _Endpoint(Controller(self._max, fixed=self._fixed, known=self._known(name)), self._hedger())

    def learnt(self) -> dict[str, tuple[Learnt, int]]:
        """What is known of each endpoint by now, and how many requests it was sent."""
        return {name: (each.controller.learnt(), each.hedger.request_count) for name, each in self._endpoints.items()}

    # Requests

    def start(self, chunk: Chunk, ended: Ended) -> None:
        """Fill the chunk's buffer from its store; `ended(chunk, error)` follows."""
        self._ended[chunk] = ended
        self._begin(chunk, chunk.buffer, is_hedge=False)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_S_MIN, self._look)

    def _begin(self, chunk: Chunk, buffer: int, *, is_hedge: bool) -> None:
        endpoint = self._use(chunk.entry.origin)
        watch = Watch(partial(self._tell, endpoint), self._now)
        request = _FetchRequest(chunk, buffer, endpoint, watch, self._now(), is_hedge)
        self._requests.setdefault(chunk, []).append(request)
        endpoint.in_flight += 1
        endpoint.hedger.request_count += 1

        def done(_: None, error: BaseException | None) -> None:
            self._done(request, error)

        out = self._arena.buffer(buffer)[: chunk.length]
        start = chunk.index * self._arena.chunk_bytes
        self._pool.submit(self._stores.read_watched, watch, chunk.fetched_as, chunk.entry.info, start, out, done=done)

    def _tell(self, endpoint: _Endpoint, attempt: Attempt) -> None:
        """In a thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is left to be told
            self._loop.call_soon_threadsafe(self._attempted, endpoint, attempt)

    def _attempted(self, endpoint: _Endpoint, attempt: Attempt) -> None:
        endpoint.controller.ended(attempt, self._now())
        endpoint.hedger.ended(attempt)

    def _done(self, request: _FetchRequest, error: BaseException | None) -> None:
        if request.lost:
            self._give_back(request.buffer)
            return
        request.endpoint.in_flight -= 1
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
            self._take(chunk, request.buffer)
            self.counters["hedges_won"] += request.is_hedge
        self._ended.pop(chunk)(chunk, error)

    def _take(self, chunk: Chunk, buffer: int) -> None:
        """The chunk is in `buffer` from now on; the one that it had is that of a request which will give it back."""
        if chunk.buffer != buffer:
            self._table.quarantine(chunk)
            self._table.release(buffer)
            self._table.place(chunk, buffer)

    def _give_back(self, buffer: int) -> None:
        self._table.release(buffer)
        self._freed()

    # Second requests

    def _look(self) -> None:
        """Send again what is late; look again when the next may be."""
        self._timer = None
        if not self._requests:
            return
        soonest_s = _LOOK_S_MAX
        for requests in list(self._requests.values()):
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
        buffer = self._spare()
        if buffer is not None:
            endpoint.hedger.hedge_count += 1
            self.counters["hedged_requests"] += 1
            self._begin(chunk, buffer, is_hedge=True)

    # Figures

    def stats(self) -> dict[str, Any]:
        """Of all endpoints together, and of each."""
        refusals = self._forgotten.copy()
        for endpoint in self._endpoints.values():
            refusals.update(_refusals(endpoint))
        return {
            "requests_allowed": self.limit,
            "requests_in_flight": sum(endpoint.in_flight for endpoint in self._endpoints.values()),
            "throttled_requests": refusals["throttled"],
            "timed_out_requests": refusals["timed_out"],
            "endpoints": {name: _endpoint_stats(endpoint) for name, endpoint in self._endpoints.items()},
        }


def _refusals(endpoint: _Endpoint) -> dict[str, int]:
    return {"throttled": endpoint.controller.throttled_count, "timed_out": endpoint.controller.timed_out_count}


def _endpoint_stats(endpoint: _Endpoint) -> dict[str, float]:
    learnt = endpoint.controller.learnt()
    return {
        "requests_allowed": endpoint.controller.limit,
        "requests_in_flight": endpoint.in_flight,
        "requests": endpoint.hedger.request_count,
        "bytes_per_s": learnt.bytes_per_s,
        "connection_bytes_per_s": learnt.connection_bytes_per_s,
        "first_byte_s": -1.0 if learnt.first_byte_s is None else learnt.first_byte_s,
        "throttled_at": learnt.throttled_at,
    }
