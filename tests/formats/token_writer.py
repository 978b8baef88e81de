"""Megatron's files as its own writer lays them out, and what samples of tokens are, in plain Python."""

from __future__ import annotations

import itertools
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastload.formats import PackedIndex, RecordIndex, StridedIndex, record_reader

CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f8": 6, "<f4": 7, "<u2": 8, "<u4": 9, "<u8": 10}

Sequences = list[list[int]]


def index_bytes(documents: list[Sequences], dtype: str, modes: list[list[int]] | None = None) -> bytes:
    """The `.idx` of documents that are lists of sequences."""
    lengths = [len(sequence) for document in documents for sequence in document]
    item_bytes = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *lengths])[:-1] * item_bytes
    firsts = np.cumsum([0, *(len(document) for document in documents)])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(firsts))
    body = np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + firsts.astype("<i8").tobytes()
    return head + body + (b"" if modes is None else np.array([m for each in modes for m in each], "i1").tobytes())


def parse_index(about: bytes, data: bytes) -> tuple[list[Sequences], list[list[int]] | None, int]:
    """What such an index says of data that it fits: documents, modes, and the bytes of a token."""
    code, count, starts = struct.unpack_from("<BQQ", about, 17)
    dtype = next(each for each, number in CODES.items() if number == code)
    lengths = np.frombuffer(about, "<i4", count, 34).tolist()
    firsts = np.frombuffer(about, "<i8", starts, 34 + 12 * count).tolist()
    has_modes = count and len(about) > 34 + 12 * count + 8 * starts
    of_each = list(about[-count:]) if has_modes else []
    ends = np.cumsum([0, *lengths]).tolist()
    tokens = np.frombuffer(data, dtype).tolist()
    sequences = [tokens[a:b] for a, b in pairwise(ends)]
    documents = [sequences[a:b] for a, b in pairwise(firsts)]
    modes = [of_each[a:b] for a, b in pairwise(firsts)] if has_modes else None
    return documents, modes, np.dtype(dtype).itemsize


def is_consistent(about: bytes, item_bytes: int) -> bool:
    """Whether each sequence of such an index begins where the one before ends."""
    (count,) = struct.unpack_from("<Q", about, 18)
    lengths = np.frombuffer(about, "<i4", count, 34).astype(np.int64)
    pointers = np.frombuffer(about, "<i8", count, 34 + 4 * count)
    return np.array_equal(np.cumsum([0, *lengths])[:-1] * item_bytes, pointers)


def samples_of_index(index: Any, text: bytes, start: int) -> list[dict[str, Any]]:
    """What the samples of an index of a piece hold, by its reader; lists."""
    reader = record_reader(index.layout)
    found = []
    for number in range(index.sample_count):
        if isinstance(index, PackedIndex):
            parts = slice(index.part_start[number], index.part_start[number + 1])
            places = list(zip(index.offset[parts].tolist(), index.size[parts].tolist(), strict=True))
            described = np.stack([index.size[parts], index.tag[parts]], 1).tobytes()
        else:
            places, described = [_place(index, number)], b""
        record = b"".join(text[start + offset : start + offset + size] for offset, size in places)
        assert len(record) == sum(size for _, size in places), "a sample goes beyond the end of the file"
        sample = {}
        for name in reader.columns:
            value = described if name in reader.of_parts else record  # type: ignore[attr-defined]
            sample[name] = reader.decoder(name).decode_one(value, "here").tolist()
        found.append(sample)
    return found


def _place(index: StridedIndex | RecordIndex, number: int) -> tuple[int, int]:
    if isinstance(index, RecordIndex):
        return int(index.offset[number]), int(index.size[number])
    return index.first + number * index.stride, index.record_bytes


def write(path: Path, documents: list[Sequences], dtype: str = "<u2", modes: list[list[int]] | None = None) -> None:
    """The data at `path`, which ends in .bin, and the index beside it."""
    flat = [token for document in documents for sequence in document for token in sequence]
    path.write_bytes(np.array(flat, dtype).tobytes())
    path.with_suffix(".idx").write_bytes(index_bytes(documents, dtype, modes))


def windows(count: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """The windows of so many tokens."""
    found = []
    start = 0
    while start + length <= count:
        found.append((start, start + length))
        start += length - overlap
    return found


def pieces_of(byte_count: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Where the pieces of a file begin and end."""
    if byte_count <= piece_bytes:
        return [(0, byte_count)]
    return [(start, min(start + piece_bytes, byte_count)) for start in range(0, byte_count, piece_bytes)]


def best_fit(ranges: list[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    """The ranges of tokens that share a sample: from the longest on, each goes where least room is left behind it; of
    several samples with the same room, to the one that came to have it last.
    """
    order = sorted(range(len(ranges)), key=lambda number: -(ranges[number][1] - ranges[number][0]))
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for number in order:
        size = ranges[number][1] - ranges[number][0]
        room = min((room for room, some in by_room.items() if some and room >= size), default=None)
        if room is None:
            room, chosen = length, len(bins)
            bins.append([])
        else:
            chosen = by_room[room].pop()
        bins[chosen].append(number)
        by_room.setdefault(room - size, []).append(chosen) if room > size else None
    return [[ranges[number] for number in sorted(each)] for each in sorted(bins, key=min)]


def samples(
    documents: list[Sequences],
    item_bytes: int,
    piece_bytes: int,
    length: int,
    overlap: int,
    pack: str | None,
    pad: int = 0,
    modes: list[list[int]] | None = None,
) -> list[dict[str, Any]]:
    """All samples in the order of the file."""
    text, position, owner, mode_of, edges = [], [], [], [], [0]
    for number, document in enumerate(documents):
        edges.append(edges[-1] + sum(map(len, document)))
        for at, sequence in enumerate(document):
            text += sequence
            owner += [number] * len(sequence)
            mode_of += [0 if modes is None else modes[number][at]] * len(sequence)
    total = len(text) * item_bytes
    del position
    found: list[list[tuple[int, int]]] = []
    for start, end in pieces_of(total, piece_bytes):
        is_last = end >= total

        def is_mine(token: int, start: int = start, end: int = end, is_last: bool = is_last) -> bool:
            return start <= token * item_bytes < end or (is_last and token * item_bytes == end)

        if pack == "cut":
            found += [[each] for each in windows(len(text), length, overlap) if is_mine(each[0])]
            continue
        mine = [(a, b) for a, b in itertools.pairwise(edges) if is_mine(a)]
        if pack is None:
            found += [[each] for each in mine]
            continue
        cut = []
        for a, b in mine:
            while b - a > length:
                cut.append((a, a + length))
                a += length - overlap
            if b > a:
                cut.append((a, b))
        found += best_fit(cut, length)
    return [_sample(each, text, owner, mode_of, length if pack else None, pad) for each in found]


def _sample(
    ranges: list[tuple[int, int]], text: list[int], owner: list[int], mode_of: list[int], length: int | None, pad: int
) -> dict[str, Any]:
    tokens, position, segment, mode = [], [], [], []
    for a, b in ranges:
        for token in range(a, b):
            if token == a or owner[token] != owner[token - 1]:
                position.append(0)
                segment.append(segment[-1] + 1 if segment else 1)
            else:
                position.append(position[-1] + 1)
                segment.append(segment[-1])
            tokens.append(text[token])
            mode.append(mode_of[token])
    rest = 0 if length is None else length - len(tokens)
    return {
        "tokens": tokens + [pad] * rest,
        "position": position + [0] * rest,
        "segment": segment + [0] * rest,
        "mode": mode + [0] * rest,
    }
