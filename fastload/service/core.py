"""The owner of all cache state of a node: takes what consumers say, decides, and has it carried out.

Everything here runs in one thread, the loop's. What blocks runs in pools and comes back as a call into this thread,
so there is no lock and no half-changed state. Each event (a message, a finished read or write) changes the records
and asks for a *turn*; a turn, run once for any number of events, lets the scheduler look at what is wanted and at the
buffers, carries out what it decides, and sends the mail that came up.

A chunk's life in RAM: absent, loading (from disk or store), resident; then leased and given back any number of times,
perhaps written to disk meanwhile; dropped when its buffer is needed more elsewhere.

The core knows no sockets: a consumer is a `send` function, so tests drive it directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from fastload.cache import Arena, CacheDirectory, DiskTier, object_id
from fastload.errors import AccessDeniedError
from fastload.service import buffers, protocol, scheduler
from fastload.service.buffers import BufferTable
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.indexes import Indexes
from fastload.service.ledger import Ledger
from fastload.service.loads import FETCH_THREADS, Loader
from fastload.service.model import Chunk, ObjectEntry, Objects, State, Write
from fastload.service.plans import Plan
from fastload.service.planset import PlanSet
from fastload.service.requests import Requests
from fastload.service.scheduler import Candidate, Drop, Load, Need, Recall, Slots
from fastload.service.stores import Opener, StoreTable
from fastload.service.warm import WarmPlan
from fastload.service.writing import WriteBehind

Send = Callable[[protocol.Message], None]

_TROUBLES_MAX = 16


class Core:
    """See the module's text. All methods are for the loop's thread."""

    def __init__(
        self, directory: CacheDirectory, loop: asyncio.AbstractEventLoop, opener: Opener | None = None
    ) -> None:
        """Open the arena and the disk tier of `directory`, whose lock the caller holds; CacheError where that fails."""
        limits = directory.limits
        self._loop = loop
        self._closed = False
        self._turn_due = False
        self._looking_again = False
        self.troubles: list[str] = []
        self.service_id = os.urandom(16)
        self.chunk_bytes = limits.chunk_bytes
        self.arena = Arena(limits.ram_bytes, limits.chunk_bytes)
        self.disk = DiskTier(
            directory.path, limits.disk_bytes, limits.chunk_bytes, on_trouble=self._trouble_from_thread
        )
        self._stop = threading.Event()
        self._stores = StoreTable(opener)
        self._objects = Objects(limits.chunk_bytes)
        self._table = BufferTable(self.arena.buffer_count)
        self._ledger = Ledger(self._table)
        self._disk_order = DiskOrder(self.disk.keys())
        self._loader = Loader(self.arena, self.disk, self._stores, loop, self._loaded)
        self._writer = WriteBehind(self.arena, self.disk, self._disk_order, loop, self._table.refresh, self._written)
        self._requests = Requests(self._stores, Indexes(self.disk, self._disk_order, loop), self._stats, loop)
        self.consumers: set[ConsumerState] = set()
        self._plans = PlanSet(self.consumers, self._table, self._disk_order)
        self._counters: Counter[str] = Counter(dropped_chunks=0)
        # How far prefetching may displace what will be used later (see plans): two rounds of requests, or a quarter of
        # a large arena, but never most of a small one.
        count = self.arena.buffer_count
        self._transit = min(max(2 * FETCH_THREADS, count // 4), max(1, count // 2))
        self._populating = threading.Thread(target=self._populate, name="fastload-populate", daemon=True)
        self._populating.start()

    def _populate(self) -> None:
        """In a thread: touch the arena ahead of its use, without taking time from anybody."""
        with contextlib.suppress(OSError):  # where threads have no niceness of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self.arena.populate(self._stop)

    # Consumers

    def connect(self, hello: protocol.Hello, send: Send) -> ConsumerState:
        """A consumer has come."""
        consumer = ConsumerState(hello, self._stores.add(hello.store), send)
        consumer.load_order = self._loader.order
        self.consumers.add(consumer)
        return consumer

    def disconnect(self, consumer: ConsumerState) -> None:
        """It has gone, and with it all that it held and wanted."""
        self.consumers.discard(consumer)
        self._detach(consumer)
        self._stores.remove(consumer.options_key)
        self._wake()

    def receive(self, consumer: ConsumerState, message: protocol.FromConsumer) -> None:
        """Take a message; ServiceError for one that makes no sense, after which the consumer should be cut off."""
        match message:
            case protocol.Want():
                self._ledger.want(consumer, message)
            case protocol.Release():
                self._ledger.release(consumer, message.chunks)
            case protocol.Pinned():
                self._ledger.pinned(consumer, message.chunks)
            case protocol.Advance():
                self._advance(consumer, message.position)
            case protocol.SetPlan():
                self._set_plan(consumer, message)
            case protocol.Attach():
                self._attach(consumer, message)
            case protocol.Credentials():
                self._change_credentials(consumer, message)
            case protocol.Report():
                consumer.report = message.values
            case _:
                self._requests.take(consumer, message)
        self._wake()

    def _attach(self, consumer: ConsumerState, message: protocol.Attach) -> None:
        if message.first:
            self._detach(consumer)
        endpoint = self._stores.endpoint(consumer.options_key)
        infos = message.rows.objects()
        consumer.append([self._objects.use(info, object_id(info, self.chunk_bytes, endpoint)) for info in infos])

    def _detach(self, consumer: ConsumerState) -> None:
        """End its leases, wants and plan, and forget its objects."""
        self._ledger.drop_consumer(consumer)
        self._plans.end(consumer)
        self._objects.unuse(consumer.clear_objects())

    def _change_credentials(self, consumer: ConsumerState, message: protocol.Credentials) -> None:
        before, consumer.options_key = consumer.options_key, self._stores.add(message.store)
        self._stores.remove(before)
        plan = consumer.plan
        if plan is not None:
            plan.options_key = consumer.options_key
            plan.failed.clear()
            plan.frontier = plan.cursor
            if isinstance(plan, WarmPlan):
                plan.retry()

    # Plans

    def _set_plan(self, consumer: ConsumerState, message: protocol.SetPlan) -> None:
        consumer.load_order = self._loader.order
        plan = self._plans.set(consumer, message, to_disk=self.disk.writable)
        if isinstance(plan, WarmPlan) and plan.to_disk:
            self._write_resident(plan)

    def _write_resident(self, plan: WarmPlan) -> None:
        """Chunks that a warm plan finds in RAM need no fetching, only writing."""
        for chunk in list(plan.resident()):
            if chunk.write is not Write.NONE:
                plan.taken(chunk)
            elif not self._on_disk(chunk.entry, chunk.index) and self._writer.admit(chunk, patient=True):
                plan.taken(chunk)
                self._table.refresh(chunk)

    def _advance(self, consumer: ConsumerState, position: int) -> None:
        plan = consumer.plan
        if plan is not None and not isinstance(plan, WarmPlan):
            plan.advance(position)
            if plan.repeats:
                self._table.replan(plan)

    # Turns

    def _wake(self) -> None:
        if not self._turn_due and not self._closed:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._closed:
            return
        slots = Slots(self._loader.reads.idle, self._loader.fetches.idle)
        quick = self._disk_is_quick()
        actions = scheduler.decide(
            self._candidates(), self._table, slots, coming=self._coming(quick), disk_is_quick=quick
        )
        for action in actions:
            self._carry_out(action)
        self._ledger.grant_deferred()
        self._tend_warm_plans()
        for consumer in self.consumers:
            consumer.flush()

    def _candidates(self) -> Iterator[Candidate]:
        """What should be in RAM and is not, in order of need."""
        return chain(
            (self._wish(chunk, Need.DEMANDED) for chunk in self._ledger.demanded),
            (self._wish(chunk, Need.WANTED) for chunk in self._ledger.wanted),
            scheduler.upcoming(self._plans.to_read(), self._transit, self._on_disk),
            *(plan.candidates(self._on_disk) for plan in self._plans.warm() if not self._no_room_for(plan)),
        )

    def _wish(self, chunk: Chunk, need: Need) -> Candidate:
        distance = 0
        consumer, _ = next(iter(chunk.wanters))
        if consumer.plan is not None:
            distance = max(0, consumer.plan.position(chunk.entry, chunk.index) - consumer.plan.cursor)
        on_disk = self._on_disk(chunk.entry, chunk.index)
        return Candidate(chunk.entry, chunk.index, need, distance, on_disk, consumer.plan)

    def _on_disk(self, entry: ObjectEntry, index: int) -> bool:
        return self.disk.readable and self.disk.contains(entry.key(index))

    def _disk_is_quick(self) -> bool:
        """Whether writes are worth waiting for; if somebody does, we look again when this one turns out to be slow."""
        quick_for_s = self._writer.quick_for_s()
        if quick_for_s and self._ledger.demanded and not self._looking_again:
            self._looking_again = True
            self._loop.call_later(quick_for_s, self._look_again)
        return quick_for_s > 0

    def _look_again(self) -> None:
        self._looking_again = False
        self._wake()

    def _coming(self, quick: bool) -> int:
        """Buffers that will be idle without any recall: being written, filled for nobody who waits, or asked back."""
        waiting = [buffers.WRITING, buffers.QUEUED] if quick else [buffers.WRITING]
        written = int(np.count_nonzero(np.isin(self._table.status, waiting)))
        unwanted = sum(not chunk.wanters for chunk in self._loader.in_flight)
        return written + unwanted + len(self._ledger.asked)

    def _carry_out(self, action: scheduler.Action) -> None:
        match action:
            case Load():
                self._load(action.candidate, action.buffer)
            case Drop():
                self._drop(self._chunk_in(action.buffer))
            case Recall():
                self._ledger.recall(self._chunk_in(action.buffer))

    def _chunk_in(self, buffer: int) -> Chunk:
        chunk = self._table.chunks[buffer]
        assert chunk is not None, f"buffer {buffer} is empty"
        return chunk

    def _load(self, candidate: Candidate, buffer: int) -> None:
        chunk = candidate.entry.chunk(candidate.index)
        options_key = self._options_for(chunk, candidate.plan)
        self._table.place(chunk, buffer)
        self._loader.start(chunk, candidate.on_disk, options_key)
        self._ledger.loading(chunk)
        self._table.refresh(chunk)
        if isinstance(candidate.plan, WarmPlan):
            candidate.plan.taken(chunk)

    @staticmethod
    def _options_for(chunk: Chunk, plan: Plan | None) -> str:
        """The credentials of whoever wants the chunk most."""
        wanters = sorted(chunk.wanters.items(), key=lambda item: not item[1].urgent)
        if wanters:
            return wanters[0][0][0].options_key
        assert plan is not None, "nobody wants this chunk"
        return plan.options_key

    def _drop(self, chunk: Chunk) -> None:
        if chunk.write is Write.QUEUED:
            self._writer.give_up(chunk)
            for plan in self._plans.warm():
                plan.put_back(chunk)
        self._empty(chunk)
        self._counters["dropped_chunks"] += 1

    def _empty(self, chunk: Chunk) -> None:
        """Its buffer holds it no more."""
        assert chunk.state is State.RESIDENT, "only what is here can go"
        assert chunk.write is Write.NONE, "a buffer that is being written cannot go"
        assert not chunk.lessees, "a leased buffer cannot go"
        self._table.clear(chunk)
        chunk.state = State.ABSENT
        for plan in self._plans.all():
            plan.dropped(chunk.entry, chunk.index)
        self._ledger.dropped(chunk)
        self._objects.forget_if_idle(chunk.entry)

    # What pools report

    def _loaded(self, chunk: Chunk, error: BaseException | None) -> None:
        if error is None:
            chunk.state = State.RESIDENT
            self._table.touch(chunk)
            self._write_behind(chunk)
            self._ledger.loaded(chunk)
            self._table.refresh(chunk)
        else:
            self._load_failed(chunk, error)
        self._wake()

    def _load_failed(self, chunk: Chunk, error: BaseException) -> None:
        """Those who want the chunk now are told; plans leave it alone until somebody wants it."""
        denied = isinstance(error, AccessDeniedError)
        for plan in self._plans.all():
            if denied and plan.options_key != chunk.fetched_as:
                continue
            position = plan.position(chunk.entry, chunk.index)
            if position >= 0:
                plan.failed.add(position)
            if isinstance(plan, WarmPlan) and position >= 0:
                plan.fail(error)
        self._table.clear(chunk)
        chunk.state = State.ABSENT
        self._ledger.failed(chunk, error)
        self._objects.forget_if_idle(chunk.entry)

    def _write_behind(self, chunk: Chunk) -> None:
        warm = [plan for plan in self._plans.warm() if plan.position(chunk.entry, chunk.index) >= 0]
        for plan in warm:
            plan.came(chunk)
        queued = False
        if chunk.source == protocol.SOURCE_REMOTE and not self._on_disk(chunk.entry, chunk.index):
            queued = self._writer.admit(chunk, patient=bool(warm))
        if not queued:
            for plan in warm:
                held = not plan.to_disk or self._on_disk(chunk.entry, chunk.index)
                plan.settle(chunk, held=held)
                plan.full |= not held

    def _written(self, chunk: Chunk, written: bool) -> None:
        self._table.refresh(chunk)
        for plan in self._plans.warm():
            plan.settle(chunk, held=written or not plan.to_disk)
        self._wake()

    # Warming

    def _tend_warm_plans(self) -> None:
        for consumer in self.consumers:
            plan = consumer.plan
            if isinstance(plan, WarmPlan):
                self._tend(consumer, plan)

    def _tend(self, consumer: ConsumerState, plan: WarmPlan) -> None:
        if plan.more_to_look_at:
            self._wake()
        elif plan.in_hand_count == 0 and not plan.finished and self._no_room_for(plan):
            plan.end_here()
        news, wait_s = plan.news()
        if news is not None:
            consumer.send(news)
        elif wait_s:
            self._loop.call_later(wait_s, self._wake)

    def _no_room_for(self, plan: WarmPlan) -> bool:
        """Whether there is no use in fetching anything more for it."""
        return plan.full or (self._writer.full if plan.to_disk else self._table.free_count == 0)

    # Figures

    def _stats(self, consumer: ConsumerState) -> dict[str, Any]:
        """All figures; docs/protocol.md says what they mean."""
        status = np.bincount(self._table.status, minlength=7)
        disk = self.disk.counters
        node = {
            **self._counters,
            **self._loader.counters,
            **self._writer.counters,
            "pid": os.getpid(),
            "recalls": self._ledger.recall_count,
            "buffers": self._table.count,
            "buffers_free": int(status[buffers.FREE]),
            "buffers_leased": int(status[buffers.LEASED] + status[buffers.STUCK]),
            "disk_used_bytes": self.disk.used_bytes,
            "disk_quota_bytes": self.disk.quota_bytes,
            "disk_damaged": disk["damaged"],
            "disk_errors": disk["errors"],
            "troubles": list(self.troubles),
        }
        return {
            "consumer": consumer.stats(),
            "consumers": [each.stats() for each in self.consumers],
            "node": node,
            "store": self._stores.counters.values(),
        }

    # Trouble and the end

    def _trouble_from_thread(self, message: str) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(self.trouble, message)

    def trouble(self, message: str) -> None:
        """Tell all consumers, those to come as well."""
        if message in self.troubles or len(self.troubles) >= _TROUBLES_MAX or self._closed:
            return
        self.troubles.append(message)
        for consumer in self.consumers:
            consumer.send(protocol.Trouble(message))

    def close(self, deadline_s: float) -> bool:
        """Let go of everything; waits so long for reads and writes under way. Whether all of them have ended."""
        self._closed = True
        self._stop.set()
        self._stores.close()
        ended = [each.close(deadline_s) for each in (self._loader, self._writer, self._requests)]
        self._populating.join()
        self.arena.close()
        return all(ended)
