"""Messages that are answered one by one: listings, shard indexes and sample counts.

What takes long is done in threads, so that one consumer's large listing does not hold up another.
"""

from __future__ import annotations

import numpy as np

from fastload import protocol
from fastload.errors import ServiceError, to_wire
from fastload.service.indexes import IndexCache
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState
from fastload.store.table import ObjectTable

# A listing of a million objects takes minutes; another consumer's small one need not wait for it.
_LISTING_THREADS = 2


class Queries:
    """Answers such messages. Used by the loop's thread only."""

    def __init__(self, resources: Resources, indexes: IndexCache) -> None:
        self._stores, self._indexes = resources.stores, indexes
        self._listings = resources.pools.make("listing", _LISTING_THREADS)

    def receive(self, consumer: ConsumerState, message: protocol.FromConsumer) -> None:
        """Answer, now or later; ServiceError for a message that is no request."""
        match message:
            case protocol.Resolve():
                self._resolve(consumer, message)
            case protocol.GetIndexes():
                self._get_indexes(consumer, message)
            case protocol.PutIndex():
                self._indexes.put(consumer.entry(message.object_no).id, message.data)
            case protocol.PutCounts():
                self._indexes.learn([consumer.entry(number).id for number in message.objects], message.counts)
            case protocol.GetCounts():
                self._get_counts(consumer, message)
            case _:
                raise ServiceError(f"an unexpected {type(message).__name__} message from a consumer")

    def _resolve(self, consumer: ConsumerState, message: protocol.Resolve) -> None:
        def resolve() -> ObjectTable:
            if message.present:
                return ObjectTable.of(self._stores.present(consumer.options_key, message.urls))
            found = self._stores.resolve(consumer.options_key, message.urls, message.endings, message.beside)
            return ObjectTable.of(found)

        def done(objects: ObjectTable, error: BaseException | None) -> None:
            if error is not None:
                consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
                return
            step = protocol.OBJECTS_PER_PIECE
            for start in range(0, max(1, len(objects)), step):
                rows = protocol.ObjectRows.of(objects[start : start + step])
                consumer.send(protocol.Resolved(message.request, rows, start + step >= len(objects)))

        self._listings.submit(resolve, done=done)

    def _get_indexes(self, consumer: ConsumerState, message: protocol.GetIndexes) -> None:
        ids = {number: consumer.entry(number).id for number in message.objects}

        def found(indexes: dict[bytes, bytes]) -> None:
            here = [(number, indexes[key]) for number, key in ids.items() if key in indexes]
            for piece in _pieces(message.request, here):
                consumer.send(piece)

        self._indexes.get(ids.values(), found)

    def _get_counts(self, consumer: ConsumerState, message: protocol.GetCounts) -> None:
        def found(counts: list[int]) -> None:
            consumer.send(protocol.Counts(message.request, np.array(counts, "<i8").tobytes()))

        self._indexes.counts([consumer.entry(number).id for number in message.objects], found)


def _pieces(request: int, indexes: list[tuple[int, bytes]]) -> list[protocol.Indexes]:
    """Messages of some megabytes each, or of one index that is larger."""
    pieces = [protocol.Indexes(request, [], [], last=False)]
    byte_count = 0
    for number, data in indexes:
        if byte_count and byte_count + len(data) > protocol.INDEX_BYTES_PER_PIECE:
            pieces.append(protocol.Indexes(request, [], [], last=False))
            byte_count = 0
        pieces[-1].objects.append(number)
        pieces[-1].data.append(data)
        byte_count += len(data)
    pieces[-1].last = True
    return pieces
