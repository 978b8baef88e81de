"""A chunk's life in RAM: absent, loading (from disk or store), resident; then leased and given back any number of
times, perhaps written to disk meanwhile; evicted when its buffer is needed more elsewhere.

What begins here is decided elsewhere (`scheduler`); what comes of it changes the state, and reaches consumers that
want the chunk, plans that name it, and the handlers of `Events`.

There is one load of a chunk at a time, for all that want it. A chunk that the disk turns out not to have, or to have
damaged (which it puts out of use by itself), is fetched from the store into the same buffer. One whose read hangs is
given up together with the buffer, which the read may yet fill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fastload import protocol
from fastload.errors import StoreError
from fastload.service.deciding import buffers
from fastload.service.deciding.eviction import read_threads
from fastload.service.deciding.plans import WarmPlan
from fastload.service.deciding.scheduler import Candidate
from fastload.service.disk_io import DiskWatch, WriteBehind
from fastload.service.fetching.fetches import Fetches
from fastload.service.fetching.warming import Warming
from fastload.service.host.threads import Done
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, Plan, WriteState


class Residency:
    """Used by the loop's thread only."""

    def __init__(
        self,
        resources: Resources,
        shared: SharedState,
        watch: DiskWatch,
        fetches: Fetches,
        writer: WriteBehind,
        warming: Warming,
    ) -> None:
        self._arena, self._disk, self._events = resources.arena, resources.disk, resources.events
        self._shared, self._table, self._plans = shared, shared.table, shared.plans
        self._leases, self._objects = shared.leases, shared.objects
        self._fetches, self._writer, self._warming = fetches, writer, warming
        self.reads = watch.pool("disk-read", read_threads(resources.arena.buffer_count))
        self.load_count = 0  # loads begun
        self.loading: set[Chunk] = set()
        self.counters: Counter[str] = Counter(
            fetched_chunks=0,
            fetched_bytes=0,
            disk_read_chunks=0,
            disk_read_bytes=0,
            disk_reads_hung=0,
            failed_fetches=0,
        )
        resources.events.written.connect(self._written)

    # In

    def load(self, candidate: Candidate, buffer: int) -> None:
        """Fill a free buffer with the candidate."""
        chunk = candidate.entry.chunk(candidate.index)
        options_key = _options_for(chunk, candidate.plan)
        self._table.place(chunk, buffer, on_disk=candidate.on_disk)
        if candidate.on_disk:
            self._shared.disk_order.use(chunk.entry.key(chunk.index))
        self._begin(chunk, candidate.on_disk, options_key)
        self._leases.loading(chunk)
        self._table.refresh(chunk)
        self._warming.began(candidate, chunk)
        if isinstance(candidate.plan, WarmPlan):
            candidate.plan.taken(chunk)

    def _begin(self, chunk: Chunk, on_disk: bool, options_key: str) -> None:
        self.load_count += 1
        chunk.begin_load(self.load_count, options_key)
        self.loading.add(chunk)
        if on_disk:
            self._read(chunk)
        else:
            self._fetch(chunk)

    def _read(self, chunk: Chunk) -> None:
        def done(length: int | None, error: BaseException | None) -> None:
            if error is None and length == chunk.length:
                self.counters["disk_read_chunks"] += 1
                self.counters["disk_read_bytes"] += chunk.length
                self._loaded(chunk, None)
            else:
                if not self._disk.contains(key):  # it was damaged
                    self._shared.disk_order.discard(key)
                self._fetch(chunk)

        def hung() -> Done:
            self.counters["disk_reads_hung"] += 1
            self.loading.discard(chunk)
            return self._read_given_up(chunk)

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
        self._loaded(chunk, error)

    def _loaded(self, chunk: Chunk, error: BaseException | None) -> None:
        self.loading.discard(chunk)
        if error is None:
            chunk.finish_load()
            if chunk.source == protocol.SOURCE_REMOTE:
                self._events.fetched(chunk)
            self._table.touch(chunk)
            self._write_behind(chunk)
            self._leases.loaded(chunk)
            self._table.refresh(chunk)
        else:
            self._load_failed(chunk, error)
        self._events.changed()

    def _load_failed(self, chunk: Chunk, error: BaseException) -> None:
        """Consumers that want the chunk now get the error; plans leave it alone until it is wanted."""
        of_store = isinstance(error, StoreError)
        for plan in self._plans.all():
            if of_store and plan.options_key != chunk.fetched_as:
                plan.dropped(chunk.entry, chunk.index)  # it may have looked past it while it was on its way
                continue
            position = plan.position(chunk.entry, chunk.index)
            if position >= 0:
                plan.failed.add(position)
            if isinstance(plan, WarmPlan) and position >= 0:
                plan.fail(chunk, error)
        self._events.load_failed(chunk, error)
        self._table.clear(chunk)
        chunk.abort_load()
        self._leases.failed(chunk, error)
        self._objects.forget_if_idle(chunk.entry)

    def give_up(self, chunk: Chunk) -> None:
        """Fetch it no more for warm plans, which come back to it. Its buffer is free when the request has ended."""
        self._fetches.give_up(chunk)
        self.loading.discard(chunk)
        self._table.quarantine(chunk)
        chunk.abort_load()
        for plan in self._plans.warm():
            plan.put_back(chunk)
        self._shared.gone(chunk)

    def _read_given_up(self, chunk: Chunk) -> Done:
        """Its buffer is lost until the read returns, and it is loaded anew, if only for those who want it."""
        buffer = self._table.quarantine(chunk)
        chunk.abort_load()
        self._shared.gone(chunk)

        def returned(length: int | None, error: BaseException | None) -> None:
            self._table.release(buffer)
            self._events.changed()

        return returned

    # To disk

    def _write_behind(self, chunk: Chunk) -> None:
        warm = self._warming.came(chunk)
        queued = False
        if chunk.source == protocol.SOURCE_REMOTE and not self._shared.on_disk(chunk.entry, chunk.index):
            queued = self._writer.admit(chunk, patient=bool(warm))
        if not queued:
            self._warming.not_written(chunk, warm)

    def _written(self, chunk: Chunk, written: bool) -> None:
        self._table.refresh(chunk)
        if written:
            self._table.written(chunk)
        for plan in self._plans.warm():
            plan.settle(chunk, held=written or not plan.to_disk)
        self._events.changed()

    # Out

    def drop(self, chunk: Chunk) -> None:
        """Empty its buffer; a write that has not begun is given up."""
        if chunk.write is WriteState.QUEUED:
            self._writer.cancel(chunk)
            for plan in self._plans.warm():
                plan.put_back(chunk)
        self._shared.evict(chunk)

    def drop_idle(self, goes: Callable[[Chunk], bool] = lambda chunk: True) -> int:
        """Empty all buffers that may be, of the chunks that shall go; how many bytes were in them."""
        buffers_held, _ = self._table.by_usefulness([buffers.IDLE, buffers.QUEUED])
        chunks = [chunk for chunk in map(self._shared.chunk_in, buffers_held) if goes(chunk)]
        for chunk in chunks:
            self.drop(chunk)
        return sum(chunk.length for chunk in chunks)

    def coming(self, quick: bool) -> int:
        """Buffers that will be idle without any further recall: written, where writes are worth waiting for (`quick`),
        filled while no consumer waits, or recalled.
        """
        written = self._table.count_of([buffers.WRITING, buffers.QUEUED]) if quick else 0
        unwanted = sum(not chunk.wanters for chunk in self.loading)
        return written + unwanted + len(self._leases.asked)


def _options_for(chunk: Chunk, plan: Plan | None) -> str:
    """The credentials of the consumer that wants the chunk most."""
    wanters = sorted(chunk.wanters.items(), key=lambda item: not item[1].urgent)
    if wanters:
        return wanters[0][0][0].options_key
    assert plan is not None, "no consumer wants this chunk"
    return plan.options_key
