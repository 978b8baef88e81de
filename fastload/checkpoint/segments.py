"""Segments: what of a rank's pieces goes into which object, and the bytes of each.

A segment is a valid safetensors file of about 256 MB, so that any reader of these opens what we write. That format
allows no gaps between tensors; wide elements come first, which keeps each aligned to its own size. The header is padded
with spaces, as the format permits, so that data begin on a page and can be written directly from memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from fastload.checkpoint.boxes import Box, cut

SEGMENT_BYTES = 256 << 20
PAGE_BYTES = 4096
BLOCK_BYTES = 65536
# A header stays far below the 100 MB that stock readers take.
_ENTRIES_MAX = 50_000
# Bytes an element of each dtype, by its name in safetensors.
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_RESERVED = "__metadata__"  # of the format, in place of a name


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the tensor `name`, which as a whole has this dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def length(self) -> int:
        """In bytes."""
        return self.box.elements * DTYPES[self.dtype]

    @property
    def key(self) -> str:
        """What it is called in a segment."""
        if self.box.sizes == self.shape and not any(self.box.offsets) and self.name != _RESERVED:
            return self.name
        return f"{self.name}@{','.join(map(str, self.box.offsets))}"


@dataclass(frozen=True, slots=True)
class Segment:
    """`header` and behind it the bytes of each piece, without a gap."""

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(piece.length for piece in self.pieces)

    @property
    def offsets(self) -> list[int]:
        """Where each piece begins."""
        return _ends([len(self.header), *(piece.length for piece in self.pieces)])[:-1]


def lay_out(pieces: Sequence[Piece], segment_bytes: int = SEGMENT_BYTES) -> Iterator[Segment]:
    """Segments for a rank's pieces, in their order. Pieces of more than `segment_bytes` are cut, at rows as a rule;
    segments hold no more than that, headers apart.
    """
    group: list[Piece] = []
    keys: set[str] = set()
    held = 0
    for piece in cut_to(pieces, segment_bytes):
        key, length = piece.key, piece.length
        # A tensor may be called as a piece of another is.
        if group and (held + length > segment_bytes or key in keys or len(group) == _ENTRIES_MAX):
            yield _segment(group)
            group, keys, held = [], set(), 0
        group.append(piece)
        keys.add(key)
        held += length
    if group:
        yield _segment(group)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Segments in memory that holds their pieces already: where each segment begins, and where what is behind them may;
    and which bytes have to be moved for that: from where, to where, how many.
    """

    segments: list[Segment]
    starts: list[int]
    moves: list[tuple[int, int, int]]


def arrange(placed: Sequence[tuple[Piece, int]], segment_bytes: int = SEGMENT_BYTES) -> Arrangement | None:
    """Segments of pieces that lie in memory from these offsets on. What lies where it is to be stays there: the memory
    was laid out in the expectation of all these pieces, with room for headers, and some may be missing now. None where
    two of them overlap.
    """
    parts: list[tuple[Piece, int]] = []
    for piece, at in sorted(placed, key=lambda each: (not each[0].length, each[1])):
        if parts and piece.length and at < parts[-1][1] + parts[-1][0].length:
            return None
        for part in cut_to([piece], segment_bytes):
            parts.append((part, at))
            at += part.length
    arrangement = Arrangement([], [], [])
    end = 0
    for group in _groups_in_place(parts, segment_bytes):
        # Empty ones, which are at the end, have no place.
        segment = _segment([piece for piece, _ in group])
        first, header = group[0][1], len(segment.header)
        begins_in_place = group[0][0].length and first % PAGE_BYTES == 0 and first - header >= end
        start = first - header if begins_in_place else end
        at = start + header
        for piece, source in group:
            if piece.length and source != at:
                arrangement.moves.append((source, at, piece.length))
            at += piece.length
        arrangement.segments.append(segment)
        arrangement.starts.append(start)
        end = -(-at // PAGE_BYTES) * PAGE_BYTES
    arrangement.starts.append(end)
    return arrangement


def _groups_in_place(parts: Sequence[tuple[Piece, int]], segment_bytes: int) -> Iterator[list[tuple[Piece, int]]]:
    group: list[tuple[Piece, int]] = []
    keys: set[str] = set()
    held = end = width = 0
    for piece, at in parts:
        is_full = held + piece.length > segment_bytes or piece.key in keys or len(group) == _ENTRIES_MAX
        is_wider = piece.length > 0 and DTYPES[piece.dtype] > width
        # Else what has gone from one segment would move all that is behind it.
        is_worth_it = held * 4 >= segment_bytes or piece.length * 2 > segment_bytes
        stays = is_worth_it and piece.length and at % PAGE_BYTES == 0 and at - end >= PAGE_BYTES
        if group and (is_full or is_wider or stays):
            yield group
            group, keys, held = [], set(), 0
        group.append((piece, at))
        keys.add(piece.key)
        held, end = held + piece.length, at + piece.length
        width = DTYPES[piece.dtype] if piece.length else width
    if group:
        yield group


def cut_to(pieces: Sequence[Piece], bytes_max: int) -> Iterator[Piece]:
    """The same, of at most so many bytes each."""
    for piece in pieces:
        elements_max = max(1, bytes_max // DTYPES[piece.dtype])
        if piece.box.elements <= elements_max:  # the most of them
            yield piece
            continue
        for box in cut(piece.box, elements_max):
            yield Piece(piece.name, piece.dtype, piece.shape, box)


def _segment(group: list[Piece]) -> Segment:
    pieces = tuple(sorted(group, key=lambda piece: -DTYPES[piece.dtype]))
    return Segment(header_of(pieces), pieces)


def header_of(pieces: Sequence[Piece]) -> bytes:
    ends = _ends([piece.length for piece in pieces])
    starts = [0, *ends[:-1]]
    entries = {
        piece.key: {"dtype": piece.dtype, "shape": piece.box.sizes, "data_offsets": [start, end]}
        for piece, start, end in zip(pieces, starts, ends, strict=True)
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _ends(lengths: Sequence[int]) -> list[int]:
    ends, at = [], 0
    for length in lengths:
        at += length
        ends.append(at)
    return ends


def checksums(parts: Sequence[memoryview]) -> bytes:
    """Those of an object's blocks, one after the other; `parts` one after the other are the object."""
    found = bytearray()
    block = bytearray()  # what has begun in one part and goes on in the next
    for part in parts:
        at = 0
        if block:
            at = min(BLOCK_BYTES - len(block), len(part))
            block += part[:at]
            if len(block) == BLOCK_BYTES:
                found += struct.pack("<Q", xxh3_64_intdigest(block))
                block.clear()
        while len(part) - at >= BLOCK_BYTES:
            found += struct.pack("<Q", xxh3_64_intdigest(part[at : at + BLOCK_BYTES]))
            at += BLOCK_BYTES
        block += part[at:]
    if block:
        found += struct.pack("<Q", xxh3_64_intdigest(block))
    return bytes(found)


def blocks_of(start: int, end: int, size: int) -> tuple[int, int]:
    """What has to be read of an object so that these bytes can be verified: the range, made wider to whole blocks."""
    return start // BLOCK_BYTES * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, size)


def damaged_block(sums: bytes, start: int, data: memoryview) -> int | None:
    """The first of `damaged_blocks`; None where there is none."""
    return next(_damaged(sums, start, data), None)


def damaged_blocks(sums: bytes, start: int, data: memoryview) -> list[int]:
    """The numbers of the blocks of `data`, which begins at the block at `start`, that are not what was written."""
    return list(_damaged(sums, start, data))


def _damaged(sums: bytes, start: int, data: memoryview) -> Iterator[int]:
    assert start % BLOCK_BYTES == 0
    first = start // BLOCK_BYTES
    for number in range(-(-len(data) // BLOCK_BYTES)):
        block = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        at = 8 * (first + number)
        if sums[at : at + 8] != struct.pack("<Q", xxh3_64_intdigest(block)):
            yield first + number
