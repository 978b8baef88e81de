"""Which chunks the disk tier holds, and which of them may have to go, in which order.

Objects that a live plan or a claim names are *covered*. What is not goes first, and of that first what was longest
without a claim, unless it was read since (SIEVE). Covered chunks whose policy knows no order go by that policy, for
others of the same policy; all others are pinned, and only `room` takes one of them for a better one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastload.cache import ChunkKey
from fastload.cache.policy import PolicyName
from fastload.cache.policy.unknown_order import Keyed, Lru, Sieve


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
