"""What is where, and who wants it: the records of a core, which all of its parts share and change by their methods.

A chunk's life in RAM: absent, loading (from disk or store), resident; then leased and given back any number of
times, perhaps written to disk meanwhile; dropped when its buffer is needed more elsewhere.

What begins here is decided elsewhere (`scheduler`); what comes of it changes the records, and whoever has to hear of it
is told: those who want the chunk, the plans that name it, warming.

Filling buffers: from the store (`fetches`), or from the disk tier, in threads of its own.

One load per chunk at a time, whoever wants it. A chunk that the disk turns out not to have, or to have damaged (which
it puts out of use by itself), is fetched from the store into the same buffer. One whose read hangs is given up together
with the buffer, which the read may yet fill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastload import protocol
from fastload.errors import StoreError
from fastload.service import buffers
from fastload.service.buffers import BufferTable
from fastload.service.control import Learnt
from fastload.service.disk_io import DiskEvictor, DiskWatch, WriteBehind
from fastload.service.eviction import DiskAdmission, DiskOrder, Pins, read_threads
from fastload.service.fetches import Fetches
from fastload.service.leases import Leases
from fastload.service.plans import PlanSet, Warming, WarmPlan
from fastload.service.ports import Disk, Ports, Ram
from fastload.service.scheduler import Candidate
from fastload.service.state import Chunk, ConsumerState, ObjectEntry, Objects, Plan, WriteState
from fastload.service.threads import Done


@dataclass(frozen=True, slots=True)
class Records:
    """See the module's text."""

    disk: Disk
    objects: Objects
    pins: Pins
    table: BufferTable
    disk_order: DiskOrder
    evictor: DiskEvictor
    ledger: Leases
    plans: PlanSet

    @classmethod
    def of_ports(cls, ports: Ports, consumers: Collection[ConsumerState]) -> Records:
        """Those of a service that begins; `consumers` are the ones that are connected."""
        pins = Pins(ports.disk, ports.limits.ram_bytes)
        table = BufferTable(ports.arena.buffer_count, pins.belongs_in_ram)
        disk_order = DiskOrder(ports.disk.keys())

        def used(chunk: Chunk) -> None:
            """It was read before, and is again, from RAM."""
            table.use(chunk)
            disk_order.use(chunk.entry.key(chunk.index))

        return cls(
            disk=ports.disk,
            objects=Objects(ports.limits.chunk_bytes),
            pins=pins,
            table=table,
            disk_order=disk_order,
            evictor=DiskEvictor(ports.disk, disk_order),
            ledger=Leases(table, used),
            plans=PlanSet(consumers, table, disk_order, pins),
        )

    def on_disk(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the disk tier holds a chunk."""
        return self.disk.readable and self.disk.contains(entry.key(index))

    def chunk_in(self, buffer: int) -> Chunk:
        """What lies in a buffer that is not empty."""
        chunk = self.table.chunks[buffer]
        assert chunk is not None, f"buffer {buffer} is empty"
        return chunk


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
        ports: Ports,
        records: Records,
        watch: DiskWatch,
        consumers: dict[ConsumerState, None],
        known: Callable[[str], Learnt | None],
        heard: Heard,
    ) -> None:
        """`known(endpoint)`: what an earlier run learnt of it."""
        self._records, self._table, self._plans = records, records.table, records.plans
        self._leases, self._objects = records.ledger, records.objects
        self._heard = heard
        self.counters: Counter[str] = Counter(dropped_chunks=0)
        self.fetches = Fetches(
            ports.arena,
            self._table,
            ports.stores,
            ports.pools,
            self._spare_buffer,
            heard.changed,
            ports.now,
            ports.requests_max,
            ports.limits.requests_in_flight,
            known,
            ports.hedger,
        )
        self.loader = Loader(ports.arena, ports.disk, watch, self.fetches, self._loaded, self._read_given_up)
        admission = DiskAdmission(records.disk_order, records.pins, self._plans.to_read)
        self.writer = WriteBehind(
            ports.arena,
            ports.disk,
            records.disk_order,
            admission,
            records.evictor,
            watch,
            self._table.refresh,
            self._written,
            ports.now,
            ports.is_lost,
        )
        self.writer.limit(ports.limits.disk_write_bytes_per_s)
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
        self._leases.loading(chunk)
        self._table.refresh(chunk)
        if isinstance(candidate.plan, WarmPlan):
            candidate.plan.taken(chunk)

    def _loaded(self, chunk: Chunk, error: BaseException | None) -> None:
        if error is None:
            chunk.finish_load()
            if chunk.source == protocol.SOURCE_REMOTE:
                self._heard.fetched(chunk)
            self._table.touch(chunk)
            self._write_behind(chunk)
            self._leases.loaded(chunk)
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
        chunk.abort_load()
        self._leases.failed(chunk, error)
        self._objects.forget_if_idle(chunk.entry)

    def _read_given_up(self, chunk: Chunk) -> Done:
        """Its buffer is lost until the read returns, and it is loaded anew, if only for those who want it."""
        buffer = self._table.quarantine(chunk)
        chunk.abort_load()
        self._gone(chunk)

        def returned(length: int | None, error: BaseException | None) -> None:
            self._table.release(buffer)
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
        if chunk.write is WriteState.QUEUED:
            self.writer.cancel(chunk)
            for plan in self._plans.warm():
                plan.put_back(chunk)
        self._table.evicted(chunk)
        chunk.evict()
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
        return written + unwanted + len(self._leases.asked)

    def _gone(self, chunk: Chunk) -> None:
        """It lies in no buffer any more."""
        for plan in self._plans.all():
            plan.dropped(chunk.entry, chunk.index)
        self._leases.dropped(chunk)
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


Loaded = Callable[[Chunk, BaseException | None], None]
GivenUp = Callable[[Chunk], Done]


class Loader:
    """Used by the loop's thread only."""

    def __init__(
        self,
        arena: Ram,
        disk: Disk,
        watch: DiskWatch,
        fetches: Fetches,
        loaded: Loaded,
        given_up: GivenUp,
    ) -> None:
        """`loaded(chunk, error)` is called at the end; or `given_up(chunk)`, which returns what to do when its read
        returns after all.
        """
        self._arena, self._disk, self._fetches = arena, disk, fetches
        self._loaded, self._given_up = loaded, given_up
        self.reads = watch.pool("disk-read", read_threads(arena.buffer_count))
        self.order = 0  # loads begun
        self.in_flight: set[Chunk] = set()
        self.counters: Counter[str] = Counter(
            fetched_chunks=0,
            fetched_bytes=0,
            disk_read_chunks=0,
            disk_read_bytes=0,
            disk_reads_hung=0,
            failed_fetches=0,
        )

    def start(self, chunk: Chunk, on_disk: bool, options_key: str) -> None:
        """Fill the chunk's buffer; `loaded(chunk, error)` follows."""
        self.order += 1
        chunk.begin_load(self.order, options_key)
        self.in_flight.add(chunk)
        if on_disk:
            self._read(chunk)
        else:
            self._fetch(chunk)

    def _read(self, chunk: Chunk) -> None:
        def done(length: int | None, error: BaseException | None) -> None:
            if error is None and length == chunk.length:
                self.counters["disk_read_chunks"] += 1
                self.counters["disk_read_bytes"] += chunk.length
                self._finish(chunk, None)
            else:
                self._fetch(chunk)

        def hung() -> Done:
            self.counters["disk_reads_hung"] += 1
            self.in_flight.discard(chunk)
            return self._given_up(chunk)

        chunk.read_from(protocol.SOURCE_DISK)
        key = chunk.entry.key(chunk.index)
        self.reads.submit(self._disk.read_into, key, self._arena.buffer(chunk.buffer), done=done, hung=hung)

    def _fetch(self, chunk: Chunk) -> None:
        chunk.read_from(protocol.SOURCE_REMOTE)
        self._fetches.start(chunk, self._fetched)

    def _fetched(self, chunk: Chunk, error: BaseException | None) -> None:
        if error is None:
            self.counters["fetched_chunks"] += 1
            self.counters["fetched_bytes"] += chunk.length
        else:
            self.counters["failed_fetches"] += 1
        self._finish(chunk, error)

    def _finish(self, chunk: Chunk, error: BaseException | None) -> None:
        self.in_flight.discard(chunk)
        self._loaded(chunk, error)
