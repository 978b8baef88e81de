"""What is written down of a checkpoint: plan, part records and manifest.

A part record says where the pieces of one rank lie, and is as long as they are many: columns of numbers, so that a
million pieces are read in a second or two, and a reader reads only what it needs. The manifest is short: it names the
attempt and the checksum of each part record, by which all of it becomes one checkpoint at once.

Everything that is read may be torn, old or hostile, and is checked before use: types, every number against what it
counts, pieces against their objects and tensors. Names of objects are of one form, so that none leads elsewhere; a
reference to an earlier step's object names where the bytes lie and not another record, so that there are no circles.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import msgspec
import numpy as np
from xxhash import xxh3_64_hexdigest

from fastload.checkpoint.boxes import Box, Int64s, why_not_tiled
from fastload.checkpoint.segments import BLOCK_BYTES, DTYPES, Piece, Segment
from fastload.errors import CheckpointDamagedError
from fastload.store.types import ObjectInfo

VERSION = 1
_MANIFEST, _PLAN, _PART = "fastload-checkpoint", "fastload-checkpoint-plan", "fastload-checkpoint-part"
_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_REFERENCE = re.compile(r"\.\./(?!\.{1,2}/)[^/\x00-\x1f\x7f]{1,255}/[0-9a-f]{16}/r[0-9]{5,7}-[0-9]{4,7}\.safetensors")
_DIMENSIONS_MAX, _OBJECT_BYTES_MAX, _TENSOR_BYTES_MAX = 32, 1 << 50, 1 << 60
ENCODINGS = ("msgpack", "torch")
HASH_BYTES = 16

Column = np.ndarray[tuple[int], np.dtype[np.int64]]


def new_attempt() -> str:
    return secrets.token_hex(8)


def is_attempt(text: str) -> bool:
    return _ATTEMPT.fullmatch(text) is not None


def object_name(attempt: str, rank: int, number: int) -> str:
    """Of a segment, below the checkpoint's URL; as are the other names."""
    return f"{attempt}/r{rank:05d}-{number:04d}.safetensors"


def part_name(attempt: str, rank: int) -> str:
    return f"{attempt}/r{rank:05d}.part"


def plan_name(attempt: str) -> str:
    return f"{attempt}/plan.json"


MANIFEST_NAME = "manifest.json"
# What the value is called that has the paths of names; no leaf is called so.
PATHS = ""


def url_of(folder: str, name: str) -> str:
    """The URL of an object that a part record names; `folder` is the checkpoint's, and ends in a slash."""
    if name.startswith("../"):
        return folder[: folder.rindex("/", 0, -1) + 1] + name[3:]
    return folder + name


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt will commit: by how many ranks, and in place of which manifest (its ETag; None: of none).
    `refers` are the folders beside it of which it may refer to objects, and `metric` is for the manifest.
    """

    attempt: str
    ranks: int
    replaces: str | None = None
    began_s: float = 0.0  # since 1970
    refers: tuple[str, ...] = ()
    metric: float | None = None

    def encode(self) -> bytes:
        return _json(_PLAN, self)

    @classmethod
    def decode(cls, data: bytes, where: str) -> Plan:
        plan = _from_json(_PLAN, cls, data, where)
        _check(where, is_attempt(plan.attempt) and 0 < plan.ranks <= 10**7, "an attempt and ranks that cannot be")
        return plan


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The attempt that is the checkpoint, and size and XXH3-64 (16 hex digits) of each rank's part record. `refers` are
    the folders beside it in which objects of it lie.
    """

    attempt: str
    parts: tuple[tuple[int, str], ...]
    refers: tuple[str, ...] = ()
    metric: float | None = None

    def encode(self) -> bytes:
        return _json(_MANIFEST, self)

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        manifest = _from_json(_MANIFEST, cls, data, where)
        sizes_are_good = all(0 < size < _OBJECT_BYTES_MAX for size, _ in manifest.parts)
        _check(where, is_attempt(manifest.attempt) and manifest.parts and sizes_are_good, "numbers that cannot be")
        return manifest

    @classmethod
    def of(
        cls, attempt: str, parts: Iterable[bytes], refers: Iterable[str] = (), metric: float | None = None
    ) -> Manifest:
        """From the encoded part records of all ranks, in their order."""
        sums = tuple((len(part), xxh3_64_hexdigest(part)) for part in parts)
        return cls(attempt=attempt, parts=sums, refers=tuple(refers), metric=metric)

    def part(self, rank: int, data: bytes, where: str) -> Part:
        """The part record of a rank, which is that of this manifest or none."""
        said, found = self.parts[rank], (len(data), xxh3_64_hexdigest(data))
        _check(where, said == found, f"{found[0]} bytes with XXH3-64 {found[1]}; the manifest has {said[0]}, {said[1]}")
        return Part.decode(data, self.attempt, rank, where)


@dataclass(frozen=True, slots=True)
class Object:
    """One that holds pieces: its name below the checkpoint's URL, and the checksums of its blocks."""

    name: str
    size: int
    sums: bytes  # none where others have written it
    info: ObjectInfo | None = None  # the version that was looked at; None: whichever is there

    @property
    def beside(self) -> str:
        """The folder in which it lies, where that is not this checkpoint's; else ""."""
        return self.name.split("/")[1] if self.name.startswith("../") else ""


@dataclass(frozen=True, slots=True)
class Reference:
    """A piece whose bytes lie in an object of another checkpoint."""

    piece: Piece
    object: Object
    offset: int


@dataclass(frozen=True)
class Part:
    """What one rank has saved. Piece p is of `tensors[tensor[p]]`, and lies in `objects[object[p]]` from `offset[p]`
    on; `boxes` has the offsets and then the sizes of each piece, one number a dimension. `values` are what is no
    tensor: name, encoding, bytes. `hashes` has 16 bytes a piece, or none.
    """

    attempt: str
    rank: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape
    objects: tuple[Object, ...]
    tensor: Column
    object: Column
    offset: Column
    boxes: Column
    values: tuple[tuple[str, str, bytes], ...] = ()
    hashes: bytes = b""

    @classmethod
    def of(
        cls,
        attempt: str,
        rank: int,
        segments: Sequence[tuple[Segment, bytes]],
        values: Iterable[tuple[str, str, bytes]] = (),
        references: Sequence[Reference] = (),
        hashes: Mapping[Piece, bytes] | None = None,
        shared: Mapping[Piece, tuple[Piece, int]] | None = None,
    ) -> Part:
        """Of segments with their checksums, which lie under the names that `object_name` gives them, and of pieces that
        lie elsewhere. `hashes` has those of all pieces. `shared` are pieces whose bytes are in another one, which lies
        in a segment, and where in that they begin.
        """
        numbers: dict[tuple[str, str, tuple[int, ...]], int] = {}
        rows: list[tuple[int, int, int]] = []
        boxes: list[int] = []
        hashed = bytearray()
        objects = [
            Object(object_name(attempt, rank, n), segment.size, sums) for n, (segment, sums) in enumerate(segments)
        ]
        places = [
            (piece, number, offset)
            for number, (segment, _) in enumerate(segments)
            for piece, offset in zip(segment.pieces, segment.offsets, strict=True)
        ]
        others: dict[str, int] = {}
        if shared:
            at = {piece: (number, offset) for piece, number, offset in places}
            found = [(*at[stored], within, piece) for piece, (stored, within) in shared.items()]
            # In further entries for the same object, as many as it takes: in one no two pieces share a byte.
            entries: dict[int, list[tuple[int, int]]] = {}  # number, and what is free from where on
            for number, offset, within, piece in sorted(found, key=lambda each: (each[0], each[1] + each[2])):
                start, free = offset + within, entries.setdefault(number, [])
                entry = next((each for each in free if each[1] <= start), None)
                if entry is None:
                    entry = len(objects), 0
                    objects.append(objects[number])
                else:
                    free.remove(entry)
                free.append((entry[0], start + piece.length))
                places.append((piece, entry[0], start))
        for each in references:
            if each.object.name not in others:
                others[each.object.name] = len(objects)
                objects.append(each.object)
            places.append((each.piece, others[each.object.name], each.offset))
        for piece, number, offset in places:
            tensor = numbers.setdefault((piece.name, piece.dtype, piece.shape), len(numbers))
            rows.append((tensor, number, offset))
            boxes += (*piece.box.offsets, *piece.box.sizes)
            hashed += hashes[piece] if hashes is not None else b""
        table = np.array(rows, np.int64).reshape(-1, 3)
        return cls(
            attempt,
            rank,
            tuple(numbers),
            tuple(objects),
            table[:, 0],
            table[:, 1],
            table[:, 2],
            np.array(boxes, np.int64),
            tuple(values),
            bytes(hashed),
        )

    def encode(self) -> bytes:
        columns = [
            np.ascontiguousarray(each, "<i8").tobytes() for each in (self.tensor, self.object, self.offset, self.boxes)
        ]
        objects = [(each.name, each.size, each.sums) for each in self.objects]
        return msgspec.msgpack.encode(
            [_PART, VERSION, self.attempt, self.rank, self.tensors, objects, *columns, self.values, self.hashes]
        )

    @classmethod
    def decode(cls, data: bytes, attempt: str, rank: int, where: str) -> Part:
        """Raises `CheckpointError` where it is not a part record of this rank and attempt, or contradicts itself."""
        try:
            wire = msgspec.msgpack.decode(data, type=_PartWire)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _damaged(where, str(error)) from error
        _check_head(where, wire, attempt, rank)
        columns = [_column(where, each) for each in (wire.tensor, wire.object, wire.offset, wire.boxes)]
        objects = tuple(Object(*each) for each in wire.objects)
        tensor, held_in, offset, boxes = columns
        part = cls(attempt, rank, wire.tensors, objects, tensor, held_in, offset, boxes, wire.values, wire.hashes)
        part._check_names(where)
        part._check_numbers(where)
        return part

    def __len__(self) -> int:
        return len(self.tensor)

    @cached_property
    def dimensions(self) -> Column:
        """How many each piece has."""
        return np.array([len(shape) for _, _, shape in self.tensors], np.int64)[self.tensor]

    @property
    def box_starts(self) -> Column:
        """Where the numbers of each piece begin in `boxes`."""
        ends = np.cumsum(2 * self.dimensions)
        return ends - 2 * self.dimensions

    def lengths(self) -> Column:
        """Bytes of each piece."""
        widths = np.array([DTYPES[dtype] for _, dtype, _ in self.tensors], np.int64)[self.tensor]
        dimensions = self.dimensions
        some = dimensions > 0  # a scalar has one element, and no numbers
        if some.any():
            # Of sizes alone: offsets count as ones.
            sizes = np.where(self._is_size(), self.boxes, 1)
            widths[some] *= np.multiply.reduceat(sizes, self.box_starts[some])
        return widths

    def _is_size(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of `boxes` are sizes: the second half of each piece's."""
        dimensions = self.dimensions
        return np.repeat(np.tile(np.array([False, True]), len(self)), np.repeat(dimensions, 2))

    def _check_names(self, where: str) -> None:
        names = [name for name, _, _ in self.tensors]
        _check(where, len(set(names)) == len(names), "two tensors of one name")
        for dtype, shape in {(dtype, shape) for _, dtype, shape in self.tensors}:
            _check(where, dtype in DTYPES, f"a tensor of dtype {dtype}")
            possible = len(shape) <= _DIMENSIONS_MAX and all(size >= 0 for size in shape)
            _check(where, possible, f"a tensor of shape {shape}")
            # Of a tensor without elements as well: no dimension is beyond what numbers of 64 bits hold.
            size = math.prod(max(size, 1) for size in shape) * DTYPES[dtype]
            _check(where, size <= _TENSOR_BYTES_MAX, f"a tensor of shape {shape}, which no machine holds")
        _check_objects(where, self.attempt, self.rank, self.objects)
        for name, encoding, _ in self.values:
            _check(where, encoding in ENCODINGS, f"{name} encoded as {encoding}")

    def _check_numbers(self, where: str) -> None:
        count = len(self)
        _check(where, len(self.object) == len(self.offset) == count, "columns of different lengths")
        _check(where, len(self.hashes) in (0, HASH_BYTES * count), f"{len(self.hashes)} bytes of hashes")
        _check(where, _below(self.tensor, len(self.tensors)), "a piece of no tensor")
        _check(where, _below(self.object, len(self.objects)), "a piece in no object")
        dimensions = self.dimensions
        _check(where, len(self.boxes) == 2 * dimensions.sum(), "boxes of other dimensions than their tensors")
        is_size = self._is_size()
        flat = [size for _, _, shape in self.tensors for size in shape]
        shapes = np.array(flat, np.int64)[
            _ragged(_starts([len(shape) for _, _, shape in self.tensors])[self.tensor], dimensions)
        ]
        offsets, sizes = self.boxes[~is_size], self.boxes[is_size]
        within = (offsets >= 0) & (sizes >= 0) & (sizes <= shapes) & (offsets <= shapes - sizes)
        _check(where, within.all(), "a piece that reaches beyond its tensor")
        lengths = self.lengths()
        held = np.array([each.size for each in self.objects], np.int64)[self.object]
        _check(
            where,
            ((self.offset >= 8) & (self.offset <= held - lengths)).all(),
            "a piece that reaches beyond its object",
        )
        own = np.array([not each.name.startswith("../") for each in self.objects], np.bool_)[self.object] & (
            lengths > 0
        )
        order = np.lexsort((self.offset[own], self.object[own]))
        held_in, offset, length = self.object[own][order], self.offset[own][order], lengths[own][order]
        apart = (held_in[1:] != held_in[:-1]) | (offset[1:] >= offset[:-1] + length[:-1])
        _check(where, apart.all(), "two pieces that overlap in their object")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a box lie."""

    box: Box
    object: Object
    offset: int
    length: int


class Contents:
    """All parts of a checkpoint together: which tensors it has, and where the pieces of each lie."""

    def __init__(self, parts: Sequence[Part], where: str) -> None:
        """Of one rank at least. Raises `CheckpointError` where they contradict each other, or leave out a part of a
        tensor.
        """
        self._parts = parts
        self.attempt = parts[0].attempt
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.values: dict[str, tuple[str, bytes]] = {}
        self.paths: list[bytes] = []  # of the names in each part that says any
        numbers: dict[str, int] = {}
        columns = []
        for part in parts:
            own = []
            for name, dtype, shape in part.tensors:
                said = self.tensors.setdefault(name, (dtype, shape))
                if said != (dtype, shape):
                    raise _damaged(where, f"{name} as {said} in one part and as {(dtype, shape)} in another")
                own.append(numbers.setdefault(name, len(numbers)))
            columns.append(np.array(own, np.int64)[part.tensor])
            for name, encoding, data in part.values:
                if name == PATHS:
                    self.paths.append(data)
                    continue
                _check(where, name not in self.values and name not in numbers, f"{name} comes twice")
                self.values[name] = encoding, data
        both = self.values.keys() & self.tensors.keys()
        _check(where, not both, f"{min(both, default='')} comes twice")
        tensor = np.concatenate(columns)
        lengths = [len(part) for part in parts]
        order = np.argsort(tensor, kind="stable")
        self._numbers = numbers
        self._part = np.repeat(np.arange(len(parts)), lengths)[order]
        self._piece = _ragged(np.zeros(len(parts), np.int64), np.array(lengths, np.int64))[order]
        self._starts = np.searchsorted(tensor[order], np.arange(len(numbers) + 1))
        self._length = np.concatenate([part.lengths() for part in parts])[order]
        self._boxes = np.concatenate([part.boxes for part in parts])
        firsts = _starts([len(part.boxes) for part in parts])
        self._box_start = np.concatenate([part.box_starts for part in parts])[order] + firsts[self._part]
        self._check_tiling(where)

    @property
    def rank_count(self) -> int:
        return len(self._parts)

    @property
    def objects(self) -> list[Object]:
        """Those that hold pieces, each once."""
        return list({each.name: each for part in self._parts for each in part.objects}.values())

    def hashes(self) -> Iterator[tuple[int, bytes, Object, int]]:
        """Of pieces that have one: length, hash, and where they lie."""
        for part in self._parts:
            columns = part.lengths().tolist(), part.object.tolist(), part.offset.tolist()
            for number, (length, held_in, offset) in enumerate(zip(*columns, strict=True)) if part.hashes else ():
                hashed = part.hashes[HASH_BYTES * number : HASH_BYTES * (number + 1)]
                yield length, hashed, part.objects[held_in], offset

    def places(self, name: str) -> list[Place]:
        """Those of a tensor's pieces."""
        here = self._rows(name)
        if here.stop - here.start == 1:  # which is all of it
            part, piece = self._parts[self._part[here.start]], self._piece[here.start]
            held_in = part.objects[part.object[piece]]
            whole = Box.whole(self.tensors[name][1])
            return [Place(whole, held_in, int(part.offset[piece]), int(self._length[here.start]))]
        offsets, sizes = self._boxes_of(name)
        columns = (each[here].tolist() for each in (self._part, self._piece, self._length))
        found = []
        for part_no, piece, length, *box in zip(*columns, offsets.tolist(), sizes.tolist(), strict=True):
            part = self._parts[part_no]
            held_in, offset = part.objects[part.object[piece]], int(part.offset[piece])
            found.append(Place(Box(*map(tuple, box)), held_in, offset, length))
        return found

    def _rows(self, name: str) -> slice:
        number = self._numbers[name]
        return slice(int(self._starts[number]), int(self._starts[number + 1]))

    def _boxes_of(self, name: str) -> tuple[Int64s, Int64s]:
        dimensions = len(self.tensors[name][1])
        table = self._boxes[self._box_start[self._rows(name), None] + np.arange(2 * dimensions)]
        return table[:, :dimensions], table[:, dimensions:]

    def _are_slabs(self) -> list[bool]:
        """Which tensors are of several pieces that lie side by side along one dimension, and are all of it. As a rule
        those that several ranks have saved; to look at each of a million of them by itself takes minutes.
        """
        found = np.zeros(len(self._numbers), np.bool_)
        counts = np.diff(self._starts)
        shapes = [shape for _, shape in self.tensors.values()]
        dimensions = np.array([len(shape) if 0 not in shape else 0 for shape in shapes], np.int64)
        for count in set(dimensions[counts > 1].tolist()) - {0}:
            numbers = np.flatnonzero((counts > 1) & (dimensions == count))
            rows = _ragged(self._starts[numbers], counts[numbers])
            table = self._boxes[self._box_start[rows, None] + np.arange(2 * count)]
            offsets, sizes = table[:, :count], table[:, count:]
            shape = np.array([shapes[number] for number in numbers.tolist()], np.int64)
            which = np.repeat(np.arange(len(numbers)), counts[numbers])
            firsts = _starts(counts[numbers].tolist())
            is_cut = np.logical_or.reduceat(sizes != shape[which], firsts)
            along = is_cut.argmax(axis=1)
            start, size = (np.take_along_axis(each, along[which, None], axis=1)[:, 0] for each in (offsets, sizes))
            # Empty pieces count for nothing.
            start = np.where(size > 0, start, -1)
            order = np.lexsort((start, which))
            end = (start + size)[order]
            expected = np.concatenate(([0], np.where(size[order] > 0, end, 0)[:-1]))
            expected[firsts] = 0
            follows = np.logical_and.reduceat((size[order] == 0) | (start[order] == expected), firsts)
            last = end[firsts + counts[numbers] - 1]
            is_whole = last == shape[np.arange(len(numbers)), along]
            found[numbers] = (is_cut.sum(axis=1) == 1) & follows & is_whole
        return found.tolist()

    def _check_tiling(self, where: str) -> None:
        lengths, starts, are_slabs = self._length.tolist(), self._starts.tolist(), self._are_slabs()
        for name, number in self._numbers.items():
            if are_slabs[number]:
                continue
            dtype, shape = self.tensors[name]
            if starts[number + 1] - starts[number] == 1:
                # The most of them, as a rule: one that is within it, and as large, is all of it.
                whole = lengths[starts[number]] == math.prod(shape) * DTYPES[dtype]
                wrong = "" if whole else "its one piece is a part of it"
            else:
                wrong = why_not_tiled(shape, *self._boxes_of(name))
            if wrong:
                raise _damaged(where, f"{name} of shape {shape}, of which {wrong}")


class _PartWire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    kind: str
    version: int
    attempt: str
    rank: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    objects: tuple[tuple[str, int, bytes], ...]
    tensor: bytes
    object: bytes
    offset: bytes
    boxes: bytes
    values: tuple[tuple[str, str, bytes], ...]
    hashes: bytes


class Record(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A part record as those see it that carry it: only its objects. All else, which takes seconds to decode where
    there are a million pieces, is passed on as it is.
    """

    kind: str
    version: int
    attempt: str
    rank: int
    tensors: msgspec.Raw
    wire_objects: tuple[tuple[str, int, bytes], ...]
    tensor: msgspec.Raw
    object: msgspec.Raw
    offset: msgspec.Raw
    boxes: msgspec.Raw
    values: msgspec.Raw
    hashes: msgspec.Raw

    @classmethod
    def decode(cls, data: bytes, attempt: str, rank: int, where: str) -> Record:
        """Raises `CheckpointError` where it is none of this rank and attempt."""
        try:
            record = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _damaged(where, str(error)) from error
        _check_head(where, record, attempt, rank)
        _check_objects(where, attempt, rank, [Object(*each) for each in record.wire_objects])
        return record

    @property
    def own(self) -> list[Object]:
        """Its own objects, in their order, each once."""
        return list(
            {each.name: each for each in (Object(*each) for each in self.wire_objects) if not each.beside}.values()
        )

    def with_sums(self, sums: Sequence[bytes]) -> Record:
        """With these checksums of its own objects."""
        found = {each.name: one for each, one in zip(self.own, sums, strict=True)}
        return msgspec.structs.replace(
            self,
            wire_objects=tuple((name, size, found.get(name, old)) for name, size, old in self.wire_objects),
        )

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


_Json = TypeVar("_Json", Plan, Manifest)


def _check_head(where: str, record: _PartWire | Record, attempt: str, rank: int) -> None:
    _check(where, (record.kind, record.version) == (_PART, VERSION), f"{record.kind!r} of version {record.version}")
    _check(where, (record.attempt, record.rank) == (attempt, rank), f"attempt {record.attempt}, rank {record.rank}")


def _check_objects(where: str, attempt: str, rank: int, objects: Iterable[Object]) -> None:
    own = re.compile(rf"{attempt}/r{rank:05d}-[0-9]{{4,7}}\.safetensors")
    for each in objects:
        _check(where, own.fullmatch(each.name) or _REFERENCE.fullmatch(each.name), f"an object {each.name!r}")
        count = -(-each.size // BLOCK_BYTES)
        fits = 0 <= each.size <= _OBJECT_BYTES_MAX and len(each.sums) == 8 * count
        _check(where, fits, f"{each.name} of {each.size} bytes with {len(each.sums)} bytes of checksums")


def _json(kind: str, record: Plan | Manifest) -> bytes:
    return json.dumps({"format": kind, "version": VERSION, **msgspec.to_builtins(record)}).encode()


def _from_json(kind: str, record: type[_Json], data: bytes, where: str) -> _Json:
    try:
        head: dict[str, Any] = msgspec.json.decode(data, type=dict)
        said = head.get("format"), head.get("version")
        _check(where, said == (kind, VERSION), f"{said[0]!r} of version {said[1]!r}")
        return msgspec.json.decode(data, type=record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(where, str(error)) from error


def _column(where: str, data: bytes) -> Column:
    _check(where, len(data) % 8 == 0, f"a column of {len(data)} bytes")
    return np.frombuffer(data, "<i8")


def _below(numbers: Column, count: int) -> bool:
    return len(numbers) == 0 or (int(numbers.min()) >= 0 and int(numbers.max()) < count)


def _starts(lengths: Sequence[int]) -> Column:
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]


def _ragged(starts: Column, lengths: Column) -> Column:
    """The numbers from each of `starts` on, so many of each, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _check(where: str, holds: object, what: str) -> None:
    if not holds:
        raise _damaged(where, what)


def _damaged(where: str, what: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{where} is damaged, or of another version of fastload: it has {what}; take another step"
    )
