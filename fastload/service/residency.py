"""A chunk's life in RAM: absent, loading (from disk or store), resident; then leased and given back any number of
times, perhaps written to disk meanwhile; dropped when its buffer is needed more elsewhere.

What begins here is decided elsewhere (`scheduler`); what comes of it changes the records, and whoever has to hear of it
is told: those who want the chunk, the plans that name it, warming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fastload import protocol
from fastload.errors import StoreError
from fastload.service import buffers
from fastload.service.consumers import ConsumerState
from fastload.service.control import Learnt
from fastload.service.fetches import Fetches
from fastload.service.loads import Loader
from fastload.service.model import Chunk, State, Write
from fastload.service.parts import Parts
from fastload.service.plans import Plan
from fastload.service.pools import Done
from fastload.service.records import Records
from fastload.service.room import Room
from fastload.service.scheduler import Candidate
from fastload.service.stalls import DiskWatch
from fastload.service.warm import WarmPlan
from fastload.service.warming import Warming
from fastload.service.writing import WriteBehind


@dataclass(frozen=True, slots=True)
class Heard:
    """Who else is told: `fetched(chunk)`, that it came from its store; `failed(chunk, error)`, that it cannot be had;
    `changed()`, that there may be something to do.
    """

    fetched: Callable[[Chunk], None]
    failed: Callable[[Chunk, BaseException], None]
    changed: Callable[[], None]


class Residency:
    """Used by the loop's thread only."""

    def __init__(
        self,
        parts: Parts,
        records: Records,
        watch: DiskWatch,
        consumers: dict[ConsumerState, None],
        known: Callable[[str], Learnt | None],
        heard: Heard,
    ) -> None:
        """`known(endpoint)`: what an earlier run learnt of it."""
        self._records, self._table, self._plans = records, records.table, records.plans
        self._ledger, self._objects = records.ledger, records.objects
        self._heard = heard
        self.counters: Counter[str] = Counter(dropped_chunks=0)
        self.fetches = Fetches(
            parts.arena,
            self._table,
            parts.stores,
            parts.pools,
            self._spare_buffer,
            heard.changed,
            parts.now,
            parts.requests_max,
            parts.limits.requests_in_flight,
            known,
            parts.hedger,
        )
        self.loader = Loader(parts.arena, parts.disk, watch, self.fetches, self._loaded, self._read_given_up)
        room = Room(records.disk_order, records.pins, self._plans.to_read)
        self.writer = WriteBehind(
            parts.arena,
            parts.disk,
            records.disk_order,
            room,
            watch,
            self._table.refresh,
            self._written,
            parts.now,
            parts.is_lost,
        )
        self.writer.limit(parts.limits.disk_write_bytes_per_s)
        self.warming = Warming(consumers, self._plans, self._table, self.writer, records.on_disk)

    # In

    def load(self, candidate: Candidate, buffer: int) -> None:
        """Fill a free buffer with the candidate."""
        chunk = candidate.entry.chunk(candidate.index)
        options_key = _options_for(chunk, candidate.plan)
        self._table.place(chunk, buffer, on_disk=candidate.on_disk)
        if candidate.on_disk:
            self._records.disk_order.use(chunk.entry.key(chunk.index))
        self.loader.start(chunk, candidate.on_disk, options_key)
        self._ledger.loading(chunk)
        self._table.refresh(chunk)
        if isinstance(candidate.plan, WarmPlan):
            candidate.plan.taken(chunk)

    def _loaded(self, chunk: Chunk, error: BaseException | None) -> None:
        if error is None:
            chunk.state = State.RESIDENT
            if chunk.source == protocol.SOURCE_REMOTE:
                self._heard.fetched(chunk)
            self._table.touch(chunk)
            self._write_behind(chunk)
            self._ledger.loaded(chunk)
            self._table.refresh(chunk)
        else:
            self._load_failed(chunk, error)
        self._heard.changed()

    def _load_failed(self, chunk: Chunk, error: BaseException) -> None:
        """Those who want the chunk now are told; plans leave it alone until somebody wants it."""
        of_store = isinstance(error, StoreError)
        for plan in self._plans.all():
            if of_store and plan.options_key != chunk.fetched_as:
                plan.dropped(chunk.entry, chunk.index)  # it may have looked past it while it was on its way
                continue
            position = plan.position(chunk.entry, chunk.index)
            if position >= 0:
                plan.failed.add(position)
            if isinstance(plan, WarmPlan) and position >= 0:
                plan.fail(error)
        self._heard.failed(chunk, error)
        self._table.clear(chunk)
        chunk.state = State.ABSENT
        self._ledger.failed(chunk, error)
        self._objects.forget_if_idle(chunk.entry)

    def _read_given_up(self, chunk: Chunk) -> Done:
        """Its buffer is lost until the read returns, and it is loaded anew, if only for those who want it."""
        buffer = self._table.strand(chunk)
        self._gone(chunk)

        def returned(length: int | None, error: BaseException | None) -> None:
            self._table.reclaim(buffer)
            self._heard.changed()

        return returned

    # To disk

    def _write_behind(self, chunk: Chunk) -> None:
        warm = self.warming.came(chunk)
        queued = False
        if chunk.source == protocol.SOURCE_REMOTE and not self._records.on_disk(chunk.entry, chunk.index):
            queued = self.writer.admit(chunk, patient=bool(warm))
        if not queued:
            self.warming.not_written(chunk, warm)

    def _written(self, chunk: Chunk, written: bool) -> None:
        self._table.refresh(chunk)
        if written:
            self._table.written(chunk)
        for plan in self._plans.warm():
            plan.settle(chunk, held=written or not plan.to_disk)
        self._heard.changed()

    # Out

    def drop(self, chunk: Chunk) -> None:
        """Empty its buffer; a write that has not begun is given up."""
        if chunk.write is Write.QUEUED:
            self.writer.give_up(chunk)
            for plan in self._plans.warm():
                plan.put_back(chunk)
        self._table.evicted(chunk)
        assert chunk.state is State.RESIDENT, "only what is here can go"
        assert chunk.write is Write.NONE, "a buffer that is being written cannot go"
        assert not chunk.lessees, "a leased buffer cannot go"
        self._table.clear(chunk)
        self._gone(chunk)
        self.counters["dropped_chunks"] += 1

    def drop_idle(self) -> int:
        """Empty all buffers that may be; how many bytes were in them."""
        buffers_held, _ = self._table.by_usefulness([buffers.IDLE, buffers.QUEUED])
        chunks = [self._records.chunk_in(buffer) for buffer in buffers_held]
        for chunk in chunks:
            self.drop(chunk)
        return sum(chunk.length for chunk in chunks)

    def coming(self, quick: bool) -> int:
        """Buffers that will be idle without any recall: being written, filled for nobody who waits, or asked back.
        `quick`: writes are worth waiting for.
        """
        waiting = [buffers.WRITING, buffers.QUEUED] if quick else [buffers.WRITING]
        written = self._table.count_of(waiting)
        unwanted = sum(not chunk.wanters for chunk in self.loader.in_flight)
        return written + unwanted + len(self._ledger.asked)

    def _gone(self, chunk: Chunk) -> None:
        """It lies in no buffer any more."""
        chunk.state = State.ABSENT
        for plan in self._plans.all():
            plan.dropped(chunk.entry, chunk.index)
        self._ledger.dropped(chunk)
        self._objects.forget_if_idle(chunk.entry)

    def _spare_buffer(self) -> int | None:
        """A buffer for a second request for a chunk that somebody wants: free, or the least useful idle one. Never the
        last, since both requests may hang: whoever waits for another chunk next finds room.
        """
        idle, _ = self._table.by_usefulness([buffers.IDLE], 2)
        if self._table.free_count + len(idle) < 2:
            return None
        if not self._table.free_count:
            self.drop(self._records.chunk_in(idle[0]))
        return self._table.borrow()


def _options_for(chunk: Chunk, plan: Plan | None) -> str:
    """The credentials of whoever wants the chunk most."""
    wanters = sorted(chunk.wanters.items(), key=lambda item: not item[1].urgent)
    if wanters:
        return wanters[0][0][0].options_key
    assert plan is not None, "nobody wants this chunk"
    return plan.options_key
