"""A store in virtual time: so many requests share a link, each after its first byte, each with a rate of its own.

Queries end at times that follow from the rates alone; a controller sees them as it would in the service. Nothing here
waits: a second of it takes milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from fastload.service.request_limit import Controller
from fastload.store.watch import Attempt, Outcome

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """The store. `throttles_above` requests at once, the rest are refused. `noise`: how far answers vary (0 to 1).

    `slow_share` of the requests take `slow_times` as long to begin.
    """

    first_byte_s: float = 0.02
    connection_bytes_per_s: float = 80e6
    total_bytes_per_s: float = 400e6
    throttles_above: int = 10**9
    noise: float = 0.0
    slow_share: float = 0.0
    slow_times: float = 50.0

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
        self._bytes = 0.0

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self._fill()
            rate = self._rate()
            step_s = min(end_s - self.now_s, *(self._event_in(each, rate) for each in self._requests))
            self._pass(max(step_s, 1e-9), rate)

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
        while len(self._requests) < min(self._limit, self.wanted_max):
            self._begin()
        self.limits.append((self.now_s, self._limit))
        if self.controller is not None and len(self._requests) < self._limit:
            self.controller.slack(self.now_s)

    def _begin(self) -> None:
        profile = self.profile
        varied = self._random.uniform(1 - profile.noise, 1 + profile.noise)
        slow = profile.slow_times if self._random.random() < profile.slow_share else 1.0
        refused = sum(not each.refused for each in self._requests) >= profile.throttles_above
        self._requests.append(_Request(self.now_s, profile.first_byte_s * varied * slow, refused))

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
            attempt = Attempt(request.began_s, self.now_s, 0, request.first_byte_s, Outcome.THROTTLED)
        else:
            self._bytes += request.left
            attempt = Attempt(request.began_s, self.now_s, CHUNK_BYTES, request.first_byte_s)
        if self.controller is not None:
            self.controller.ended(attempt, self.now_s)
