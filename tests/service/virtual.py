"""A store in virtual time: so many requests share a link, each after its first byte, each with a rate of its own.

Queries end at times that follow from the rates alone; a controller sees them as it would in the service. Nothing here
waits: a second of it takes milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from fastload.service.fetching.request_limit import Controller
from fastload.store.watch import Attempt, Outcome

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """The store. `throttles_above` requests at once, the rest are refused. `noise`: how far answers vary (0 to 1).

    `slow_share` of the requests take `slow_times` as long to begin. Whenever a thread wakes up, the one of a request or
    the loop, it waits for a core for `core_wait_s`, up to twice that or not at all. The kernel receives meanwhile.
    """

    first_byte_s: float = 0.02
    connection_bytes_per_s: float = 80e6
    total_bytes_per_s: float = 400e6
    throttles_above: int = 10**9
    noise: float = 0.0
    slow_share: float = 0.0
    slow_times: float = 50.0
    core_wait_s: float = 0.0

    @property
    def needed(self) -> float:
        """How many requests at once fill the link."""
        return self.total_bytes_per_s * (self.first_byte_s / CHUNK_BYTES + 1 / self.connection_bytes_per_s)


@dataclass(slots=True, eq=False)
class _Request:
    began_s: float
    first_byte_s: float
    refused: bool
    left: float = CHUNK_BYTES
    slot_s: float = 0.0  # when the loop sent it
    first_waited_s: float = 0.0
    ended_waited_s: float = 0.0
    ended_s: float = float("inf")  # when its thread has seen its end
    heard_s: float = float("inf")  # when the loop has


@dataclass
class Store:
    """Virtual time and all that is in flight. `run` keeps as many in flight as the controller, or `fixed`, says."""

    profile: Profile
    controller: Controller | None = None
    fixed: int = 0
    seed: int = 0
    wanted_max: int = 10**9  # requests that there is anything to ask with
    now_s: float = 0.0
    received: list[tuple[float, float]] = field(default_factory=list)  # up to when, how many bytes in all
    limits: list[tuple[float, int]] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._requests: list[_Request] = []
        self._seen: list[_Request] = []  # ended, and still in their slots
        self._bytes = 0.0

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self._fill()
            rate = self._rate()
            events = (self._event_in(each, rate) for each in self._requests)
            step_s = min([end_s - self.now_s, *events, *(each.heard_s - self.now_s for each in self._seen)])
            self._pass(max(step_s, 1e-9), rate)
            self._hear()

    def mb_per_s(self, from_s: float, to_s: float) -> float:
        """Goodput between two times."""
        return (self._received_at(to_s) - self._received_at(from_s)) / (to_s - from_s) / 1e6

    def most_in_flight(self, from_s: float, to_s: float) -> int:
        """The highest limit between two times."""
        return max(limit for at, limit in self.limits if from_s <= at <= to_s)

    def _received_at(self, at: float) -> float:
        return float(np.interp(at, *zip((0.0, 0.0), *self.received, strict=True)))

    @property
    def _limit(self) -> int:
        return self.controller.limit if self.controller is not None else self.fixed

    def _fill(self) -> None:
        while (in_flight := len(self._requests) + len(self._seen)) < min(self._limit, self.wanted_max):
            self._begin()
        self.limits.append((self.now_s, self._limit))
        if self.controller is not None and in_flight < self._limit:
            self.controller.slack(self.now_s)

    def _begin(self) -> None:
        profile = self.profile
        varied = self._random.uniform(1 - profile.noise, 1 + profile.noise)
        slow = profile.slow_times if self._random.random() < profile.slow_share else 1.0
        refused = sum(not each.refused for each in self._requests) >= profile.throttles_above
        began_s = self.now_s + self._core_wait_s()
        request = _Request(began_s, profile.first_byte_s * varied * slow, refused, slot_s=self.now_s)
        request.first_waited_s = self._core_wait_s()
        self._requests.append(request)

    def _core_wait_s(self) -> float:
        most_s = 2 * self.profile.core_wait_s
        return self._random.uniform(0.0, most_s) if most_s else 0.0

    def _rate(self) -> float:
        """Bytes a second of each body that is on the wire."""
        bodies = sum(self._has_begun(each) and not each.refused for each in self._requests)
        return min(self.profile.connection_bytes_per_s, self.profile.total_bytes_per_s / max(1, bodies))

    def _has_begun(self, request: _Request) -> bool:
        return self.now_s >= request.began_s + request.first_byte_s - 1e-9

    def _event_in(self, request: _Request, rate: float) -> float:
        if not self._has_begun(request):
            return request.began_s + request.first_byte_s - self.now_s
        return 0.0 if request.refused else request.left / rate

    def _pass(self, step_s: float, rate: float) -> None:
        moving = [each for each in self._requests if self._has_begun(each)]
        self.now_s += step_s
        for request in moving:
            if request.refused or request.left <= rate * step_s * (1 + 1e-9):
                self._end(request)
            else:
                request.left -= rate * step_s
                self._bytes += rate * step_s
        self.received.append((self.now_s, self._bytes))

    def _end(self, request: _Request) -> None:
        self._requests.remove(request)
        if request.refused:
            self.refused_s.append(self.now_s)
        else:
            self._bytes += request.left
        request.ended_waited_s = self._core_wait_s()
        first_seen_s = request.began_s + request.first_byte_s + request.first_waited_s
        request.ended_s = max(first_seen_s, self.now_s + request.ended_waited_s)
        request.heard_s = request.ended_s + self._core_wait_s()
        self._seen.append(request)
        self._hear()

    def _hear(self) -> None:
        """The loop learns of ends, and has their slots free."""
        for request in [each for each in self._seen if each.heard_s <= self.now_s + 1e-9]:
            self._seen.remove(request)
            if self.controller is not None:
                self.controller.ended(self._attempt(request), self.now_s)

    @staticmethod
    def _attempt(request: _Request) -> Attempt:
        return Attempt(
            request.began_s,
            request.ended_s,
            0 if request.refused else CHUNK_BYTES,
            request.first_byte_s + request.first_waited_s,
            Outcome.THROTTLED if request.refused else Outcome.GOOD,
            queued_s=request.began_s - request.slot_s,
            waited_s=request.first_waited_s + request.ended_waited_s,
            first_waited_s=request.first_waited_s,
        )
