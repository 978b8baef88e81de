"""The objects that a consumer's chunk numbers refer to.

Chunks are numbered through: those of an object follow each other, in the order of the list. A list is attached whole,
or it grows by one object at a time, as they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import protocol
from fastload.errors import ServiceError
from fastload.protocol import ObjectRows
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

Int64 = npt.NDArray[np.int64]
Ints = Sequence[int] | npt.NDArray[np.integer[Any]]


def chunk_starts(sizes: Sequence[int] | Int64, chunk_bytes: int) -> Int64:
    """int64[n + 1]: the number of each object's first chunk, and last how many chunks there are."""
    counts = -(-np.asarray(sizes, np.int64) // chunk_bytes)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass(frozen=True, slots=True)
class OpenedObject:
    """One version of an object: chunk `index` of it has the number `first_chunk + index`."""

    info: ObjectInfo
    first_chunk: int


class AttachedObjects:
    """See the module's text. Begins empty, and may grow; `of` makes one that does not. For one thread at a time."""

    def __init__(self) -> None:
        self._objects: Sequence[ObjectInfo] = []
        self._starts = np.zeros(1024, np.int64)  # with room for more
        self._first_chunk = self._starts[:1]

    @classmethod
    def of(cls, table: ObjectTable, chunk_bytes: int) -> AttachedObjects:
        """These objects, and no others."""
        attached = cls()
        attached._objects = table
        attached._first_chunk = chunk_starts(table.sizes, chunk_bytes)
        return attached

    def __len__(self) -> int:
        return len(self._objects)

    def __getitem__(self, number: int) -> OpenedObject:
        return OpenedObject(self._objects[number], int(self._first_chunk[number]))

    def append(self, opened: protocol.Opened, chunk_bytes: int) -> None:
        """The service has taken another object onto the end of its list."""
        if not isinstance(self._objects, list):
            raise protocol.ConversationError("an unexpected Opened message")
        number = len(self._objects)
        if opened.object_no != number:
            raise ServiceError(f"the cache service opened object {opened.object_no} where {number} was the next")
        if number + 2 > len(self._starts):
            self._starts = np.concatenate([self._starts, np.zeros_like(self._starts)])
        # A fork may come in between: what is derived from the list is set last, and the next call sets it right.
        self._starts[number + 1] = self._starts[number] - (-opened.size // chunk_bytes)
        self._objects.append(ObjectInfo(opened.url, opened.size, opened.etag, opened.mtime_ns))
        self._first_chunk = self._starts[: number + 2]

    def messages(self) -> Iterator[protocol.Attach]:
        """What makes this the list of a service's consumer."""
        step, count = protocol.OBJECTS_PER_PIECE, len(self._objects)
        for start in range(0, max(1, count), step):
            rows = ObjectRows.of(self._objects[start : start + step])
            yield protocol.Attach(start == 0, start + step >= count, rows)

    def checked_objects(self, object_nos: Ints) -> list[int]:
        """The numbers as a list; ValueError where one is none of an object."""
        numbers: list[int] = np.asarray(object_nos, np.int64).tolist()
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(self._objects)):
            raise ValueError(f"a plan names object {max(numbers)} (or a negative one) of {len(self._objects)}")
        return numbers

    def checked_chunks(self, chunk_nos: Ints) -> list[int]:
        """The numbers as a list; ValueError where one is none of a chunk."""
        chunks: list[int] = np.asarray(chunk_nos, np.int64).tolist()
        if chunks and not (min(chunks) >= 0 and max(chunks) < self._first_chunk[-1]):
            raise ValueError(f"chunk {max(chunks)} (or a negative one) of {self._first_chunk[-1]} attached chunks")
        return chunks

    def where(self, chunk: int, chunk_bytes: int) -> str:
        """Where a chunk lies, for people."""
        number = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        info = self._objects[number]
        start = info.start + (chunk - int(self._first_chunk[number])) * chunk_bytes
        return f"{info.url} from byte {start}"
