"""A consumer whose objects are opened one by one, where nobody knows beforehand which ones they will be.

The service finds out an object's version, takes the object onto the end of this consumer's list, and says so. Both
sides number objects in the order of these answers, which the socket keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastload import protocol
from fastload.client.consumer import Consumer
from fastload.client.session import Connector
from fastload.errors import ServiceError
from fastload.store.types import ObjectInfo
from fastload.waiting import DEADLINE_S


@dataclass(frozen=True, slots=True)
class OpenedObject:
    """One version of an object: chunk `index` of it has the number `first_chunk + index`."""

    info: ObjectInfo
    first_chunk: int


class Opener(Consumer):
    """See the module's text. Its list only grows: when it is long, another opener goes on with an empty one."""

    def __init__(self, cache: Connector, storage_options: Mapping[str, Any] | None = None, name: str = "") -> None:
        self._list: list[ObjectInfo] = []
        self._starts = np.zeros(1024, np.int64)  # of `_first_chunk`, with room for more
        super().__init__(cache, storage_options, name)
        self._objects = self._list

    def open(self, url: str, deadline_s: float = DEADLINE_S) -> OpenedObject:
        """The object at `url` (normalised), as it is now; the store's errors come as they are."""
        (part,) = self._ask_service(lambda request: protocol.Open(request, url), "listing", deadline_s)
        assert isinstance(part, protocol.Opened)
        with self._changed:
            return OpenedObject(self._list[part.object_no], int(self._first_chunk[part.object_no]))

    @property
    def opened_count(self) -> int:
        """How many objects are on its list."""
        return len(self._list)

    @property
    def buffer_count(self) -> int:
        """How many chunks the arena has room for."""
        arena = self._arena
        return 0 if arena is None else arena.view.byte_count // arena.chunk_bytes

    def _take(self, message: protocol.FromService) -> None:
        if isinstance(message, protocol.Opened):
            self._append(message)  # also where whoever asked has given up: the service counts it
            self._take_part(message)
        else:
            super()._take(message)

    def _append(self, message: protocol.Opened) -> None:
        number = len(self._list)
        if message.object_no != number:
            raise ServiceError(f"the cache service opened object {message.object_no} where {number} was the next")
        if number + 2 > len(self._starts):
            self._starts = np.concatenate([self._starts, np.zeros_like(self._starts)])
        # A fork may find this half done: what is derived from the list comes last, and the next one puts it right.
        self._starts[number + 1] = self._starts[number] - (-message.size // self.chunk_bytes)
        self._list.append(ObjectInfo(message.url, message.size, message.etag, message.mtime_ns))
        self._first_chunk = self._starts[: number + 2]
