"""All that the service knows of objects, chunks and consumers: plain records, changed by the loop's thread only.

An `ObjectEntry` is one version of one object, shared by all consumers that attached it. A `Chunk` record exists while
the chunk is in a buffer, on its way there, or wanted; a chunk without a record is simply not in RAM.

A `ConsumerState` is one connected consumer: its objects, plan, wants and leases. Grants and recalls are gathered there
and sent once per tick of the core, so that a burst of chunks is one message.

A `Plan` is the known order of one consumer: which chunk is needed how soon. Positions count chunks along it: all chunks
of its first object, then of its second, and so on. Marks along it:

    cursor         the first position that may still be needed
    frontier       a remembered answer: the first position at or after the cursor whose chunk is not in RAM, so that
                   looking for work does not start at the cursor each time; dropping a chunk moves it back (`dropped`)
    delivered_to   one past the furthest position that the consumer was granted
    prefetched_to  of a blind plan, how far it was fetched ahead
    evicted_to     how far what was read has been searched for chunks to evict from disk (see `eviction`)

Beyond `delivered_to` plus a fixed distance, prefetching takes only room that no plan has a use for. Without that bound
it would run ahead until the whole arena held just the next chunks, dropping ones that later positions would have found
there, each of which would have to be fetched again: of an arena of half the data, a quarter would be left to hit
instead of half.

A warm plan's chunks may be read too, in an order of their own, many times each: its `uses`, which arrive bit by bit. A
plan that `is_blind` is of data whose user wants a policy for unknown orders: it is fetched ahead within that distance,
so that what lies beyond is as good as unknown.
"""

from __future__ import annotations

import enum
import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, islice
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from fastload import protocol
from fastload.cache import ChunkKey, object_id
from fastload.cache.policy import PolicyName
from fastload.cache.policy.known_order import FAR, NextUses
from fastload.errors import ServiceError
from fastload.history.keys import object_key
from fastload.protocol import ObjectRows
from fastload.redaction import redact
from fastload.service.fetching.request_limit import UNPACKED
from fastload.store.types import ObjectInfo
from fastload.store.urls import store_root

Holder = tuple["ConsumerState", int]  # a consumer, and the number by which it knows the chunk


class ChunkState(enum.Enum):
    """Where a chunk is."""

    ABSENT = "absent"  # wanted, not in a buffer
    LOADING = "loading"  # its buffer is being filled
    RESIDENT = "resident"  # may be read


class WriteState(enum.Enum):
    """Whether a chunk is on its way to the disk."""

    NONE = "none"
    QUEUED = "queued"
    RUNNING = "running"
    HUNG = "hung"  # given up, but it does not return, and keeps the buffer


class RecallState(enum.Enum):
    """Whether a chunk's leases have been asked back."""

    NO = "no"
    ASKED = "asked"
    PINNED = "pinned"  # a holder says that it is in use; when it comes back is unknown


TRANSITIONS: Mapping[str, Mapping[enum.Enum, enum.Enum]] = {
    # In RAM
    "begin_load": {ChunkState.ABSENT: ChunkState.LOADING},
    "finish_load": {ChunkState.LOADING: ChunkState.RESIDENT},
    "abort_load": {ChunkState.LOADING: ChunkState.ABSENT},
    "evict": {ChunkState.RESIDENT: ChunkState.ABSENT},
    # To disk. A write that failed is queued again, also one that had hung.
    "queue_write": {
        WriteState.NONE: WriteState.QUEUED,
        WriteState.RUNNING: WriteState.QUEUED,
        WriteState.HUNG: WriteState.QUEUED,
    },
    "begin_write": {WriteState.QUEUED: WriteState.RUNNING},
    "cancel_write": {WriteState.QUEUED: WriteState.NONE},
    "abandon_write": {WriteState.RUNNING: WriteState.HUNG},
    "finish_write": {WriteState.RUNNING: WriteState.NONE, WriteState.HUNG: WriteState.NONE},
    # Leases
    "recall": {RecallState.NO: RecallState.ASKED},
    "pin": {RecallState.ASKED: RecallState.PINNED},
    "end_recall": {RecallState.ASKED: RecallState.NO, RecallState.PINNED: RecallState.NO},
}
"""What may happen to a chunk: for each event, a method of `Chunk`, the states that allow it and what follows each."""

_StateT = TypeVar("_StateT", ChunkState, WriteState, RecallState)


def _next(event: str, state: _StateT) -> _StateT:
    after = TRANSITIONS[event].get(state)
    assert after is not None, f"{event}: not for a chunk that is {state}"
    return cast(_StateT, after)


@dataclass(slots=True)
class OpenWant:
    """One consumer's open want of a chunk."""

    serial: int
    urgent: bool


@dataclass(slots=True, eq=False)
class ObjectEntry:
    """One version of one object, cut into chunks."""

    info: ObjectInfo
    id: bytes
    chunk_bytes: int
    chunks: dict[int, Chunk]
    endpoint: str = ""  # of the store, as its options have it
    user_count: int = 0  # consumers' object lists that name it
    plan_count: int = 0  # live plans and keep lists that name it
    policy: PolicyName = "pin"  # by which its chunks stay and go while one does
    epoch: int = 0  # of the last plan that named it
    data_set: str = ""  # the name that a consumer gave its data set
    noted_at: float = -math.inf  # when its use was noted (see `holdings`)
    _history_key: int | None = None
    _origin: str = ""

    @property
    def history_key(self) -> int:
        """What stands for it in histories of reads, whatever its version."""
        if self._history_key is None:
            self._history_key = object_key(self.info.url)
        return self._history_key

    def in_object(self, index: int) -> int:
        """Which chunk of the whole object a chunk is; histories know no pieces."""
        return index + self.info.start // self.chunk_bytes

    @property
    def origin(self) -> str:
        """Who serves it: an endpoint of its own, or a bucket, host or machine. What is in packed objects comes from our
        own processes, and has none of its limits.
        """
        if not self._origin:  # each tick asks for that of each candidate
            self._origin = self.store_origin + (UNPACKED if self.info.packing else "")
        return self._origin

    @property
    def store_origin(self) -> str:
        """Who serves the stored object."""
        return redact(self.endpoint or store_root(self.info.url))

    @property
    def chunk_count(self) -> int:
        """How many chunks the object has; an empty one has none."""
        return -(-self.info.size // self.chunk_bytes)

    def length(self, index: int) -> int:
        """The bytes of one chunk; the last is usually shorter."""
        return min(self.chunk_bytes, self.info.size - index * self.chunk_bytes)

    def key(self, index: int) -> ChunkKey:
        return ChunkKey(self.id, index)

    def chunk(self, index: int) -> Chunk:
        """The record of a chunk, made if there is none."""
        chunk = self.chunks.get(index)
        if chunk is None:
            chunk = self.chunks[index] = Chunk(self, index)
        return chunk

    def forget_if_idle(self, chunk: Chunk) -> None:
        """Drop the record of a chunk that is neither in a buffer nor wanted."""
        if chunk.state is ChunkState.ABSENT and not chunk.wanters:
            self.chunks.pop(chunk.index, None)


class Chunk:
    """A chunk that is in a buffer, on its way there, or wanted. All else reads its fields and changes them by its
    methods only. Only a resident chunk is leased, recalled or written, and it cannot be evicted meanwhile.
    """

    __slots__ = (
        "buffer",
        "entry",
        "fetched_as",
        "granted_to",
        "index",
        "lessees",
        "load_order",
        "recalled",
        "source",
        "state",
        "wanters",
        "write",
    )

    def __init__(self, entry: ObjectEntry, index: int) -> None:
        self.entry, self.index = entry, index
        self.state = ChunkState.ABSENT
        self.buffer = -1
        self.source = 0  # of protocol.SOURCES: what the buffer is or was filled from
        self.load_order = 0  # the service's count of loads when this one began
        self.fetched_as = ""  # the store options it is being fetched with
        self.lessees: dict[Holder, int] = {}  # the source that the holder's grant named
        self.wanters: dict[Holder, OpenWant] = {}
        self.granted_to: set[int] = set()  # consumers that had a lease since this load
        self.write = WriteState.NONE
        self.recalled = RecallState.NO

    @property
    def length(self) -> int:
        return self.entry.length(self.index)

    @property
    def urgent(self) -> bool:
        """Whether a consumer waits for it."""
        return any(want.urgent for want in self.wanters.values())

    # In RAM

    def place(self, buffer: int) -> None:
        """It lies in this buffer from now on."""
        assert self.buffer < 0, "a chunk has one buffer"
        self.buffer = buffer

    def displace(self) -> int:
        """It has left its buffer, which is returned."""
        buffer, self.buffer = self.buffer, -1
        return buffer

    def begin_load(self, order: int, options_key: str) -> None:
        """Its buffer is being filled: the load with this number, with these store options."""
        self.state = _next("begin_load", self.state)
        self.load_order, self.fetched_as = order, options_key
        self.granted_to.clear()

    def read_from(self, source: int) -> None:
        """What its buffer is being filled from, now."""
        assert self.state is ChunkState.LOADING, "only a chunk that is being loaded has another source"
        self.source = source

    def finish_load(self) -> None:
        """Its buffer is filled."""
        self.state = _next("finish_load", self.state)

    def abort_load(self) -> None:
        """The load failed, or is no longer waited for."""
        self.state = _next("abort_load", self.state)

    def evict(self) -> None:
        """Its buffer is needed more elsewhere."""
        assert self.write is WriteState.NONE, "a buffer that is being written cannot go"
        assert not self.lessees, "a leased buffer cannot go"
        self.state = _next("evict", self.state)

    # To disk

    def queue_write(self) -> None:
        """It is to be written."""
        assert self.state is ChunkState.RESIDENT, "only what is in RAM can be written"
        self.write = _next("queue_write", self.write)

    def begin_write(self) -> None:
        """A thread writes it."""
        self.write = _next("begin_write", self.write)

    def cancel_write(self) -> None:
        """A write that has not begun shall not."""
        self.write = _next("cancel_write", self.write)

    def abandon_write(self) -> None:
        """Its write hangs, and is no longer waited for."""
        self.write = _next("abandon_write", self.write)

    def finish_write(self) -> None:
        """Its write has ended, one way or the other."""
        self.write = _next("finish_write", self.write)

    # Wants and leases

    def want(self, holder: Holder, want: OpenWant) -> None:
        """A consumer wants it."""
        self.wanters[holder] = want

    def unwant(self, holder: Holder) -> None:
        """A consumer no longer wants it."""
        del self.wanters[holder]

    def take_wanters(self) -> dict[Holder, OpenWant]:
        """Return all that want it, and forget them."""
        wanters, self.wanters = self.wanters, {}
        return wanters

    def lease(self, holder: Holder, source: int) -> None:
        """A consumer holds it; its grant names this source."""
        assert self.state is ChunkState.RESIDENT, "only what is in RAM can be leased"
        self.lessees[holder] = source
        self.granted_to.add(holder[0].number)

    def end_lease(self, holder: Holder) -> None:
        """A consumer no longer holds it."""
        del self.lessees[holder]

    def undo_lease(self, holder: Holder) -> None:
        """A consumer never took its lease."""
        self.granted_to.discard(holder[0].number)
        self.end_lease(holder)

    def recall(self) -> None:
        """Its holders are asked for it."""
        assert self.lessees, "only what is leased can be recalled"
        self.recalled = _next("recall", self.recalled)

    def pin(self) -> None:
        """A holder says that it is in use."""
        self.recalled = _next("pin", self.recalled)

    def end_recall(self) -> None:
        """All leases have ended."""
        self.recalled = _next("end_recall", self.recalled)


class ObjectPiece(list[ObjectEntry]):
    """Consecutive objects of consumers' lists: one for all that attached the same."""

    __slots__ = ("__weakref__",)


class Objects:
    """All entries, by object id."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._entries: dict[bytes, ObjectEntry] = {}
        self._pieces: WeakValueDictionary[tuple[str, bytes], ObjectPiece] = WeakValueDictionary()

    def use_rows(self, rows: ObjectRows, endpoint: str) -> ObjectPiece:
        """The entries of a piece of one more list; `endpoint` is where its objects are.

        The ranks of a node all attach the same list. Only the first pays for a long one: four seconds a million.
        """
        key = endpoint, rows.digest()
        piece = self._pieces.get(key)
        if piece is None:
            infos = rows.table()
            piece = ObjectPiece(self.use_info(info, endpoint) for info in infos)
            self._pieces[key] = piece
        else:
            for entry in piece:
                entry.user_count += 1
        return piece

    def use_info(self, info: ObjectInfo, endpoint: str) -> ObjectEntry:
        """The entry of an object that one more list names, and that is at `endpoint`."""
        return self.use(info, object_id(info, self._chunk_bytes, endpoint), endpoint)

    def use(self, info: ObjectInfo, object_id: bytes, endpoint: str = "") -> ObjectEntry:
        """The entry of an object that one more list names."""
        entry = self._entries.get(object_id)
        if entry is None:
            entry = self._entries[object_id] = ObjectEntry(info, object_id, self._chunk_bytes, {}, endpoint)
        entry.user_count += 1
        return entry

    def unuse(self, entries: Iterable[ObjectEntry]) -> None:
        """A list that named these is gone."""
        for entry in entries:
            entry.user_count -= 1
            self.forget_if_idle(entry)

    def forget_if_idle(self, entry: ObjectEntry) -> None:
        """Drop an entry that no list names and that has nothing in RAM."""
        if entry.user_count == 0 and not entry.chunks:
            self._entries.pop(entry.id, None)

    def get(self, object_id: bytes) -> ObjectEntry | None:
        return self._entries.get(object_id)


_numbers = count(1)


@dataclass(slots=True)
class LeaseCounts:
    """Leases given since the consumer connected, by source."""

    chunks: list[int] = field(default_factory=lambda: [0] * len(protocol.SOURCES))
    byte_counts: list[int] = field(default_factory=lambda: [0] * len(protocol.SOURCES))


class ConsumerState:
    """Changed by the loop's thread only."""

    def __init__(self, hello: protocol.Hello, options_key: str, send: Callable[[protocol.Message], None]) -> None:
        self.number = next(_numbers)
        self.name, self.pid, self.program = hello.name, hello.pid, hello.program
        self.options_key = options_key
        self.send = send
        self.entries: list[ObjectEntry] = []
        self._pieces: list[ObjectPiece] = []
        self._first_chunk = array("q", [0])
        self.plan: Plan | None = None
        self.kept: list[ObjectEntry] = []  # its keep list
        self.load_order = 0  # loads that the service had counted when this plan began; those are found in RAM
        self.leases: dict[int, Chunk] = {}
        self.wants: dict[int, Chunk] = {}
        self.first_wants: list[int] | None = None  # of its plan: those it began with, until all have come
        self.granted = LeaseCounts()
        self.report: dict[str, Any] = {}
        self.active_at = 0.0  # when its last message came, or it was given indexes to make
        self._grants = protocol.Grants([], [], [], [])
        self._recalls: dict[int, None] = {}

    # Numbering

    def append(self, piece: ObjectPiece) -> None:
        """More objects, whose chunks get the next numbers."""
        self._pieces.append(piece)
        self.entries += piece
        starts = accumulate((entry.chunk_count for entry in piece), initial=self._first_chunk[-1])
        self._first_chunk.extend(islice(starts, 1, None))

    def waits_to_begin(self) -> Iterator[Chunk]:
        """Those chunks that it wanted first of its plan and has not got."""
        if self.first_wants:
            self.first_wants = [chunk_no for chunk_no in self.first_wants if chunk_no in self.wants]
        return (self.wants[chunk_no] for chunk_no in self.first_wants or ())

    def clear_objects(self) -> list[ObjectEntry]:
        """Forget the object list; returns what it named."""
        entries, self.entries = self.entries, []
        self._pieces = []
        self._first_chunk = array("q", [0])
        return entries

    def locate(self, chunk_no: int) -> tuple[ObjectEntry, int]:
        """Object and index of a chunk number; `ServiceError` for one that was not attached."""
        if not 0 <= chunk_no < self._first_chunk[-1]:
            raise ServiceError(f"a message names chunk {chunk_no} of {self._first_chunk[-1]}")
        number = bisect_right(self._first_chunk, chunk_no) - 1
        return self.entries[number], chunk_no - self._first_chunk[number]

    def entry(self, object_no: int) -> ObjectEntry:
        """The entry of an object number; `ServiceError` for one that was not attached."""
        if not 0 <= object_no < len(self.entries):
            raise ServiceError(f"a message names object {object_no} of {len(self.entries)}")
        return self.entries[object_no]

    # Messages that are due

    def grant(self, chunk_no: int, serial: int, buffer: int, source: int) -> None:
        """Send it a grant with the next `flush`."""
        grants = self._grants
        grants.chunks.append(chunk_no)
        grants.serials.append(serial)
        grants.buffers.append(buffer)
        grants.sources.append(source)

    def count(self, source: int, byte_count: int, times: int = 1) -> None:
        """Book a new lease, or take one back."""
        self.granted.chunks[source] += times
        self.granted.byte_counts[source] += times * byte_count

    def recall(self, chunk_no: int) -> None:
        """Send it a recall with the next `flush`."""
        self._recalls[chunk_no] = None

    def unrecall(self, chunk_no: int) -> None:
        """The lease ended by itself."""
        self._recalls.pop(chunk_no, None)

    def flush(self) -> None:
        """Send what is due: grants first, since a recall may be of one of them."""
        if self._grants.chunks:
            grants, self._grants = self._grants, protocol.Grants([], [], [], [])
            self.send(grants)
        if self._recalls:
            recalls, self._recalls = list(self._recalls), {}
            self.send(protocol.Recall(recalls))

    def stats(self) -> dict[str, Any]:
        """Its line in the service's figures."""
        figures: dict[str, Any] = {
            "name": self.name,
            "pid": self.pid,
            "leases": len(self.leases),
            "wants": len(self.wants),
        }
        for number, source in enumerate(protocol.SOURCES):
            figures[f"{source}_chunks"] = self.granted.chunks[number]
            figures[f"{source}_bytes"] = self.granted.byte_counts[number]
        return {**figures, "report": self.report}


Step = tuple[int, ObjectEntry, int]  # position, object, chunk index
Int64 = npt.NDArray[np.int64]
NEVER = np.iinfo(np.int64).max
_ANY_DEPTH = 1 << 62
# Uses that are known and not made: 16 bytes each. No policy looks so far ahead (see `cache.policy.known_order`).
_USES_MAX = 1 << 24


class Plan:
    """Changed by the loop's thread only."""

    # Whether its objects count as covered (see `plans`).
    covers = True
    # Of a short plan, which is a blind one, the positions of each chunk, in order; None: it is long (see `buffers`).
    places: Mapping[tuple[ObjectEntry, int], list[int]] | None = None

    def __init__(self, entries: Sequence[ObjectEntry], options_key: str, epoch: int, cursor: int = 0) -> None:
        self.entries = list(entries)
        self.options_key = options_key
        # The same for plans that name the same objects in the same order, for the same credentials.
        self.likeness = options_key, hashlib.blake2b(array("Q", map(id, self.entries)), digest_size=16).digest()
        self.epoch = epoch
        self.cursor = self.frontier = self.delivered_to = self.evicted_to = cursor
        self.uses: NextUses | None = None
        self.is_blind = False
        self.prefetched_to = cursor  # of a blind plan, up to where it was fetched ahead
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
        is_needed = (ahead >= 0) & (positions < self.prefetched_to) if self.is_blind else ahead >= 0
        return np.where(is_needed, ahead, NEVER)

    def foresee(self, message: protocol.Uses) -> None:
        """More of its uses are known; `ServiceError` where one is of no chunk of the plan, or they are no numbers."""
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
        self.uses.add(message.first, positions)

    def delivered_steps(self) -> Iterator[Step]:
        """What was read and has not been looked through; the caller moves `evicted_to` on."""
        for step in self._steps(self.evicted_to):
            if step[0] >= self.cursor:
                return
            yield step

    def at(self, position: int) -> tuple[ObjectEntry, int]:
        number = bisect_right(self._starts, position) - 1
        return self.entries[number], position - self._starts[number]

    def advance(self, position: int) -> None:
        """Nothing below `position` is needed any more."""
        self.cursor = max(self.cursor, min(position, self.chunk_count))

    def delivered(self, entry: ObjectEntry, index: int) -> None:
        """The consumer was granted this chunk."""
        self.delivered_to = max(self.delivered_to, self.position(entry, index) + 1)

    def dropped(self, entry: ObjectEntry, index: int) -> None:
        """A chunk has left RAM."""
        position = self.position(entry, index)
        if self.cursor <= position < self.frontier:
            self.frontier = position

    def missing(self) -> Iterator[Step]:
        """What is not in RAM nor on its way there, in order of need."""
        self.frontier = max(self.frontier, self.cursor)
        at_frontier = True
        for position, entry, index in self._steps(self.frontier):
            chunk = entry.chunks.get(index)
            if (chunk is not None and chunk.state is not ChunkState.ABSENT) or position in self.failed:
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
