"""Reading where every batch takes its samples from anywhere: `shuffle="global"`.

A window is then a whole partition. Its shards are indexed and its chunks are not leased: each entry wants the chunks of
its own samples when it is due, and gives them back when its batch is made. The plan tells the service to fill the cache
with all of it: the disk tier holds the data after the first epoch, and reads go there. Which chunks entries will read
is told beforehand (*foreseen*), some hundred thousand samples ahead, so that the arena keeps what is needed soonest.

That is allowed where the cache holds the data, or where samples are so large that fetching the chunks of each costs
little more than the samples themselves; otherwise an epoch would fetch the data many times over.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastload.cache.policy.known_order import lookahead
from fastload.client.consumer import Consumer
from fastload.config import format_bytes
from fastload.errors import ConfigError
from fastload.pipeline.reader import Objects, WindowReader
from fastload.pipeline.shards import ShardTable
from fastload.pipeline.windows import Ints
from fastload.plan import BatchEntry

# Of the disk tier's quota, what chunks can be sure of: each has a trailer, and blocks are rounded up.
_DISK_SHARE = 0.97
# Remote bytes of an epoch, in times of the data, up to which a cache that does not hold the data will do.
_AMPLIFICATION_MAX = 1.25


@dataclass(slots=True, eq=False)
class _Held:
    """An entry, the chunks that it reads, and the number of its first use."""

    entry: BatchEntry
    chunks: Ints
    is_leased: bool = False
    first_use: int = 0


class ScatteredReader(WindowReader):
    """A reader that leases by entry. `chunks_of` gives the chunk numbers that an entry's samples lie in."""

    def __init__(self, consumer: Consumer, shards: ShardTable, first_chunk: Ints) -> None:
        super().__init__(consumer, shards, first_chunk)
        self.chunks_of: Callable[[BatchEntry], Ints] = lambda entry: np.empty(0, np.int64)
        self.foresees = False
        self._leasing = threading.Lock()
        self._held: dict[int, _Held] = {}  # by identity, in the order in which they are read
        self._position_of = np.full(int(first_chunk[-1]), -1, np.int32)  # of each chunk in the plan
        self._told = self._passed = 0  # uses
        self._holders: Counter[int] = Counter()  # chunk -> how many entries hold it

    def plan(self, windows: Sequence[tuple[Hashable, Objects]], epoch: int) -> None:
        """All of these windows' objects are to be kept."""
        objects = np.concatenate([np.empty(0, np.int32), *(object_nos for _, object_nos in windows)])
        self._consumer.set_plan(objects, epoch, warm=True)
        self._epoch = epoch
        _, first = np.unique(objects, return_index=True)
        chunks = self._chunks_of_objects(objects[np.sort(first)].astype(np.int64))
        with self._leasing:
            self._position_of.fill(-1)
            self._position_of[chunks] = np.arange(len(chunks), dtype=np.int32)
            for held in self._held.values():  # told to the plan before
                self._foresee(held)

    @property
    def lookahead(self) -> int:
        """See `cache.policy.known_order`; uses, taken for samples."""
        return lookahead(len(self._position_of)) if self.foresees else 0

    def hold(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Tell which chunks the entry will read."""
        super().hold(entry, windows)
        held = _Held(entry, self.chunks_of(entry))
        with self._leasing:
            self._held[id(entry)] = held
            self._foresee(held)

    def due(self, entry: BatchEntry) -> None:
        """Ask for the entry's chunks, before they are needed."""
        with self._leasing:
            held = self._held[id(entry)]
            held.is_leased = True
            self._holders.update(held.chunks.tolist())
        self._consumer.want(held.chunks)

    def done(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Give back the chunks that no other entry holds."""
        self._release(self._drop([id(entry)]))
        super().done(entry, windows)

    def exhausted(self, next_objects: Objects, next_epoch: int) -> None:
        """The pass has been read to its end. What the next one begins with is as likely to be here as the rest."""
        super().exhausted(next_objects[:0], next_epoch)

    def _chunks_to_lease(self, numbers: Ints) -> Ints:
        return np.empty(0, np.int64)

    def _indexed(self, numbers: Ints) -> None:
        """The shards are indexed: what that was leased for is over."""
        self._release(self._chunks_of_objects(numbers))

    def _let_go(self) -> None:
        self._release(self._drop(list(self._held)))
        super()._let_go()

    def _drop(self, entry_ids: list[int]) -> Ints:
        """Forget what these entries hold; the chunks that nobody holds then."""
        with self._leasing:
            held = [self._held.pop(number) for number in entry_ids if number in self._held]
            leased = [each.chunks for each in held if each.is_leased]
            self._pass()
            chunks: list[int] = np.concatenate(leased).tolist() if leased else []
            self._holders.subtract(chunks)
            free = [chunk for chunk in set(chunks) if self._holders[chunk] <= 0]
            for chunk in free:
                del self._holders[chunk]
        return np.array(free, np.int64)

    def _foresee(self, held: _Held) -> None:
        """Tell the uses of an entry, which follow those of the entries before."""
        if not self.foresees:
            return
        positions = self._position_of[held.chunks]
        positions = positions[positions >= 0]
        held.first_use = self._told
        self._told += len(positions)
        self._consumer.foresee(held.first_use, positions)

    def _pass(self) -> None:
        """Tell that uses have been made: those before the first entry that is held."""
        first = next((held.first_use for held in self._held.values()), self._told)
        if self.foresees and first > self._passed:
            self._passed = first
            self._consumer.advance(first)

    def _release(self, chunks: Ints) -> None:
        if len(chunks):
            self._consumer.release(chunks)


def holds(data_bytes: int, ram_bytes: int, disk_bytes: int) -> bool:
    """Whether a cache of these limits holds the data."""
    return data_bytes <= _cache_bytes(ram_bytes, disk_bytes)


def _cache_bytes(ram_bytes: int, disk_bytes: int) -> int:
    return max(ram_bytes, int(disk_bytes * _DISK_SHARE))


def check_allowed(
    data_bytes: int, ram_bytes: int, disk_bytes: int, chunk_bytes: int, counts: npt.NDArray[np.int64] | None
) -> None:
    """Raise `ConfigError` where the cache does not hold the data and an epoch would fetch it many times over.

    `data_bytes` is what this node reads in an epoch; `counts` are the samples of its shards, None if not all are known.
    """
    cache_bytes = _cache_bytes(ram_bytes, disk_bytes)
    cache = (
        f'shuffle="global" reads {format_bytes(data_bytes)} in no order, and the cache holds '
        f"{format_bytes(cache_bytes)}"
    )
    cure = f"raise disk_bytes to {format_bytes(int(data_bytes / _DISK_SHARE) + 1)}, or use shuffle=True"
    if counts is None:
        raise ConfigError(f"{cache}; that may do where samples are large, but the shards are not indexed yet: {cure}")
    amplification = fetched_share(data_bytes, cache_bytes, chunk_bytes, int(counts.sum()))
    if amplification > _AMPLIFICATION_MAX:
        raise ConfigError(f"{cache}: an epoch would fetch {amplification:.1f} times the data; {cure}")


def fetched_share(data_bytes: int, cache_bytes: int, chunk_bytes: int, sample_count: int) -> float:
    """Bytes that an epoch fetches, in times of the data, where each sample that is not cached costs whole chunks."""
    if not sample_count:
        return 0.0
    chunks_of_sample = data_bytes / sample_count / chunk_bytes + 1
    missed = 1 - cache_bytes / data_bytes
    return missed * sample_count * chunks_of_sample * chunk_bytes / data_bytes
