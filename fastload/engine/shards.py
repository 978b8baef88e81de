"""Shard indexes: from this process's memory, from the service, or by parsing the shard's bytes once.

Consumers parse and the service stores: the first pass over a shard costs a walk over its headers, in the same chunks
that are being fetched for its samples anyway, and no later pass, epoch or process pays it again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import cachetools
import numpy as np
import numpy.typing as npt

from fastload.errors import ShardError
from fastload.formats import ShardIndex, indexer_for
from fastload.plan import Manifest
from fastload.service.client import Consumer

# Indexes take about 80 bytes a sample. Windows hold the ones in use; this is for those that come again next epoch.
_MEMORY_BYTES = 256 << 20


class ShardTable:
    """The indexes of a data set's shards, by object number. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, first_chunk: np.ndarray, chunk_bytes: int) -> None:
        self._manifest = manifest
        self._first_chunk = first_chunk
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[int, ShardIndex] = cachetools.LRUCache(
            _MEMORY_BYTES, getsizeof=lambda index: index.byte_count + 1024
        )

    def get(self, consumer: Consumer, object_nos: Sequence[int]) -> list[ShardIndex]:
        """The indexes of these shards, in this order; parses what nobody has parsed before."""
        found = self._in_memory(object_nos)
        missing = [number for number in object_nos if number not in found]
        if missing:
            stored = consumer.get_indexes(missing)
            for number in missing:
                found[number] = self._load(consumer, number, stored.get(number))
        with self._lock:
            for number, index in found.items():
                if index.byte_count + 1024 <= self._known.maxsize:
                    self._known[number] = index
        return [found[number] for number in object_nos]

    def known_counts(self, consumer: Consumer) -> npt.NDArray[np.int64]:
        """int64[objects]: how many samples each shard has, -1 where nobody knows yet. Parses nothing."""
        counts = consumer.get_counts(range(len(self._manifest)))
        with self._lock:  # the service keeps no index above 64 MiB
            for number, index in self._known.items():
                counts[number] = index.sample_count
        return counts

    def _stored_index(self, object_no: int, stored: bytes | None) -> ShardIndex | None:
        """The index that the service has, or None where it has none that can be used."""
        if stored is None:
            return None
        info = self._manifest.objects[object_no]
        try:
            return ShardIndex.from_bytes(stored, info.url, info.size)
        except ShardError:
            # Damaged, or of another version: worth no more than none. It is parsed again and the new one takes its
            # place.
            return None

    def _in_memory(self, object_nos: Sequence[int]) -> dict[int, ShardIndex]:
        with self._lock:
            return {number: self._known[number] for number in object_nos if number in self._known}

    def _load(self, consumer: Consumer, object_no: int, stored: bytes | None) -> ShardIndex:
        found = self._stored_index(object_no, stored)
        if found is not None:
            return found
        index = self._parse(consumer, object_no)
        consumer.put_index(object_no, index.to_bytes())
        return index

    def _parse(self, consumer: Consumer, object_no: int) -> ShardIndex:
        """Walk over the headers of a shard, chunk by chunk, skipping the chunks that hold none."""
        info = self._manifest.objects[object_no]
        first, end = int(self._first_chunk[object_no]), int(self._first_chunk[object_no + 1])
        indexer = indexer_for(info.url, info.size)
        chunk = first
        while chunk < end and not indexer.done:
            start = (chunk - first) * self._chunk_bytes
            length = min(self._chunk_bytes, info.size - start)
            with consumer.acquire([chunk], reason="index") as held:
                view, _, offsets = held.groups[0]
                indexer.feed(view[int(offsets[0]) : int(offsets[0]) + length], start)
            chunk = max(chunk + 1, first + indexer.next_offset // self._chunk_bytes)
        return indexer.finish()
