"""What the service knows of one rank's save on its way to disk and store."""

from __future__ import annotations

import asyncio
import posixpath
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastload import protocol
from fastload.checkpoint.records import Record
from fastload.errors import FastloadError
from fastload.service.host.threads import Done, Pool
from fastload.service.operators import Operator
from fastload.service.saving.area import Kept
from fastload.service.saving.image import Image
from fastload.service.state import ConsumerState

# The delay before a retry, at first.
RETRY_S = 1.0


@dataclass(eq=False)
class Saving:
    """One rank's part of a checkpoint on its way. Changed by the loop's thread only."""

    kept: Kept
    began: float
    image: Image | None = None
    part: Record | None = None  # once all checksums are known
    is_done: bool = False
    error: FastloadError | None = None  # that has ended it
    watchers: dict[ConsumerState, None] = field(default_factory=dict)
    borrowers: set[Operator] = field(default_factory=set)
    readers: int = 0  # of the image, in threads
    wanted_back: ConsumerState | None = None
    # Of the disk's half (`ToDisk`)
    sums: dict[int, bytes] = field(default_factory=dict)
    disk_bytes: int = 0
    is_on_disk: bool = False
    no_disk: str = ""  # why it is not
    # Of the store's half (`ToStore`)
    options_key: str | None = None
    denied: set[str] = field(default_factory=set)  # options with which it cannot be stored
    left: deque[int] = field(default_factory=deque)  # segments that are to be sent
    uploaded: set[int] = field(default_factory=set)
    is_begun: bool = False
    in_step: bool = False  # it begins, or finishes: nothing else goes on meanwhile
    is_stored: bool = False  # the part record as well
    # Of what is tried again
    refusal: FastloadError | None = None  # of the store, where waiting alone does not help
    reason: str = ""  # why it was to be tried again
    delay_s: float = RETRY_S
    retry: asyncio.TimerHandle | None = None  # what is to try it again

    @property
    def is_over(self) -> bool:
        return self.is_done or self.error is not None

    @property
    def store_bytes(self) -> int:
        return sum(self.kept.sizes[number] for number in self.uploaded)

    @property
    def run(self) -> tuple[str, int]:
        """What is saved again and again: the folder above, and the rank."""
        return posixpath.dirname(self.kept.folder.rstrip("/")), self.kept.rank

    @property
    def level(self) -> protocol.Level:
        return "store" if self.is_done else "disk" if self.is_on_disk else "memory"

    def read_image(
        self, pool: Pool, read: Callable[[Image], Any], done: Done, released: Callable[[Saving], None]
    ) -> None:
        """Read the image in a thread of `pool`; then `done`, and `released` once this holds the image no more."""
        image = self.image
        assert image is not None
        self.readers += 1

        def has_read(result: Any, error: BaseException | None) -> None:
            self.readers -= 1
            done(result, error)
            released(self)

        pool.submit(read, image, done=has_read)
