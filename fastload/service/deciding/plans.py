"""The live plans and keep lists of all consumers, and what follows from there being one: its objects are covered.

A *plan* is what a consumer reads next, in its order. A *keep list* (`Keep`) is what it reads again and again, and by
which policy that should be kept; it lasts through plans that name only a part, such as the rest of an epoch or the
beginning of the next. An object is covered while one of either names it. Covered chunks are kept on disk, and in RAM
they are evicted after all others.

The aim of a *warm plan* is that the cache holds its chunks, not that they are read now. With a disk tier, each chunk
that the disk lacks is fetched, written, and then need not stay in RAM; the plan ends when all are on disk or the disk
takes no more. Without one, chunks are fetched until the arena's free buffers are used up. Positions are settled one by
one, in any order, and the counts of that are the progress that the consumer sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from fastload import protocol
from fastload.cache.policy import BLIND, PolicyName
from fastload.errors import AccessDeniedError, to_wire
from fastload.redaction import redact
from fastload.service.deciding.buffers import BufferTable
from fastload.service.deciding.eviction import DiskOrder, TierArcs
from fastload.service.deciding.scheduler import Candidate, Need, OnDisk
from fastload.service.fetching.warming_limit import warming_budget
from fastload.service.state import Chunk, ChunkState, ConsumerState, ObjectEntry, Plan, Step


class PlanSet:
    """Changed by the loop's thread only."""

    def __init__(
        self,
        consumers: Collection[ConsumerState],
        table: BufferTable,
        disk_order: DiskOrder,
        arcs: TierArcs,
        now: Callable[[], float],
    ) -> None:
        self._consumers, self._table, self._disk_order, self._arcs = consumers, table, disk_order, arcs
        self._now = now

    def all(self) -> Iterator[Plan]:
        """Every live plan."""
        return (consumer.plan for consumer in self._consumers if consumer.plan is not None)

    def to_read(self) -> list[Plan]:
        """Those whose consumers will read the chunks."""
        return [plan for plan in self.all() if not isinstance(plan, WarmPlan)]

    def warm(self) -> list[WarmPlan]:
        """Those that only fill the cache, and have not done so yet, the most urgent first."""
        plans = [plan for plan in self.all() if isinstance(plan, WarmPlan) and not plan.finished]
        return sorted(plans, key=WarmPlan.urgency)  # which leaves those that are alike in the order of their ages

    def set(self, consumer: ConsumerState, message: protocol.SetPlan, *, to_disk: bool) -> Plan | None:
        """Give the consumer another plan, or none; `to_disk`: a warm one fills the disk."""
        before, consumer.plan = consumer.plan, None
        if message.objects:
            consumer.plan = self._begin(consumer, message, to_disk)
        if before is not None:  # last, so that what both name is covered throughout
            self._forget(before)
        return consumer.plan

    def replay(self, consumer: ConsumerState, plan: Plan | None) -> None:
        """Give a consumer without plans of its own another prediction, or none."""
        before, consumer.plan = consumer.plan, plan
        if plan is not None:
            self._table.add_plan(plan)
        if before is not None:
            self._forget(before)

    def keep(self, consumer: ConsumerState, message: protocol.Keep) -> None:
        """Give the consumer another keep list, or none."""
        before = consumer.kept
        consumer.kept = list(dict.fromkeys(consumer.entry(number) for number in message.objects))
        for entry in consumer.kept:
            self._cover(entry, message.policy)
        self._uncover(before)
        self._table.recompute_eviction_classes()

    def end(self, consumer: ConsumerState) -> None:
        """End the consumer's plan and keep list."""
        plan, consumer.plan = consumer.plan, None
        if plan is not None:
            self._forget(plan)
        kept, consumer.kept = consumer.kept, []
        if kept:  # of workers that come and go, most have none
            self._uncover(kept)
            self._table.recompute_eviction_classes()

    def _begin(self, consumer: ConsumerState, message: protocol.SetPlan, to_disk: bool) -> Plan:
        entries = [consumer.entry(number) for number in message.objects]
        if message.warm:
            plan: Plan = WarmPlan(entries, consumer.options_key, message.epoch, to_disk, message.terms, self._now())
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
            self._arcs.cover(entry)

    def _uncover(self, entries: Iterable[ObjectEntry]) -> None:
        for entry in entries:
            entry.plan_count -= 1
            if entry.plan_count == 0:
                entry.policy = "pin"
                self._disk_order.uncover(entry.id)
                self._arcs.uncover(entry)


OPEN, HELD, NOT_HELD = range(3)
# Positions looked at in one tick: some milliseconds.
_LOOKED_AT_MAX = 4000
_REPORT_EVERY_S = 0.1
# A warm-up that stands back for long is alive all the same.
_REPORT_AGAIN_S = 5.0
_FAILURES_MAX = 1000  # that are told one by one
# Where access is denied to so many objects before a single chunk has come, it is denied to all of them.
_DENIED_MAX = 1000


class WarmPlan(Plan):
    """Changed by the loop's thread only."""

    def __init__(
        self,
        entries: Sequence[ObjectEntry],
        options_key: str,
        epoch: int,
        to_disk: bool,
        terms: protocol.WarmTerms | None,
        now: float,
    ) -> None:
        super().__init__(list(dict.fromkeys(entries)), options_key, epoch)
        self.to_disk = to_disk
        self.terms = terms
        self.budget = warming_budget(terms.bytes_per_s if terms else 0, now)
        self.failures: dict[ObjectEntry, BaseException] = {}  # of one that goes on
        self._denied_count = 0
        self._states = bytearray(self.chunk_count)
        self._next = 0  # everything below is settled or in hand
        self._in_hand: set[int] = set()
        self._recorded_to = 0  # everything below is settled, and recorded
        self.more_to_look_at = False
        self.full = False  # a chunk found no room: those behind it are not tried
        self.error: BaseException | None = None
        self.total_bytes = sum(entry.info.size for entry in self.entries)
        self.done_chunks = self.done_bytes = self.held_chunks = self.held_bytes = self.fetched_bytes = 0
        self._reported = (-1, False)
        self._reported_at = now - _REPORT_EVERY_S
        if to_disk:
            # In RAM these chunks have done their work once they are written.
            self.advance(self.chunk_count)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to come."""
        return self.done_chunks == self.chunk_count or self.error is not None

    @property
    def next_object(self) -> ObjectEntry | None:
        """The object of the first position that is not settled or in hand, if there is one."""
        return self.at(self._next)[0] if self._next < self.chunk_count else None

    def urgency(self) -> tuple[bool, float, int]:
        """By which warm plans are ordered, the most urgent first: those of jobs that read the data themselves, then
        warm-ups by deadline and priority.
        """
        if self.terms is None:
            return False, 0.0, 0
        return True, self.terms.deadline or math.inf, -self.terms.priority

    def candidates(self, on_disk: OnDisk) -> Iterator[Candidate]:
        """What should be loaded, in the plan's order."""
        self.more_to_look_at = False
        for looked_at, (position, entry, index) in enumerate(self._todo()):
            if looked_at == _LOOKED_AT_MAX:
                self.more_to_look_at = True
                return
            chunk = entry.chunks.get(index)
            if self._is_held(entry, index, on_disk):
                self._settle(position, held=True)
            elif chunk is None or chunk.state is ChunkState.ABSENT:
                yield Candidate(entry, index, Need.WARMING, position, False, self, may_displace=False)

    def _todo(self) -> Iterator[Step]:
        at_front = True
        for position, entry, index in self._steps(self._next):
            if self._to_do(position):
                yield position, entry, index
            at_front = at_front and not self._to_do(position)  # the caller may have settled it
            if at_front:
                self._next = position + 1

    def _to_do(self, position: int) -> bool:
        return self._states[position] == OPEN and position not in self._in_hand

    def resident(self) -> Iterator[Chunk]:
        """Chunks of the plan that are in RAM already and not on their way to the disk."""
        for position, entry, index in self._steps(0):
            chunk = entry.chunks.get(index)
            if chunk is not None and chunk.state is ChunkState.RESIDENT and position not in self._in_hand:
                yield chunk

    def taken(self, chunk: Chunk) -> None:
        """The chunk is on its way."""
        position = self._mine(chunk)
        if position is not None:
            self._in_hand.add(position)

    def came(self, chunk: Chunk) -> None:
        """The chunk was fetched; its fate is settled later."""
        if self._mine(chunk) is not None and chunk.source == protocol.SOURCE_REMOTE:
            self.fetched_bytes += chunk.length

    def settle(self, chunk: Chunk, *, held: bool) -> None:
        """The cache holds the chunk now, or will not."""
        position = self._mine(chunk)
        if position is not None:
            self._settle(position, held=held)

    def put_back(self, chunk: Chunk) -> None:
        """Its write was given up for something more urgent: to be done again."""
        position = self._mine(chunk)
        if position is not None:
            self._in_hand.discard(position)
            self._next = min(self._next, position)

    def fail(self, chunk: Chunk, error: BaseException) -> None:
        """The chunk cannot be had. That ends the plan, or, where it goes on, what it wants of the object."""
        self._denied_count += isinstance(error, AccessDeniedError)
        is_denied_all = self._denied_count >= _DENIED_MAX and not self.fetched_bytes
        if self.terms is None or not self.terms.goes_on or is_denied_all:
            self.error = self.error or error
            return
        self.failures.setdefault(chunk.entry, error)
        start = self._starts_of[chunk.entry][0]
        for index in range(chunk.entry.chunk_count):
            if self._to_do(start + index) or (index == chunk.index and self._mine(chunk) is not None):
                self._settle(start + index, held=False)

    def retry(self) -> None:
        """What was in the way may be gone: access, of objects that were denied."""
        self.error, self._denied_count = None, 0
        denied = [entry for entry, error in self.failures.items() if isinstance(error, AccessDeniedError)]
        for entry in denied:
            del self.failures[entry]
            for index in range(entry.chunk_count):
                self._reopen(self._starts_of[entry][0] + index)
        self._in_hand.clear()
        self._next = 0
        self._reported = (-1, False)  # also where it comes to the same again

    def end_here(self, on_disk: OnDisk) -> None:
        """No room is left: what is still to do is held already, or not at all."""
        for position, entry, index in self._steps(self._next):
            if self._to_do(position):
                self._settle(position, held=self._is_held(entry, index, on_disk))
        self._next = self.chunk_count

    def _is_held(self, entry: ObjectEntry, index: int, on_disk: OnDisk) -> bool:
        if self.to_disk:
            return on_disk(entry, index)
        chunk = entry.chunks.get(index)
        return chunk is not None and chunk.state is ChunkState.RESIDENT

    def newly_settled(self) -> Iterator[Step]:
        """What was settled since, in the plan's order: no position before those ahead of it."""
        for step in self._steps(self._recorded_to):
            if self._states[step[0]] == OPEN:
                return
            self._recorded_to = step[0] + 1
            yield step

    @property
    def in_hand_count(self) -> int:
        """Chunks on their way."""
        return len(self._in_hand)

    def _mine(self, chunk: Chunk) -> int | None:
        """The chunk's position while it is to do, else None."""
        starts = self._starts_of.get(chunk.entry)
        if starts is None or self._states[starts[0] + chunk.index] != OPEN:
            return None
        return starts[0] + chunk.index

    def _settle(self, position: int, *, held: bool) -> None:
        self._in_hand.discard(position)
        self._states[position] = HELD if held else NOT_HELD
        entry, index = self.at(position)
        self.done_chunks += 1
        self.done_bytes += entry.length(index)
        if held:
            self.held_chunks += 1
            self.held_bytes += entry.length(index)

    def _reopen(self, position: int) -> None:
        if self._states[position] == NOT_HELD:
            self._states[position] = OPEN
            entry, index = self.at(position)
            self.done_chunks -= 1
            self.done_bytes -= entry.length(index)

    # Progress

    def report(self, now: float) -> tuple[protocol.Progress | None, float]:
        """The progress to report now, if any, and in how many seconds to look again (0: when something happens)."""
        figures = (self.done_chunks, self.finished)
        if figures != self._reported:
            wait_s = self._reported_at + _REPORT_EVERY_S - now
        elif self.terms is None or self.finished:
            return None, 0.0
        else:
            wait_s = self._reported_at + _REPORT_AGAIN_S - now
        if wait_s > 0 and not self.finished:
            return None, wait_s
        self._reported, self._reported_at = figures, now
        return self._progress(), 0.0 if self.terms is None or self.finished else _REPORT_AGAIN_S

    def _progress(self) -> protocol.Progress:
        name, message = ("", "") if self.error is None else to_wire(self.error)
        return protocol.Progress(
            done_chunks=self.done_chunks,
            done_bytes=self.done_bytes,
            total_chunks=self.chunk_count,
            total_bytes=self.total_bytes,
            held_chunks=self.held_chunks,
            held_bytes=self.held_bytes,
            fetched_bytes=self.fetched_bytes,
            finished=self.finished,
            error_name=name,
            error_message=message,
            failed_objects=len(self.failures),
            failures=[
                (redact(entry.info.url), *to_wire(failure))
                for entry, failure in islice(self.failures.items(), _FAILURES_MAX if self.finished else 0)
            ],
        )
