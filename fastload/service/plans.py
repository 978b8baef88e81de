"""The live plans and claims of all consumers, and what follows from there being one: its objects are covered.

A *plan* is what a consumer reads next, in its order. A *claim* (`Keep`) is what it reads again and again, and by which
policy that should be kept; it lasts through plans that name only a part, such as the rest of an epoch or the beginning
of the next. An object is covered while one of either names it. Covered chunks are kept on disk, and in RAM they go
after all others.

Warming: a plan whose aim is that the cache holds its chunks, not that somebody reads them now.

With a disk tier, each chunk that the disk lacks is fetched, written, and then need not stay in RAM; it ends when all
are on disk or the disk takes no more. Without one, chunks are fetched until the arena's free buffers are used up.
Positions are settled one by one, in any order, and the figures of that are the progress that the consumer sees.

Seeing warm plans through: what becomes of their chunks, when they end, and what their consumers hear of it.

What should be in RAM and is not, over all consumers, in order of need: the candidates of one decision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain

from fastload import protocol
from fastload.cache.policy import BLIND, PolicyName
from fastload.errors import to_wire
from fastload.service import scheduler
from fastload.service.buffers import BufferTable
from fastload.service.disk_io import WriteBehind
from fastload.service.eviction import DiskOrder, Pins, transit
from fastload.service.leases import Leases
from fastload.service.scheduler import Candidate, Need, OnDisk
from fastload.service.state import Chunk, ChunkState, ConsumerState, ObjectEntry, Plan, Step, WriteState


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
        self._table.recompute_eviction_classes()

    def end(self, consumer: ConsumerState) -> None:
        """The consumer has neither plan nor claim any more."""
        plan, consumer.plan = consumer.plan, None
        if plan is not None:
            self._forget(plan)
        kept, consumer.kept = consumer.kept, []
        if kept:  # of workers that come and go, most have made no claim
            self._uncover(kept)
            self._table.recompute_eviction_classes()

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


OPEN, HELD, NOT_HELD = range(3)
# Positions looked at in one turn: some milliseconds.
_LOOKED_AT_MAX = 4000
_NEWS_S = 0.1


class WarmPlan(Plan):
    """Changed by the loop's thread only."""

    def __init__(self, entries: Sequence[ObjectEntry], options_key: str, epoch: int, to_disk: bool) -> None:
        super().__init__(list(dict.fromkeys(entries)), options_key, epoch)
        self.to_disk = to_disk
        self._states = bytearray(self.chunk_count)
        self._next = 0  # everything below is settled or in hand
        self._in_hand: set[int] = set()
        self._told_of = 0  # everything below is settled, and whoever keeps history knows it
        self.more_to_look_at = False
        self.full = False  # a chunk found no room: those behind it are not tried
        self.error: BaseException | None = None
        self.total_bytes = sum(entry.info.size for entry in self.entries)
        self.done_chunks = self.done_bytes = self.held_chunks = self.held_bytes = self.fetched_bytes = 0
        self._told = (-1, False)
        self._told_at = 0.0
        if to_disk:
            # In RAM these chunks have done their work once they are written.
            self.advance(self.chunk_count)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to come."""
        return self.done_chunks == self.chunk_count or self.error is not None

    def candidates(self, on_disk: OnDisk) -> Iterator[Candidate]:
        """What should be loaded, in the plan's order."""
        self.more_to_look_at = False
        for looked_at, (position, entry, index) in enumerate(self._todo()):
            if looked_at == _LOOKED_AT_MAX:
                self.more_to_look_at = True
                return
            chunk = entry.chunks.get(index)
            state = ChunkState.ABSENT if chunk is None else chunk.state
            if on_disk(entry, index) if self.to_disk else state is ChunkState.RESIDENT:
                self._settle(position, held=True)
            elif state is ChunkState.ABSENT:
                yield Candidate(entry, index, Need.WARMING, position, False, self, may_displace=False)

    def _todo(self) -> Iterator[Step]:
        at_front = True
        for position, entry, index in self._steps(self._next):
            if self._to_do(position):
                yield position, entry, index
            at_front = at_front and not self._to_do(position)  # whoever was given it may have settled it
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

    def fail(self, error: BaseException) -> None:
        """Something that no chunk will get past."""
        self.error = self.error or error

    def retry(self) -> None:
        """What was in the way may be gone."""
        self.error = None
        self._in_hand.clear()
        self._next = 0

    def end_here(self) -> None:
        """There is no more room: what is still to do is not held."""
        for position in range(self._next, self.chunk_count):
            if self._to_do(position):
                self._settle(position, held=False)
        self._next = self.chunk_count

    def newly_settled(self) -> Iterator[Step]:
        """What was settled since, in the plan's order: no position before those ahead of it."""
        for step in self._steps(self._told_of):
            if self._states[step[0]] == OPEN:
                return
            self._told_of = step[0] + 1
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

    # News

    def news(self, now: float) -> tuple[protocol.Progress | None, float]:
        """What to tell the consumer now, or else in how many seconds to look again (0: when something happens)."""
        figures = (self.done_chunks, self.finished)
        if figures == self._told:
            return None, 0.0
        wait_s = self._told_at + _NEWS_S - now
        if wait_s > 0 and not self.finished:
            return None, wait_s
        self._told, self._told_at = figures, now
        return self._progress(), 0.0

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
        )


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
            if chunk.write is not WriteState.NONE:
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


class Candidates:
    """Used by the loop's thread only."""

    def __init__(
        self,
        ledger: Leases,
        plans: PlanSet,
        warming: Warming,
        buffer_count: int,
        on_disk: OnDisk,
        requests_allowed: Callable[[], int],
    ) -> None:
        self._leases, self._plans, self._warming = ledger, plans, warming
        self._buffer_count, self._on_disk, self._requests_allowed = buffer_count, on_disk, requests_allowed

    @property
    def _transit(self) -> int:
        return transit(self._buffer_count, self._requests_allowed())

    def by_need(self) -> Iterator[Candidate]:
        """See the module's text. Lazy: how many are looked at is the scheduler's business."""
        return chain(
            (self._candidate(chunk, Need.DEMANDED) for chunk in self._leases.demanded),
            (self._candidate(chunk, Need.WANTED) for chunk in self._leases.wanted),
            scheduler.upcoming(self._plans.to_read(), self._transit, self._on_disk),
            *(plan.candidates(self._on_disk) for plan in self._plans.warm() if self._warming.may_fetch_for(plan)),
        )

    def _candidate(self, chunk: Chunk, need: Need) -> Candidate:
        distance = 0
        consumer, _ = next(iter(chunk.wanters))
        if consumer.plan is not None:
            distance = max(0, consumer.plan.position(chunk.entry, chunk.index) - consumer.plan.cursor)
        on_disk = self._on_disk(chunk.entry, chunk.index)
        return Candidate(chunk.entry, chunk.index, need, distance, on_disk, consumer.plan)
