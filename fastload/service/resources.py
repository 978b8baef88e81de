"""What a core works with: its limits, tiers, threads, stores, a clock, and the events of its parts.

The real resources are made from a directory; a simulation brings its own, and decides by them as the service would.
`Ram` and `Disk` are what the service needs of its two tiers. `cache.Arena` and `cache.DiskTier` are the real ones,
whose text holds the contract; a simulation has others, which hold no bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastload.cache import Arena, CacheDirectory, ChunkKey, DiskTier
from fastload.cache.catalog import Catalog
from fastload.cache.directory import LastingRoot
from fastload.config import CacheLimits
from fastload.history.archive import Archive
from fastload.rendezvous import ServiceLocation
from fastload.service.events import Events, Warnings
from fastload.service.fetching.request_limit import REQUESTS_MAX, Hedger, requests_max
from fastload.service.fetching.stores import StoreFactory, StoreTable
from fastload.service.host.threads import Pools
from fastload.service.saving.area import Area
from fastload.service.unpacking import files_in, memory_file
from fastload.store.watch import waited_for_core_s


@dataclass(frozen=True, slots=True)
class Resources:
    """See the module's text. `now` is the clock of all of them, in seconds; times of different ones can be compared."""

    limits: CacheLimits
    arena: Ram
    disk: Disk
    pools: Pools
    stores: StoreTable
    warnings: Warnings
    now: Callable[[], float] = time.monotonic
    hedger: Callable[[], Hedger] = Hedger  # for each endpoint of a store
    wall: Callable[[], float] = time.time  # seconds since 1970, for people
    started_at: float = field(default_factory=time.time)  # by that clock
    requests_max: int = REQUESTS_MAX  # at a time, over all endpoints
    is_lost: Callable[[], bool] = lambda: False  # the directory is gone: nothing more may be written. From any thread
    closed: Callable[[], object] = lambda: None  # nothing uses them any more
    catalog: Catalog | None = None  # None: nothing is known of what an earlier service held, and no pin is kept
    checkpoints: Area | None = None  # None: none is kept on disk
    history: Archive | None = None  # None: none is kept or used; with `history_bytes=0` it can only be cleared
    events: Events = field(default_factory=Events)
    waited_for_core: Callable[[], float] = waited_for_core_s  # of the calling thread, in seconds

    @classmethod
    def of_directory(
        cls, directory: ServiceLocation, loop: asyncio.AbstractEventLoop, factory: StoreFactory | None = None
    ) -> Resources:
        """The real ones. CacheError where arena or disk tier cannot be opened."""
        limits, warnings = directory.limits, Warnings(loop)
        root = directory.lasting_root() if isinstance(directory, CacheDirectory) else None
        arena = Arena(limits.ram_bytes, limits.chunk_bytes)
        disk = DiskTier(
            directory.path,
            limits.disk_bytes,
            limits.chunk_bytes,
            root=root,
            on_trouble=warnings.add_from_thread,
        )
        return cls(
            limits,
            arena,
            disk,
            Pools(loop),
            StoreTable(factory, _files_of(directory, root)),
            warnings,
            requests_max=requests_max(),
            is_lost=lambda: directory.is_lost,
            closed=(lambda: None) if root is None else root.close,
            catalog=None
            if not isinstance(directory, CacheDirectory)
            else Catalog(root.path if root else directory.path),
            checkpoints=Area(root.path if root else directory.path)
            if isinstance(directory, CacheDirectory) and limits.checkpoint_disk_bytes
            else None,
            history=Archive(directory.path, root) if isinstance(directory, CacheDirectory) else None,
        )


def _files_of(directory: ServiceLocation, root: LastingRoot | None) -> Callable[[int], int]:
    """What makes files for unpacked bytes."""
    if root is None or not directory.limits.disk_bytes:
        return memory_file
    return files_in(root.path)


class Ram(Protocol):
    """See `cache.Arena`."""

    @property
    def chunk_bytes(self) -> int:
        """The size of a buffer."""
        ...

    @property
    def buffer_count(self) -> int:
        """How many there are."""
        ...

    @property
    def byte_count(self) -> int:
        """The size of all of them."""
        ...

    @property
    def fd(self) -> int:
        """The descriptor that consumers map it by."""
        ...

    @property
    def touched_bytes(self) -> int:
        """How much memory it takes up."""
        ...

    def buffer(self, number: int) -> memoryview:
        """Buffer `number`."""
        ...

    def renew(self) -> Callable[[], None]:
        """Go over to fresh memory; what the old holds is lost. Returns what lets go of it, for a thread."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class Disk(Protocol):
    """See `cache.DiskTier`. What takes time is called in the pools' threads."""

    @property
    def directory(self) -> Path:
        """Where it is."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """The size of a whole chunk."""
        ...

    @property
    def readable(self) -> bool:
        """Whether chunks are looked for here at all."""
        ...

    @property
    def writable(self) -> bool:
        """Whether `write` may succeed, given room."""
        ...

    @property
    def used_bytes(self) -> int:
        """What all that is held takes up."""
        ...

    @property
    def quota_bytes(self) -> int:
        """What may be held."""
        ...

    @property
    def free_bytes(self) -> int:
        """What the quota has left beside writes under way."""
        ...

    @property
    def counters(self) -> dict[str, int]:
        """What went well and wrong."""
        ...

    def file_bytes(self, length: int) -> int:
        """The room that a chunk of `length` bytes takes."""
        ...

    def contains(self, key: ChunkKey) -> bool:
        """Whether the chunk is held. Never blocks."""
        ...

    def keys(self) -> list[ChunkKey]:
        """The chunks held."""
        ...

    def read_into(self, key: ChunkKey, out: memoryview) -> int | None:
        """Fill the start of `out` with the chunk; its length, or None for no chunk."""
        ...

    def verify(self, key: ChunkKey, scratch: memoryview, *, repair: bool) -> bool | None:
        """Whether the chunk's file is whole; None: not to be said. With `repair`, a damaged one is removed."""
        ...

    def write(self, key: ChunkKey, buffer: memoryview, length: int) -> bool:
        """Keep the first `length` bytes of `buffer` as the chunk; False where it is not kept."""
        ...

    def remove(self, key: ChunkKey) -> bool:
        """Drop the chunk."""
        ...

    def get_blob(self, name: str) -> bytes | None:
        """The value under `name`, or None."""
        ...

    def has_blob(self, name: str) -> bool:
        """Whether there is one. Never blocks."""
        ...

    def get_blob_head(self, name: str, head_bytes: int) -> tuple[bytes, int] | None:
        """The first bytes of the value under `name`, and how long all of it is."""
        ...

    def blob_names(self) -> list[str]:
        """The names of all blobs."""
        ...

    def remove_blob(self, name: str) -> bool:
        """Remove a blob; whether it was there."""
        ...

    def put_blob(self, name: str, data: bytes) -> bool:
        """Keep `data` under `name`."""
        ...

    def set_quota(self, quota_bytes: int) -> None:
        """Change the quota while running."""
        ...

    def stalled(self, seconds: float) -> None:
        """A call has not returned for `seconds`."""
        ...

    def answered(self) -> None:
        """The calls that hung have returned."""
        ...
