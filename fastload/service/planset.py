"""The live plans of all consumers, and what follows from there being one: its objects are covered.

An object is covered while a live plan names it. Covered chunks are kept on disk, and in RAM they go after all others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fastload.service import protocol
from fastload.service.buffers import BufferTable
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.plans import Plan
from fastload.service.warm import WarmPlan


class PlanSet:
    """Changed by the loop's thread only."""

    def __init__(self, consumers: Collection[ConsumerState], table: BufferTable, disk_order: DiskOrder) -> None:
        self._consumers, self._table, self._disk_order = consumers, table, disk_order

    def all(self) -> Iterator[Plan]:
        """Every live plan."""
        return (consumer.plan for consumer in self._consumers if consumer.plan is not None)

    def to_read(self) -> list[Plan]:
        """Those whose consumers will read the chunks."""
        return [plan for plan in self.all() if not isinstance(plan, WarmPlan)]

    def warm(self) -> list[WarmPlan]:
        """Those that only fill the cache, and have not done so yet."""
        return [plan for plan in self.all() if isinstance(plan, WarmPlan) and not plan.finished]

    def set(self, consumer: ConsumerState, message: protocol.SetPlan, *, to_disk: bool) -> Plan | None:
        """Give the consumer another plan, or none; `to_disk`: a warm one fills the disk."""
        before, consumer.plan = consumer.plan, None
        if message.objects:
            consumer.plan = self._begin(consumer, message, to_disk)
        if before is not None:  # last, so that what both name is covered throughout
            self._forget(before)
        return consumer.plan

    def end(self, consumer: ConsumerState) -> None:
        """The consumer has no plan any more."""
        plan, consumer.plan = consumer.plan, None
        if plan is not None:
            self._forget(plan)

    def _begin(self, consumer: ConsumerState, message: protocol.SetPlan, to_disk: bool) -> Plan:
        entries = [consumer.entry(number) for number in message.objects]
        if message.warm:
            plan: Plan = WarmPlan(entries, consumer.options_key, message.epoch, to_disk)
        else:
            plan = Plan(entries, consumer.options_key, message.epoch, message.position)
        for entry in plan.objects():
            entry.plan_count += 1
            self._disk_order.cover(entry.id)
        self._table.add_plan(plan)
        return plan

    def _forget(self, plan: Plan) -> None:
        for entry in plan.objects():
            entry.plan_count -= 1
            if entry.plan_count == 0:
                self._disk_order.uncover(entry.id)
        self._table.remove_plan(plan)
