"""Messages that are answered one by one: listings, shard indexes and sample counts.

What takes long is done in threads, so that one consumer's large listing does not hold up another.

The ranks of a node want the same indexes at the same time. The first that asks for one that is not stored makes it, and
the others' requests wait (`IndexMakers`) until it is made or given up. So the shards of a node are parsed once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastload import protocol
from fastload.errors import ServiceError, ShardError, StoreUnavailableError, to_wire
from fastload.service.indexes import IndexCache
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState
from fastload.store.table import ObjectTable

# An index is waited for no longer where its maker, which asks for one chunk after the other, has said nothing for so
# long (it may be stopped), or where no index comes for so long: requests have a deadline.
SILENT_S, PATIENCE_S = 10.0, 300.0
# Who has waited for so long is answered with the next that is made, and asks again for the rest.
SOME_AFTER_S = 5.0
# A listing of a million objects takes minutes; another consumer's small one need not wait for it.
_LISTING_THREADS = 2
# After so long, unpacked sizes that are not known yet are asked for again.
_SIZES_PATIENCE_S = 20.0


class Queries:
    """Answers such messages. Used by the loop's thread only."""

    def __init__(self, resources: Resources, indexes: IndexCache, consumers: Collection[ConsumerState]) -> None:
        self._stores, self._indexes, self._consumers = resources.stores, indexes, consumers
        self._makers = IndexMakers(resources.pools.loop, resources.now)
        self._listings = resources.pools.make("listing", _LISTING_THREADS)
        self._sizes = resources.pools.make("unpacked-sizes", _LISTING_THREADS)

    def receive(self, consumer: ConsumerState, message: protocol.FromConsumer) -> None:
        """Answer, now or later; ServiceError for a message that is no request."""
        match message:
            case protocol.Resolve():
                self._resolve(consumer, message)
            case protocol.GetIndexes():
                self._get_indexes(consumer, message)
            case protocol.PutIndex():
                object_id = consumer.entry(message.object_no).id
                self._indexes.put(object_id, message.data)
                self._makers.end([object_id])
            case protocol.GiveUpIndexes():
                self._makers.end(self._makers.of(consumer) & {consumer.entry(number).id for number in message.objects})
            case protocol.PutCounts():
                self._indexes.learn([consumer.entry(number).id for number in message.objects], message.counts)
            case protocol.GetCounts():
                self._get_counts(consumer, message)
            case protocol.GetUnpackedSizes():
                self._get_unpacked_sizes(consumer, message)
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

    def left(self, consumer: ConsumerState) -> None:
        """It has gone, or has other objects from now on."""
        self._makers.left(consumer)

    def _get_indexes(self, consumer: ConsumerState, message: protocol.GetIndexes) -> None:
        ids = {number: consumer.entry(number).id for number in message.objects}

        def look() -> None:
            self._indexes.get(ids.values(), found)

        def found(indexes: dict[bytes, bytes]) -> None:
            missing = {key: number for number, key in ids.items() if key not in indexes}
            if any(map(self._indexes.has, missing)):  # it came while the disk was read
                look()
                return
            is_here = consumer in self._consumers
            make = self._makers.begin(consumer, missing) if is_here else []
            if is_here and missing and not make and not indexes:
                self._makers.wait(consumer, missing, look)
                return
            here = [(number, indexes[key]) for number, key in ids.items() if key in indexes]
            for piece in _pieces(message.request, here, [missing[key] for key in make]):
                consumer.send(piece)

        look()

    def _get_counts(self, consumer: ConsumerState, message: protocol.GetCounts) -> None:
        def found(counts: list[int]) -> None:
            consumer.send(protocol.Counts(message.request, np.array(counts, "<i8").tobytes()))

        self._indexes.counts([consumer.entry(number).id for number in message.objects], found)

    def _get_unpacked_sizes(self, consumer: ConsumerState, message: protocol.GetUnpackedSizes) -> None:
        entries = [consumer.entry(number) for number in message.objects]
        options_key = consumer.options_key
        # A size is a fact of one version of one object, as a sample count is, and kept beside those.
        keys = [hashlib.blake2b(entry.id, digest_size=16, person=b"measured size").digest() for entry in entries]

        def known(sizes: list[int]) -> None:
            unknown = [number for number, size in enumerate(sizes) if size < 0]

            def done(found: list[int | ShardError | None], error: BaseException | None) -> None:
                try:
                    answer(found, error)
                finally:  # only now that they are stored, so that no later question measures them again
                    unpacked_sizes.forget(question)

            def answer(found: list[int | ShardError | None], error: BaseException | None) -> None:
                if error is None and len(entries) == len(found) == 1 and isinstance(found[0], ShardError):
                    error = found[0]
                if error is not None:
                    consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
                    return
                some = {number: size for number, size in zip(unknown, found, strict=True) if isinstance(size, int)}
                bad = {number for number, size in zip(unknown, found, strict=True) if isinstance(size, ShardError)}
                self._indexes.learn([keys[number] for number in some], np.array(list(some.values()), "<i8").tobytes())
                all_sizes = np.array(sizes, "<i8")
                all_sizes[list(some)] = list(some.values())
                all_sizes[list(bad)] = protocol.NO_SIZE
                consumer.send(protocol.Counts(message.request, all_sizes.tobytes()))

            unpacked_sizes = self._stores.unpacked_sizes
            try:
                question = unpacked_sizes.ask(options_key, [entries[number].info for number in unknown])
            except StoreUnavailableError as error:
                consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
                return
            self._sizes.submit(unpacked_sizes.wait, question, _SIZES_PATIENCE_S, done=done)

        self._indexes.counts(keys, known)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request of a consumer, which began to wait at a time, and the indexes that it waits for."""

    consumer: ConsumerState
    left: set[bytes]
    look_again: Callable[[], None]
    began: float
    timer: asyncio.TimerHandle | None = None
    is_over: bool = False


class IndexMakers:
    """Which consumer makes which index, and who waits for it. Used by the loop's thread only.

    A consumer that waits makes nothing, so no two wait for each other.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, now: Callable[[], float]) -> None:
        self._loop, self._now = loop, now
        self._makers: dict[bytes, ConsumerState] = {}
        self._made_by: defaultdict[ConsumerState, set[bytes]] = defaultdict(set)
        self._waiting: defaultdict[bytes, list[_Waiting]] = defaultdict(list)

    def of(self, consumer: ConsumerState) -> set[bytes]:
        """The indexes that a consumer makes."""
        return self._made_by.get(consumer, set()).copy()

    def begin(self, consumer: ConsumerState, object_ids: Iterable[bytes]) -> list[bytes]:
        """Those of these that the consumer is to make: the first that no other makes."""
        free = (key for key in object_ids if self._makers.get(key, consumer) is consumer)
        make = list(islice(free, protocol.INDEXES_TO_MAKE))
        self._makers.update(dict.fromkeys(make, consumer))
        if make:
            self._made_by[consumer].update(make)
            consumer.active_at = self._now()
        return make

    def wait(self, consumer: ConsumerState, object_ids: Iterable[bytes], look_again: Callable[[], None]) -> None:
        """Call `look_again` once these, which others make, are made or given up, or some of them are."""
        left = set(islice(object_ids, protocol.INDEXES_TO_MAKE))
        waiting = _Waiting(consumer, left, look_again, self._now())
        for object_id in left:
            self._waiting[object_id].append(waiting)
        self._watch(waiting)

    def end(self, object_ids: Iterable[bytes]) -> None:
        """These are made, or not going to be."""
        due: dict[_Waiting, None] = {}
        for object_id in object_ids:
            maker = self._makers.pop(object_id, None)
            if maker is not None:
                self._made_by[maker].discard(object_id)
                if not self._made_by[maker]:
                    del self._made_by[maker]
            for waiting in self._waiting.pop(object_id, ()):
                waiting.left.discard(object_id)
                if not waiting.left or self._now() >= waiting.began + SOME_AFTER_S:
                    due[waiting] = None
        for waiting in due:  # only now: they may begin to make what ends here, or to wait for it
            self._finish(waiting)

    def left(self, consumer: ConsumerState) -> None:
        """It makes nothing and waits for nothing any more."""
        mine = {each: None for some in self._waiting.values() for each in some if each.consumer is consumer}
        for waiting in mine:
            self._finish(waiting)
        self.end(self.of(consumer))

    def _finish(self, waiting: _Waiting) -> None:
        if waiting.is_over:  # by what came of the end of another
            return
        waiting.is_over = True
        for object_id in waiting.left:
            self._waiting[object_id].remove(waiting)
            if not self._waiting[object_id]:
                del self._waiting[object_id]
        if waiting.timer is not None:
            waiting.timer.cancel()
        waiting.look_again()

    def _watch(self, waiting: _Waiting) -> None:
        makers = {maker for object_id in waiting.left if (maker := self._makers.get(object_id)) is not None}
        active = min((maker.active_at for maker in makers), default=self._now())
        left_s = min(active + SILENT_S, waiting.began + PATIENCE_S) - self._now()
        if left_s > 0:
            waiting.timer = self._loop.call_later(left_s, self._watch, waiting)
        else:
            self.end(list(waiting.left))


def _pieces(request: int, indexes: list[tuple[int, bytes]], make: list[int]) -> list[protocol.Indexes]:
    """Messages of some megabytes each, or of one index that is larger."""
    pieces = [protocol.Indexes(request, [], [], make, last=False)]
    byte_count = 0
    for number, data in indexes:
        if byte_count and byte_count + len(data) > protocol.INDEX_BYTES_PER_PIECE:
            pieces.append(protocol.Indexes(request, [], [], [], last=False))
            byte_count = 0
        pieces[-1].objects.append(number)
        pieces[-1].data.append(data)
        byte_count += len(data)
    pieces[-1].last = True
    return pieces
