"""What a core is built on: its tiers, its threads, its stores and its clock. The real ones are made from a directory;
a simulation brings its own, and decides by them as the service would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastload.cache import Arena, CacheDirectory, DiskTier
from fastload.config import CacheLimits
from fastload.history.archive import Archive
from fastload.service.control import REQUESTS_MAX
from fastload.service.fetches import requests_max
from fastload.service.hedging import Hedger
from fastload.service.pools import Pools
from fastload.service.populate import Populator
from fastload.service.standin import Place
from fastload.service.stores import Opener, StoreTable
from fastload.service.tiers import Disk, Ram
from fastload.service.troubles import Troubles


class Touching(Protocol):
    """Has the arena's memory ready before it is used. See `Populator`."""

    def need(self, used_count: int, needed_count: int) -> None:
        """The first `used_count` buffers have been used, and `needed_count` will be."""
        ...

    def renewed(self) -> None:
        """The arena has fresh memory, and nothing is needed of it yet."""
        ...

    def close(self) -> None:
        """Touch no more."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """See the module's text. `now` is the clock of all of them, in seconds; times of different ones can be compared."""

    limits: CacheLimits
    arena: Ram
    disk: Disk
    pools: Pools
    stores: StoreTable
    populator: Touching
    troubles: Troubles
    now: Callable[[], float] = time.monotonic
    hedger: Callable[[], Hedger] = Hedger  # for each endpoint of a store
    wall: Callable[[], float] = time.time  # seconds since 1970, for people
    requests_max: int = REQUESTS_MAX  # at a time, over all endpoints
    is_lost: Callable[[], bool] = lambda: False  # the directory is gone: nothing more may be written. From any thread
    closed: Callable[[], object] = lambda: None  # nothing uses them any more
    history: Archive | None = None  # None: none is kept or used; with `history_bytes=0` it can only be cleared

    @classmethod
    def of_directory(cls, directory: Place, loop: asyncio.AbstractEventLoop, opener: Opener | None = None) -> Parts:
        """The real ones. CacheError where arena or disk tier cannot be opened."""
        limits, troubles = directory.limits, Troubles(loop)
        root = directory.lasting_root() if isinstance(directory, CacheDirectory) else None
        arena = Arena(limits.ram_bytes, limits.chunk_bytes)
        disk = DiskTier(
            directory.path,
            limits.disk_bytes,
            limits.chunk_bytes,
            root=root,
            on_trouble=troubles.add_from_thread,
        )
        return cls(
            limits,
            arena,
            disk,
            Pools(loop),
            StoreTable(opener),
            Populator(arena),
            troubles,
            requests_max=requests_max(),
            is_lost=lambda: directory.is_lost,
            closed=(lambda: None) if root is None else root.close,
            history=Archive(directory.path, root) if isinstance(directory, CacheDirectory) else None,
        )
