"""Shards of all shapes, uploaded once; a corpus is some of them, in some order, named by their URLs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastload.demo.weed import WeedServer
from tests.shards import tar_of

# Samples of each shard: none, one, few, many, and one of a hundred times the few.
COUNTS = (0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 5, 8, 13, 16, 21, 24, 30, 300)
HUGE = COUNTS.index(300)
KEYS = tuple(tuple(f"{shard:02}-{sample:03}" for sample in range(count)) for shard, count in enumerate(COUNTS))
# These have no number in `cls`.
BAD = frozenset(key for shard in range(1, len(COUNTS), 2) for key in KEYS[shard][2::7])


def _tar(shard: int) -> bytes:
    # Samples are nothing like their bytes: some shards have a column that nobody reads.
    padding = {"bin": bytes(shard * 37 % 5 * 400)} if shard % 3 == 0 else {}
    return tar_of({key: {"cls": b"no" if key in BAD else key[-3:].encode(), **padding} for key in KEYS[shard]})


_TARS = tuple(map(_tar, range(len(COUNTS))))
SIZES = tuple(map(len, _TARS))


@dataclass(frozen=True)
class Shelf:
    """Where the shards are. `environment` leads there."""

    urls: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def uploaded(cls, server: WeedServer, bucket: str) -> Shelf:
        """All shards in a new bucket."""
        server.make_bucket(bucket)
        urls = tuple(f"s3://{bucket}/{number:02}.tar" for number in range(len(COUNTS)))
        for url, data in zip(urls, _TARS, strict=True):
            server.put(url, data)
        return cls(urls, server.environment())
