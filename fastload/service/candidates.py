"""What to load next (`Candidates`): chunks that are wanted, that plans will need, and that warm plans ask for; and the
progress of warm plans (`Warming`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from fastload.service import scheduler
from fastload.service.disk_io import WriteBehind
from fastload.service.eviction import prefetch_distance
from fastload.service.plans import WarmPlan
from fastload.service.request_limit import Endpoints
from fastload.service.scheduler import Candidate, Need
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, ConsumerState, WriteState


class Warming:
    """Sees warm plans through: what becomes of their chunks, when they end, and their progress."""

    def __init__(self, shared: SharedState, writer: WriteBehind) -> None:
        self._shared, self._plans, self._table, self._writer = shared, shared.plans, shared.table, writer

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
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def _tend(self, consumer: ConsumerState, plan: WarmPlan, now: float) -> float | None:
        if plan.in_hand_count == 0 and not plan.more_to_look_at and not plan.finished and self.no_room_for(plan):
            plan.end_here()
        progress, wait_s = plan.report(now)
        if progress is not None:
            consumer.send(progress)
        pause_s = self._pause_s(plan)
        if pause_s:
            return min(pause_s, wait_s or pause_s)
        if plan.more_to_look_at:
            return 0.0
        return wait_s if progress is None and wait_s else None


class Candidates:
    """What should be in RAM and is not, over all consumers, in order of need: for one decision of the scheduler."""

    def __init__(self, shared: SharedState, warming: Warming, endpoints: Endpoints) -> None:
        self._shared, self._warming, self._endpoints = shared, warming, endpoints

    def by_need(self) -> Iterator[Candidate]:
        """Lazy: how many are looked at is for the scheduler to say."""
        leases, plans, on_disk = self._shared.leases, self._shared.plans, self._shared.on_disk
        ahead = prefetch_distance(self._shared.table.count, self._endpoints.limit)
        return chain(
            (self._candidate(chunk, Need.DEMANDED) for chunk in leases.demanded),
            (self._candidate(chunk, Need.WANTED) for chunk in leases.wanted),
            scheduler.upcoming(plans.to_read(), ahead, on_disk),
            *(plan.candidates(on_disk) for plan in plans.warm() if self._warming.may_fetch_for(plan)),
        )

    def _candidate(self, chunk: Chunk, need: Need) -> Candidate:
        distance = 0
        consumer, _ = next(iter(chunk.wanters))
        if consumer.plan is not None:
            distance = max(0, consumer.plan.position(chunk.entry, chunk.index) - consumer.plan.cursor)
        on_disk = self._shared.on_disk(chunk.entry, chunk.index)
        return Candidate(chunk.entry, chunk.index, need, distance, on_disk, consumer.plan)
