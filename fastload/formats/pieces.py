"""Large files of some formats are read in pieces of `PIECE_BYTES`, each a shard of its own, so that a file larger than
any cache is shared by nodes.

A piece holds the samples that begin in its own bytes. Where one goes on behind these, it ends in the next piece's. So
that hardly any piece needs another, each is fetched with the `TAIL_BYTES` that follow it, which the next one has as
well. What is longer still goes on in the next piece.

The order depends on both numbers, so they are no settings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

__all__ = ["PIECE_BYTES", "TAIL_BYTES", "in_pieces", "own_bytes"]

PIECE_BYTES = 64 << 20
TAIL_BYTES = 512 << 10


def in_pieces(shards: ObjectTable, is_cut: Callable[[str], bool] = lambda url: True) -> ObjectTable:
    """The same shards, with pieces in place of those that are larger than one and whose URLs say that they are cut;
    what is in packed objects is whole. Those of an object follow each other.
    """
    are_large = (shards.sizes > PIECE_BYTES) & (shards.all_pieces()[1] < 0)
    large = [number for number in np.flatnonzero(are_large).tolist() if is_cut(shards[number].url)]
    if not large:
        return shards
    parts: list[ObjectTable] = []
    whole_from = 0
    for number in large:
        parts += [shards[whole_from:number], ObjectTable.of(_pieces_of(shards[number]))]
        whole_from = number + 1
    return ObjectTable.joined([*parts, shards[whole_from:]])


def _pieces_of(info: ObjectInfo) -> list[ObjectInfo]:
    return [
        ObjectInfo(
            info.url,
            min(PIECE_BYTES + TAIL_BYTES, info.size - start),
            info.etag,
            info.mtime_ns,
            start,
            info.size,
        )
        for start in range(0, info.size, PIECE_BYTES)
    ]


def own_bytes(info: ObjectInfo) -> int:
    """How many of the first bytes of a shard are its own, and no other piece's."""
    return min(PIECE_BYTES, info.object_size - info.start) if info.is_piece else info.size
