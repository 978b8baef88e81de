"""What the service knows of one connected consumer: its objects, plan, wants and leases, and the mail it is owed.

Grants and recalls are gathered here and sent once per turn of the loop, so that a burst of chunks is one message.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, count, islice

from fastload import protocol
from fastload.errors import ServiceError
from fastload.service.model import Chunk, ObjectEntry, Piece
from fastload.service.plans import Plan

_numbers = count(1)


@dataclass(slots=True)
class Granted:
    """Leases given since the consumer connected, by source."""

    chunks: list[int] = field(default_factory=lambda: [0] * len(protocol.SOURCES))
    byte_counts: list[int] = field(default_factory=lambda: [0] * len(protocol.SOURCES))


class ConsumerState:
    """Changed by the loop's thread only."""

    def __init__(self, hello: protocol.Hello, options_key: str, send: Callable[[protocol.Message], None]) -> None:
        self.number = next(_numbers)
        self.name, self.pid = hello.name, hello.pid
        self.options_key = options_key
        self.send = send
        self.entries: list[ObjectEntry] = []
        self.attached = False  # the whole list has arrived
        self._pieces: list[Piece] = []
        self._first_chunk = array("q", [0])
        self.plan: Plan | None = None
        self.kept: list[ObjectEntry] = []  # its claim
        self.load_order = 0  # loads that the service had counted when this plan began; those are found in RAM
        self.leases: dict[int, Chunk] = {}
        self.wants: dict[int, Chunk] = {}
        self.granted = Granted()
        self.report: dict[str, float] = {}
        self._grants = protocol.Grants([], [], [], [])
        self._recalls: dict[int, None] = {}

    # Numbering

    def append(self, piece: Piece) -> None:
        """More objects, whose chunks get the next numbers."""
        self._pieces.append(piece)
        self.entries += piece
        starts = accumulate((entry.chunk_count for entry in piece), initial=self._first_chunk[-1])
        self._first_chunk.extend(islice(starts, 1, None))

    def clear_objects(self) -> list[ObjectEntry]:
        """Forget the object list; returns what it named."""
        entries, self.entries = self.entries, []
        self._pieces = []
        self._first_chunk = array("q", [0])
        self.attached = False
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

    # Mail

    def grant(self, chunk_no: int, serial: int, buffer: int, source: int) -> None:
        """Owe it a grant."""
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
        """Owe it a recall."""
        self._recalls[chunk_no] = None

    def unrecall(self, chunk_no: int) -> None:
        """The lease ended by itself."""
        self._recalls.pop(chunk_no, None)

    def flush(self) -> None:
        """Send what is owed: grants first, since a recall may speak of one of them."""
        if self._grants.chunks:
            grants, self._grants = self._grants, protocol.Grants([], [], [], [])
            self.send(grants)
        if self._recalls:
            recalls, self._recalls = list(self._recalls), {}
            self.send(protocol.Recall(recalls))

    def stats(self) -> dict[str, float | str]:
        """Its line in the service's figures."""
        figures: dict[str, float | str] = {
            "name": self.name,
            "pid": self.pid,
            "leases": len(self.leases),
            "wants": len(self.wants),
        }
        for number, source in enumerate(protocol.SOURCES):
            figures[f"{source}_chunks"] = self.granted.chunks[number]
            figures[f"{source}_bytes"] = self.granted.byte_counts[number]
        return {**figures, **self.report}
