"""Which chunks the disk tier holds, and which of them may have to go, in which order.

Objects that a live plan or a claim names are *covered*. What is not goes first, and of that first what was longest
without a claim, unless it was read since (SIEVE). Covered chunks whose policy knows no order go by that policy, for
others of the same policy; all others are pinned, and only `room` takes one of them for a better one.

Which chunks each tier should hold of the data that live plans and claims name: the arcs of `cache.policy.pin`.

The disk's arc is as long as the part of the covered bytes that its quota holds, and the arena's follows it. Where they
lie is a matter of the epoch in which an object is read, so all ranks of a node mean the same chunks.

Whose room on disk a chunk may take, where there is none left.

First that of chunks that nobody has a use for; that of others of its own policy, where no order is known. A chunk that
should be pinned (see `pins`) may take the room of one that should not, once that was read in this epoch: it would be
fetched in the next one, as this one is fetched now, so the exchange costs a write and no fetch. Such *leavers* are
looked for along what plans have read, each position once.

How much may be written to disk: so many bytes a second on average, since flash wears.

A token bucket. What was not used lately may be used at once, up to ten seconds of it; a write is let through while
anything is left, so that a chunk may be larger than all of that, and what it takes beyond is missing afterwards. Pure:
the time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fastload.cache import ChunkKey
from fastload.cache.policy import BLIND, PolicyName
from fastload.cache.policy.pin import Arc, place
from fastload.cache.policy.unknown_order import Keyed, Lru, Sieve
from fastload.service.ports import Disk
from fastload.service.state import Chunk, ObjectEntry, Plan


class DiskOrder:
    """Changed by the loop's thread only."""

    def __init__(self, keys: Iterable[ChunkKey]) -> None:
        self._indexes: dict[bytes, dict[int, None]] = {}  # of the chunks that are held, by object
        self._policies: dict[bytes, PolicyName] = {}  # of covered objects
        self._idle: Keyed[ChunkKey] = Sieve()
        self._by_policy: dict[str, Keyed[ChunkKey]] = {"sieve": Sieve(), "lru": Lru()}
        for key in keys:
            self.add(key)

    def __contains__(self, key: ChunkKey) -> bool:
        """Whether the chunk is on disk and not about to go."""
        return key.index in self._indexes.get(key.object_id, ())

    def add(self, key: ChunkKey) -> None:
        """The chunk is on disk."""
        self._indexes.setdefault(key.object_id, {})[key.index] = None
        order = self._order_of(key.object_id)
        if order is not None:
            order.add(key)

    def discard(self, key: ChunkKey) -> None:
        """The chunk is on disk no more."""
        indexes = self._indexes.get(key.object_id)
        if indexes is None:
            return
        indexes.pop(key.index, None)
        if not indexes:
            del self._indexes[key.object_id]
        order = self._order_of(key.object_id)
        if order is not None:
            order.discard(key)

    def use(self, key: ChunkKey) -> None:
        """The chunk was read once more."""
        order = self._order_of(key.object_id)
        if order is not None:
            order.use(key)

    def cover(self, object_id: bytes, policy: PolicyName = "pin") -> None:
        """A live plan or claim names the object, whose chunks stay and go by this policy from now on."""
        if self._policies.get(object_id) != policy:
            self._move(object_id, policy)

    def uncover(self, object_id: bytes) -> None:
        """None names it any more."""
        self._move(object_id, None)

    def _move(self, object_id: bytes, policy: PolicyName | None) -> None:
        keys = [ChunkKey(object_id, index) for index in self._indexes.get(object_id, ())]
        before = self._order_of(object_id)
        if policy is None:
            self._policies.pop(object_id, None)
        else:
            self._policies[object_id] = policy
        after = self._order_of(object_id)
        for key in keys:
            if before is not None:
                before.discard(key)
            if after is not None:
                after.add(key)

    def _order_of(self, object_id: bytes) -> Keyed[ChunkKey] | None:
        """That in which chunks of an object go; None where they are pinned."""
        policy = self._policies.get(object_id)
        return self._idle if policy is None else self._by_policy.get(policy)

    # What goes

    def may_evict(self, policy: PolicyName) -> bool:
        """Whether something could go for a chunk of this policy."""
        return bool(self._idle) or bool(self._by_policy.get(policy))

    def evict(self, policy: PolicyName) -> ChunkKey | None:
        """Choose what goes for a chunk of this policy; it counts as gone."""
        order = self._idle if self._idle else self._by_policy.get(policy)
        if not order:
            return None
        key = order.evict()
        self.discard(key)
        return key

    def idle(self) -> Iterator[ChunkKey]:
        """The chunks that nobody has a use for, those that go first in front."""
        return self._idle.in_order()

    def covered(self) -> Iterator[ChunkKey]:
        """The others, pinned ones last."""
        for order in self._by_policy.values():
            yield from order.in_order()
        for object_id, indexes in self._indexes.items():
            if object_id in self._policies and self._order_of(object_id) is None:
                for index in indexes:
                    yield ChunkKey(object_id, index)


# Of the disk's quota, what chunks can be sure of: indexes lie there too. The rest is filled with what comes.
_DISK_SHARE = 0.97
# Of the arena, what pins can be sure of: the rest is for what is being read and what comes next.
_RAM_SHARE = 0.5


class Pins:
    """Changed by the loop's thread only."""

    def __init__(self, disk: Disk, ram_bytes: int) -> None:
        self._disk, self._ram_bytes = disk, ram_bytes
        self._whole_file_bytes = disk.file_bytes(disk.chunk_bytes)
        self._covered_bytes = self._covered_file_bytes = self._covered_chunks = 0

    def cover(self, entry: ObjectEntry) -> None:
        """An object is covered."""
        self._count(entry, 1)

    def uncover(self, entry: ObjectEntry) -> None:
        """It is covered no more."""
        self._count(entry, -1)

    def _count(self, entry: ObjectEntry, times: int) -> None:
        self._covered_bytes += times * entry.info.size
        self._covered_chunks += times * entry.chunk_count
        self._covered_file_bytes += times * entry.chunk_count * self._whole_file_bytes
        if entry.chunk_count:
            last = self._disk.file_bytes(entry.length(entry.chunk_count - 1))
            self._covered_file_bytes += times * (last - self._whole_file_bytes)

    @property
    def buffers_needed(self) -> int:
        """How many buffers the covered data takes; 0 where it leaves most of each of them empty, so that having their
        memory ready would take several times the room of the data.
        """
        is_dense = 2 * self._covered_bytes >= self._covered_chunks * self._disk.chunk_bytes
        return self._covered_chunks if is_dense else 0

    @property
    def disk_share(self) -> float:
        """The part of the covered data that the disk holds, at most 1."""
        return min(1.0, _DISK_SHARE * self._disk.quota_bytes / max(1, self._covered_file_bytes))

    def belongs_on_disk(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the disk should hold a chunk."""
        share = self.disk_share
        return share >= 1.0 or Arc.of_epoch(entry.epoch, share).holds(place(entry.id, index))

    def belongs_in_ram(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the arena should, rather than others that the disk does not hold."""
        before = self.disk_share
        share = _RAM_SHARE * self._ram_bytes / max(1, self._covered_bytes)
        return before < 1.0 and Arc.of_epoch(entry.epoch, share, before).holds(place(entry.id, index))


class Room:
    """Used by the loop's thread only. `plans` are those that are read."""

    def __init__(self, order: DiskOrder, pins: Pins, plans: Callable[[], Sequence[Plan]]) -> None:
        self._order, self._pins, self._plans = order, pins, plans

    @property
    def is_spare(self) -> bool:
        """Whether something is on disk that nobody has a use for."""
        return self._order.may_evict("pin")

    def can_be_made(self, chunk: Chunk) -> bool:
        """Whether something could go for this chunk."""
        return self._order.may_evict(chunk.entry.policy) or self._victim_for(chunk) is not None

    def make(self, chunk: Chunk) -> ChunkKey | None:
        """Choose what goes for it, which counts as gone; None where nothing may."""
        key = self._order.evict(chunk.entry.policy)
        if key is None:
            key = self._victim_for(chunk)
            if key is not None:
                self._order.discard(key)
        return key

    def _victim_for(self, chunk: Chunk) -> ChunkKey | None:
        entry = chunk.entry
        if entry.policy in BLIND or not entry.plan_count or not self._pins.belongs_on_disk(entry, chunk.index):
            return None
        plans = self._plans()
        return next((key for plan in plans if (key := self._victim_of(plan, plans)) is not None), None)

    def _victim_of(self, plan: Plan, plans: Sequence[Plan]) -> ChunkKey | None:
        """The first leaver that the plan has read and that is still there."""
        for position, entry, index in plan.delivered_steps():
            key = entry.key(index)
            if key in self._order and entry.policy not in BLIND and not self._pins.belongs_on_disk(entry, index):
                waits = [other for other in plans if other.position(entry, index) >= other.cursor]
                if not waits:
                    return key
                if any(other.epoch == plan.epoch for other in waits):
                    return None  # a rank that is a little behind: look here again
            plan.evicted_to = position + 1
        return None


_SAVED_S = 10.0


class WriteBudget:
    """Used by one thread."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        """0 bytes a second: no limit."""
        self._bytes_per_s, self._left, self._at = bytes_per_s, bytes_per_s * _SAVED_S, now

    def change(self, bytes_per_s: int, now: float) -> None:
        """Another limit from now on; a debt stays."""
        self._refill(now)
        self._bytes_per_s = bytes_per_s
        self._left = min(self._left, bytes_per_s * _SAVED_S) if bytes_per_s else 0.0

    def take(self, byte_count: int, now: float, *, on_credit: bool = False) -> bool:
        """Whether a write of so many bytes may be made now, which is then counted. `on_credit`: it will be made anyway,
        and others wait for it.
        """
        self._refill(now)
        if self._bytes_per_s and self._left <= 0 and not on_credit:
            return False
        self._left -= byte_count
        return True

    def give_back(self, byte_count: int) -> None:
        """A write that was let through was not made."""
        self._left += byte_count

    def wait_s(self, now: float) -> float:
        """In how many seconds a write may be made again; 0: now."""
        self._refill(now)
        if not self._bytes_per_s or self._left > 0:
            return 0.0
        return (1 - self._left) / self._bytes_per_s

    def _refill(self, now: float) -> None:
        earned = self._bytes_per_s * (now - self._at)
        self._left = min(self._left + earned, self._bytes_per_s * _SAVED_S) if self._bytes_per_s else 0.0
        self._at = now
