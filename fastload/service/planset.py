"""The live plans and claims of all consumers, and what follows from there being one: its objects are covered.

A *plan* is what a consumer reads next, in its order. A *claim* (`Keep`) is what it reads again and again, and by which
policy that should be kept; it lasts through plans that name only a part, such as the rest of an epoch or the beginning
of the next. An object is covered while one of either names it. Covered chunks are kept on disk, and in RAM they go
after all others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from fastload import protocol
from fastload.cache.policy import BLIND, PolicyName
from fastload.service.buffers import BufferTable
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.model import ObjectEntry
from fastload.service.pins import Pins
from fastload.service.plans import Plan
from fastload.service.warm import WarmPlan


class PlanSet:
    """Changed by the loop's thread only."""

    def __init__(
        self, consumers: Collection[ConsumerState], table: BufferTable, disk_order: DiskOrder, pins: Pins
    ) -> None:
        self._consumers, self._table, self._disk_order, self._pins = consumers, table, disk_order, pins

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

    def replay(self, consumer: ConsumerState, plan: Plan | None) -> None:
        """Give a consumer that tells no plans another prediction, or none."""
        before, consumer.plan = consumer.plan, plan
        if plan is not None:
            self._table.add_plan(plan)
        if before is not None:
            self._forget(before)

    def keep(self, consumer: ConsumerState, message: protocol.Keep) -> None:
        """Give the consumer another claim, or none."""
        before = consumer.kept
        consumer.kept = list(dict.fromkeys(consumer.entry(number) for number in message.objects))
        for entry in consumer.kept:
            self._cover(entry, message.policy)
        self._uncover(before)
        self._table.recover()

    def end(self, consumer: ConsumerState) -> None:
        """The consumer has neither plan nor claim any more."""
        plan, consumer.plan = consumer.plan, None
        if plan is not None:
            self._forget(plan)
        kept, consumer.kept = consumer.kept, []
        if kept:  # of workers that come and go, most have made no claim
            self._uncover(kept)
            self._table.recover()

    def _begin(self, consumer: ConsumerState, message: protocol.SetPlan, to_disk: bool) -> Plan:
        entries = [consumer.entry(number) for number in message.objects]
        if message.warm:
            plan: Plan = WarmPlan(entries, consumer.options_key, message.epoch, to_disk)
        else:
            plan = Plan(entries, consumer.options_key, message.epoch, message.position)
        for entry in plan.objects():
            entry.epoch = message.epoch
            self._cover(entry, entry.policy)
        plan.is_blind = entries[0].policy in BLIND
        self._table.add_plan(plan)
        return plan

    def _forget(self, plan: Plan) -> None:
        if plan.covers:
            self._uncover(plan.objects())
        self._table.remove_plan(plan)

    def _cover(self, entry: ObjectEntry, policy: PolicyName) -> None:
        entry.plan_count += 1
        entry.policy = policy
        self._disk_order.cover(entry.id, policy)
        if entry.plan_count == 1:
            self._pins.cover(entry)

    def _uncover(self, entries: Iterable[ObjectEntry]) -> None:
        for entry in entries:
            entry.plan_count -= 1
            if entry.plan_count == 0:
                entry.policy = "pin"
                self._disk_order.uncover(entry.id)
                self._pins.uncover(entry)
