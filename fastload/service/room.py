"""Whose room on disk a chunk may take, where there is none left.

First that of chunks that nobody has a use for; that of others of its own policy, where no order is known. A chunk that
should be pinned (see `pins`) may take the room of one that should not, once that was read in this epoch: it would be
fetched in the next one, as this one is fetched now, so the exchange costs a write and no fetch. Such *leavers* are
looked for along what plans have read, each position once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastload.cache import ChunkKey
from fastload.cache.policy import BLIND
from fastload.service.diskorder import DiskOrder
from fastload.service.model import Chunk
from fastload.service.pins import Pins
from fastload.service.plans import Plan


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
        return self._order.may_evict(chunk.entry.policy) or self._leaver_for(chunk) is not None

    def make(self, chunk: Chunk) -> ChunkKey | None:
        """Choose what goes for it, which counts as gone; None where nothing may."""
        key = self._order.evict(chunk.entry.policy)
        if key is None:
            key = self._leaver_for(chunk)
            if key is not None:
                self._order.discard(key)
        return key

    def _leaver_for(self, chunk: Chunk) -> ChunkKey | None:
        entry = chunk.entry
        if entry.policy in BLIND or not entry.plan_count or not self._pins.belongs_on_disk(entry, chunk.index):
            return None
        plans = self._plans()
        return next((key for plan in plans if (key := self._leaver_of(plan, plans)) is not None), None)

    def _leaver_of(self, plan: Plan, plans: Sequence[Plan]) -> ChunkKey | None:
        """The first leaver that the plan has read and that is still there."""
        for position, entry, index in plan.swept_steps():
            key = entry.key(index)
            if key in self._order and entry.policy not in BLIND and not self._pins.belongs_on_disk(entry, index):
                waits = [other for other in plans if other.position(entry, index) >= other.cursor]
                if not waits:
                    return key
                if any(other.epoch == plan.epoch for other in waits):
                    return None  # a rank that is a little behind: look here again
            plan.swept = position + 1
        return None
