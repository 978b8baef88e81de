"""The formats of shards, behind one small interface: bytes in, a `ShardIndex` out.

Nothing here imports numba until the first shard is to be indexed.
"""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.formats.shard_index import ShardIndex

__all__ = ["SHARD_ENDINGS", "SIDECAR_NAME", "Indexer", "ShardIndex", "indexer_for"]

SHARD_ENDINGS = (".tar",)
"""How the names of objects end that are shards, where a prefix is given instead of names."""

SIDECAR_NAME = "fastload-index.arrow"
"""What a file of indexes is called that is found by itself beside the shards of a prefix (see `sidecar`)."""

_UNPACK = {
    ".gz": "gunzip",
    ".tgz": "gunzip -S .tgz",
    ".zst": "unzstd",
    ".tzst": "unzstd",
    ".bz2": "bunzip2",
    ".tbz2": "bunzip2",
    ".xz": "unxz",
    ".txz": "unxz",
    ".lz4": "unlz4",
}


class Indexer(Protocol):
    """Makes the index of one shard from its bytes, in order, as they come. Used by one thread."""

    @property
    def next_offset(self) -> int:
        """The offset in the object of the next byte that is needed; the object's size once none is."""
        ...

    @property
    def done(self) -> bool:
        """Whether no more bytes are needed and `finish` may be called."""
        ...

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read `chunk`, which lies at `start` in the object; it is not kept. ShardError: not this format."""
        ...

    def finish(self) -> ShardIndex:
        """The index, once `done`. ShardError: the samples make no sense."""
        ...


def indexer_for(url: str, size: int) -> Indexer:
    """An indexer for the shard at `url` of `size` bytes, by the ending of its name; tar where there is none.

    Raises ConfigError for compressed archives and for other formats, ShardError for an empty object.
    """
    # A local path may hold any character; a URL's path ends before its query.
    name = (urlsplit(url).path if "://" in url else url).rpartition("/")[2]
    for ending, tool in _UNPACK.items():
        if name.lower().endswith(ending):
            raise ConfigError(f"{url}: compressed shards are not supported yet; unpack it with: {tool} {name}")
    from fastload.formats.tar import TarIndexer

    return TarIndexer(url, size)
