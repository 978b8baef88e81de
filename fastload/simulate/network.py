"""A store whose requests share its bandwidth and the nodes' links, and the service's way to it.

A request waits for its first byte, for a time that is drawn, and then its body comes at a rate that follows from how
many bodies are in flight: at most a connection's own, at most an equal share of the node's link, and at most an
equal share of what the store gives to all. So the bodies of one node all have the same rate at any time, and end in
the order of the bytes that were left: a node has one running count of the bytes that each connection has got, and a
body ends when that has grown by its size. An event costs the logarithm of what is in flight.

A request that is refused is tried again as `store.wrappers.Retrying` would, in the same job, and each attempt is
reported to its watch, from which the controllers learn.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from itertools import count

from fastload.errors import StoreUnavailableError
from fastload.service.fetching.stores import StoreTable
from fastload.simulate.clock import Timer, VirtualLoop
from fastload.simulate.pools import Resume, VirtualPools
from fastload.simulate.scenario import StoreProfile
from fastload.store.types import ObjectInfo
from fastload.store.watch import Outcome, Watch
from fastload.store.wrappers import RetryOptions

# Counts of bytes are floats: what is less than this is nothing.
_BYTE = 0.5

Fetched = Callable[[ObjectInfo, int, int], None]


class _Request:
    """One read of a chunk, over all its attempts."""

    __slots__ = ("attempt_count", "byte_count", "is_over", "is_refused", "resume", "timer", "waited_s", "watch")

    def __init__(self, watch: Watch, byte_count: int, resume: Resume) -> None:
        self.watch, self.byte_count, self.resume = watch, byte_count, resume
        self.attempt_count = 0
        self.is_refused = self.is_over = False
        self.timer: Timer | None = None
        self.waited_s = 0.0  # its thread, for a core


class Connections:
    """Those of one node: what is in flight, and the bodies that share a rate."""

    def __init__(self, link_bytes_per_s: float, seed: str, core_wait_s: float = 0.0) -> None:
        self.link_bytes_per_s, self.core_wait_s = link_bytes_per_s, core_wait_s
        self.waited_s = 0.0  # for a core, the thread whose watch is notified
        self.draw = random.Random(seed)
        self.requests: dict[_Request, None] = {}
        self.bodies: list[tuple[float, int, _Request]] = []  # (the count at which it ends, number, request), a heap
        self.body_count = 0
        self.got = 0.0  # bytes that each connection has got since the beginning
        self.rate = 0.0  # bytes a second of each
        self.request_seconds = 0.0  # the integral of requests in flight
        self._at_s = 0.0

    def move_to(self, now_s: float) -> None:
        """Time has passed."""
        passed_s = now_s - self._at_s
        self.got += self.rate * passed_s
        self.request_seconds += len(self.requests) * passed_s
        self._at_s = now_s

    def first_end(self) -> float | None:
        """The count at which the next body ends; None while there is none."""
        while self.bodies and self.bodies[0][2].is_over:
            heapq.heappop(self.bodies)
        return self.bodies[0][0] if self.bodies else None


class Network:
    """What all simulated nodes share."""

    def __init__(self, profile: StoreProfile, loop: VirtualLoop) -> None:
        self.profile = profile
        self._loop = loop
        self._nodes: list[Connections] = []
        self._numbers = count()
        self._timer: Timer | None = None
        self._retry = RetryOptions()
        self.throttled_count = 0

    def join(self, link_bytes_per_s: float, seed: str, core_wait_s: float = 0.0) -> Connections:
        """One more node."""
        node = Connections(link_bytes_per_s, seed, core_wait_s)
        self._nodes.append(node)
        return node

    def request(self, node: Connections, watch: Watch, byte_count: int, resume: Resume) -> None:
        """Send a request for so many bytes; `resume` is called at its end."""
        node.move_to(self._loop.time())
        request = _Request(watch, byte_count, resume)
        node.requests[request] = None
        request.timer = self._when_awake(node, request, self._attempt)

    def _when_awake(
        self, node: Connections, request: _Request, then: Callable[[Connections, _Request], None]
    ) -> Timer | None:
        """Call it once the request's thread has a core; at once where that is always so."""
        if not node.core_wait_s:
            then(node, request)
            return request.timer
        wait_s = node.draw.uniform(0.0, 2 * node.core_wait_s)
        request.waited_s += wait_s
        return self._loop.call_later(wait_s, then, node, request)

    def _attempt(self, node: Connections, request: _Request) -> None:
        if self._was_cancelled(node, request):
            return
        profile = self.profile
        node.waited_s = request.waited_s
        request.watch.attempt_begins()
        request.is_refused = False
        if profile.throttles_above < math.inf:
            served = sum(not each.is_refused for every in self._nodes for each in every.requests)
            request.is_refused = served > profile.throttles_above
        wait_s = profile.first_byte_s * node.draw.uniform(1 - profile.noise, 1 + profile.noise)
        if node.draw.random() < profile.slow_share:
            wait_s *= profile.slow_times
        answered = self._refused if request.is_refused else self._answered
        request.timer = self._loop.call_later(wait_s, answered, node, request)

    def _refused(self, node: Connections, request: _Request) -> None:
        if self._was_cancelled(node, request):
            return
        self.throttled_count += 1
        node.waited_s = request.waited_s
        request.watch.attempt_ended(0, Outcome.THROTTLED)
        most_s = min(self._retry.delay_s_max, self._retry.delay_s * 2 ** min(request.attempt_count, 30))
        request.attempt_count += 1
        request.timer = self._loop.call_later(node.draw.uniform(0.0, most_s), self._attempt, node, request)

    def _answered(self, node: Connections, request: _Request) -> None:
        if self._was_cancelled(node, request):
            return
        request.timer = None
        self._prune(node)
        self._when_awake(node, request, self._seen)
        node.move_to(self._loop.time())
        heapq.heappush(node.bodies, (node.got + request.byte_count, next(self._numbers), request))
        node.body_count += 1
        self._share()

    def _seen(self, node: Connections, request: _Request) -> None:
        """The first byte."""
        if not request.is_over:
            node.waited_s = request.waited_s
            request.watch.first_byte()

    def _was_cancelled(self, node: Connections, request: _Request) -> bool:
        if request.watch.cancelled:
            self._end(node, request, Outcome.CANCELLED)
        return request.is_over

    # Rates

    def _share(self) -> None:
        """How many bodies there are has changed: their rates do, and when the next one ends."""
        now_s = self._loop.time()
        for node in self._nodes:
            node.move_to(now_s)
        own = [
            min(self.profile.connection_bytes_per_s, node.link_bytes_per_s / max(1, node.body_count))
            for node in self._nodes
        ]
        level = _level(self.profile.total_bytes_per_s, own, [node.body_count for node in self._nodes])
        for node, rate in zip(self._nodes, own, strict=True):
            node.rate = min(rate, level) if node.body_count else 0.0
        self._expect(now_s)

    def _expect(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends = ((node.first_end(), node) for node in self._nodes if node.body_count)
        wait_s = min(((end - node.got) / node.rate for end, node in ends if end is not None), default=None)
        if wait_s is not None:
            self._timer = self._loop.call_at(now_s + max(0.0, wait_s), self._look)

    def _look(self) -> None:
        """Bodies have come to their ends."""
        self._timer = None
        now_s = self._loop.time()
        for node in self._nodes:
            node.move_to(now_s)
            while (end := node.first_end()) is not None and end - node.got < _BYTE:
                _, _, request = heapq.heappop(node.bodies)
                node.body_count -= 1
                request.timer = self._when_awake(node, request, self._came)
        self._share()

    def _came(self, node: Connections, request: _Request) -> None:
        """Its thread has all of it."""
        if not request.is_over:
            self._end(node, request, Outcome.CANCELLED if request.watch.cancelled else Outcome.GOOD)
            self._loop.call_soon(self._prune, node)

    def _prune(self, node: Connections) -> None:
        """End those whose result is not needed, since another was quicker."""
        gone = [request for request in node.requests if request.watch.cancelled]
        for request in gone:
            if request.timer is None:  # its body is on the way
                node.body_count -= 1
            self._end(node, request, Outcome.CANCELLED)
        if gone:
            self._share()

    def _end(self, node: Connections, request: _Request, outcome: Outcome) -> None:
        node.move_to(self._loop.time())
        if request.timer is not None:
            request.timer.cancel()
        request.is_over = True
        node.waited_s = request.waited_s
        del node.requests[request]
        is_good = outcome is Outcome.GOOD
        request.watch.attempt_ended(request.byte_count if is_good else 0, outcome)
        request.resume(None if is_good else StoreUnavailableError("the read was given up"))


def _level(total: float, own: Sequence[float], counts: Sequence[int]) -> float:
    """The rate up to which each body may go, so that all together come to no more than `total`."""
    left, bodies = total, sum(counts)
    for rate, body_count in sorted(zip(own, counts, strict=True)):
        if not bodies or rate * bodies >= left:
            break
        left -= rate * body_count
        bodies -= body_count
    return left / bodies if bodies else math.inf


class VirtualStores(StoreTable):
    """The stores of one node's service: all reads go over its connections."""

    def __init__(
        self, network: Network, node: Connections, jobs: VirtualPools, chunk_bytes: int, fetched: Fetched
    ) -> None:
        """`fetched(info, start, byte_count)` is called after each chunk that has come."""
        super().__init__()
        self._network, self._node, self._jobs, self._chunk_bytes = network, node, jobs, chunk_bytes
        self._fetched = fetched

    def read_watched(self, watch: Watch, key: str, info: ObjectInfo, start: int, out: memoryview) -> None:
        """See `StoreTable.read_watched`."""
        byte_count = min(self._chunk_bytes, info.size - start)
        resume = self._jobs.suspend()

        def ended(error: BaseException | None) -> None:
            if error is None:
                self._fetched(info, start, byte_count)
            resume(error)

        self._network.request(self._node, watch, byte_count, ended)
