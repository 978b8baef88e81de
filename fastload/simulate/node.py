"""One node: the service's core on virtual resources, its ranks, and what is counted of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastload.cache import ChunkKey, object_id
from fastload.config import CacheLimits
from fastload.pipeline.windows import Window, window_chunks
from fastload.plan import BatchEntry
from fastload.service.core import Core
from fastload.service.events import Warnings
from fastload.service.fetching.request_limit import Hedger
from fastload.service.resources import Resources
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.consumer import SimulatedConsumer
from fastload.simulate.data import Data, SimulatedShards
from fastload.simulate.network import Network, VirtualStores
from fastload.simulate.pools import VirtualPools
from fastload.simulate.rank import Pace, Rank
from fastload.simulate.scenario import Node
from fastload.simulate.tiers import VirtualArena, VirtualDisk
from fastload.store.types import ObjectInfo


class _NoHedger(Hedger):
    """Nothing is sent twice."""

    def late_after_s(self, byte_count: int) -> float | None:
        """Never."""
        return None


class SimulatedNode:
    """See the module's text.

    Bytes are counted by the epoch that they are for: that of the first rank that has yet to read the chunk. One more
    epoch than there are takes what is fetched for none of them. `chunks_read` says which chunks batches were made from.
    """

    def __init__(
        self, number: int, data: Data, options: Node, network: Network, pace: Pace, loop: VirtualLoop, seed: int
    ) -> None:
        job = data.job
        self._data, self._loop = data, loop
        self.requests_in_flight: list[float] = []  # the mean of each epoch
        self._marked = 0.0, 0.0
        factor = job.link_factors[number] if job.link_factors else 1.0
        self.connections = network.join(
            factor * options.link_bytes_per_s, f"fastload simulate {seed} node {number}", options.core_wait_s
        )
        self.own = data.own_objects(number)
        self.remote_bytes, self.disk_bytes = np.zeros((2, job.epochs + 1), np.int64)
        self.chunks_read = np.zeros((job.epochs, int(data.first_chunk[-1])), np.bool_)
        self._closed = np.full((job.ranks_per_node, int(data.first_chunk[-1])), -1, np.int64)  # the last epoch of each
        self._object_nos = {object_id(info, data.chunk_bytes, ""): no for no, info in enumerate(data.manifest.objects)}
        self.core = Core.of_resources(self._resources(options, network, loop))
        stored = set(range(len(data.counts))) if job.is_indexed else set[int]()
        self.ranks = [self._rank(number, local_rank, stored, pace, loop) for local_rank in range(job.ranks_per_node)]

    def _resources(self, options: Node, network: Network, loop: VirtualLoop) -> Resources:
        chunk_bytes, jobs = options.chunk_bytes, VirtualPools(loop)
        limits = CacheLimits(
            options.ram_bytes, options.disk_bytes, chunk_bytes, requests_in_flight=options.requests_in_flight
        )
        rates = options.disk_read_bytes_per_s, options.disk_write_bytes_per_s
        return Resources(
            limits,
            VirtualArena(limits.ram_bytes, chunk_bytes),
            VirtualDisk(limits.disk_bytes, chunk_bytes, jobs, loop, rates, self._read),
            jobs,
            VirtualStores(network, self.connections, jobs, chunk_bytes, self._fetched),
            Warnings(loop.for_service),
            loop.time,
            Hedger if self._data.job.hedging else _NoHedger,
            waited_for_core=lambda: self.connections.waited_s,
        )

    def _rank(self, number: int, local_rank: int, stored: set[int], pace: Pace, loop: VirtualLoop) -> Rank:
        data = self._data
        consumer = SimulatedConsumer(self.core, loop, f"rank {local_rank} of node {number}")
        consumer.consumer.attach(data.manifest.objects)
        return Rank(
            data,
            data.ranks(number, local_rank),
            consumer,
            SimulatedShards(data, stored),
            self.own.tolist(),
            pace,
            loop,
            self,
        )

    @property
    def is_finished(self) -> bool:
        return len(self.requests_in_flight) == self._data.job.epochs

    # What is heard

    def _fetched(self, info: ObjectInfo, start: int, byte_count: int) -> None:
        first = self._data.chunk_of_url.get(info.url)
        if first is not None:  # else it is warmed for another job
            self.remote_bytes[self._epoch_of(first + start // self._data.chunk_bytes)] += byte_count

    def _read(self, key: ChunkKey, byte_count: int) -> None:
        object_no = self._object_nos.get(key.object_id)
        if object_no is not None:
            self.disk_bytes[self._epoch_of(int(self._data.first_chunk[object_no]) + key.index)] += byte_count

    def _epoch_of(self, chunk: int) -> int:
        return int(self._closed[:, chunk].min()) + 1

    def has_read(self, rank: Rank, entry: BatchEntry) -> None:
        """See `Observer`."""
        self.chunks_read[rank.epoch, self._data.chunks_of(entry)] = True

    def has_closed(self, rank: Rank, window: Window) -> None:
        """See `Observer`."""
        chunks: npt.NDArray[np.int64] = window_chunks(self._data.first_chunk, window.object_nos)
        self._closed[rank.ranks.local_rank, chunks] = rank.epoch

    def has_ended(self, rank: Rank) -> None:
        """See `Observer`. It may have had no samples of some windows."""
        self._closed[rank.ranks.local_rank] = rank.epoch
        if all(len(each.epochs) > rank.epoch for each in self.ranks):
            self.connections.move_to(self._loop.time())
            now = self._loop.time(), self.connections.request_seconds
            self.requests_in_flight.append((now[1] - self._marked[1]) / max(1e-9, now[0] - self._marked[0]))
            self._marked = now
