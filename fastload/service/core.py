"""The owner of all cache state of a node: takes their messages, decides, and has it carried out.

Everything here runs in one thread, the loop's. What blocks runs in pools and comes back as a call into this thread,
so there is no lock and no half-changed state. Each event (a message, a finished read or write) changes the records
and asks for a *turn*; a turn, run once for any number of events, lets the scheduler look at what is wanted and at the
buffers, carries out what it decides, and sends the mail that came up.

What becomes of a chunk, from its loading to its end, is carried out by `residency`.

The core knows no sockets: a consumer is a `send` function, so tests drive it directly.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from fastload import protocol
from fastload.errors import CacheError
from fastload.rendezvous import ServiceLocation
from fastload.service import admin, scheduler
from fastload.service.admin import Clearing, Queries
from fastload.service.candidates import Candidates, Warming
from fastload.service.disk_io import DISK_DEADLINE_S, DiskEvictor, DiskWatch, Quota, WriteBehind
from fastload.service.fetches import Fetches
from fastload.service.indexes import IndexCache
from fastload.service.openings import Openings, Versions
from fastload.service.plans import WarmPlan
from fastload.service.ports import Ports
from fastload.service.recording import WRITE_AFTER_S, Recording
from fastload.service.records import Records
from fastload.service.replay import Replay, ReplayPlan
from fastload.service.request_limit import Endpoints
from fastload.service.residency import Residency
from fastload.service.scheduler import Capacity, Drop, Load, RecallChunk
from fastload.service.state import ConsumerState, Plan
from fastload.service.stores import Opener
from fastload.service.threads import Pool

log = logging.getLogger("fastload.service")

# The arena's memory is given back so long after the last consumer went: the next job, or the next epoch's workers, may
# be about to come for what it holds.
RELEASE_AFTER_S = 10.0
_RELEASE_AGAIN_S = 1.0

Send = Callable[[protocol.Message], None]


class Core:
    """See the module's text. All methods are for the loop's thread."""

    def __init__(
        self,
        directory: ServiceLocation,
        loop: asyncio.AbstractEventLoop,
        opener: Opener | None = None,
        disk_deadline_s: float = DISK_DEADLINE_S,
    ) -> None:
        """Open the arena and the disk tier of `directory`, whose lock the caller holds; CacheError where that fails.

        `disk_deadline_s`: after so long without an answer the disk is bypassed (see `disk_io`).
        """
        self._begin(Ports.of_directory(directory, loop, opener), disk_deadline_s)

    @classmethod
    def of_ports(cls, ports: Ports, disk_deadline_s: float = DISK_DEADLINE_S) -> Core:
        """A core that is built on other ports than a directory's."""
        core = cls.__new__(cls)
        core._begin(ports, disk_deadline_s)
        return core

    def _begin(self, ports: Ports, disk_deadline_s: float) -> None:
        self._ports, self._loop = ports, ports.pools.loop
        self._closed = False
        self._turn_due = self._flush_due = False
        self._looking_again = False
        self._release_timer: asyncio.TimerHandle | None = None
        self._memory_pool = ports.pools.make("memory", 1)
        self._memory_pool.finishes = True
        self.service_id = os.urandom(16)
        self.chunk_bytes = ports.limits.chunk_bytes
        self.arena, self.disk = ports.arena, ports.disk
        self._watch = DiskWatch(ports, disk_deadline_s)
        self._make_records(ports)
        self._make_services(ports)
        ports.warnings.added.connect(self._broadcast)
        ports.events.disk_stalled.connect(self._wake)
        ports.events.changed.connect(self._wake)

    def _make_records(self, ports: Ports) -> None:
        """What is where, who wants it, and what becomes of it: each part knows those below it."""
        records = self._records = Records.of_ports(ports)
        self.consumers, self._objects, self._table = records.consumers, records.objects, records.table
        self._leases, self._plans = records.leases, records.plans
        fixed = ports.limits.requests_in_flight
        requests_max = fixed or max(1, min(ports.requests_max, ports.arena.buffer_count))
        self._endpoints = Endpoints(requests_max, fixed, ports.hedger)
        self._evictor = DiskEvictor(records)
        self._writer = WriteBehind(ports, records, self._watch, self._evictor)
        self._fetches = Fetches(ports, records, self._endpoints)
        self._warming = Warming(records, self._writer)
        self._candidates = Candidates(records, self._warming, self._endpoints)
        self._residency = Residency(ports, records, self._watch, self._fetches, self._writer, self._warming)

    def _make_services(self, ports: Ports) -> None:
        """What consumers ask for besides chunks, and what is kept of what they read."""
        versions = Versions(ports.now)
        self._history = Recording(ports, self._endpoints)
        self._openings = Openings(ports, self._records, versions)
        self._replay = Replay(ports, self._records, versions, self._history)
        self._indexes = IndexCache(ports, self._watch, self._evictor)
        self._queries = Queries(ports, self._indexes)
        self._quota = Quota(ports, self._evictor)
        self._clearing = Clearing(ports, self._residency, self._history, self._watch, self._evictor)

    # Consumers

    def connect(self, hello: protocol.Hello, send: Send) -> ConsumerState:
        """A consumer has come."""
        consumer = ConsumerState(hello, self._ports.stores.add(hello.store), send)
        consumer.load_order = self._residency.load_count
        self.consumers[consumer] = None
        if self._release_timer is not None:
            self._release_timer.cancel()
        self._history.connect(consumer, hello)
        if "disk_bytes" in hello.limits:
            self._quota.change(hello.limits["disk_bytes"])
        if "disk_write_bytes_per_s" in hello.limits:
            self._writer.limit(hello.limits["disk_write_bytes_per_s"])
        return consumer

    def disconnect(self, consumer: ConsumerState) -> None:
        """It has gone, and with it all that it held and wanted."""
        self.consumers.pop(consumer, None)
        self._detach(consumer)
        self._history.disconnect(consumer)
        self._ports.stores.remove(consumer.options_key)
        self._flush_soon()
        if not self.consumers:
            self._release_timer = self._loop.call_later(RELEASE_AFTER_S, self._release)
        self._wake()

    def _release(self) -> None:
        """No consumer has come again: give back the arena's memory, once nothing is on its way into it or out of it."""
        if self._closed or not self.arena.touched_bytes:
            return
        self._residency.drop_idle()
        if not self._table.is_empty:
            self._release_timer = self._loop.call_later(_RELEASE_AGAIN_S, self._release)
            return
        try:
            let_go = self.arena.renew()
        except OSError as error:
            log.warning("the arena's memory cannot be given back: %s", error)
            return
        self._table.renewed()
        self._ports.populator.renewed()
        self._memory_pool.submit(let_go, done=_gone)

    def _flush_soon(self) -> None:
        """Not at once: a job that ends may remove the cache's directory, and a new file would come in between."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_later(WRITE_AFTER_S, self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if not self._closed:
            self._indexes.flush()

    def receive(self, consumer: ConsumerState, message: protocol.FromConsumer) -> None:
        """Take a message; ServiceError for one that makes no sense, after which the consumer should be cut off."""
        match message:
            case protocol.Want():
                self._leases.want(consumer, message)
                self._read(consumer, message.chunks)
            case protocol.Release():
                self._leases.release(consumer, message.chunks)
            case protocol.Pinned():
                self._leases.pinned(consumer, message.chunks)
            case protocol.Advance():
                self._advance(consumer, message.position)
            case protocol.SetPlan():
                self._set_plan(consumer, message)
            case protocol.Uses():
                plan = _own_plan(consumer)
                if plan is not None:
                    plan.foresee(message)
            case protocol.Keep():
                self._plans.keep(consumer, message)
            case protocol.Attach():
                self._attach(consumer, message)
            case protocol.Open():
                self._openings.open(consumer, message)
                self._replay.opening(consumer, message.url)
            case protocol.Clear():
                self._clearing.clear(consumer, message)
            case protocol.Credentials():
                self._change_credentials(consumer, message)
            case protocol.Report():
                consumer.report = message.values
            case protocol.Stats():
                consumer.send(protocol.StatsReply(message.request, self._stats(consumer)))
            case _:
                self._queries.take(consumer, message)
        self._wake()

    def _attach(self, consumer: ConsumerState, message: protocol.Attach) -> None:
        if message.first:
            self._detach(consumer)
        endpoint = self._ports.stores.endpoint(consumer.options_key)
        consumer.append(self._objects.use_rows(message.rows, endpoint))

    def _read(self, consumer: ConsumerState, chunk_nos: list[int]) -> None:
        """Record reads in the history. A warm plan is recorded by its progress instead."""
        if isinstance(consumer.plan, WarmPlan):
            return
        for chunk_no in chunk_nos:
            entry, index = consumer.locate(chunk_no)
            if self._history.read(consumer, entry, index):
                self._replay.read(consumer, entry.history_key, index)

    def _note_warmed(self, consumer: ConsumerState) -> None:
        """A plan to warm the cache counts as read as far as it has come, so that the history has its order."""
        if isinstance(consumer.plan, WarmPlan):
            for _, entry, index in consumer.plan.newly_settled():
                self._history.read(consumer, entry, index)

    def _detach(self, consumer: ConsumerState) -> None:
        """End its leases, wants and plan, and forget its objects."""
        self._note_warmed(consumer)
        self._replay.left(consumer)
        self._leases.drop_consumer(consumer)
        self._plans.end(consumer)
        self._objects.unuse(consumer.clear_objects())

    def _change_credentials(self, consumer: ConsumerState, message: protocol.Credentials) -> None:
        before, consumer.options_key = consumer.options_key, self._ports.stores.add(message.store)
        self._ports.stores.remove(before)
        self._replay.credentials_changed(consumer)
        plan = consumer.plan
        if plan is not None and not isinstance(plan, ReplayPlan):
            plan.options_key = consumer.options_key
            plan.failed.clear()
            plan.frontier = plan.cursor
            if isinstance(plan, WarmPlan):
                plan.retry()

    # Plans

    def _set_plan(self, consumer: ConsumerState, message: protocol.SetPlan) -> None:
        self._note_warmed(consumer)
        self._replay.left(consumer)
        consumer.load_order = self._residency.load_count
        plan = self._plans.set(consumer, message, to_disk=self.disk.writable)
        if isinstance(plan, WarmPlan) and plan.to_disk:
            self._warming.write_resident(plan)

    def _advance(self, consumer: ConsumerState, position: int) -> None:
        plan = _own_plan(consumer)
        if plan is not None and plan.uses is not None:
            plan.uses.advance(position)
        elif plan is not None and not isinstance(plan, WarmPlan):
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
        capacity = Capacity(self._residency.reads.idle, self._fetches.idle, self._endpoints.free_at)
        quick = self._disk_is_quick()
        actions = scheduler.decide(
            self._candidates.by_need(),
            self._table,
            capacity,
            coming=self._residency.coming(quick),
            disk_is_quick=quick,
        )
        for action in actions:
            self._carry_out(action)
        self._endpoints.slack(self._ports.now())
        self._ports.populator.need(self._table.used_count, self._records.pins.buffers_needed)
        if self._watch.stalled and self._table.quarantined_count == self._table.count:
            self._refuse_demands()
        self._leases.grant_deferred()
        wait_s = self._warming.tend(self._ports.now())
        if wait_s is not None:
            self._loop.call_later(wait_s, self._wake)
        for consumer in self.consumers:
            self._note_warmed(consumer)
            consumer.flush()

    def _disk_is_quick(self) -> bool:
        """Whether writes are worth waiting for; if one waits, look again when this write turns out to be slow."""
        quick_for_s = self._writer.quick_for_s()
        if quick_for_s and self._leases.demanded and not self._looking_again:
            self._looking_again = True
            self._loop.call_later(quick_for_s, self._look_again)
        return quick_for_s > 0

    def _look_again(self) -> None:
        self._looking_again = False
        self._wake()

    def _carry_out(self, action: scheduler.Action) -> None:
        match action:
            case Load():
                self._residency.load(action.candidate, action.buffer)
            case Drop():
                self._residency.drop(self._records.chunk_in(action.buffer))
            case RecallChunk():
                self._leases.recall(self._records.chunk_in(action.buffer))

    # A disk that hangs

    def pool(self, name: str) -> Pool:
        """A thread for what may hang, which ends with the core."""
        return self._ports.pools.make(name, 1)

    @property
    def disk_hangs(self) -> bool:
        """Whether reads or writes of the disk were given up and have not returned."""
        return self._watch.stalled

    def _refuse_demands(self) -> None:
        error = CacheError(
            f"the disk cache {self.disk.directory} does not answer, and reads and writes that wait for it hold all "
            f"{self._table.count} chunks of ram_bytes; raise ram_bytes, or set disk_bytes=0"
        )
        for chunk in list(self._leases.demanded):
            self._leases.failed(chunk, error)

    # Figures

    def _stats(self, consumer: ConsumerState) -> dict[str, Any]:
        """All figures; docs/protocol.md says what they mean."""
        counted = {
            **self._records.counters,
            **self._residency.counters,
            **self._fetches.counters,
            **self._writer.counters,
        }
        counted |= self._replay.counters
        counted["recalls"] = self._leases.recall_count
        node = {
            **counted,
            **admin.buffer_stats(self._table),
            **admin.disk_stats(self.disk),
            **self._endpoints.stats(),
            "arena_touched_bytes": self.arena.touched_bytes,
            "pid": os.getpid(),
            "troubles": list(self.warnings),
        }
        return {
            "consumer": consumer.stats(),
            "consumers": [each.stats() for each in self.consumers],
            "node": node,
            "store": self._ports.stores.counters.values(),
        }

    # Trouble and the end

    @property
    def warnings(self) -> list[str]:
        """What present and future consumers are warned of."""
        return self._ports.warnings.messages

    def _broadcast(self, message: str) -> None:
        for consumer in self.consumers:
            consumer.send(protocol.Trouble(message))

    def close(self, deadline_s: float) -> bool:
        """Let go of everything; waits so long for reads and writes under way. Whether all of them have ended."""
        self._closed = True
        self._history.close()
        self._indexes.flush()
        ports = self._ports
        ports.warnings.close()
        ports.stores.close()
        self._watch.close()
        ended = ports.pools.close(deadline_s)
        ports.populator.close()
        ports.arena.close()
        if ended:
            ports.closed()
        return ended


def _gone(_: None, error: BaseException | None) -> None:
    if error is not None:
        log.warning("the arena's memory was not given back: %s", error)


def _own_plan(consumer: ConsumerState) -> Plan | None:
    """The plan that a consumer speaks of; None where that has ended, also where something was predicted since."""
    return None if isinstance(consumer.plan, ReplayPlan) else consumer.plan
