"""Objects that are read whole or in parts through the cache, beside the shards: lists and indexes.

They are attached and numbered like shards, so they are fetched once for the node, verified and kept like all chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from fastload.client.consumer import Consumer


def reader(consumer: Consumer, first_chunk: int, size: int) -> Callable[[int, int], bytes]:
    """`read_at(start, length)` of the attached object of `size` bytes whose chunks begin at number `first_chunk`."""
    chunk_bytes = consumer.chunk_bytes

    def read_at(start: int, length: int) -> bytes:
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} of an object of {size}")
        if not length:
            return b""
        first, last = start // chunk_bytes, (start + length - 1) // chunk_bytes
        consumer.want(range(first_chunk + first, first_chunk + last + 1))
        parts = []
        for chunk in range(first, last + 1):
            low, high = max(start - chunk * chunk_bytes, 0), min(start + length - chunk * chunk_bytes, chunk_bytes)
            with consumer.acquire([first_chunk + chunk], reason="index") as held:
                arena, _, offsets = held.groups[0]
                parts.append(arena[int(offsets[0]) + low : int(offsets[0]) + high].tobytes())
            consumer.release([first_chunk + chunk])
        return b"".join(parts)

    return read_at
