"""Shards of all shapes, uploaded once; a corpus is some of them, in some order, named by their URLs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastload.demo.weed import WeedServer
from tests.shards import tar_of

# Samples of each shard: none, one, few, many, and one of a hundred times the few.
COUNTS = (0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 5, 8, 13, 16, 21, 24, 30, 300)
HUGE = COUNTS.index(300)


@dataclass(frozen=True)
class Shelf:
    """`keys[i]` are the keys of shard i's samples, `sizes[i]` its bytes; `environment` leads to it."""

    urls: tuple[str, ...]
    sizes: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Shelf({len(self.urls)} shards)"

    @classmethod
    def uploaded(cls, server: WeedServer, bucket: str) -> Shelf:
        """All shards in a new bucket."""
        server.make_bucket(bucket)
        urls, sizes, keys = [], [], []
        for number, count in enumerate(COUNTS):
            samples = {f"{number:02}-{sample:03}": {"cls": b"%d" % sample} for sample in range(count)}
            # Samples are nothing like their bytes: some shards have a column that nobody reads.
            padding = {"bin": bytes(number * 37 % 5 * 400)} if number % 3 == 0 else {}
            data = tar_of({key: {**sample, **padding} for key, sample in samples.items()})
            urls.append(f"s3://{bucket}/{number:02}.tar")
            server.put(urls[-1], data)
            sizes.append(len(data))
            keys.append(tuple(samples))
        return cls(tuple(urls), tuple(sizes), tuple(keys), server.environment())

    def names(self, shards: Sequence[int], batches: Sequence[Sequence[tuple[int, int]]]) -> list[list[str]]:
        """Batches of (object, sample) of a corpus of these shards, as keys."""
        return [[self.keys[shards[number]][sample] for number, sample in batch] for batch in batches]
