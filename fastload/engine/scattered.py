"""Reading where every batch takes its samples from anywhere: `shuffle="global"`.

A window is then a whole partition. Its shards are indexed and its chunks are not leased: each entry wants the chunks of
its own samples as soon as it is planned, and gives them back when its batch is made. In use order, the plan is of no
help to the service (whatever it would fetch next is no more likely to be needed than the rest), so what it is told is
to fill the cache with all of it: the disk tier holds the data after the first epoch, and reads go there.

That is allowed where the cache holds the data, or where samples are so large that fetching the chunks of each costs
little more than the samples themselves; otherwise an epoch would fetch the data many times over.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from fastload.config import format_bytes
from fastload.engine.reader import Objects, WindowReader
from fastload.engine.shards import ShardTable
from fastload.engine.windows import Ints
from fastload.errors import ConfigError
from fastload.plan import BatchEntry
from fastload.service.client import Consumer

# Of the disk tier's quota, what chunks can be sure of: each has a trailer, and blocks are rounded up.
_DISK_SHARE = 0.97
# Remote bytes of an epoch, in times of the data, up to which a cache that does not hold the data will do.
_AMPLIFICATION_MAX = 1.25


class ScatteredReader(WindowReader):
    """A reader that leases by entry. `chunks_of` gives the chunk numbers that an entry's samples lie in."""

    def __init__(self, consumer: Consumer, shards: ShardTable, first_chunk: Ints) -> None:
        super().__init__(consumer, shards, first_chunk)
        self.chunks_of: Callable[[BatchEntry], Ints] = lambda entry: np.empty(0, np.int64)
        self._leasing = threading.Lock()
        self._held: dict[int, tuple[BatchEntry, Ints]] = {}  # by identity: entries, and the chunks of each
        self._holders: Counter[int] = Counter()  # chunk -> how many entries hold it

    def plan(self, windows: Sequence[tuple[Hashable, Objects]], epoch: int) -> None:
        """All of these windows' objects are to be kept."""
        objects = [object_nos for _, object_nos in windows]
        self._consumer.set_plan(np.concatenate(objects) if objects else [], epoch, warm=True)
        self._epoch = epoch

    def hold(self, entry: BatchEntry, windows: Collection[Hashable]) -> None:
        """Ask for the entry's chunks, before its batch is due."""
        super().hold(entry, windows)
        chunks = self.chunks_of(entry)
        with self._leasing:
            self._held[id(entry)] = entry, chunks
            self._holders.update(chunks.tolist())
        self._consumer.want(chunks)

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
            held = [self._held.pop(number)[1] for number in entry_ids if number in self._held]
            chunks: list[int] = np.concatenate(held).tolist() if held else []
            self._holders.subtract(chunks)
            free = [chunk for chunk in set(chunks) if self._holders[chunk] <= 0]
            for chunk in free:
                del self._holders[chunk]
        return np.array(free, np.int64)

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
