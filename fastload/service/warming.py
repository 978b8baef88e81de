"""Seeing warm plans through: what becomes of their chunks, when they end, and what their consumers hear of it."""

from __future__ import annotations

from collections.abc import Collection

from fastload.service.buffers import BufferTable
from fastload.service.consumers import ConsumerState
from fastload.service.model import Chunk, Write
from fastload.service.planset import PlanSet
from fastload.service.scheduler import OnDisk
from fastload.service.warm import WarmPlan
from fastload.service.writing import WriteBehind


class Warming:
    """Used by the loop's thread only."""

    def __init__(
        self,
        consumers: Collection[ConsumerState],
        plans: PlanSet,
        table: BufferTable,
        writer: WriteBehind,
        on_disk: OnDisk,
    ) -> None:
        self._consumers, self._plans, self._table = consumers, plans, table
        self._writer, self._on_disk = writer, on_disk

    def write_resident(self, plan: WarmPlan) -> None:
        """Chunks that a new plan finds in RAM need no fetching, only writing."""
        for chunk in list(plan.resident()):
            if chunk.write is not Write.NONE:
                plan.taken(chunk)
            elif not self._on_disk(chunk.entry, chunk.index) and self._writer.admit(chunk, patient=True):
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
            held = not plan.to_disk or self._on_disk(chunk.entry, chunk.index)
            plan.settle(chunk, held=held)
            plan.full |= not held

    def no_room_for(self, plan: WarmPlan) -> bool:
        """Whether there is no use in fetching anything more for it."""
        return plan.full or (self._writer.full if plan.to_disk else self._table.free_count == 0)

    def may_fetch_for(self, plan: WarmPlan) -> bool:
        """Whether to fetch more for it now."""
        return not self.no_room_for(plan) and self._pause_s(plan) == 0

    def _pause_s(self, plan: WarmPlan) -> float:
        """For how many seconds it waits, because no more may be written."""
        return self._writer.wait_s() if plan.to_disk and not plan.finished else 0.0

    def tend(self, now: float) -> float | None:
        """End plans that have no more room, and tell their consumers how far they are.

        Returns in how many seconds to look again; None: when something happens.
        """
        waits_s = [
            self._tend(consumer, consumer.plan, now)
            for consumer in self._consumers
            if isinstance(consumer.plan, WarmPlan)
        ]
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def _tend(self, consumer: ConsumerState, plan: WarmPlan, now: float) -> float | None:
        if plan.in_hand_count == 0 and not plan.more_to_look_at and not plan.finished and self.no_room_for(plan):
            plan.end_here()
        news, wait_s = plan.news(now)
        if news is not None:
            consumer.send(news)
        pause_s = self._pause_s(plan)
        if pause_s:
            return min(pause_s, wait_s or pause_s)
        if plan.more_to_look_at:
            return 0.0
        return wait_s if news is None and wait_s else None
