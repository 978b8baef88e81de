"""Pieces whose bytes an earlier checkpoint beside this one has already: they are named there, and not stored again.

Pieces are cut small, so that what has changed little is sent little. Two of the same length and BLAKE2b hash are the
same: that takes 2^64 of them to go wrong by chance.

What is referred to must not be deleted meanwhile; how both sides see to that is in `pruning`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.records import HASH_BYTES, Contents, Manifest, Object, Reference
from fastload.checkpoint.segments import Piece, cut_to
from fastload.errors import CheckpointDamagedError, ObjectMissingError

PIECE_BYTES = 512 << 10
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint beside, as it was when it was looked at."""

    place: Place
    manifest: Manifest
    contents: Contents

    @classmethod
    def at(cls, place: Place) -> Base | None:
        """None where it is damaged or gone."""
        there = attempts.current(place)
        if there is None or there.manifest is None:
            return None
        try:
            return cls(place, there.manifest, attempts.contents(place))
        except (CheckpointDamagedError, ObjectMissingError):
            return None

    @property
    def name(self) -> str:
        return self.place.folder.rstrip("/").rpartition("/")[2]

    @property
    def refers(self) -> list[str]:
        """The folders in which lies what it holds, as those beside it write them."""
        return [self.name, *self.manifest.refers]

    def is_there_still(self) -> bool:
        """To be asked once a plan is written that names it: what it holds stays from then on."""
        now = attempts.current(self.place)
        return now is not None and now.manifest == self.manifest

    def known(self) -> dict[tuple[int, bytes], tuple[Object, int]]:
        """Where the bytes of its pieces lie, by length and hash."""
        found: dict[tuple[int, bytes], tuple[Object, int]] = {}
        objects: dict[str, Object] = {}
        for length, hashed, held_in, offset in self.contents.hashes():
            if held_in.name not in objects:
                name = held_in.name if held_in.beside else f"../{self.name}/{held_in.name}"
                objects[held_in.name] = Object(name, held_in.size, held_in.sums)
            found.setdefault((length, hashed), (objects[held_in.name], offset))
        return found


def digests(pieces: Sequence[Piece], data_of: Callable[[Piece], memoryview]) -> dict[Piece, bytes]:
    """The hash of each, cut small."""

    def digest(piece: Piece) -> bytes:
        return hashlib.blake2b(data_of(piece), digest_size=HASH_BYTES).digest()

    small = list(cut_to(pieces, PIECE_BYTES))
    with ThreadPoolExecutor(_THREADS, "fastload-hashes") as pool:
        return dict(zip(small, pool.map(digest, small), strict=True))


def divide(
    hashes: Mapping[Piece, bytes], known: Mapping[tuple[int, bytes], tuple[Object, int]]
) -> tuple[list[Piece], list[Reference]]:
    """Which pieces are to be stored, and which refer to what is there."""
    fresh, references = [], []
    for piece, hashed in hashes.items():
        at = known.get((piece.length, hashed)) if piece.length else None
        if at is None:
            fresh.append(piece)
        else:
            references.append(Reference(piece, *at))
    return fresh, references
