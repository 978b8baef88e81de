"""Files that are attached behind a manifest's objects: of indexes, or of what says how shards are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastload.client.consumer import Consumer
from fastload.pipeline.shard_listing import object_reader
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SideFiles:
    """Attached files, and the number of each one's first chunk and how many chunks it has."""

    infos: ObjectTable
    first_chunk: Ints
    chunk_counts: Ints

    @classmethod
    def behind(cls, first_chunk: int, chunk_bytes: int, files: ObjectTable) -> SideFiles:
        """Those that are attached from that chunk on."""
        counts: Ints = -(-files.sizes // chunk_bytes)
        return cls(files, first_chunk + np.cumsum(counts) - counts, counts)

    def divided(self, is_first: Callable[[ObjectInfo], bool]) -> tuple[SideFiles, SideFiles]:
        """Those for which that holds, and the others."""
        mask = np.array([is_first(info) for info in self.infos], np.bool_)
        first, others = (
            SideFiles(self.infos.take(at), self.first_chunk[at], self.chunk_counts[at])
            for at in map(np.flatnonzero, (mask, ~mask))
        )
        return first, others

    def read_at(self, consumer: Consumer, number: int) -> Callable[[int, int], bytes]:
        """Reads parts of one of them: `read_at(start, length)`."""
        return object_reader(consumer, int(self.first_chunk[number]), self.infos[number].size)
