"""The known order of one consumer: which chunk is needed how soon.

Positions count chunks along the plan: all chunks of its first object, then of its second, and so on. `cursor` is the
first position that may still be needed. `frontier` is a remembered answer, the first position at or after the cursor
whose chunk is not in RAM, so that looking for work does not begin at the cursor each time; whoever drops a chunk of the
plan moves it back (`dropped`).

`reach` is how far the consumer has come: one past the furthest position it was granted. Beyond `reach` plus a fixed
transit, prefetching takes only room that no plan has a use for. Without that bound it would run ahead until the whole
arena held just the next chunks, dropping ones that later positions would have found there, each of which would have to
be fetched again: of an arena of half the data, a quarter would be left to hit instead of half.

A warm plan's chunks may be read too, in an order of their own, many times each: its `uses`, which are told bit by bit.

`swept` is how far what was read has been looked through for chunks to give up (see `room`). A plan that `is_blind` is
of data whose user wants a policy for unknown orders: it is fetched ahead within the transit, and what lies beyond is as
good as unknown.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fastload import protocol
from fastload.cache.policy.known_order import FAR, NextUses
from fastload.errors import ServiceError
from fastload.service.model import ObjectEntry, State

Step = tuple[int, ObjectEntry, int]  # position, object, chunk index
Int64 = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int64).max

_ANY_DEPTH = 1 << 62
# Uses that are told and not made: 16 bytes each. Nobody looks so far ahead (see `cache.policy.known_order`).
_USES_MAX = 1 << 24


class Plan:
    """Changed by the loop's thread only."""

    # Whether its objects count as covered (see `planset`).
    covers = True
    # Of a short plan, which is a blind one, the positions of each chunk, in order; None: it is long (see `shortplans`).
    places: Mapping[tuple[ObjectEntry, int], list[int]] | None = None

    def __init__(self, entries: Sequence[ObjectEntry], options_key: str, epoch: int, cursor: int = 0) -> None:
        self.entries = list(entries)
        self.options_key = options_key
        # The same for plans that name the same objects in the same order, for the same credentials.
        self.likeness = options_key, hashlib.blake2b(array("Q", map(id, self.entries)), digest_size=16).digest()
        self.epoch = epoch
        self.cursor = self.frontier = self.reach = self.swept = cursor
        self.uses: NextUses | None = None
        self.is_blind = False
        self.sight = cursor  # of a blind plan, up to where it was fetched ahead
        self.depth = _ANY_DEPTH  # of a blind plan, how far ahead at most
        self.failed: set[int] = set()  # positions that prefetching leaves alone: only a demand tries them again
        self._starts = [0, *accumulate(entry.chunk_count for entry in entries)]
        self._starts_of: dict[ObjectEntry, list[int]] = {}
        for entry, start in zip(self.entries, self._starts, strict=False):
            self._starts_of.setdefault(entry, []).append(start)

    @property
    def chunk_count(self) -> int:
        """How many positions it has."""
        return self._starts[-1]

    @property
    def repeats(self) -> bool:
        """Whether an object occurs more than once."""
        return len(self._starts_of) < len(self.entries)

    def objects(self) -> Iterator[ObjectEntry]:
        """Its objects, each once."""
        return iter(self._starts_of)

    def position(self, entry: ObjectEntry, index: int) -> int:
        """The next position of a chunk: the first at or after the cursor, else its last; -1 if it has none."""
        starts = self._starts_of.get(entry)
        if starts is None:
            return -1
        for start in starts:
            if start + index >= self.cursor:
                return start + index
        return starts[-1] + index

    def ahead(self, positions: Int64) -> Int64:
        """How many chunks ahead of the cursor these positions are, `NEVER` for what is behind it or -1."""
        if self.uses is not None:
            next_uses = self.uses.of(positions)
            return np.where(next_uses < FAR, next_uses - self.uses.cursor, NEVER)
        ahead = positions - self.cursor
        is_needed = (ahead >= 0) & (positions < self.sight) if self.is_blind else ahead >= 0
        return np.where(is_needed, ahead, NEVER)

    def foresee(self, message: protocol.Uses) -> None:
        """More of its uses are told; `ServiceError` where one is of no chunk of the plan, or they are no numbers."""
        if len(message.positions) % 4:
            raise ServiceError(f"a message names positions in {len(message.positions)} bytes, not four for each")
        positions = np.frombuffer(message.positions, "<i4").astype(np.int32)
        if len(positions) and not (positions.min() >= 0 and positions.max() < self.chunk_count):
            raise ServiceError(f"a message names position {positions.max()} (or less than 0) of {self.chunk_count}")
        if self.uses is None:
            self.uses = NextUses(self.chunk_count)
        ahead = message.first + len(positions) - self.uses.cursor
        if message.first == self.uses.end and ahead > _USES_MAX:
            raise ServiceError(f"a message tells {ahead} uses ahead, more than {_USES_MAX}")
        self.uses.tell(message.first, positions)

    def swept_steps(self) -> Iterator[Step]:
        """What was read and has not been looked through; whoever has done so moves `swept` on."""
        for step in self._steps(self.swept):
            if step[0] >= self.cursor:
                return
            yield step

    def at(self, position: int) -> tuple[ObjectEntry, int]:
        """The chunk at a position."""
        number = bisect_right(self._starts, position) - 1
        return self.entries[number], position - self._starts[number]

    def advance(self, position: int) -> None:
        """Nothing below `position` is needed any more."""
        self.cursor = max(self.cursor, min(position, self.chunk_count))

    def reached(self, entry: ObjectEntry, index: int) -> None:
        """The consumer was granted this chunk."""
        self.reach = max(self.reach, self.position(entry, index) + 1)

    def dropped(self, entry: ObjectEntry, index: int) -> None:
        """A chunk is in RAM no more."""
        position = self.position(entry, index)
        if self.cursor <= position < self.frontier:
            self.frontier = position

    def missing(self) -> Iterator[Step]:
        """What is not in RAM nor on its way there, in order of need."""
        self.frontier = max(self.frontier, self.cursor)
        at_frontier = True
        for position, entry, index in self._steps(self.frontier):
            chunk = entry.chunks.get(index)
            if (chunk is not None and chunk.state is not State.ABSENT) or position in self.failed:
                if at_frontier:
                    self.frontier = position + 1
                continue
            at_frontier = False
            yield position, entry, index

    def _steps(self, position: int) -> Iterator[Step]:
        if position >= self.chunk_count:
            return
        first = bisect_right(self._starts, position) - 1
        for number in range(first, len(self.entries)):
            entry, start = self.entries[number], self._starts[number]
            for index in range(max(0, position - start), entry.chunk_count):
                yield start + index, entry, index
