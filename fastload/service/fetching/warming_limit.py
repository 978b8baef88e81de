"""How much warming may ask of stores now: its manners beside jobs that train, and its limits. Pure: time is passed in.

*Manners*. What jobs read comes first, and what warming has in flight is what a job may find itself behind. So:

    alone      No job has used a store for some seconds: as much as the endpoint takes.
    beside     Jobs do: what warming has in flight is at most a quarter of a second of the node's link, or one request
               where that is more.
    elsewhere  A thread of a job waits, or did just now, for a chunk from another endpoint, such as another bucket,
               which may be at the other end of the same link or not: one request at a time, and as long a pause after
               it as it took.
    trickle    The same, for a chunk from this endpoint: one request at a time, and no more than a twentieth of what the
               endpoint gives. So warming never starves wholly, and the job does not notice.

Where a job begins to wait while warming has more than half a second of the link in flight, the newest of that
is given up (`excess`), and fetched again later.

*Limits* are bytes a second, of all warm plans together and of each, and requests in flight.

What is begun is decided in *turns*, one for each decision of the scheduler: a turn admits what might be begun, and only
what was begun then counts (`WarmingLimit.began`).

The link is what came when most came, lately (`LinkMeter`): how much of it a job uses says nothing of what it can carry.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fastload.service.fetching.rate_budget import RateBudget

# For so long after a job's last request warming is beside it, and after its last wait it counts as waiting: between two
# batches no thread waits for a moment.
_USED_S, _WAITED_S = 10.0, 0.5
# Of the link: what warming may have in flight beside jobs, in seconds, and what a trickle may take.
_BESIDE_S, _TRICKLE_SHARE = 0.25, 0.05
# What is in flight when a job begins to wait may take so long yet: to give it up costs the bytes that have come of it.
_EXCESS_S = 0.5
# While nothing was measured, the time between two requests of a trickle.
_TRICKLE_UNMEASURED_S = 1.0
# What a limit leaves unused may be used so much later: more would show as a burst, less would be lost where the loop is
# late.
_SAVED_S = 0.1


def warming_budget(bytes_per_s: int, now: float) -> RateBudget:
    """The limit of a warm plan, or of all of them; 0: none."""
    return RateBudget(bytes_per_s, now, _SAVED_S, begins_full=False)


@dataclass(frozen=True, slots=True)
class InFlight:
    """What warming has in flight at an endpoint."""

    count: int = 0
    byte_count: int = 0


_NOTHING = InFlight()


@dataclass(frozen=True, slots=True)
class Links:
    """What was measured lately, in bytes a second, 0 where nothing was: over all of the node, and from an endpoint."""

    of_node: float = 0.0
    of_endpoint: Callable[[str], float] = lambda endpoint: 0.0


@dataclass(slots=True)
class _Endpoint:
    """What was seen of one."""

    waited_at: float = -math.inf  # by a job
    trickle_at: float = -math.inf  # when the next request of a trickle may begin
    began_at: float | None = None  # the last request of warming there, while any is in flight
    rest_until: float = -math.inf

    def matters(self, now: float) -> bool:
        """Whether it is not as good as never seen."""
        until = max(self.waited_at + _WAITED_S, self.trickle_at, self.rest_until)
        return self.began_at is not None or now < until


class WarmingLimit:
    """See the module's text."""

    def __init__(self, now: float) -> None:
        self._budget = warming_budget(0, now)
        self.requests_max = 0  # in flight; 0: no limit
        self._used_at = -math.inf  # a store, by a job
        self._endpoints: dict[str, _Endpoint] = {}

    @property
    def bytes_per_s(self) -> int:
        """The limit of all warm plans together; 0: none."""
        return self._budget.bytes_per_s

    def change(self, bytes_per_s: int, requests_max: int, now: float) -> None:
        """Other limits from now on; 0: none."""
        self._budget.change(bytes_per_s, now)
        self.requests_max = requests_max

    def observe(self, is_used: bool, waited_for: Collection[str], now: float) -> None:
        """Jobs have requests of theirs in flight now, or not, and threads that wait for chunks from these endpoints."""
        if is_used or waited_for:
            self._used_at = now
        for name in waited_for:
            self._at(name).waited_at = now

    def turn(self, in_flight: Mapping[str, InFlight], links: Links, now: float) -> Turn:
        """What may be begun now, while warming has this in flight."""
        for name, seen in self._endpoints.items():
            if seen.began_at is not None and name not in in_flight:
                seen.rest_until, seen.began_at = 2 * now - seen.began_at, None
        self._endpoints = {name: seen for name, seen in self._endpoints.items() if seen.matters(now)}
        return Turn(self, in_flight, links, now)

    def excess(self, in_flight: Sequence[tuple[float, int]], links: Links, now: float) -> int:
        """How many of the requests of warming to give up, the newest first, since a job waits. They are when each began
        and its bytes, the oldest first.
        """
        if not in_flight or not any(seen.waited_at >= now for seen in self._endpoints.values()):
            return 0
        total = sum(byte_count for _, byte_count in in_flight)
        # Where nothing was measured, no more can have come than all of them, since the oldest began.
        link = links.of_node or total / max(1e-3, now - in_flight[0][0])
        if total <= _EXCESS_S * link:
            return 0
        count = 0
        for _, byte_count in reversed(in_flight[1:]):
            if total <= _BESIDE_S * link:
                break
            total, count = total - byte_count, count + 1
        return count

    def began(self, endpoint: str, byte_count: int, budget: RateBudget, links: Links, now: float) -> None:
        """A request was begun; `budget` is that of its plan."""
        for each in (self._budget, budget):
            each.take(byte_count, now, on_credit=True)
        seen, link = self._at(endpoint), links.of_endpoint(endpoint)
        seen.began_at = now
        seen.trickle_at = now + (byte_count / (_TRICKLE_SHARE * link) if link else _TRICKLE_UNMEASURED_S)

    def _at(self, endpoint: str) -> _Endpoint:
        return self._endpoints.setdefault(endpoint, _Endpoint())

    def _is_used(self, now: float) -> bool:
        return now < self._used_at + _USED_S

    def _waits_s(self, endpoint: str, now: float) -> tuple[float, float]:
        """For how many seconds a job counts as waiting: for this endpoint, and for any."""
        waits_s = {name: seen.waited_at + _WAITED_S - now for name, seen in self._endpoints.items()}
        return waits_s.get(endpoint, -math.inf), max(waits_s.values(), default=-math.inf)


class Turn:
    """See `WarmingLimit.turn`."""

    def __init__(self, limit: WarmingLimit, in_flight: Mapping[str, InFlight], links: Links, now: float) -> None:
        self._limit, self._in_flight, self._links, self._now = limit, in_flight, links, now
        self._total = InFlight(
            sum(each.count for each in in_flight.values()), sum(each.byte_count for each in in_flight.values())
        )
        self._counts: Counter[str] = Counter()  # what was admitted, by endpoint
        self._byte_counts: Counter[str] = Counter()
        self._of_budgets: Counter[RateBudget] = Counter()  # bytes
        self.wait_s = math.inf  # in how many seconds something that was not admitted may be, if nothing else happens

    def admits_any(self, budget: RateBudget) -> bool:
        """Whether the limits leave anything for a plan of this budget, whatever the endpoint."""
        if self._limit.requests_max and self._total.count + self._counts.total() >= self._limit.requests_max:
            return False
        waits_s = [each.wait_s(self._now, self._of_budgets[each]) for each in (self._limit._budget, budget)]
        return self._unless(max(waits_s))

    def admits(self, endpoint: str, byte_count: int, budget: RateBudget) -> bool:
        """Whether a request for so many bytes may be begun too; if so it counts for this turn."""
        if not (self.admits_any(budget) and self._has_room(endpoint, byte_count)):
            return False
        self._counts[endpoint] += 1
        self._byte_counts[endpoint] += byte_count
        self._of_budgets.update({self._limit._budget: byte_count, budget: byte_count})
        return True

    def _has_room(self, endpoint: str, byte_count: int) -> bool:
        limit, now = self._limit, self._now
        if not limit._is_used(now):
            return True
        is_first_here = self._in_flight.get(endpoint, _NOTHING).count + self._counts[endpoint] == 0
        is_first = self._total.count + self._counts.total() == 0
        seen, (waits_here_s, waits_s) = limit._at(endpoint), limit._waits_s(endpoint, now)
        if waits_here_s > 0:
            return self._unless(min(waits_here_s, max(0.0, seen.trickle_at - now) if is_first_here else math.inf))
        if waits_s > 0:
            return self._unless(min(waits_s, max(0.0, seen.rest_until - now) if is_first else math.inf))
        room = _BESIDE_S * self._links.of_node - self._total.byte_count - self._byte_counts.total()
        return is_first or byte_count <= room  # else the end of a request is what opens it

    def _unless(self, wait_s: float) -> bool:
        """Whether there is nothing to wait for."""
        if wait_s > 0:
            self.wait_s = min(self.wait_s, wait_s)
        return wait_s <= 0


# A window of the meter is so long, with so many requests that ended in it: those that began together end together. What
# came in it counts for so long.
_WINDOW_S, _WINDOW_COUNT, _REMEMBERED_S = 0.5, 8, 30.0
# One that ended since nothing more was asked for may be shorter.
_WINDOW_S_MIN = 0.05


class LinkMeter:
    """What a link or an endpoint gives, in bytes a second: the most that came in a window, lately."""

    def __init__(self) -> None:
        self._began = self._ended = -math.inf
        self._byte_count = self._count = 0
        self._rates: deque[tuple[float, float]] = deque()  # when and how much, falling

    def began(self, now: float) -> None:
        """A request was begun where none was in flight: the time before that says nothing."""
        if self._count and self._ended - self._began >= _WINDOW_S_MIN:
            self._close()
        self._began, self._byte_count, self._count = now, 0, 0

    def came(self, byte_count: int, now: float) -> None:
        """A request has brought so many bytes."""
        self._byte_count, self._count, self._ended = self._byte_count + byte_count, self._count + 1, now
        if self._count >= _WINDOW_COUNT and now - self._began >= _WINDOW_S:
            self._close()
            self._began, self._byte_count, self._count = now, 0, 0

    def _close(self) -> None:
        rate = self._byte_count / (self._ended - self._began)
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        while self._rates and self._rates[0][0] < self._ended - _REMEMBERED_S:
            self._rates.popleft()
        self._rates.append((self._ended, rate))

    @property
    def bytes_per_s(self) -> float:
        """What was measured last, however long ago; 0: nothing."""
        return self._rates[0][1] if self._rates else 0.0
