"""Who holds and who wants what: the wants and leases of all consumers, and the messages that follow from them.

One chunk has one record however many consumers ask for it, so it is fetched once (`state.Chunk`). A want is answered as
soon as its chunk is in RAM, unless that is being recalled: then a consumer waits for its buffer, and might wait for
ever if others kept it in use one after the other. Such wants are `deferred` until the recall has ended and that
consumer had the first choice (`grant_deferred`). What is not in RAM is in `demanded` (a consumer waits) or `wanted`,
oldest first; the core takes it from there.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastload import protocol
from fastload.errors import StoreError, to_wire
from fastload.service.deciding.buffers import BufferTable
from fastload.service.deciding.eviction import DiskOrder
from fastload.service.state import Chunk, ChunkState, ConsumerState, OpenWant, RecallState


class Leases:
    """Changed by the loop's thread only."""

    def __init__(self, table: BufferTable, disk_order: DiskOrder) -> None:
        self._table, self._disk_order = table, disk_order
        self.demanded: dict[Chunk, None] = {}
        self.wanted: dict[Chunk, None] = {}
        self._deferred: dict[Chunk, None] = {}
        self.asked: set[Chunk] = set()  # recalled, and not answered yet
        self.recall_count = 0
        self.served_bytes = [0] * len(protocol.SOURCES)  # leased since the service began, by source

    # From consumers

    def want(self, consumer: ConsumerState, message: protocol.Want) -> None:
        """Note the wants, and answer those whose chunk is here."""
        if consumer.first_wants is None and consumer.plan is not None:
            consumer.first_wants = list(message.chunks)
        for chunk_no in message.chunks:
            entry, index = consumer.locate(chunk_no)
            chunk = entry.chunk(index)
            holder = consumer, chunk_no
            recalled = chunk.recalled is not RecallState.NO
            if chunk_no in consumer.leases and recalled:
                # It asked again before our grant reached it, which it ignored therefore, and the recall too.
                self._undo_lease(chunk, consumer, chunk_no)
            if chunk.state is ChunkState.RESIDENT and not recalled:
                if chunk.granted_to:  # what was fetched ahead is read for the first time
                    self._table.use(chunk)
                    self._disk_order.use(entry.key(index))
                self._grant(chunk, consumer, chunk_no, message.serial)
                continue
            consumer.wants[chunk_no] = chunk
            chunk.want(holder, OpenWant(message.serial, message.urgent))
            self._queue(chunk)

    def release(self, consumer: ConsumerState, chunk_nos: Iterable[int]) -> None:
        """End leases and wants."""
        for chunk_no in chunk_nos:
            held = consumer.leases.pop(chunk_no, None)
            if held is not None:
                self._end_lease(held, consumer, chunk_no)
            wanted = consumer.wants.pop(chunk_no, None)
            if wanted is not None:
                wanted.unwant((consumer, chunk_no))
                self._queue(wanted)
                wanted.entry.forget_if_idle(wanted)

    def pinned(self, consumer: ConsumerState, chunk_nos: Iterable[int]) -> None:
        """Recalled chunks are in use: no point in waiting for just these."""
        for chunk_no in chunk_nos:
            chunk = consumer.leases.get(chunk_no)
            if chunk is not None and chunk.recalled is RecallState.ASKED:
                chunk.pin()
                self.asked.discard(chunk)

    def drop_consumer(self, consumer: ConsumerState) -> None:
        """End all leases and wants of a consumer that has gone, or attaches anew."""
        self.release(consumer, [*consumer.leases, *consumer.wants])

    # From the core

    def recall(self, chunk: Chunk) -> None:
        """Ask the holders of the chunk to release it."""
        chunk.recall()
        self.asked.add(chunk)
        self.recall_count += 1
        for consumer, chunk_no in chunk.lessees:
            consumer.recall(chunk_no)
        self._table.refresh(chunk)

    def loading(self, chunk: Chunk) -> None:
        """The chunk is being loaded: nothing has to be asked for."""
        self.demanded.pop(chunk, None)
        self.wanted.pop(chunk, None)

    def loaded(self, chunk: Chunk) -> None:
        """The chunk is in RAM: grant it to all who want it."""
        for (consumer, chunk_no), want in chunk.take_wanters().items():
            del consumer.wants[chunk_no]
            self._grant(chunk, consumer, chunk_no, want.serial)

    def dropped(self, chunk: Chunk) -> None:
        """The chunk has left RAM."""
        self._queue(chunk)
        chunk.entry.forget_if_idle(chunk)

    def grant_deferred(self) -> None:
        """Answer wants that waited for a recall to end."""
        for chunk in list(self._deferred):
            if chunk.state is ChunkState.RESIDENT and chunk.recalled is RecallState.NO:
                del self._deferred[chunk]
                self.loaded(chunk)

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        """The chunk cannot be loaded: those who want it get the error.

        A store's error is reported only to those by whose options it was asked; for others the chunk is tried again.
        """
        name, message = to_wire(error)
        of_store = isinstance(error, StoreError)
        for (consumer, chunk_no), want in list(chunk.wanters.items()):
            if of_store and consumer.options_key != chunk.fetched_as:
                continue
            chunk.unwant((consumer, chunk_no))
            del consumer.wants[chunk_no]
            consumer.send(protocol.Failed([chunk_no], [want.serial], name, message))
        self.dropped(chunk)

    # Inside

    def _queue(self, chunk: Chunk) -> None:
        """Put a chunk in the queue where its wants belong."""
        if chunk.state is ChunkState.RESIDENT and chunk.wanters:
            self._deferred.setdefault(chunk)
        else:
            self._deferred.pop(chunk, None)
        if chunk.state is not ChunkState.ABSENT or not chunk.wanters:
            self.loading(chunk)
        elif chunk.urgent:
            self.wanted.pop(chunk, None)
            self.demanded.setdefault(chunk)
        else:
            self.demanded.pop(chunk, None)
            self.wanted.setdefault(chunk)

    def _grant(self, chunk: Chunk, consumer: ConsumerState, chunk_no: int, serial: int) -> None:
        source = chunk.lessees.get((consumer, chunk_no))
        if source is None:
            source = self._source(chunk, consumer)
            self._count(consumer, source, chunk.length)
            chunk.lease((consumer, chunk_no), source)
        consumer.leases[chunk_no] = chunk
        consumer.unrecall(chunk_no)
        consumer.grant(chunk_no, serial, chunk.buffer, source)
        if consumer.plan is not None:
            consumer.plan.delivered(chunk.entry, chunk.index)
        self._table.refresh(chunk)

    def _count(self, consumer: ConsumerState, source: int, byte_count: int, times: int = 1) -> None:
        consumer.count(source, byte_count, times)
        self.served_bytes[source] += times * byte_count

    @staticmethod
    def _source(chunk: Chunk, consumer: ConsumerState) -> int:
        """Where the chunk had to come from for this plan: RAM if it was there before, or was counted before."""
        if chunk.load_order <= consumer.load_order or consumer.number in chunk.granted_to:
            return protocol.SOURCE_RAM
        return chunk.source

    def _undo_lease(self, chunk: Chunk, consumer: ConsumerState, chunk_no: int) -> None:
        """A lease that its consumer never took."""
        self._count(consumer, chunk.lessees[consumer, chunk_no], chunk.length, times=-1)
        del consumer.leases[chunk_no]
        chunk.undo_lease((consumer, chunk_no))
        self._lease_ended(chunk, consumer, chunk_no)

    def _end_lease(self, chunk: Chunk, consumer: ConsumerState, chunk_no: int) -> None:
        chunk.end_lease((consumer, chunk_no))
        self._lease_ended(chunk, consumer, chunk_no)

    def _lease_ended(self, chunk: Chunk, consumer: ConsumerState, chunk_no: int) -> None:
        consumer.unrecall(chunk_no)
        if not chunk.lessees:
            if chunk.recalled is not RecallState.NO:
                chunk.end_recall()
                self.asked.discard(chunk)
            self._table.touch(chunk)
        self._table.refresh(chunk)
