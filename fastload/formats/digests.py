"""Digests of whole shards, which an index beside them may have: checked where a shard's index is made, once for each
version of it, and kept with the index. So they cost one pass over bytes that are there anyway, and nothing later.

Of several the one that is computed fastest is checked, of a packed shard that of what is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.indexers import WholeIndexer
from fastload.formats.record_index import RecordIndex
from fastload.formats.table_index import TableIndex

_FASTEST_FIRST = (
    "xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "sha1", "sha256", "sha224", "blake2b", "md5", "sha512", "sha384",
    "blake2s", "sha3_224", "sha3_256", "sha3_384", "sha3_512",
)  # fmt: skip


def new_digest(algorithm: str) -> Any:
    """What computes it, as in `hashlib`; None where nothing here does."""
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)()
    try:
        made = hashlib.new(algorithm, usedforsecurity=False)
    except ValueError:
        return None
    return made if made.digest_size else None  # of no fixed size


def fastest(digests: Mapping[str, str]) -> str:
    """The algorithm that is checked; "" where none is known here."""
    known = (name for name in (*_FASTEST_FIRST, *digests) if name in digests and new_digest(name) is not None)
    return next(known, "")


class CheckedIndexer(WholeIndexer):
    """Another indexer, of a shard whose digest it checks at the end. Used by one thread."""

    def __init__(self, indexer: Any, url: str, size: int, algorithm: str, digest: str) -> None:
        """`indexer` is an `Indexer` of the shard at `url`, which has `size` bytes."""
        super().__init__(url, size)
        self._inner = indexer
        self._algorithm, self._digest, self._hash = algorithm, digest.lower(), new_digest(algorithm)

    def _read(self, chunk: NDArray[np.uint8], start: int) -> None:
        if not self._inner.done and start <= self._inner.next_offset < start + len(chunk):
            self._inner.feed(chunk, start)
        self._hash.update(chunk.data)

    def finish(self) -> RecordIndex | TableIndex:
        """The index. ShardError where the digest is another one."""
        found = self._hash.hexdigest()
        if found != self._digest:
            raise ShardError(
                f"{self._url}: its {self._algorithm} is {found}, and the index beside it says {self._digest}: it is "
                "damaged, or is another one; upload both again"
            )
        index: RecordIndex | TableIndex = self._inner.finish()
        return index
