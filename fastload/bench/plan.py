"""What to measure, and what is read for that: a part of the shards, so that it stays within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastload.store import ObjectInfo

BUSY = 0.9  # of an accelerator's time, as MLPerf Storage asks of most workloads


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `for_s` bounds an epoch; `max_bytes` what all phases together read from the store."""

    urls: Sequence[str]
    format: str = "auto"
    split: str | None = None
    shuffle: str = "window"
    seed: int = 0
    columns: Sequence[str] = ()
    decode: dict[str, str] = field(default_factory=dict)
    batch_size: int = 256
    workers: int = 2
    cache: Path | None = None
    cache_shares: Sequence[float] = ()
    for_s: float = 30.0
    max_bytes: int = 4 << 30
    repeats: int = 1
    step_s: float = 0.0  # 0: find the least
    peers: Sequence[str] = ()  # other loaders, to be measured beside
    skip: frozenset[str] = frozenset()
    price_per_gb: float = 0.0
    price_per_1000: float = 0.0
    epochs: int = 1
    show_endpoints: bool = False
    ranks: int = 1
    functions: Sequence[str] = ()  # `module:name` of what is mapped over the samples
    ram_bytes: int = 0  # of the arena; 0: as each phase needs it
    shuffle_window: int | str = "auto"
    against: str = ""  # `module:name` of the user's loader
    ideal: bool = False
    profile: str = ""  # the workload of MLPerf Storage that this is, with its batch and step; each rank an accelerator
    busy: float = BUSY  # the accelerator use that is enough


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be read: these shards, of all that the URLs name."""

    objects: Sequence[ObjectInfo]
    whole_count: int
    whole_bytes: int
    chunk_bytes: int
    passes: float  # over the data, from the store

    @property
    def byte_count(self) -> int:
        """Of the shards that are read."""
        return sum(each.size for each in self.objects)

    @property
    def store_bytes(self) -> int:
        """What all phases read from the store, but for measuring it."""
        return int(self.byte_count * self.passes)

    @property
    def requests(self) -> int:
        """The requests that takes."""
        return int(sum(-(-each.size // self.chunk_bytes) for each in self.objects) * self.passes)


def shards_within(objects: Sequence[ObjectInfo], byte_count: int) -> list[ObjectInfo]:
    """Shards of at most so many bytes together, evenly spread over all of them; at least one."""
    total = sum(each.size for each in objects)
    if total <= byte_count:
        return list(objects)
    count = max(1, int(len(objects) * byte_count / total))
    step = len(objects) / count
    return [objects[int(number * step)] for number in range(count)]
