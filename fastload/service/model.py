"""What the service knows of objects and chunks: plain records, changed by the loop's thread only.

An `ObjectEntry` is one version of one object, shared by all consumers that attached it. A `Chunk` record exists while
the chunk is in a buffer, on its way there, or wanted by somebody; a chunk without a record is simply not in RAM.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from fastload.cache import ChunkKey, object_id
from fastload.cache.policy import PolicyName
from fastload.history.keys import object_key
from fastload.protocol import ObjectRows
from fastload.redaction import redact
from fastload.store.types import ObjectInfo
from fastload.store.urls import store_root

if TYPE_CHECKING:
    from fastload.service.consumers import ConsumerState

Holder = tuple["ConsumerState", int]  # a consumer, and the number by which it knows the chunk


class State(enum.Enum):
    """Where a chunk is."""

    ABSENT = "absent"  # wanted, not in a buffer
    LOADING = "loading"  # its buffer is being filled
    RESIDENT = "resident"  # may be read


class Write(enum.Enum):
    """Whether a chunk is on its way to the disk."""

    NONE = "none"
    QUEUED = "queued"
    RUNNING = "running"
    HUNG = "hung"  # given up, but it does not return, and keeps the buffer


class Recalled(enum.Enum):
    """Whether a chunk's leases have been asked back."""

    NO = "no"
    ASKED = "asked"
    PINNED = "pinned"  # a holder says it is in use; it comes back, but nobody knows when


@dataclass(slots=True)
class Want:
    """One consumer's open wish for a chunk."""

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
    plan_count: int = 0  # live plans and claims that name it
    policy: PolicyName = "pin"  # by which its chunks stay and go while one does
    epoch: int = 0  # of the last plan that named it
    _history_key: int | None = None
    _origin: str = ""

    @property
    def history_key(self) -> int:
        """What stands for it in histories of reads, whatever its version."""
        if self._history_key is None:
            self._history_key = object_key(self.info.url)
        return self._history_key

    @property
    def origin(self) -> str:
        """Who serves it: an endpoint of its own, or a bucket, host or machine."""
        if not self._origin:  # each turn asks for that of each candidate
            self._origin = redact(self.endpoint or store_root(self.info.url))
        return self._origin

    @property
    def chunk_count(self) -> int:
        """How many chunks the object has; an empty one has none."""
        return -(-self.info.size // self.chunk_bytes)

    def length(self, index: int) -> int:
        """The bytes of one chunk; the last is usually shorter."""
        return min(self.chunk_bytes, self.info.size - index * self.chunk_bytes)

    def key(self, index: int) -> ChunkKey:
        """The key of one chunk."""
        return ChunkKey(self.id, index)

    def chunk(self, index: int) -> Chunk:
        """The record of a chunk, made if there is none."""
        chunk = self.chunks.get(index)
        if chunk is None:
            chunk = self.chunks[index] = Chunk(self, index)
        return chunk

    def forget_if_idle(self, chunk: Chunk) -> None:
        """Drop the record of a chunk that is neither in a buffer nor wanted."""
        if chunk.state is State.ABSENT and not chunk.wanters:
            self.chunks.pop(chunk.index, None)


class Chunk:
    """See the module's text."""

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
        self.state = State.ABSENT
        self.buffer = -1
        self.source = 0  # of protocol.SOURCES: what the buffer is or was filled from
        self.load_order = 0  # the service's count of loads when this one began
        self.fetched_as = ""  # the store options it is being fetched with
        self.lessees: dict[Holder, int] = {}  # the source that the holder was told
        self.wanters: dict[Holder, Want] = {}
        self.granted_to: set[int] = set()  # consumers that had a lease since this load
        self.write = Write.NONE
        self.recalled = Recalled.NO

    @property
    def length(self) -> int:
        """Its bytes."""
        return self.entry.length(self.index)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it."""
        return any(want.urgent for want in self.wanters.values())


class Piece(list[ObjectEntry]):
    """Consecutive objects of consumers' lists: one for all that attached the same."""

    __slots__ = ("__weakref__",)


class Objects:
    """All entries, by object id."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._entries: dict[bytes, ObjectEntry] = {}
        self._pieces: WeakValueDictionary[tuple[str, bytes], Piece] = WeakValueDictionary()

    def use_rows(self, rows: ObjectRows, endpoint: str) -> Piece:
        """The entries of a piece of one more list; `endpoint` is where its objects are.

        The ranks of a node all attach the same list. Only the first pays for a long one: four seconds a million.
        """
        key = endpoint, rows.digest()
        piece = self._pieces.get(key)
        if piece is None:
            infos = rows.table()
            piece = Piece(self.use_info(info, endpoint) for info in infos)
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
        """The entry with this id, if any."""
        return self._entries.get(object_id)
