"""The data of a simulated job: shards that are alike, in the real order, and which chunks a batch needs of them."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fastload.client.attached import chunk_starts
from fastload.client.consumer import Consumer
from fastload.formats import Index, ShardIndex
from fastload.pipeline.counts import Counts
from fastload.pipeline.shards import ShardTable
from fastload.plan import (
    BatchEntry,
    EpochOrder,
    Manifest,
    OrderOptions,
    Ranks,
    RequestedOrder,
    epoch_orders,
    first_objects,
)
from fastload.simulate.scenario import Job
from fastload.store.types import ObjectInfo

Ints = npt.NDArray[np.int64]

# What is fetched ahead of the next epoch: see `pipeline.epoch_pass`.
_NEXT_EPOCH_BYTES = 512 << 20


class Data:
    """The shards of the simulated nodes, and their order."""

    def __init__(self, job: Job, nodes: int, sample_count: int, ram_bytes: int, chunk_bytes: int, seed: int) -> None:
        """`sample_count` samples for so many nodes with so much RAM each."""
        self.job, self.node_count, self.chunk_bytes = job, nodes, chunk_bytes
        # As many shards for every node, as equal as can be: how it is with many shards.
        shards = max(1, round(sample_count * job.sample_bytes / job.shard_bytes / nodes)) * nodes
        self.counts = np.diff(np.arange(shards + 1) * sample_count // shards)
        sizes = self.counts * job.sample_bytes
        self.manifest = Manifest(
            ObjectInfo(f"s3://simulated/{number:07}.tar", size, "etag") for number, size in enumerate(sizes.tolist())
        )
        self.first_chunk = chunk_starts(sizes, chunk_bytes)
        requested = RequestedOrder(seed, job.shuffle, job.window_bytes, nodes)
        self.order: OrderOptions = requested.settled(self.ranks(0, 0), ram_bytes)
        self.orders = lru_cache(maxsize=2)(self._orders)  # of an epoch, for all ranks

    def ranks(self, node: int, local_rank: int) -> Ranks:
        """A rank of a node among those that are simulated."""
        each = self.job.ranks_per_node
        return Ranks(node * each + local_rank, self.node_count * each, local_rank, each)

    def _orders(self, epoch: int) -> tuple[EpochOrder, ...]:
        return epoch_orders(self.manifest, self.order, epoch)

    def own_objects(self, node: int) -> npt.NDArray[np.int32]:
        """Those of the node's partition."""
        return self.orders(0)[node].object_order

    def expected_next(self, epoch: int, ranks: Ranks) -> npt.NDArray[np.int32]:
        """With what the epoch after this begins; nothing, after the last."""
        if epoch + 1 >= self.job.epochs:
            return np.empty(0, np.int32)
        return first_objects(self.manifest, self.order, epoch + 1, ranks, _NEXT_EPOCH_BYTES)

    def chunks_of(self, entry: BatchEntry) -> Ints:
        """The chunks that hold a batch's samples, each once, rising."""
        starts = entry.sample_no * self.job.sample_bytes
        base = self.first_chunk[entry.object_no]
        first = base + starts // self.chunk_bytes
        lengths = base + (starts + self.job.sample_bytes - 1) // self.chunk_bytes - first + 1
        ends = np.cumsum(lengths)
        return np.unique(np.repeat(first - (ends - lengths), lengths) + np.arange(ends[-1]))

    def chunks_of_object(self, object_no: int) -> range:
        return range(int(self.first_chunk[object_no]), int(self.first_chunk[object_no + 1]))

    @cached_property
    def chunk_of_url(self) -> dict[str, int]:
        """The first chunk of each shard."""
        return {info.url: int(first) for info, first in zip(self.manifest.objects, self.first_chunk, strict=False)}


class KnownCounts:
    """See `pipeline.feed.CountSource`: what shards hold is known from the beginning."""

    def __init__(self, data: Data) -> None:
        self._known = np.arange(len(data.counts), dtype=np.int32), data.counts

    def known(self) -> Counts:
        return self._known

    def counted(self, object_nos: npt.NDArray[np.int32], counts: Ints) -> None:
        """Nothing to learn."""

    def ask(self, object_nos: npt.NDArray[np.int32]) -> Counts:
        """Never called, as all is known."""
        raise AssertionError("a count was asked for that is known")


class SimulatedShards(ShardTable):
    """The indexes of one rank. What would be parsed is noted in `to_parse`, and given without a wait: the caller
    has to wait for the chunks of these before it goes on.
    """

    def __init__(self, data: Data, stored: set[int]) -> None:
        """`stored` are the shards whose index the node's service has."""
        super().__init__(data.manifest, data.first_chunk, data.chunk_bytes)
        self._counts, self._stored = data.counts.tolist(), stored
        self._by_count: dict[int, ShardIndex] = {}
        self._here: set[int] = set()
        self.to_parse: list[int] = []

    def get(self, consumer: Consumer, object_nos: object) -> list[Index]:
        """See `ShardTable.get`."""
        assert isinstance(object_nos, list)
        self.to_parse += [number for number in object_nos if number not in self._here and number not in self._stored]
        self._here.update(object_nos)
        return [self._index(self._counts[number]) for number in object_nos]

    def parsed(self, object_no: int) -> None:
        """The service keeps the index."""
        self._stored.add(object_no)

    def _index(self, sample_count: int) -> ShardIndex:
        """One of so many samples, of which nothing else is known."""
        if sample_count not in self._by_count:
            none, zeros = np.empty(0, np.int64), np.zeros(sample_count + 1, np.int64)
            self._by_count[sample_count] = ShardIndex(
                (), np.empty(0, np.uint8), zeros, zeros, np.empty(0, np.int32), none, none, 0
            )
        return self._by_count[sample_count]
