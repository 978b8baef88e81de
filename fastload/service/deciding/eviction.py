"""What stays in RAM and on disk, and what is evicted for what: decisions only. Nothing here waits or does I/O.

An object is *covered* while a live plan or a keep list names it.

In RAM, the order in which buffers are given up (`least_useful_first`) is looked at by the scheduler, which knows for
whom. First go chunks of objects that are not covered.

Each tier holds one part of the covered data epoch after epoch (`TierArcs`), an arc of `cache.policy.pin`: the disk's
arc is as long as the part of the covered bytes that its quota holds, and the arena's follows it. Where they lie depends
on the epoch in which an object is read, so all ranks of a node mean the same chunks.

Chunks are admitted to disk until the quota is full (`DiskAdmission`). After that a chunk may take the place of one that
is not covered, of these first of what was longest uncovered unless it was read since (SIEVE); else of one of its
own policy, where no order is known. A chunk of the disk's arc may take the place of one that is not, once that was
read in this epoch: it would be fetched in the next one, as this one is fetched now, so the exchange costs a write
and no fetch. Such victims are looked for along what plans have read, each position once.

Pinned objects (`pins`) are in none of these orders: nothing takes the place of their chunks, and only a quota that was
lowered takes them, last. The arcs of other data are parts of what the pins leave. A chunk of a pinned object may take
the place of any that is not pinned.

How much may be written is bounded too, since flash wears (`WriteBehind`).

The shares of all this are in `fastload.shares`. `disk_io.DiskEvictor` carries out what goes from disk, `residency` what
goes from RAM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastload import shares
from fastload.cache import ChunkKey
from fastload.cache.policy import BLIND, PolicyName
from fastload.cache.policy.pin import Arc, place
from fastload.cache.policy.unknown_order import Keyed, Lru, Sieve, SieveSlots, least
from fastload.service.state import NEVER, Chunk, Int64, ObjectEntry, Plan

# A direct read of 8 MiB runs at 1.6 GB/s in one thread.
DISK_READ_THREADS = 4
DISK_WRITE_THREADS = 2
# Also where few requests at a time fill the link, a consumer takes several chunks at once.
_PREFETCH_MIN = 32

# Of the chunk in a buffer: its object is not covered; it is, and its policy makes nothing of a known order; it is, and
# has an order.
NOT_COVERED, BY_SIEVE, BY_LRU, COVERED = range(4)
_CLASSES = {"sieve": BY_SIEVE, "lru": BY_LRU}

LATER = NEVER - 1
"""The next use of what no plan names ahead, but will be read again, and would have to be fetched."""


def eviction_class(entry: ObjectEntry) -> int:
    """The class of an object's chunks."""
    return _CLASSES.get(entry.policy, COVERED) if entry.plan_count else NOT_COVERED


def least_useful_first(
    buffers: Int64,
    classes: npt.NDArray[np.uint8],
    next_use: Int64,
    released_at: Int64,
    on_disk: npt.NDArray[np.bool_],
    sieve: SieveSlots,
    at_most: int,
) -> Int64:
    """The order in which chunks in RAM go, as places in these arrays, and no more than these.

    First what is not covered, by SIEVE, in which what is not used any more goes in the order in which it came. Then
    what is read in an unknown order, by its policy. Then what is covered but has no use ahead any more, the last used
    first: what is left of an epoch is as good as what goes, and the next epoch finds it (dropping the oldest
    would leave nothing to find); of these, first what is on disk, so that the two hold different chunks, and
    last what is of the arena's arc. In the end what will be used, the farthest use first.
    """
    is_ahead, is_covered = next_use < LATER, classes == COVERED
    rank = classes + np.where(is_covered, 2 * (next_use == LATER) + ~on_disk, 0)
    rank[is_ahead] = COVERED + 4
    within = np.where(is_covered, -released_at, released_at)
    by_sieve = classes < BY_LRU
    if (by_sieve & ~is_ahead).any():
        within[by_sieve] = sieve.order(buffers[by_sieve])
    within[is_ahead] = -next_use[is_ahead]
    some = _least(rank, within, at_most)
    return some[np.lexsort((within[some], rank[some]))]


def _least(rank: npt.NDArray[np.uint8], within: Int64, count: int) -> Int64:
    """Which are the first `count` by rank and within each, in no order: sorting all of a large arena takes too long."""
    if len(rank) <= count:
        return np.arange(len(rank))
    found = np.empty(0, np.int64)
    for each in range(int(rank.max()) + 1):
        (places,) = np.nonzero(rank == each)
        missing = count - len(found)
        if len(places) > missing:
            return np.concatenate([found, places[least(within[places], missing)]])
        found = np.concatenate([found, places])
    return found


class DiskOrder:
    """Which chunks the disk holds, and in which order they go. Changed by the loop's thread only."""

    def __init__(self, keys: Iterable[ChunkKey]) -> None:
        self._indexes: dict[bytes, dict[int, None]] = {}  # of the chunks that are held, by object
        self._policies: dict[bytes, PolicyName] = {}  # of covered objects
        self._pinned: set[bytes] = set()
        self.version = 0  # grows when something may go that might not before
        self._notify: Callable[[ChunkKey, int], None] = lambda key, times: None
        self._idle: Keyed[ChunkKey] = Sieve()
        self._by_policy: dict[str, Keyed[ChunkKey]] = {"sieve": Sieve(), "lru": Lru()}
        for key in keys:
            self.add(key)

    def __contains__(self, key: ChunkKey) -> bool:
        """Whether the chunk is on disk and not about to go."""
        return key.index in self._indexes.get(key.object_id, ())

    def watch(self, moved: Callable[[ChunkKey, int], None]) -> None:
        """Call `moved(key, 1)` for each chunk that comes from now on, and with -1 for each that goes."""
        self._notify = moved

    def add(self, key: ChunkKey) -> None:
        """The chunk is on disk."""
        indexes = self._indexes.setdefault(key.object_id, {})
        is_new = key.index not in indexes
        indexes[key.index] = None
        self.version += 1
        order = self._order_of(key.object_id)
        if order is not None:
            order.add(key)
        if is_new:
            self._notify(key, 1)

    def discard(self, key: ChunkKey) -> None:
        """The chunk has left the disk."""
        indexes = self._indexes.get(key.object_id)
        if indexes is None:
            return
        was_here = key.index in indexes
        indexes.pop(key.index, None)
        if not indexes:
            del self._indexes[key.object_id]
        order = self._order_of(key.object_id)
        if order is not None:
            order.discard(key)
        if was_here:
            self._notify(key, -1)

    def use(self, key: ChunkKey) -> None:
        """The chunk was read once more."""
        order = self._order_of(key.object_id)
        if order is not None:
            order.use(key)

    def cover(self, object_id: bytes, policy: PolicyName = "pin") -> None:
        """A live plan or keep list names the object, whose chunks stay and go by this policy from now on."""
        if self._policies.get(object_id) != policy:
            self._move(object_id, policy)

    def uncover(self, object_id: bytes) -> None:
        """No plan or keep list names it any longer."""
        self._move(object_id, None)

    def _move(self, object_id: bytes, policy: PolicyName | None) -> None:
        before = self._order_of(object_id)
        if policy is None:
            self._policies.pop(object_id, None)
        else:
            self._policies[object_id] = policy
        self._moved(object_id, before)

    def pin(self, object_id: bytes) -> None:
        """A pin names the object, whose chunks stay."""
        before = self._order_of(object_id)
        self._pinned.add(object_id)
        self._moved(object_id, before)

    def unpin(self, object_id: bytes) -> None:
        """No pin names it any longer."""
        before = self._order_of(object_id)
        self._pinned.discard(object_id)
        self._moved(object_id, before)

    def is_pinned(self, object_id: bytes) -> bool:
        return object_id in self._pinned

    def _moved(self, object_id: bytes, before: Keyed[ChunkKey] | None) -> None:
        self.version += 1
        after = self._order_of(object_id)
        if after is before:
            return
        for index in self._indexes.get(object_id, ()):
            key = ChunkKey(object_id, index)
            if before is not None:
                before.discard(key)
            if after is not None:
                after.add(key)

    def indexes_of(self, object_id: bytes) -> Collection[int]:
        """Which chunks of an object are held."""
        return self._indexes.get(object_id, ())

    def _order_of(self, object_id: bytes) -> Keyed[ChunkKey] | None:
        """That in which chunks of an object go; None where they stay by the disk's arc, or are pinned."""
        if object_id in self._pinned:
            return None
        policy = self._policies.get(object_id)
        return self._idle if policy is None else self._by_policy.get(policy)

    # What goes

    def may_evict(self, policy: PolicyName) -> bool:
        """Whether something could go for a chunk of this policy."""
        return bool(self._idle) or bool(self._by_policy.get(policy))

    def evict(self, policy: PolicyName) -> ChunkKey | None:
        """Choose what goes for a chunk of this policy, which counts as gone from now on."""
        order = self._idle if self._idle else self._by_policy.get(policy)
        if not order:
            return None
        key = order.evict()
        self.discard(key)
        return key

    def in_order(self) -> Iterator[ChunkKey]:
        """All chunks that are not pinned, as they should go if there must be less on disk: those of the arc last."""
        yield from self._idle.in_order()
        yield from self.covered()

    def covered(self) -> Iterator[ChunkKey]:
        """Those of covered objects, those of the arc last."""
        for order in self._by_policy.values():
            yield from order.in_order()
        for object_id, indexes in self._indexes.items():
            if object_id in self._policies and self._order_of(object_id) is None and object_id not in self._pinned:
                for index in indexes:
                    yield ChunkKey(object_id, index)

    def pinned(self) -> Iterator[ChunkKey]:
        """Those of pinned objects."""
        held = (object_id for object_id in self._pinned if object_id in self._indexes)
        return (ChunkKey(object_id, index) for object_id in held for index in self._indexes[object_id])


class DiskSizes(Protocol):
    """What is asked of the disk tier here: sizes, at once. See `resources.Disk`."""

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def quota_bytes(self) -> int: ...

    def file_bytes(self, length: int) -> int: ...


class TierArcs:
    """Which chunks each tier should hold of the covered data. Changed by the loop's thread only."""

    def __init__(self, disk: DiskSizes, ram_bytes: int, is_pinned: Callable[[bytes], bool]) -> None:
        self._disk, self._ram_bytes, self._is_pinned = disk, ram_bytes, is_pinned
        self._whole_file_bytes = disk.file_bytes(disk.chunk_bytes)
        self._covered_bytes = self._covered_file_bytes = 0  # of what is not pinned
        self.pinned_file_bytes = 0  # the disk's room that pins claim

    def file_bytes(self, size: int) -> int:
        """What all chunks of an object of so many bytes take on disk."""
        whole, rest = divmod(size, self._disk.chunk_bytes)
        return whole * self._whole_file_bytes + (self._disk.file_bytes(rest) if rest else 0)

    def cover(self, entry: ObjectEntry) -> None:
        self._count(entry, 1)

    def uncover(self, entry: ObjectEntry) -> None:
        self._count(entry, -1)

    def _count(self, entry: ObjectEntry, times: int) -> None:
        if not self._is_pinned(entry.id):
            self._covered_bytes += times * entry.info.size
            self._covered_file_bytes += times * self.file_bytes(entry.info.size)

    @property
    def disk_share(self) -> float:
        """The part of the covered data that the disk holds beside what is pinned, at most 1."""
        room = max(0.0, shares.DISK_CHUNKS * self._disk.quota_bytes - self.pinned_file_bytes)
        return min(1.0, room / max(1, self._covered_file_bytes))

    def belongs_on_disk(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the disk should hold a chunk."""
        if self._is_pinned(entry.id):
            return True
        share = self.disk_share
        return share >= 1.0 or Arc.of_epoch(entry.epoch, share).holds(place(entry.id, index))

    def belongs_in_ram(self, chunk: Chunk) -> bool:
        """Whether the arena should, rather than others that the disk does not hold."""
        entry, index = chunk.entry, chunk.index
        if self._is_pinned(entry.id):
            return False
        before = self.disk_share
        share = shares.ARC * self._ram_bytes / max(1, self._covered_bytes)
        return before < 1.0 and Arc.of_epoch(entry.epoch, share, before).holds(place(entry.id, index))


class DiskAdmission:
    """Which chunk may go from a full disk for another. Used by the loop's thread only."""

    def __init__(
        self,
        order: DiskOrder,
        arcs: TierArcs,
        plans: Callable[[], Sequence[Plan]],
        entry_of: Callable[[bytes], ObjectEntry | None],
    ) -> None:
        self._order, self._arcs, self._plans, self._entry_of = order, arcs, plans, entry_of
        self._for_pinned: list[ChunkKey] = []  # what may go for a pinned chunk, the first to go last
        self._looked_at = -1  # the order's version when these were looked for

    @property
    def has_spare(self) -> bool:
        """Whether something is on disk that is not covered."""
        return self._order.may_evict("pin")

    def may_evict_for(self, chunk: Chunk) -> bool:
        """Whether something may go for this chunk."""
        return self._order.may_evict(chunk.entry.policy) or self._victim_for(chunk) is not None

    def evict_for(self, chunk: Chunk) -> ChunkKey | None:
        """Choose the victim for this chunk, which counts as gone from now on; None where nothing may go."""
        key = self._order.evict(chunk.entry.policy)
        if key is None:
            key = self._victim_for(chunk)
            if key is not None:
                self._order.discard(key)
        return key

    def may_evict_for_pinned(self) -> bool:
        """Whether something may go for a chunk that is pinned."""
        return self.has_spare or self._victim_for_pinned() is not None

    def _victim_for(self, chunk: Chunk) -> ChunkKey | None:
        entry = chunk.entry
        if self._order.is_pinned(entry.id):
            return self._victim_for_pinned()
        if entry.policy in BLIND or not entry.plan_count or not self._arcs.belongs_on_disk(entry, chunk.index):
            return None
        plans = self._plans()
        return next((key for plan in plans if (key := self._victim_of(plan, plans)) is not None), None)

    def _victim_for_pinned(self) -> ChunkKey | None:
        """Of all that plans name and pins do not: what stays by no arc first, then what is of none, then the rest. One
        pass finds victims for many chunks.
        """
        while True:
            while self._for_pinned:
                key = self._for_pinned[-1]
                if key in self._order and not self._order.is_pinned(key.object_id):
                    return key
                self._for_pinned.pop()
            if self._looked_at == self._order.version:
                return None
            self._looked_at = self._order.version
            self._for_pinned = sorted(self._order.covered(), key=self._is_in_arc)[::-1]

    def _is_in_arc(self, key: ChunkKey) -> bool:
        entry = self._entry_of(key.object_id)
        return entry is not None and entry.policy not in BLIND and self._arcs.belongs_on_disk(entry, key.index)

    def _victim_of(self, plan: Plan, plans: Sequence[Plan]) -> ChunkKey | None:
        """The first chunk that the plan has read, that is still there and that is not of the disk's arc."""
        for position, entry, index in plan.delivered_steps():
            key = entry.key(index)
            if key in self._order and entry.policy not in BLIND and not self._arcs.belongs_on_disk(entry, index):
                waits = [other for other in plans if other.position(entry, index) >= other.cursor]
                if not waits:
                    return key
                if any(other.epoch == plan.epoch for other in waits):
                    return None  # a rank that is a little behind: look here again
            plan.evicted_to = position + 1
        return None


def read_threads(buffer_count: int) -> int:
    """How many may read from disk: so few that a disk that hangs leaves a small arena two buffers, if it has four."""
    return max(1, min(DISK_READ_THREADS, buffer_count - 2 - write_threads(buffer_count)))


def write_threads(buffer_count: int) -> int:
    """How many may write to disk: see `read_threads`."""
    return min(DISK_WRITE_THREADS, max(1, (buffer_count - 2) // 2))


def write_queue_max(buffer_count: int) -> int:
    """How many chunks may wait for a slow disk to write them."""
    return max(1, int(buffer_count * shares.WRITE_QUEUE))


def prefetch_distance(buffer_count: int, requests_allowed: int) -> int:
    """How many chunks ahead prefetching may displace what will be used later (see `state`): twice as many as requests
    are allowed, or a quarter of a large arena, but never most of a small one.
    """
    least = max(_PREFETCH_MIN, 2 * requests_allowed)
    return min(max(least, int(buffer_count * shares.PREFETCH_LEAST)), max(1, int(buffer_count * shares.PREFETCH_MOST)))
