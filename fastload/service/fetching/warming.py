"""Warm plans, seen through: what becomes of their chunks, when they end, their progress, and their manners beside jobs
(`warming_limit`).

Warming is what warm-ups ask for: the chunks of their plans, and those that they want themselves, to index the shards
that came. What a job wants as well is the job's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain
from typing import TypeGuard

from fastload.protocol import SOURCE_REMOTE
from fastload.service.deciding.plans import WarmPlan
from fastload.service.deciding.scheduler import Candidate
from fastload.service.disk_io import WriteBehind
from fastload.service.fetching.request_limit import Endpoints
from fastload.service.fetching.warming_limit import InFlight, Turn, WarmingLimit
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, ConsumerState, Plan, WriteState

# Chunks of a plan that are passed over in one turn, since their endpoint takes no more just now: enough to find others.
_REFUSED_MAX = 32
# A wait of the core is no shorter, so that none is rounded to nothing.
_WAIT_S_MIN = 0.001


class Warming:
    """See the module's text. Used by the loop's thread only."""

    def __init__(self, resources: Resources, shared: SharedState, writer: WriteBehind, endpoints: Endpoints) -> None:
        self._now, self._changed = resources.now, resources.events.changed
        self._shared, self._plans, self._table, self._writer = shared, shared.plans, shared.table, writer
        self._endpoints = endpoints
        self._limit = WarmingLimit(self._now())
        self._in_flight: dict[Chunk, float] = {}  # begun for warm-ups, and when; some of it may be a job's by now
        self._counts: Counter[str] = Counter()  # of those that are not a job's, by endpoint
        self._turn: Turn | None = None  # None: there is nothing to hold back

    # Limits and manners

    def limit(self, bytes_per_s: int, requests: int) -> None:
        """All warm-ups together fetch so many bytes a second from now on, with so many requests; 0: no limit."""
        self._limit.change(bytes_per_s, requests, self._now())
        self._changed()

    def begin_turn(self, loading: Collection[Chunk], beginning: Collection[str]) -> list[Chunk]:
        """Look at what jobs do, for the decision that follows. `loading`: what is being loaded; `beginning`: the
        endpoints that jobs wait for to begin. Returns what is to be given up of it.
        """
        self._turn = None
        warm_ups = [plan for plan in self._plans.warm() if plan.terms is not None]
        self._in_flight = {chunk: at for chunk, at in self._in_flight.items() if chunk in loading}
        self._counts.clear()
        if not warm_ups:
            return []
        for plan in warm_ups:
            plan.more_to_look_at = False
        remote = [chunk for chunk in loading if chunk.source == SOURCE_REMOTE]
        of_jobs = {chunk for chunk in remote if chunk not in self._in_flight or _is_wanted_by_job(chunk)}
        to_come = self._to_come()
        now = self._now()
        waited_for = {chunk.entry.origin for chunk in chain(of_jobs, to_come) if _is_waited_for_by_job(chunk)}
        self._limit.observe(bool(of_jobs or to_come), {*waited_for, *beginning}, now)
        own = {chunk: at for chunk, at in self._in_flight.items() if chunk not in of_jobs}
        of_no_plan = [chunk for chunk in own if not self._is_planned_by_job(chunk)]
        sizes = [(own[chunk], chunk.length) for chunk in of_no_plan]
        excess = self._limit.excess(sizes, self._endpoints.links, now)
        given_up = of_no_plan[len(of_no_plan) - excess :]
        for chunk in given_up:
            del own[chunk], self._in_flight[chunk]
        in_flight: dict[str, InFlight] = {}
        for chunk in own:
            before = in_flight.get(chunk.entry.origin, InFlight())
            in_flight[chunk.entry.origin] = InFlight(before.count + 1, before.byte_count + chunk.length)
            self._counts[chunk.entry.origin] += 1
        self._turn = self._limit.turn(in_flight, self._endpoints.links, now)
        return given_up

    def _to_come(self) -> list[Chunk]:
        """What jobs want of stores, and is not being loaded yet."""
        return [
            chunk
            for chunk in chain(self._shared.leases.demanded, self._shared.leases.wanted)
            if _is_wanted_by_job(chunk) and not self._shared.on_disk(chunk.entry, chunk.index)
        ]

    def a_job_waits(self, loading: Collection[Chunk]) -> bool:
        """Whether a thread of a job waits for a chunk from a store."""
        remote = (chunk for chunk in loading if chunk.source == SOURCE_REMOTE)
        return any(_is_waited_for_by_job(chunk) for chunk in chain(remote, self._to_come()))

    def in_flight_at(self, endpoint: str) -> int:
        """How many requests of warm-ups are in flight there."""
        return self._counts[endpoint]

    def _is_planned_by_job(self, chunk: Chunk) -> bool:
        """Whether a job will read it, so that it is no loss that it comes first."""
        positions = ((plan, plan.position(chunk.entry, chunk.index)) for plan in self._plans.to_read())
        return any(position >= plan.cursor for plan, position in positions)

    def admits_want(self, chunk: Chunk) -> bool:
        """Whether to load a chunk that consumers want: one that a job wants in any case."""
        if self._turn is None or _is_wanted_by_job(chunk) or self._shared.on_disk(chunk.entry, chunk.index):
            return True
        budget = next(
            consumer.plan.budget for consumer, _ in chunk.wanters if isinstance(consumer.plan, WarmPlan)
        )  # of the first, as its plan is what the load will be of
        return self._turn.admits(chunk.entry.origin, chunk.length, budget)

    def candidates(self) -> Iterator[Candidate]:
        """What to load for warm plans, the most urgent plan first."""
        for plan in self._plans.warm():
            if self.may_fetch_for(plan):
                yield from self._candidates_of(plan)

    def _candidates_of(self, plan: WarmPlan) -> Iterator[Candidate]:
        candidates = plan.candidates(self._shared.on_disk)
        if plan.terms is None or self._turn is None:
            yield from candidates
            return
        refused = 0
        for candidate in candidates:
            entry = candidate.entry
            if self._turn.admits(entry.origin, entry.length(candidate.index), plan.budget):
                yield candidate
                continue
            refused += 1
            if refused > _REFUSED_MAX or not self._turn.admits_any(plan.budget):
                return

    def began(self, candidate: Candidate, chunk: Chunk) -> None:
        """The candidate is being loaded."""
        plan = candidate.plan
        if candidate.on_disk or not _is_warm_up(plan) or _is_wanted_by_job(chunk):
            return
        self._in_flight[chunk] = self._now()
        self._limit.began(chunk.entry.origin, chunk.length, plan.budget, self._endpoints.links, self._now())

    # Chunks and plans

    def write_resident(self, plan: WarmPlan) -> None:
        """Chunks that a new plan finds in RAM need no fetching, only writing."""
        for chunk in list(plan.resident()):
            if chunk.write is not WriteState.NONE:
                plan.taken(chunk)
            elif not self._shared.on_disk(chunk.entry, chunk.index) and self._writer.admit(chunk, patient=True):
                plan.taken(chunk)
                self._table.refresh(chunk)

    def came(self, chunk: Chunk) -> list[WarmPlan]:
        """A chunk has been loaded; returns the plans that it is of."""
        plans = [plan for plan in self._plans.warm() if plan.position(chunk.entry, chunk.index) >= 0]
        for plan in plans:
            plan.came(chunk)
        return plans

    def not_written(self, chunk: Chunk, plans: list[WarmPlan]) -> None:
        """It need not be written for these plans, or cannot be."""
        for plan in plans:
            held = not plan.to_disk or self._shared.on_disk(chunk.entry, chunk.index)
            plan.settle(chunk, held=held)
            plan.full |= not held

    def no_room_for(self, plan: WarmPlan) -> bool:
        """Whether there is no use in fetching anything more for it."""
        if plan.full or not plan.to_disk:
            return plan.full or self._table.free_count == 0
        entry = plan.next_object
        if entry is not None and self._shared.disk_order.is_pinned(entry.id):
            return self._writer.full_of_pinned
        return self._writer.full

    def may_fetch_for(self, plan: WarmPlan) -> bool:
        """Whether to fetch more for it now."""
        return not self.no_room_for(plan) and self._pause_s(plan) == 0

    def _pause_s(self, plan: WarmPlan) -> float:
        """For how many seconds it waits, because no more may be written."""
        return self._writer.wait_s() if plan.to_disk and not plan.finished else 0.0

    def tend(self, now: float) -> float | None:
        """End plans that have no more room, and report progress to their consumers.

        Returns in how many seconds to look again; None: when something happens.
        """
        waits_s = [
            self._tend(consumer, consumer.plan, now)
            for consumer in self._shared.consumers
            if isinstance(consumer.plan, WarmPlan)
        ]
        if self._turn is not None and self._turn.wait_s < math.inf:
            waits_s.append(self._turn.wait_s)
        wait_s = min((wait_s for wait_s in waits_s if wait_s is not None), default=None)
        return max(_WAIT_S_MIN, wait_s) if wait_s else wait_s

    def _tend(self, consumer: ConsumerState, plan: WarmPlan, now: float) -> float | None:
        if plan.in_hand_count == 0 and not plan.finished and self.no_room_for(plan):
            plan.end_here(self._shared.on_disk)
        progress, wait_s = plan.report(now)
        if progress is not None:
            consumer.send(progress)
        if plan.more_to_look_at and self.may_fetch_for(plan):
            return 0.0
        return min((each_s for each_s in (self._pause_s(plan), wait_s) if each_s > 0), default=None)


def _is_warm_up(plan: Plan | None) -> TypeGuard[WarmPlan]:
    """Whether it is a warm-up's, and not a job's that has its own data kept."""
    return isinstance(plan, WarmPlan) and plan.terms is not None


def _is_wanted_by_job(chunk: Chunk) -> bool:
    return any(not _is_warm_up(consumer.plan) for consumer, _ in chunk.wanters)


def _is_waited_for_by_job(chunk: Chunk) -> bool:
    return any(want.urgent and not _is_warm_up(consumer.plan) for (consumer, _), want in chunk.wanters.items())
