"""A core in virtual time with a store and a disk that fail, and what must hold of its records after every event."""

from __future__ import annotations

import math
import random
from collections import Counter

from fastload.cache import ChunkKey
from fastload.config import CacheLimits
from fastload.errors import AccessDeniedError, ObjectChangedError, StoreError, StoreUnavailableError
from fastload.service.core import Core
from fastload.service.deciding import buffers
from fastload.service.deciding.buffers import _status
from fastload.service.events import Warnings
from fastload.service.fetching.request_limit import SHARE_MAX
from fastload.service.fetching.stores import options_gone
from fastload.service.resources import Resources
from fastload.service.state import Chunk, ChunkState, RecallState, WriteState
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.network import Connections, Network, VirtualStores
from fastload.simulate.pools import VirtualPools
from fastload.simulate.scenario import StoreProfile
from fastload.simulate.tiers import VirtualArena, VirtualDisk
from fastload.store.types import ObjectInfo
from fastload.store.watch import Watch

CHUNK_BYTES = 1 << 18
FILE_BYTES = CHUNK_BYTES + 8192


class Stores(VirtualStores):
    """A share of the reads fails, `denied` options always, with `refusal`."""

    def __init__(
        self, link: Network, node: Connections, jobs: VirtualPools, loop: VirtualLoop, draw: random.Random
    ) -> None:
        super().__init__(link, node, jobs, CHUNK_BYTES, lambda info, start, byte_count: None)
        self._loop, self._draw = loop, draw
        self.fail_share = 0.0
        self.denied: set[str] = set()
        self.refusal: StoreError = AccessDeniedError("denied")

    def read_watched(self, watch: Watch, key: str, info: ObjectInfo, start: int, out: memoryview) -> None:
        error: Exception | None = None
        if key in self.denied:
            error = self.refusal
        elif key not in self._options:
            error = options_gone()
        elif self._draw.random() < self.fail_share:
            errors = AccessDeniedError("denied"), StoreUnavailableError("away"), ObjectChangedError("changed")
            error = self._draw.choice(errors)
        resume = self._jobs.suspend()
        byte_count = min(CHUNK_BYTES, info.size - start)
        self._network.request(self._node, watch, byte_count, lambda failed: resume(failed or error))

    def head(self, key: str, url: str) -> ObjectInfo:
        missing = StoreUnavailableError("away") if self._draw.random() < self.fail_share else None
        self._loop.call_later(self._draw.choice([0.01, 50.0]), self._jobs.suspend(), missing)
        return ObjectInfo(url, 3 * CHUNK_BYTES + 5, "etag")


class Disk(VirtualDisk):
    """A share of the reads and writes fails, some after they have hung."""

    def __init__(
        self, quota_bytes: int, jobs: VirtualPools, loop: VirtualLoop, draw: random.Random, write_rate: float
    ) -> None:
        super().__init__(quota_bytes, CHUNK_BYTES, jobs, loop, (1e8, write_rate), lambda key, length: None)
        self._loop, self._draw = loop, draw
        self.fail_share = 0.0

    def _fails(self) -> bool:
        if self._draw.random() >= self.fail_share:
            return False
        self._loop.call_later(self._draw.choice([0.01, 5.0, 40.0]), self._jobs.suspend(), None)
        return True

    def read_into(self, key: ChunkKey, out: memoryview) -> int | None:
        return None if self._fails() else super().read_into(key, out)

    def write(self, key: ChunkKey, buffer: memoryview, length: int) -> bool:
        return False if self._fails() else super().write(key, buffer, length)


class VirtualCore:
    """See the module's text."""

    def __init__(self, draw: random.Random, buffer_count: int, disk_chunks: int, write_rate: float = 1e8) -> None:
        self.loop = VirtualLoop()
        jobs = VirtualPools(self.loop)
        profile = StoreProfile(
            first_byte_s=draw.choice([0.001, 0.2]),
            total_bytes_per_s=draw.choice([5e6, 1e9]),
            slow_share=draw.choice([0.0, 0.1, 0.3]),
            slow_times=draw.choice([50.0, 500.0]),
            throttles_above=draw.choice([1.0, 4.0, math.inf]),
        )
        link = Network(profile, self.loop)
        self.stores = Stores(link, link.join(1e9, "node"), jobs, self.loop, draw)
        limits = CacheLimits(buffer_count * CHUNK_BYTES, disk_chunks * FILE_BYTES, CHUNK_BYTES)
        self.disk = Disk(limits.disk_bytes, jobs, self.loop, draw, write_rate)
        arena, warnings = VirtualArena(limits.ram_bytes, CHUNK_BYTES), Warnings(self.loop.for_service)
        resources = Resources(
            limits, arena, self.disk, jobs, self.stores, warnings, self.loop.time, waited_for_core=lambda: 0.0
        )
        self.core = Core.of_resources(resources)

    def run(self, seconds: float) -> None:
        """Let time pass, and look at everything after each event."""
        end_s, is_over = self.loop.time() + seconds, list[bool]()
        self.loop.call_later(seconds, is_over.append, True)

        def look() -> bool:
            check(self.core)
            return bool(is_over)

        self.loop.run_until(look)
        assert self.loop.time() <= end_s + 1e-6


def check(core: Core) -> None:
    """What must hold between events."""
    chunks = [chunk for entry in core._objects._entries.values() for chunk in entry.chunks.values()]
    _check_buffers(core, chunks)
    _check_holders(core, chunks)
    _check_queues(core, chunks)
    _check_writes(core, chunks)
    _check_requests(core, chunks)
    _check_plans(core)


def _check_buffers(core: Core, chunks: list[Chunk]) -> None:
    """Each is free, a chunk's, or one that something may yet write to; nothing else."""
    table = core._table
    free = table.free()
    assert len(free) == len({*free})
    for buffer, chunk in enumerate(table.chunks):
        if chunk is None:
            assert table.status[buffer] == (buffers.FREE if buffer in free else buffers.QUARANTINED)
        else:
            assert buffer not in free
            assert chunk.buffer == buffer
            assert chunk.entry.chunks[chunk.index] is chunk
            assert table.status[buffer] == _status(chunk)
    for chunk in chunks:
        assert (chunk.buffer >= 0) == (chunk.state is not ChunkState.ABSENT)
        assert chunk.state is not ChunkState.ABSENT or chunk.wanters, "a record of nothing"
    requests = len(core._fetches._pool.under_way) - len(core._fetches._requests)
    reads = sum(task.function == core.disk.read_into for task in core._watch._hanging)
    writes = sum(chunk.write is WriteState.HUNG for chunk in chunks)
    assert table.quarantined_count == requests + reads + writes


def _check_holders(core: Core, chunks: list[Chunk]) -> None:
    """Consumers and chunks agree on leases and wants."""
    leases = {(consumer, number): chunk for consumer in core.consumers for number, chunk in consumer.leases.items()}
    wants = {(consumer, number): chunk for consumer in core.consumers for number, chunk in consumer.wants.items()}
    assert leases == {holder: chunk for chunk in chunks for holder in chunk.lessees}
    assert wants == {holder: chunk for chunk in chunks for holder in chunk.wanters}
    assert all(chunk.state is ChunkState.RESIDENT for chunk in leases.values())


def _check_queues(core: Core, chunks: list[Chunk]) -> None:
    """What is wanted is where it will be found."""
    ledger = core._leases
    absent = {chunk for chunk in chunks if chunk.state is ChunkState.ABSENT and chunk.wanters}
    assert {*ledger.demanded} == {chunk for chunk in absent if chunk.urgent}
    assert {*ledger.wanted} == {chunk for chunk in absent if not chunk.urgent}
    assert {*ledger._deferred} == {chunk for chunk in chunks if chunk.state is ChunkState.RESIDENT and chunk.wanters}
    assert ledger.asked == {chunk for chunk in chunks if chunk.recalled is RecallState.ASKED}
    assert core._residency.loading == {chunk for chunk in chunks if chunk.state is ChunkState.LOADING}


def _check_writes(core: Core, chunks: list[Chunk]) -> None:
    """The queue of writes and its bytes."""
    writer = core._writer
    assert {*writer._queue} == {chunk for chunk in chunks if chunk.write is WriteState.QUEUED}
    assert {*writer._running} == {chunk for chunk in chunks if chunk.write is WriteState.RUNNING}
    assert writer._queued_bytes == sum(core.disk.file_bytes(chunk.length) for chunk in writer._queue)
    assert {*writer._tries} <= {chunk for chunk in chunks if chunk.write is not WriteState.NONE}


def _check_requests(core: Core, chunks: list[Chunk]) -> None:
    """At most three for a chunk, each with a buffer, and as many as are counted."""
    fetches = core._fetches
    requests = [request for each in fetches._requests.values() for request in each]
    by_endpoint = Counter(id(request.endpoint) for request in requests)
    for endpoint in core._endpoints._endpoints.values():
        assert endpoint.in_flight == by_endpoint[id(endpoint)]
        assert endpoint.hedger.hedge_count <= math.ceil(SHARE_MAX * endpoint.hedger.request_count)
    assert {*fetches._requests} == {*fetches._ended} <= core._residency.loading
    assert len({request.buffer for request in requests}) == len(requests)
    for chunk, each in fetches._requests.items():
        assert 1 <= len(each) <= 3
        assert chunk.buffer in [request.buffer for request in each]
        assert not any(request.lost for request in each)


def _check_plans(core: Core) -> None:
    """No plan has looked past what it still has to fetch, and positions are those of the chunks that lie there."""
    for plan in core._plans.to_read():
        for position in range(plan.cursor, plan.frontier):
            entry, index = plan.at(position)
            chunk = entry.chunks.get(index)
            is_here = chunk is not None and chunk.state is not ChunkState.ABSENT
            assert is_here or position in plan.failed, f"position {position} is hidden"
    for plan, positions in core._table._positions.items():
        for buffer, chunk in enumerate(core._table.chunks):
            if chunk is not None and not plan.repeats:
                assert positions[buffer] == plan.position(chunk.entry, chunk.index)
