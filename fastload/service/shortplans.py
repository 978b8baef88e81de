"""Where the chunks of short plans lie. A prediction is one: each reader has its own, and gets another very often.

Of a long plan each buffer has a position (see `buffers`), and each decision looks through all of them. Of a short one
each position has a buffer instead, and only those between its cursor and its sight are looked at. With 128 readers and
16,384 buffers that is a tenth of a millisecond a decision, where looking through all buffers for each took ten.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastload.service.model import Chunk, ObjectEntry
from fastload.service.plans import Plan

Int64 = npt.NDArray[np.int64]


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
        parts = [buffers[plan.cursor : plan.sight] for plan, buffers in self._buffers.items()]
        if not parts:
            return
        steps = np.arange(max(map(len, parts)))
        buffers, ahead = np.concatenate(parts), np.concatenate([steps[: len(part)] for part in parts])
        is_here = buffers >= 0
        np.minimum.at(nearest, buffers[is_here], ahead[is_here])
