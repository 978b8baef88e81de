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
    """What will be read: these shards, of all that the URLs name, as a loader reads them. So several may be pieces of
    one object, and the size of what is in a packed object is that of the unpacked bytes.
    """

    objects: Sequence[ObjectInfo]
    whole_count: int
    whole_bytes: int
    chunk_bytes: int
    passes: float  # over the data, from the store

    @property
    def stored(self) -> list[ObjectInfo]:
        """The objects that hold the shards, as their store has them."""
        return _stored(self.objects)

    @property
    def byte_count(self) -> int:
        """Of the shards that are read, unpacked."""
        return sum(each.size for each in self.objects)

    @property
    def stored_bytes(self) -> int:
        """Of the objects that are fetched for that."""
        return sum(each.size for each in self.stored)

    @property
    def store_bytes(self) -> int:
        """What all phases read from the store, but for measuring it."""
        return int(self.stored_bytes * self.passes)

    @property
    def requests(self) -> int:
        """The requests that takes."""
        return int(sum(-(-each.size // self.chunk_bytes) for each in self.stored) * self.passes)


def shards_within(objects: Sequence[ObjectInfo], byte_count: int) -> list[ObjectInfo]:
    """Shards whose objects have at most so many bytes together in the store, evenly spread over all of them; at least
    those of one object, since a loader is given URLs.
    """
    stored = _stored(objects)
    total = sum(each.size for each in stored)
    if total <= byte_count:
        return list(objects)
    count = max(1, int(len(stored) * byte_count / total))
    step = len(stored) / count
    chosen = {stored[int(number * step)].url for number in range(count)}
    return [each for each in objects if each.url in chosen]


def _stored(objects: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    return list({each.url: each.stored for each in objects}.values())
