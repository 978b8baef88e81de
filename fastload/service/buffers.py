"""The arena's buffers as the scheduler sees them: who lies where, and which could go.

One numpy row per buffer, so that choosing among thousands of buffers is a few array operations. The rows follow the
chunk records: whoever changes a chunk's state, leases or write calls `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fastload.service.model import Chunk, Recalled, State, Write
from fastload.service.plans import Plan

Int64 = npt.NDArray[np.int64]

FREE, LOADING, IDLE, QUEUED, WRITING, LEASED, STUCK, STRANDED = range(8)
"""What is in a buffer: nothing; a chunk being filled in; a chunk that may go at once; one whose write has not begun;
one being written; a leased one whose lease may be asked back; a leased one for which that has been done or would not
help; a chunk, or nothing any more, under a read or write that hangs."""

NEVER = np.iinfo(np.int64).max


class BufferTable:
    """Changed by the loop's thread only."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.status = np.full(count, FREE, np.uint8)
        self.chunks: list[Chunk | None] = [None] * count
        self._released = np.zeros(count, np.int64)  # when it was last let go of, in `_clock` ticks
        self._covered = np.zeros(count, bool)  # a live plan names its object
        self._positions: dict[Plan, Int64] = {}  # per plan, -1 where the buffer's chunk is not in it
        self._clock = 0
        self.used_count = 0  # no buffer from this number on was ever used
        # Buffers are used again last in, first out, and fresh ones from the lowest up: used memory is touched already,
        # and what lies beyond need never be (see `populate`).
        self._free = list(range(count))[::-1]

    @property
    def free_count(self) -> int:
        """How many buffers hold nothing."""
        return len(self._free)

    @property
    def stranded_count(self) -> int:
        """How many buffers cannot be used because a read or write hangs."""
        return int(np.count_nonzero(self.status == STRANDED))

    def free(self) -> list[int]:
        """The buffers that hold nothing; the one to use next is the last."""
        return self._free.copy()

    def place(self, chunk: Chunk, buffer: int) -> None:
        """Give the free `buffer` to `chunk`."""
        assert self.chunks[buffer] is None, "a buffer was given away twice"
        if self._free[-1] == buffer:
            self._free.pop()
        else:
            self._free.remove(buffer)
        self.used_count = max(self.used_count, buffer + 1)
        self.chunks[buffer] = chunk
        chunk.buffer = buffer
        self.touch(chunk)
        self._covered[buffer] = chunk.entry.plan_count > 0
        for plan, positions in self._positions.items():
            positions[buffer] = plan.position(chunk.entry, chunk.index)
        self.refresh(chunk)

    def clear(self, chunk: Chunk) -> None:
        """Take the chunk's buffer back."""
        self.reclaim(self.strand(chunk))

    def strand(self, chunk: Chunk) -> int:
        """Part the chunk from its buffer, which cannot be used until `reclaim`; returns it."""
        buffer, chunk.buffer = chunk.buffer, -1
        self.chunks[buffer] = None
        self.status[buffer] = STRANDED
        return buffer

    def reclaim(self, buffer: int) -> None:
        """The buffer holds nothing, and nobody writes to it any more."""
        self.status[buffer] = FREE
        self._free.append(buffer)

    def touch(self, chunk: Chunk) -> None:
        """The chunk was let go of just now."""
        self._clock += 1
        self._released[chunk.buffer] = self._clock

    def refresh(self, chunk: Chunk) -> None:
        """The chunk's record has changed."""
        if chunk.buffer >= 0:
            self.status[chunk.buffer] = _status(chunk)

    # Plans

    def add_plan(self, plan: Plan) -> None:
        """A plan begins; its objects are counted already."""
        self._positions[plan] = np.full(self.count, -1, np.int64)
        self.replan(plan)
        self._recover()

    def remove_plan(self, plan: Plan) -> None:
        """A plan has ended; its objects are discounted already."""
        del self._positions[plan]
        self._recover()

    def replan(self, plan: Plan) -> None:
        """The next positions of a plan's chunks have changed."""
        positions = self._positions[plan]
        for buffer, chunk in enumerate(self.chunks):
            if chunk is not None:
                positions[buffer] = plan.position(chunk.entry, chunk.index)

    def _recover(self) -> None:
        for buffer, chunk in enumerate(self.chunks):
            self._covered[buffer] = chunk is not None and chunk.entry.plan_count > 0

    # Choosing

    def next_use(self) -> Int64:
        """int64[count]: how many chunks ahead the nearest use of each buffer is, over all plans; `NEVER` for none."""
        nearest = np.full(self.count, NEVER, np.int64)
        for plan, positions in self._positions.items():
            ahead = positions - plan.cursor
            np.minimum(nearest, np.where(ahead >= 0, ahead, NEVER), out=nearest)
        return nearest

    def by_usefulness(self, statuses: Iterable[int]) -> tuple[list[int], list[int]]:
        """Buffers with one of these statuses, the least useful first, and the next use of each.

        First what no live plan names, longest unused first. Then what a live plan names but has no use for any more,
        the last used first: what is left of an epoch is as good as what goes, and the next epoch finds it (a pin, where
        dropping the oldest would leave nothing to find). Last what will be used, the farthest use first.
        """
        (buffers,) = np.nonzero(np.isin(self.status, list(statuses)))
        next_use = self.next_use()[buffers]
        covered, released = self._covered[buffers], self._released[buffers]
        spent = next_use == NEVER
        rank = np.where(~spent, 2, np.where(covered, 1, 0))
        within = np.where(~spent, -next_use, np.where(covered, -released, released))
        order = np.lexsort((within, rank))
        return buffers[order].tolist(), next_use[order].tolist()


def _status(chunk: Chunk) -> int:
    if chunk.state is State.LOADING:
        return LOADING
    if chunk.write is Write.HUNG:
        return STRANDED
    if chunk.lessees:
        ready = chunk.recalled is Recalled.NO and chunk.write is not Write.RUNNING
        return LEASED if ready else STUCK
    return {Write.NONE: IDLE, Write.QUEUED: QUEUED, Write.RUNNING: WRITING}[chunk.write]
