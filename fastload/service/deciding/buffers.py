"""The arena's buffers as the scheduler sees them: which chunk lies where, and which could go.

There is one numpy row per buffer, so that choosing among thousands of buffers is a few array operations. The rows
follow the chunk records: a change of a chunk's state, leases or write is followed by `refresh`.

Of a long plan each buffer has a position, and each decision looks through all of them. A prediction is a short plan:
each reader has its own, and gets another very often. Of these each position has a buffer instead (`ShortPlans`), and
only those between cursor and `prefetched_to` are looked at. With 128 readers and 16,384 buffers that is a tenth of a
millisecond a decision, where looking through all buffers for each took ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fastload.cache.policy.unknown_order import SieveSlots
from fastload.service.deciding.eviction import BY_LRU, COVERED, LATER, eviction_class, least_useful_first
from fastload.service.state import NEVER, Chunk, ChunkState, Int64, ObjectEntry, Plan, RecallState, WriteState

FREE, LOADING, IDLE, QUEUED, WRITING, LEASED, STUCK, QUARANTINED = range(8)
"""What is in a buffer: nothing; a chunk being filled in; a chunk that may go at once; one whose write has not begun;
one being written; a leased one whose lease may be asked back; a leased one for which that has been done or would not
help; a chunk, or nothing any more, under a read or write that hangs."""


class BufferTable:
    """Changed by the loop's thread only."""

    def __init__(self, count: int, is_in_arc: Callable[[Chunk], bool] = lambda chunk: False) -> None:
        """`is_in_arc(chunk)`: whether a chunk that the disk does not hold should rather stay than others."""
        self.count, self._is_in_arc = count, is_in_arc
        self.status = np.full(count, FREE, np.uint8)
        self.chunks: list[Chunk | None] = [None] * count
        self._released_at = np.zeros(count, np.int64)  # when it was last let go of, in `_clock` ticks
        self._eviction_class = np.zeros(count, np.uint8)
        self._in_arc = np.zeros(count, bool)
        self._on_disk = np.zeros(count, bool)  # as far as was said: it may have gone there since
        self._sieve = SieveSlots(count)
        self._positions: dict[Plan, Int64] = {}  # per long plan, -1 where the buffer's chunk is not in it
        self._short_plans = ShortPlans()
        self._clock = 0
        self._notify: Callable[[Chunk, int], None] = lambda chunk, times: None
        # Buffers are used again last in, first out, before fresh ones: used memory is the machine's no more, and what
        # was never used takes up nothing.
        self._free = list(range(count))[::-1]

    def watch(self, moved: Callable[[Chunk, int], None]) -> None:
        """Call `moved(chunk, 1)` for each chunk that gets a buffer from now on, and with -1 for each that leaves it."""
        self._notify = moved

    @property
    def free_count(self) -> int:
        """How many buffers hold nothing."""
        return len(self._free)

    def stats(self) -> dict[str, int]:
        """How many buffers are in which state."""
        count = np.bincount(self.status, minlength=QUARANTINED + 1).tolist()
        return {
            "buffers": self.count,
            "buffers_free": count[FREE],
            "buffers_leased": count[LEASED] + count[STUCK],
            "buffers_stranded": count[QUARANTINED],
        }

    @property
    def quarantined_count(self) -> int:
        """How many buffers cannot be used because a read or write hangs."""
        return int(np.count_nonzero(self.status == QUARANTINED))

    def free(self) -> list[int]:
        """The buffers that hold nothing; the one to use next is the last."""
        return self._free.copy()

    def place(self, chunk: Chunk, buffer: int, *, on_disk: bool = False) -> None:
        """Give the free `buffer` to `chunk`, which the disk holds as well, or does not."""
        assert self.chunks[buffer] is None, "a buffer was given away twice"
        if self._free[-1] == buffer:
            self._free.pop()
        else:
            self._free.remove(buffer)
        self.chunks[buffer] = chunk
        chunk.place(buffer)
        self.touch(chunk)
        self._sieve.came(buffer)
        self._on_disk[buffer] = on_disk
        self._classify(chunk)
        for plan, positions in self._positions.items():
            positions[buffer] = plan.position(chunk.entry, chunk.index)
        self._short_plans.lies(chunk, buffer)
        self.refresh(chunk)
        self._notify(chunk, 1)

    def clear(self, chunk: Chunk) -> None:
        """Take the chunk's buffer back."""
        self.release(self.quarantine(chunk))

    def quarantine(self, chunk: Chunk) -> int:
        """Part the chunk from its buffer, which cannot be used until `release`; returns it."""
        buffer = chunk.displace()
        self.chunks[buffer] = None
        self.status[buffer] = QUARANTINED
        self._short_plans.lies(chunk, -1)
        self._notify(chunk, -1)
        return buffer

    def borrow(self) -> int:
        """A free buffer for a read that may turn out to be for nothing; it cannot be used until `release`."""
        buffer = self._free.pop()
        self.status[buffer] = QUARANTINED
        return buffer

    def release(self, buffer: int) -> None:
        """The buffer holds nothing, and no call writes to it any more."""
        self.status[buffer] = FREE
        self._free.append(buffer)

    @property
    def is_empty(self) -> bool:
        return not any(self.chunks)

    def touch(self, chunk: Chunk) -> None:
        """The chunk was let go of just now."""
        self._clock += 1
        self._released_at[chunk.buffer] = self._clock

    def use(self, chunk: Chunk) -> None:
        """The chunk was here when it was asked for."""
        self._sieve.use(chunk.buffer)

    def written(self, chunk: Chunk) -> None:
        """The disk holds the chunk as well."""
        if chunk.buffer >= 0:
            self._on_disk[chunk.buffer] = True

    def evicted(self, chunk: Chunk) -> None:
        """The chunk is about to go, because others need its buffer more."""
        if self._eviction_class[chunk.buffer] < BY_LRU:
            self._sieve.evicted(chunk.buffer)

    def refresh(self, chunk: Chunk) -> None:
        """The chunk's record has changed."""
        if chunk.buffer >= 0:
            self.status[chunk.buffer] = _status(chunk)

    # Plans

    def add_plan(self, plan: Plan) -> None:
        """A plan begins; its objects are counted already."""
        if plan.places is not None:
            self._short_plans.add(plan)
        else:
            self._positions[plan] = np.full(self.count, -1, np.int64)
            self.replan(plan)
        if plan.covers:
            self.recompute_eviction_classes()

    def remove_plan(self, plan: Plan) -> None:
        """A plan has ended; its objects are discounted already."""
        if plan.places is not None:
            self._short_plans.remove(plan)
        else:
            del self._positions[plan]
        if plan.covers:
            self.recompute_eviction_classes()

    def replan(self, plan: Plan) -> None:
        """The next positions of a long plan's chunks have changed."""
        positions = self._positions[plan]
        for buffer, chunk in enumerate(self.chunks):
            if chunk is not None:
                positions[buffer] = plan.position(chunk.entry, chunk.index)

    def recompute_eviction_classes(self) -> None:
        """Which objects are covered has changed."""
        for chunk in self.chunks:
            if chunk is not None:
                self._classify(chunk)

    def _classify(self, chunk: Chunk) -> None:
        self._eviction_class[chunk.buffer] = eviction_class(chunk.entry)
        self._in_arc[chunk.buffer] = chunk.entry.plan_count > 0 and self._is_in_arc(chunk)

    # Choosing

    def count_of(self, statuses: Iterable[int]) -> int:
        return int(np.count_nonzero(self._has(statuses)))

    def _has(self, statuses: Iterable[int]) -> npt.NDArray[np.bool_]:
        """Which have one of these; twice a tick, so not `np.isin`, which takes 30 us whatever there is."""
        wanted = np.zeros(QUARANTINED + 1, bool)
        wanted[list(statuses)] = True
        return wanted[self.status]

    def next_use(self) -> Int64:
        """int64[count]: how many chunks ahead the nearest use of each buffer is, over all plans; `NEVER` for none."""
        nearest = np.full(self.count, NEVER, np.int64)
        for plan, positions in self._positions.items():
            np.minimum(nearest, plan.ahead(positions), out=nearest)
        self._short_plans.lower(nearest)
        is_kept = self._in_arc & ~self._on_disk & (self._eviction_class == COVERED)
        return np.where(is_kept & (nearest == NEVER), LATER, nearest)

    def by_usefulness(self, statuses: Iterable[int], at_most: int = 1 << 62) -> tuple[list[int], list[int]]:
        """Buffers with one of these statuses, the least useful first and no more than these, and the next use of each.
        See `eviction.least_useful_first`.
        """
        (buffers,) = np.nonzero(self._has(statuses))
        next_use = self.next_use()[buffers]
        order = least_useful_first(
            buffers,
            self._eviction_class[buffers],
            next_use,
            self._released_at[buffers],
            self._on_disk[buffers],
            self._sieve,
            at_most,
        )
        return buffers[order].tolist(), next_use[order].tolist()


def _status(chunk: Chunk) -> int:
    if chunk.state is ChunkState.LOADING:
        return LOADING
    if chunk.write is WriteState.HUNG:
        return QUARANTINED
    if chunk.lessees:
        ready = chunk.recalled is RecallState.NO and chunk.write is not WriteState.RUNNING
        return LEASED if ready else STUCK
    return {WriteState.NONE: IDLE, WriteState.QUEUED: QUEUED, WriteState.RUNNING: WRITING}[chunk.write]


class ShortPlans:
    """Changed by the loop's thread only."""

    def __init__(self) -> None:
        self._buffers: dict[Plan, Int64] = {}  # by position, -1 where the chunk is not in RAM
        self._naming: dict[tuple[ObjectEntry, int], dict[Plan, list[int]]] = {}  # a chunk's plans, and where

    def add(self, plan: Plan) -> None:
        """A plan begins."""
        assert plan.places is not None, "a long plan"
        buffers = np.full(plan.chunk_count, -1, np.int64)
        for (entry, index), positions in plan.places.items():
            self._naming.setdefault((entry, index), {})[plan] = positions
            chunk = entry.chunks.get(index)
            if chunk is not None and chunk.buffer >= 0:
                buffers[positions] = chunk.buffer
        self._buffers[plan] = buffers

    def remove(self, plan: Plan) -> None:
        """A plan has ended."""
        assert plan.places is not None, "a long plan"
        del self._buffers[plan]
        for place in plan.places:
            naming = self._naming[place]
            del naming[plan]
            if not naming:
                del self._naming[place]

    def lies(self, chunk: Chunk, buffer: int) -> None:
        """The chunk is in this buffer now, -1: in none."""
        for plan, positions in self._naming.get((chunk.entry, chunk.index), {}).items():
            self._buffers[plan][positions] = buffer

    def lower(self, nearest: Int64) -> None:
        """Make `nearest`, how many chunks ahead the next use of each buffer is, as small as these plans have it."""
        parts = [buffers[plan.cursor : plan.prefetched_to] for plan, buffers in self._buffers.items()]
        if not parts:
            return
        steps = np.arange(max(map(len, parts)))
        buffers, ahead = np.concatenate(parts), np.concatenate([steps[: len(part)] for part in parts])
        is_here = buffers >= 0
        np.minimum.at(nearest, buffers[is_here], ahead[is_here])
