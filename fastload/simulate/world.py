"""Running a job in virtual time, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastload.config import CacheLimits
from fastload.errors import ConfigError
from fastload.pipeline.reader import check_allowed, holds
from fastload.plan import DEFAULT_WINDOW_BYTES, ram_bytes_for
from fastload.protocol import SOURCE_DISK, SOURCE_RAM
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.data import Data
from fastload.simulate.network import Network
from fastload.simulate.node import SimulatedNode
from fastload.simulate.rank import Pace, Rank
from fastload.simulate.scenario import Job, Node, StoreProfile

# Of a node, so many chunks an epoch are simulated by default; of more data and cache, a part.
CHUNKS_MAX = 2000
# With global shuffle each sample is a read of a chunk; of those, so many times as many.
_READS_PER_CHUNK = 10
# However small the part, an arena has room for what is on its way.
_BUFFERS_MIN = 64
# And so much more data than that is simulated: what an arena that is not made smaller holds too much is a few percent.
_DATA_OF_ARENA = 16


class RefusedError(ConfigError):
    """The loader would not run this job with this cache."""


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """An epoch, over all simulated nodes: means of nodes and ranks.

    Of the bytes that a node's data has, `remote_share` were fetched and `disk_share` read from the disk; of what is
    left, `ram_share`, the arena had kept. `hit_share` is what was not fetched. Where each chunk is read many times an
    epoch, by global shuffle, the shares of disk and arena are those of the bytes that were leased.

    Seconds are a rank's: from its first request to its last step, `stall_s` of them waiting for its own batches and
    `peers_s` for other ranks. `stall_share` is the part of the time that was not spent in steps. `samples_per_s` is
    what the whole job was fed.
    """

    epoch: int
    seconds: float
    hit_share: float
    ram_share: float
    disk_share: float
    remote_share: float
    remote_bytes_per_node: float
    stall_s: float
    peers_s: float
    stall_share: float
    samples_per_s: float
    requests_in_flight: float


@dataclass(frozen=True, slots=True)
class RankFigures:
    """A rank over all epochs."""

    node: int
    local_rank: int
    samples: int
    seconds: float
    stall_s: float
    peers_s: float

    @property
    def stall_share(self) -> float:
        """The part of its time for which it waited for its own batches."""
        return self.stall_s / max(1e-9, self.seconds)


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one simulation.

    `node` is the one that was asked for. `scale` is the part of a node's data and caches that was simulated, with an
    arena of `simulated_ram_bytes`, which may be more than that part.
    `requests_allowed`: what the first node's controller had come to at the end.
    """

    node: Node
    simulated_nodes: int
    scale: float
    data_bytes_per_node: float
    epochs: tuple[EpochFigures, ...]
    ranks: tuple[RankFigures, ...]
    requests_allowed: int
    hedged_requests: int
    throttled_requests: int
    refused: str = ""  # why the loader would not run at all
    simulated_ram_bytes: int = 0

    @property
    def later(self) -> Sequence[EpochFigures]:
        """The epochs that find a cache: all but the first, where there is more than one."""
        return self.epochs[1:] or self.epochs

    def mean(self, figure: str) -> float:
        """The mean of one of the `EpochFigures`, by name, over the later epochs."""
        return _mean([getattr(each, figure) for each in self.later])


def simulate(
    job: Job,
    node: Node,
    store: StoreProfile,
    *,
    seed: int = 0,
    simulated_nodes: int | None = None,
    chunks_max: int | None = CHUNKS_MAX,
) -> Run:
    """Run the job. Of alike nodes, `simulated_nodes` stand for all (default: two), with their share of what the store
    gives; of data that has more than `chunks_max` chunks a node (None: whatever it has), a part stands for all, with
    the same part of the caches.

    The same arguments give the same figures. Raises `ConfigError`.
    """
    world = World(job, node, store, seed=seed, simulated_nodes=simulated_nodes, chunks_max=chunks_max)
    world.run()
    return world.figures()


def sweep(
    job: Job,
    nodes: Sequence[Node],
    store: StoreProfile,
    *,
    seed: int = 0,
    simulated_nodes: int | None = None,
    chunks_max: int | None = CHUNKS_MAX,
) -> list[Run]:
    """`simulate` with one node after the other. What a loader would refuse to do says why, and has no figures."""
    runs = []
    for node in nodes:
        try:
            run = simulate(job, node, store, seed=seed, simulated_nodes=simulated_nodes, chunks_max=chunks_max)
        except RefusedError as error:
            run = Run(node, 0, 1.0, job.data_bytes / job.nodes, (), (), 0, 0, 0, str(error))
        runs.append(run)
    return runs


class World:
    """A job's simulated nodes, for tests that look into them; `simulate` is the short way."""

    def __init__(
        self,
        job: Job,
        node: Node,
        store: StoreProfile,
        *,
        seed: int = 0,
        simulated_nodes: int | None = None,
        chunks_max: int | None = None,
    ) -> None:
        """See `simulate`."""
        self.job, self.asked_for = job, node
        self.node_count = min(job.nodes, 2 if simulated_nodes is None else simulated_nodes)
        if self.node_count < 1:
            raise ConfigError(f"simulated_nodes={simulated_nodes} must be at least 1")
        self._bytes_per_node = job.data_bytes / job.nodes
        CacheLimits(node.ram_bytes, 0, node.chunk_bytes)  # says what cannot be
        self.scale = 1.0 if chunks_max is None else _scale(job, node, chunks_max)
        self.node = _part(job, node, self.scale)
        samples = int(self._bytes_per_node * self.scale / job.sample_bytes) * self.node_count
        if samples < job.batch_size * job.ranks_per_node * self.node_count:
            raise ConfigError(
                f"data_bytes={job.data_bytes} is {samples // self.node_count} samples for each of {job.nodes} nodes, "
                f"less than a batch for each of its {job.ranks_per_node} ranks; give more data, or fewer nodes"
            )
        self.loop = VirtualLoop(node.core_wait_s)
        self.data = Data(job, self.node_count, samples, self.node.ram_bytes, node.chunk_bytes, seed)
        self._check()
        self.network = Network(store.part(self.node_count / job.nodes), self.loop)
        pace = Pace(self.loop, self.node_count * job.ranks_per_node if job.in_step else 1)
        self.nodes = [
            SimulatedNode(number, self.data, self.node, self.network, pace, self.loop, seed)
            for number in range(self.node_count)
        ]

    def _check(self) -> None:
        """What the loader does not do; of all the data and caches, as it would say it."""
        node, data_bytes = self.asked_for, int(self._bytes_per_node)
        try:
            CacheLimits(node.ram_bytes, node.disk_bytes, node.chunk_bytes)
        except ConfigError as error:
            raise RefusedError(str(error)) from error
        if self.job.shuffle == "global" and not holds(data_bytes, node.ram_bytes, node.disk_bytes):
            samples = np.array([data_bytes // self.job.sample_bytes])
            try:
                check_allowed(data_bytes, node.ram_bytes, node.disk_bytes, node.chunk_bytes, samples)
            except ConfigError as error:
                raise RefusedError(str(error)) from error

    @property
    def ranks(self) -> list[Rank]:
        return [rank for node in self.nodes for rank in node.ranks]

    def run(self) -> None:
        """From the beginning to the end."""
        ranks = self.ranks
        for rank in ranks:
            self.loop.call_soon(rank.begin)
        ended = self.loop.run_until(lambda: all(node.is_finished for node in self.nodes))
        assert ended, "nothing is due any more, and ranks still wait"

    def figures(self) -> Run:
        """What came of it."""
        first = self.nodes[0].core
        counters = [node.core._fetches.counters for node in self.nodes]
        return Run(
            node=self.asked_for,
            simulated_nodes=self.node_count,
            scale=self.scale,
            data_bytes_per_node=self._bytes_per_node,
            epochs=tuple(self._epoch(epoch) for epoch in range(self.job.epochs)),
            ranks=tuple(self._rank(rank) for rank in self.ranks),
            requests_allowed=first._endpoints.limit,
            hedged_requests=sum(each["hedged_requests"] for each in counters),
            throttled_requests=self.network.throttled_count,
            simulated_ram_bytes=self.node.ram_bytes,
        )

    def _epoch(self, epoch: int) -> EpochFigures:
        job, data = self.job, int(self.data.manifest.sizes.sum())
        remote = sum(int(node.remote_bytes[epoch]) for node in self.nodes) / data
        disk = sum(int(node.disk_bytes[epoch]) for node in self.nodes) / data
        ranks = [rank.epochs[epoch] for rank in self.ranks]
        ram = max(0.0, 1.0 - remote - disk)
        if job.shuffle == "global":
            leased = np.array([each.leased_bytes for each in ranks]).sum(axis=0)
            ram, disk = (float(leased[source] / leased.sum()) for source in (SOURCE_RAM, SOURCE_DISK))
        seconds = _mean([each.ended_s - each.began_s for each in ranks])
        waited = _mean([each.stall_s + each.peers_s for each in ranks])
        samples = sum(each.samples for each in ranks)
        return EpochFigures(
            epoch=epoch,
            seconds=seconds,
            hit_share=max(0.0, 1.0 - remote),
            ram_share=ram,
            disk_share=disk,
            remote_share=remote,
            remote_bytes_per_node=remote * self._bytes_per_node,
            stall_s=_mean([each.stall_s for each in ranks]),
            peers_s=_mean([each.peers_s for each in ranks]),
            stall_share=waited / max(1e-9, seconds),
            samples_per_s=samples / max(1e-9, seconds) * job.nodes / self.node_count,
            requests_in_flight=_mean([node.requests_in_flight[epoch] for node in self.nodes]),
        )

    def _rank(self, rank: Rank) -> RankFigures:
        each = rank.epochs
        return RankFigures(
            node=rank.ranks.rank // rank.ranks.local_world_size,
            local_rank=rank.ranks.local_rank,
            samples=sum(epoch.samples for epoch in each),
            seconds=sum(epoch.ended_s - epoch.began_s for epoch in each),
            stall_s=sum(epoch.stall_s for epoch in each),
            peers_s=sum(epoch.peers_s for epoch in each),
        )


def _scale(job: Job, node: Node, chunks_max: int) -> float:
    """The part that is simulated of a node's data."""
    chunk_count = job.data_bytes / job.nodes / node.chunk_bytes
    if job.shuffle == "global":
        chunk_count = max(chunk_count, job.data_bytes / job.nodes / job.sample_bytes / _READS_PER_CHUNK)
    else:
        chunks_max = max(chunks_max, _DATA_OF_ARENA * _ram_bytes_min(job, node) // node.chunk_bytes)
    return min(1.0, chunks_max / chunk_count)


def _ram_bytes_min(job: Job, node: Node) -> int:
    """The least arena for a part: where batches are made from windows, what these need. In less they would be read
    again and again, and what is fetched ahead would not last as long as a late answer takes.
    """
    least = _BUFFERS_MIN * node.chunk_bytes
    if job.shuffle != "global":
        least = max(least, ram_bytes_for(1, max(job.window_bytes or DEFAULT_WINDOW_BYTES, job.shard_bytes)))
    return min(node.ram_bytes, least)


def _part(job: Job, node: Node, scale: float) -> Node:
    """A part of a node's caches."""
    disk_bytes = int(node.disk_bytes * scale)
    return replace(
        node,
        ram_bytes=max(_ram_bytes_min(job, node), int(node.ram_bytes * scale)),
        disk_bytes=disk_bytes if disk_bytes >= node.chunk_bytes + 8192 else 0,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
