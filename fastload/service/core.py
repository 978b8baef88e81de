"""The owner of all cache state of a node: it receives consumers' messages, decides, and has that carried out.

Everything here runs in one thread, the loop's. What blocks runs in pools and comes back as a call into this thread,
so there is no lock and no half-changed state. Each event (a message, a finished read or write) changes the state and
asks for a *tick*. A tick, run once for any number of events, lets the scheduler look at what is wanted and at the
buffers, carries out what it decides, and sends each consumer its grants and recalls.

What becomes of a chunk, from its loading to its end, is carried out by `residency`.

The core knows no sockets: a consumer is a `send` function, so tests drive it directly.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from fastload import protocol
from fastload.errors import CacheError
from fastload.rendezvous import ServiceLocation
from fastload.service.deciding import scheduler
from fastload.service.deciding.candidates import Candidates
from fastload.service.deciding.plans import WarmPlan
from fastload.service.deciding.scheduler import Capacity, Drop, Load, RecallChunk
from fastload.service.description import describe, judged
from fastload.service.disk_io import DISK_DEADLINE_S, DiskEvictor, DiskWatch, Quota, WriteBehind
from fastload.service.fetching.fetches import Fetches
from fastload.service.fetching.openings import Openings, Versions
from fastload.service.fetching.request_limit import Endpoints
from fastload.service.fetching.stores import StoreFactory, StoreTable
from fastload.service.fetching.warming import Warming
from fastload.service.holding.clearing import Clearing
from fastload.service.holding.holdings import Holdings
from fastload.service.holding.verifying import Verifying
from fastload.service.host.threads import Pool
from fastload.service.indexes import IndexCache
from fastload.service.loading.loads import Loads
from fastload.service.operators import Operators
from fastload.service.queries import Queries
from fastload.service.recording import WRITE_AFTER_S, Recording
from fastload.service.replay import Replay, ReplayPlan
from fastload.service.residency import Residency
from fastload.service.resources import Disk, Resources
from fastload.service.saving.savings import Savings
from fastload.service.shared_state import SharedState
from fastload.service.state import ConsumerState, Plan
from fastload.snapshot import Snapshot

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
        factory: StoreFactory | None = None,
        disk_deadline_s: float = DISK_DEADLINE_S,
    ) -> None:
        """Open the arena and the disk tier of `directory`, whose lock the caller holds; CacheError where that fails.

        `disk_deadline_s`: after so long without an answer the disk is bypassed (see `disk_io`).
        """
        self._begin(Resources.of_directory(directory, loop, factory), disk_deadline_s)

    @classmethod
    def of_resources(cls, resources: Resources, disk_deadline_s: float = DISK_DEADLINE_S) -> Core:
        """A core that is built on other resources than a directory's."""
        core = cls.__new__(cls)
        core._begin(resources, disk_deadline_s)
        return core

    def _begin(self, resources: Resources, disk_deadline_s: float) -> None:
        self._resources, self._loop = resources, resources.pools.loop
        self._closed = False
        self._tick_due = self._flush_due = False
        self._looking_again = False
        self._release_timer: asyncio.TimerHandle | None = None
        self._warming_timer: asyncio.TimerHandle | None = None
        self.rest_after_s = RELEASE_AFTER_S
        self._memory_pool = resources.pools.make("memory", 1)
        self._memory_pool.finishes = True
        self.service_id = os.urandom(16)
        self.chunk_bytes = resources.limits.chunk_bytes
        self.arena, self.disk = resources.arena, resources.disk
        self._watch = DiskWatch(resources, disk_deadline_s)
        self._make_state(resources)
        self._make_services(resources)
        resources.warnings.added.connect(self._broadcast)
        resources.events.disk_stalled.connect(self._wake)
        resources.events.changed.connect(self._wake)

    def _make_state(self, resources: Resources) -> None:
        """What is where, who wants it, and what becomes of it: each part knows those below it."""
        shared = self._shared = SharedState.of_resources(resources)
        self.consumers, self._objects, self._table = shared.consumers, shared.objects, shared.table
        self._leases, self._plans = shared.leases, shared.plans
        fixed = resources.limits.requests_in_flight
        requests_max = fixed or max(1, min(resources.requests_max, resources.arena.buffer_count))
        self._endpoints = Endpoints(requests_max, fixed, resources.hedger)
        self._evictor = DiskEvictor(shared)
        self._writer = WriteBehind(resources, shared, self._watch, self._evictor)
        self._fetches = Fetches(resources, shared, self._endpoints)
        self.warming = Warming(resources, shared, self._writer, self._endpoints)
        self._candidates = Candidates(shared, self.warming, self._endpoints)
        self._residency = Residency(resources, shared, self._watch, self._fetches, self._writer, self.warming)

    def _make_services(self, resources: Resources) -> None:
        """What consumers ask for besides chunks, and what is kept of what they read."""
        versions = Versions(resources.now)
        self._history = Recording(resources, self._endpoints)
        self._openings = Openings(resources, self._shared, versions)
        self._replay = Replay(resources, self._shared, versions, self._history)
        self._indexes = IndexCache(resources, self._watch, self._evictor)
        self._queries = Queries(resources, self._indexes, self.consumers)
        self.holdings = Holdings(resources, self._shared, self._watch)
        self._quota = Quota(resources, self._evictor, self.holdings.took_stock)
        self._clearing = Clearing(
            resources, self._shared, self._residency, self._history, self.holdings, self._watch, self._evictor
        )
        self.verifying = Verifying(resources, self._shared, self.holdings, self._watch, self._evictor)
        self.operators = Operators(resources, self._make_snapshot)
        self.operators.on(protocol.Clear, lambda operator, message: self._clearing.clear(operator.send, message))
        self.operators.on(protocol.Evict, lambda operator, message: self._clearing.evict(operator.send, message))
        self.operators.on(protocol.Unpin, lambda operator, message: self.holdings.unpin_called(operator.send, message))
        self.operators.on(protocol.Verify, self.verifying.verify)
        self.savings = Savings(resources)
        self.operators.on(protocol.Borrow, self.savings.lend)
        self.loads = Loads(resources, lambda: self.savings.stats()["checkpoint_ram_bytes"])

    # Consumers

    def connect(self, hello: protocol.Hello, send: Send) -> ConsumerState:
        """Register a consumer that has said hello."""
        # Before it is registered: of what this may be warned of, it hears in its welcome.
        if "disk_bytes" in hello.limits:
            self.change_disk_quota(hello.limits["disk_bytes"])
        if "disk_write_bytes_per_s" in hello.limits:
            self._writer.limit(hello.limits["disk_write_bytes_per_s"])
        consumer = ConsumerState(hello, self._resources.stores.add(hello.store), send)
        consumer.load_order = self._residency.load_count
        self.consumers[consumer] = None
        if self._release_timer is not None:
            self._release_timer.cancel()
        self._history.connect(consumer, hello)
        self.savings.options_came(consumer)
        return consumer

    def disconnect(self, consumer: ConsumerState) -> None:
        """Forget a consumer that has gone, with all that it held and wanted."""
        self.consumers.pop(consumer, None)
        self._detach(consumer)
        self._history.disconnect(consumer)
        self.savings.left(consumer)
        self.loads.left(consumer)
        self._resources.stores.remove(consumer.options_key)
        self._flush_soon()
        if not self.consumers:
            self._release_timer = self._loop.call_later(self.rest_after_s, self._release)
        self._wake()

    def _release(self) -> None:
        """No consumer has connected since: give back the arena's memory, once nothing is under way in it."""
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
        """Handle a message. ServiceError for one that makes no sense: its consumer should be disconnected."""
        consumer.active_at = self._resources.now()
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
                self._clearing.clear(consumer.send, message)
            case protocol.Pin():
                self.holdings.pin(consumer, message)
            case protocol.Unpin():
                self.holdings.unpin_called(consumer.send, message)
            case protocol.Label():
                self.holdings.label(consumer, message)
            case protocol.Held():
                self.holdings.held(consumer, message)
            case protocol.Credentials():
                self._change_credentials(consumer, message)
            case protocol.TakeBack():
                self.savings.take_back(consumer, message)
            case protocol.Report():
                consumer.report = judged(message.values, self._endpoints, self.chunk_bytes)
            case protocol.Stats():
                consumer.send(protocol.StatsReply(message.request, self._stats(consumer)))
            case _:
                self._queries.receive(consumer, message)
        self._wake()

    def _attach(self, consumer: ConsumerState, message: protocol.Attach) -> None:
        if message.first:
            self._detach(consumer)
        endpoint = self._resources.stores.endpoint(consumer.options_key)
        consumer.append(self._objects.use_rows(message.rows, endpoint))

    def _read(self, consumer: ConsumerState, chunk_nos: list[int]) -> None:
        """Note that objects are used, and record reads in the history: of a warm plan, its progress does that."""
        located = list(map(consumer.locate, chunk_nos))
        self.holdings.use(entry for entry, _ in located)
        if isinstance(consumer.plan, WarmPlan):
            return
        for entry, index in located:
            if entry.info.packing:  # histories know stored objects only
                continue
            if self._history.read(consumer, entry, index):
                self._replay.read(consumer, entry.history_key, entry.in_object(index))

    def _note_warmed(self, consumer: ConsumerState) -> None:
        """A plan to warm the cache counts as read as far as it has come, so that the history has its order."""
        if isinstance(consumer.plan, WarmPlan):
            for _, entry, index in consumer.plan.newly_settled():
                if not entry.info.packing:
                    self._history.read(consumer, entry, index)

    def _detach(self, consumer: ConsumerState) -> None:
        """End its leases, wants and plan, and forget its objects."""
        self._note_warmed(consumer)
        self._replay.left(consumer)
        self._queries.left(consumer)
        self._leases.drop_consumer(consumer)
        self._plans.end(consumer)
        self._objects.unuse(consumer.clear_objects())

    def _change_credentials(self, consumer: ConsumerState, message: protocol.Credentials) -> None:
        before, consumer.options_key = consumer.options_key, self._resources.stores.add(message.store)
        self._resources.stores.remove(before)
        self._replay.credentials_changed(consumer)
        self.savings.options_came(consumer)
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
        consumer.first_wants = None
        plan = self._plans.set(consumer, message, to_disk=self.disk.writable)
        if plan is not None:
            self.holdings.use(plan.objects())
        if isinstance(plan, WarmPlan):
            self.holdings.named(consumer.pid, plan.entries)
        if isinstance(plan, WarmPlan) and plan.to_disk:
            self.warming.write_resident(plan)

    def _advance(self, consumer: ConsumerState, position: int) -> None:
        plan = _own_plan(consumer)
        if plan is not None and plan.uses is not None:
            plan.uses.advance(position)
        elif plan is not None and not isinstance(plan, WarmPlan):
            plan.advance(position)
            if plan.repeats:
                self._table.replan(plan)

    # Ticks

    def _wake(self) -> None:
        if not self._tick_due and not self._closed:
            self._tick_due = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_due = False
        if self._closed:
            return
        beginning = {chunk.entry.origin for each in self.consumers for chunk in each.waits_to_begin()}
        for chunk in self.warming.begin_turn(self._residency.loading, beginning):
            self._residency.give_up(chunk)
        if self.savings.is_sending and (beginning or self.warming.a_job_waits(self._residency.loading)):
            self.savings.loader_waits()
        capacity = Capacity(
            self._residency.reads.idle,
            self._fetches.idle,
            self._endpoints.free_at,
            lambda name: self._endpoints.reserved_at(name) if name in beginning else 0,
            self.warming.in_flight_at,
        )
        quick = self._disk_is_quick()
        actions = scheduler.decide(
            self._candidates.by_need(),
            self._table,
            capacity,
            coming=self._residency.coming(quick),
            disk_is_quick=quick,
            writes_excess=self._writer.excess,
        )
        for action in actions:
            self._carry_out(action)
        self._endpoints.slack(self._resources.now(), beginning)
        if self._watch.stalled and self._table.quarantined_count == self._table.count:
            self._refuse_demands()
        self._leases.grant_deferred()
        self._look_again_in(self.warming.tend(self._resources.now()))
        for consumer in self.consumers:
            self._note_warmed(consumer)
            consumer.flush()

    def _look_again_in(self, wait_s: float | None) -> None:
        """Have a tick then, for warming; in place of the one that was due for it. None: only when something happens."""
        if self._warming_timer is not None:
            self._warming_timer.cancel()
        self._warming_timer = None if wait_s is None else self._loop.call_later(wait_s, self._wake)

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
                self._residency.drop(self._shared.chunk_in(action.buffer))
            case RecallChunk():
                self._leases.recall(self._shared.chunk_in(action.buffer))

    # A disk that hangs

    def pool(self, name: str) -> Pool:
        """A thread for what may hang, which ends with the core."""
        return self._resources.pools.make(name, 1)

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
        return {
            "consumer": consumer.stats(),
            "consumers": [each.stats() for each in self.consumers],
            "node": self._node_stats(),
            "store": self._resources.stores.counters.values(),
        }

    def _node_stats(self) -> dict[str, Any]:
        counted = {
            **self._shared.counters,
            **self._residency.counters,
            **self._fetches.counters,
            **self._writer.counters,
        }
        kept = self.savings.stats() | self.loads.stats()
        for counters in (self._replay.counters, self.holdings.counters, self.verifying.counters, kept):
            counted.update(counters)
        counted["recalls"] = self._leases.recall_count
        return {
            **counted,
            **self._table.stats(),
            **_disk_stats(self.disk),
            **self._endpoints.stats(),
            "arena_touched_bytes": self.arena.touched_bytes,
            "pid": os.getpid(),
            "troubles": list(self.warnings),
        }

    def _make_snapshot(self) -> Snapshot:
        return describe(
            self._resources, self._shared, self._endpoints, self.holdings, self._node_stats(), self.operators.jobs
        )

    # For who runs the service

    @property
    def stores(self) -> StoreTable:
        """Where threads may list and read."""
        return self._resources.stores

    def change_disk_quota(self, quota_bytes: int) -> None:
        """The disk tier may hold so much from now on."""
        self._quota.change(quota_bytes)
        self.holdings.quota_changed(quota_bytes)

    def drop(self, urls: Sequence[str]) -> None:
        """These are gone from their store, or have changed: neither their pins nor their chunks are of use."""

        def evict(_: protocol.Message) -> None:
            self._clearing.evict(lambda message: None, protocol.Evict(0, list(urls)))

        self.holdings.unpin_called(evict, protocol.Unpin(0, list(urls)))

    # Trouble and the end

    @property
    def warnings(self) -> list[str]:
        """What present and future consumers are warned of."""
        return self._resources.warnings.messages

    def _broadcast(self, message: str) -> None:
        for consumer in self.consumers:
            consumer.send(protocol.Trouble(message))

    def close(self, deadline_s: float) -> bool:
        """End everything, and wait so long for reads and writes under way. Whether all of these have ended."""
        self._closed = True
        self._history.close()
        self._indexes.flush()
        self.holdings.close()
        resources = self._resources
        self.savings.close()
        self.loads.close()
        resources.warnings.close()
        resources.stores.close()
        self._watch.close()
        ended = resources.pools.close(deadline_s)
        resources.arena.close()
        if ended:
            resources.closed()
        return ended


def _gone(_: None, error: BaseException | None) -> None:
    if error is not None:
        log.warning("the arena's memory was not given back: %s", error)


def _own_plan(consumer: ConsumerState) -> Plan | None:
    """The plan that a consumer speaks of; None where that has ended, also where something was predicted since."""
    return None if isinstance(consumer.plan, ReplayPlan) else consumer.plan


def _disk_stats(disk: Disk) -> dict[str, int]:
    counters = disk.counters
    return {
        "disk_used_bytes": disk.used_bytes,
        "disk_quota_bytes": disk.quota_bytes,
        "disk_damaged": counters["damaged"],
        "disk_errors": counters["errors"],
        "disk_stalls": counters["stalls"],
    }
