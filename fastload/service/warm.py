"""Warming: a plan whose aim is that the cache holds its chunks, not that somebody reads them now.

With a disk tier, each chunk that the disk lacks is fetched, written, and then need not stay in RAM; it ends when all
are on disk or the disk takes no more. Without one, chunks are fetched until the arena's free buffers are used up.
Positions are settled one by one, in any order, and the figures of that are the progress that the consumer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastload import protocol
from fastload.errors import to_wire
from fastload.service.model import Chunk, ObjectEntry, State
from fastload.service.plans import Plan, Step
from fastload.service.scheduler import Candidate, Need, OnDisk

OPEN, HELD, NOT_HELD = range(3)

# Positions looked at in one turn: some milliseconds.
_LOOKED_AT_MAX = 4000
_NEWS_S = 0.1


class WarmPlan(Plan):
    """Changed by the loop's thread only."""

    def __init__(self, entries: Sequence[ObjectEntry], options_key: str, epoch: int, to_disk: bool) -> None:
        super().__init__(list(dict.fromkeys(entries)), options_key, epoch)
        self.to_disk = to_disk
        self._states = bytearray(self.chunk_count)
        self._next = 0  # everything below is settled or in hand
        self._in_hand: set[int] = set()
        self._told_of = 0  # everything below is settled, and whoever keeps history knows it
        self.more_to_look_at = False
        self.full = False  # a chunk found no room: those behind it are not tried
        self.error: BaseException | None = None
        self.total_bytes = sum(entry.info.size for entry in self.entries)
        self.done_chunks = self.done_bytes = self.held_chunks = self.held_bytes = self.fetched_bytes = 0
        self._told = (-1, False)
        self._told_at = 0.0
        if to_disk:
            # In RAM these chunks have done their work once they are written.
            self.advance(self.chunk_count)

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to come."""
        return self.done_chunks == self.chunk_count or self.error is not None

    def candidates(self, on_disk: OnDisk) -> Iterator[Candidate]:
        """What should be loaded, in the plan's order."""
        self.more_to_look_at = False
        for looked_at, (position, entry, index) in enumerate(self._todo()):
            if looked_at == _LOOKED_AT_MAX:
                self.more_to_look_at = True
                return
            chunk = entry.chunks.get(index)
            state = State.ABSENT if chunk is None else chunk.state
            if on_disk(entry, index) if self.to_disk else state is State.RESIDENT:
                self._settle(position, held=True)
            elif state is State.ABSENT:
                yield Candidate(entry, index, Need.WARMING, position, False, self, may_displace=False)

    def _todo(self) -> Iterator[Step]:
        at_front = True
        for position, entry, index in self._steps(self._next):
            if self._to_do(position):
                yield position, entry, index
            at_front = at_front and not self._to_do(position)  # whoever was given it may have settled it
            if at_front:
                self._next = position + 1

    def _to_do(self, position: int) -> bool:
        return self._states[position] == OPEN and position not in self._in_hand

    def resident(self) -> Iterator[Chunk]:
        """Chunks of the plan that are in RAM already and not on their way to the disk."""
        for position, entry, index in self._steps(0):
            chunk = entry.chunks.get(index)
            if chunk is not None and chunk.state is State.RESIDENT and position not in self._in_hand:
                yield chunk

    def taken(self, chunk: Chunk) -> None:
        """The chunk is on its way."""
        position = self._mine(chunk)
        if position is not None:
            self._in_hand.add(position)

    def came(self, chunk: Chunk) -> None:
        """The chunk was fetched; its fate is settled later."""
        if self._mine(chunk) is not None and chunk.source == protocol.SOURCE_REMOTE:
            self.fetched_bytes += chunk.length

    def settle(self, chunk: Chunk, *, held: bool) -> None:
        """The cache holds the chunk now, or will not."""
        position = self._mine(chunk)
        if position is not None:
            self._settle(position, held=held)

    def put_back(self, chunk: Chunk) -> None:
        """Its write was given up for something more urgent: to be done again."""
        position = self._mine(chunk)
        if position is not None:
            self._in_hand.discard(position)
            self._next = min(self._next, position)

    def fail(self, error: BaseException) -> None:
        """Something that no chunk will get past."""
        self.error = self.error or error

    def retry(self) -> None:
        """What was in the way may be gone."""
        self.error = None
        self._in_hand.clear()
        self._next = 0

    def end_here(self) -> None:
        """There is no more room: what is still to do is not held."""
        for position in range(self._next, self.chunk_count):
            if self._to_do(position):
                self._settle(position, held=False)
        self._next = self.chunk_count

    def newly_settled(self) -> Iterator[Step]:
        """What was settled since, in the plan's order: no position before those ahead of it."""
        for step in self._steps(self._told_of):
            if self._states[step[0]] == OPEN:
                return
            self._told_of = step[0] + 1
            yield step

    @property
    def in_hand_count(self) -> int:
        """Chunks on their way."""
        return len(self._in_hand)

    def _mine(self, chunk: Chunk) -> int | None:
        """The chunk's position while it is to do, else None."""
        starts = self._starts_of.get(chunk.entry)
        if starts is None or self._states[starts[0] + chunk.index] != OPEN:
            return None
        return starts[0] + chunk.index

    def _settle(self, position: int, *, held: bool) -> None:
        self._in_hand.discard(position)
        self._states[position] = HELD if held else NOT_HELD
        entry, index = self.at(position)
        self.done_chunks += 1
        self.done_bytes += entry.length(index)
        if held:
            self.held_chunks += 1
            self.held_bytes += entry.length(index)

    # News

    def news(self, now: float) -> tuple[protocol.Progress | None, float]:
        """What to tell the consumer now, or else in how many seconds to look again (0: when something happens)."""
        figures = (self.done_chunks, self.finished)
        if figures == self._told:
            return None, 0.0
        wait_s = self._told_at + _NEWS_S - now
        if wait_s > 0 and not self.finished:
            return None, wait_s
        self._told, self._told_at = figures, now
        return self._progress(), 0.0

    def _progress(self) -> protocol.Progress:
        name, message = ("", "") if self.error is None else to_wire(self.error)
        return protocol.Progress(
            done_chunks=self.done_chunks,
            done_bytes=self.done_bytes,
            total_chunks=self.chunk_count,
            total_bytes=self.total_bytes,
            held_chunks=self.held_chunks,
            held_bytes=self.held_bytes,
            fetched_bytes=self.fetched_bytes,
            finished=self.finished,
            error_name=name,
            error_message=message,
        )
