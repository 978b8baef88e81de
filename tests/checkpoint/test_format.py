"""What is written of a checkpoint is read back; what is damaged or hostile is refused."""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.checkpoint.boxes import Box, cut, overlap, why_not_tiled
from fastload.checkpoint.records import (
    Contents,
    Manifest,
    Object,
    Part,
    Plan,
    Record,
    Reference,
    new_attempt,
    object_name,
    url_of,
)
from fastload.checkpoint.segments import (
    BLOCK_BYTES,
    DTYPES,
    PAGE_BYTES,
    Piece,
    Segment,
    blocks_of,
    checksums,
    damaged_block,
    header_of,
    lay_out,
)
from fastload.errors import CheckpointError

NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2", "U32": "u4", "I32": "i4", "F32": "f4",
    "U64": "u8", "I64": "i8", "F64": "f8", "C64": "c8",
}  # fmt: skip
ATTEMPT = "0123456789abcdef"


# A state over a mesh, written and read back


@dataclass(frozen=True)
class Saved:
    objects: dict[str, bytes]
    parts: list[bytes]
    manifest: bytes


def split(size: int, count: int, at: int) -> tuple[int, int]:
    """Offset and size of one of `count` shards, as torch.chunk has them: the last ones may be smaller or empty."""
    step = -(-size // count)
    start = min(size, at * step)
    return start, min(size, start + step) - start


def boxes(shape: tuple[int, ...], mesh: tuple[int, ...]) -> list[Box]:
    """Of each rank of a mesh with an axis a dimension."""
    return [
        Box(*(tuple(side) for side in zip(*map(split, shape, mesh, where), strict=True))) if shape else Box((), ())
        for where in itertools.product(*map(range, mesh))
    ]


def save(
    arrays: dict[str, tuple[str, Any]], mesh_of: dict[str, tuple[int, ...]], world: int, segment_bytes: int
) -> Saved:
    """As `world` ranks do that have the pieces of each tensor's mesh in turn."""
    objects, parts = {}, []
    for rank in range(world):
        pieces = []
        for name, (dtype, array) in arrays.items():
            for number, box in enumerate(boxes(array.shape, mesh_of[name])):
                if number % world == rank and (box.elements or not array.size):
                    pieces.append(Piece(name, dtype, array.shape, box))
        pieces = list({(piece.name, piece.box): piece for piece in pieces}.values())
        segments = []
        for number, segment in enumerate(lay_out(pieces, segment_bytes)):
            data = [segment.header, *(contents(arrays, piece) for piece in segment.pieces)]
            segments.append((segment, checksums([memoryview(each) for each in data])))
            objects[object_name(ATTEMPT, rank, number)] = b"".join(data)
        parts.append(Part.of(ATTEMPT, rank, segments, [(f"step{rank}", "msgpack", b"\x07")]).encode())
    return Saved(objects, parts, Manifest.of(ATTEMPT, parts).encode())


def contents(arrays: dict[str, tuple[str, Any]], piece: Piece) -> bytes:
    _, array = arrays[piece.name]
    return np.ascontiguousarray(array[piece.box.within(Box.whole(array.shape))]).tobytes()  # type: ignore[no-any-return]


def opened(saved: Saved) -> Contents:
    manifest = Manifest.decode(saved.manifest, "manifest.json")
    parts = [manifest.part(rank, data, f"part {rank}") for rank, data in enumerate(saved.parts)]
    return Contents(parts, "here")


def load(saved: Saved, contents: Contents, name: str, wanted: Box) -> Any:
    """One box of a tensor, out of what is read of its pieces and verified."""
    dtype, _ = contents.tensors[name]
    out = np.zeros(wanted.sizes, NUMPY[dtype])
    for place in contents.places(name):
        both = overlap(place.box, wanted)
        if both is None:
            continue
        start, end = blocks_of(place.offset, place.offset + place.length, place.object.size)
        data = memoryview(saved.objects[place.object.name])[start:end]
        assert damaged_block(place.object.sums, start, data) is None
        piece = np.frombuffer(data[place.offset - start :][: place.length], NUMPY[dtype]).reshape(place.box.sizes)
        out[both.within(wanted)] = piece[both.within(place.box)]
    return out


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(NUMPY))
names = st.text(min_size=1, max_size=5) | st.sampled_from(["__metadata__", "w@0", "w"])


@st.composite
def states(
    draw: st.DrawFn,
) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Tensors, and for each the meshes over which they are saved and loaded."""
    arrays, before, after = {}, {}, {}
    for number, name in enumerate(draw(st.sets(names, max_size=5))):
        dtype, shape = draw(dtypes), draw(shapes)
        count = math.prod(shape) * DTYPES[dtype]
        random = np.random.default_rng(number)
        array = random.integers(0, 2 if dtype == "BOOL" else 256, count, np.uint8).view(NUMPY[dtype]).reshape(shape)
        arrays[name] = dtype, array
        before[name], after[name] = (tuple(draw(st.integers(1, 3)) for _ in shape) for _ in range(2))
    return arrays, before, after


@given(states(), st.integers(1, 4), st.sampled_from([1, 8, 24, 100, 1 << 20]))
def test_what_one_mesh_saves_another_loads(state: Any, world: int, segment_bytes: int) -> None:
    arrays, before, after = state
    saved = save(arrays, before, world, segment_bytes)
    there = opened(saved)
    assert there.tensors == {name: (dtype, array.shape) for name, (dtype, array) in arrays.items()}
    assert set(there.values) == {f"step{rank}" for rank in range(world)}
    for name, (_, array) in arrays.items():
        for box in [*boxes(array.shape, after[name]), Box.whole(array.shape)]:
            found = load(saved, there, name, box)
            assert found.tobytes() == np.ascontiguousarray(array[box.within(Box.whole(array.shape))]).tobytes()


@given(states(), st.sampled_from([1, 24, 1 << 20]))
def test_segments_are_safetensors_files(state: Any, segment_bytes: int) -> None:
    """By the rules of that format: what follows tries its own reader."""
    arrays, mesh, _ = state
    for data in save(arrays, mesh, 2, segment_bytes).objects.values():
        (length,) = struct.unpack_from("<Q", data)
        assert (8 + length) % PAGE_BYTES == 0
        header = json.loads(data[8 : 8 + length])
        assert data[8:9] == b"{"
        at = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            assert key != "__metadata__"
            assert start == at  # no gap
            assert (8 + length + start) % DTYPES[entry["dtype"]] == 0
            assert end - start == math.prod(entry["shape"]) * DTYPES[entry["dtype"]]
            at = end
        assert 8 + length + at == len(data)


def test_its_own_reader_opens_segments(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    random = np.random.default_rng(5)
    arrays: dict[str, tuple[str, Any]] = {
        "layers.0.w": ("F32", random.random((300, 7), np.float32)),
        "layers.0.b": ("F64", random.random(11)),
        "flags": ("BOOL", random.random(5) < 0.5),
        "step": ("I64", np.array(7)),
        "none": ("F16", np.zeros((0, 4), np.float16)),
        "ü": ("U8", random.integers(0, 256, (2, 3), np.uint8)),
    }
    seen = set()
    for mesh in (1, 3):
        for key, data in save(
            arrays, {name: (mesh, *(1,) * 3)[: array.ndim] for name, (_, array) in arrays.items()}, 1, 2000
        ).objects.items():
            path = tmp_path / key.replace("/", "-")
            path.write_bytes(data)
            with safetensors.safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    tensor, _, offsets = name.partition("@")
                    origin = tuple(map(int, offsets.split(","))) if offsets else (0,) * arrays[tensor][1].ndim
                    found = file.get_tensor(name)
                    wanted = arrays[tensor][1][Box(origin, found.shape).within(Box.whole(arrays[tensor][1].shape))]
                    assert found.dtype == wanted.dtype
                    np.testing.assert_array_equal(found, wanted)
                    seen.add(name)
    assert {"layers.0.w@0,0", "layers.0.w@100,0", "layers.0.b", "step", "none", "ü"} <= seen


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_all_dtypes_are_those_of_safetensors(dtype: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    piece = Piece("a", dtype, (3, 2), Box.whole((3, 2)))
    data = header_of([piece]) + bytes(range(piece.length))
    (tmp_path / "a").write_bytes(data)
    assert safetensors.deserialize(data)[0][1] == {
        "dtype": dtype, "shape": [3, 2], "data": bytes(range(piece.length)),
    }  # fmt: skip


# Boxes


@given(st.lists(st.integers(0, 9), max_size=4).map(tuple), st.integers(1, 50))
def test_cuts_are_contiguous_and_complete(shape: tuple[int, ...], elements_max: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    parts = [numbers[box.within(Box.whole(shape))].ravel() for box in cut(Box.whole(shape), elements_max)]
    assert all(part.size <= elements_max for part in parts)
    assert np.array_equal(np.concatenate(parts), numbers.ravel())


def test_large_tensors_are_cut_at_rows() -> None:
    assert [box.sizes for box in cut(Box.whole((10, 8)), 25)] == [(3, 8), (3, 8), (3, 8), (1, 8)]
    assert [box.sizes for box in cut(Box((4, 0, 2), (1, 4, 8)), 16)] == [(1, 2, 8), (1, 2, 8)]


def counted(shape: tuple[int, ...], pieces: list[Box]) -> bool:
    table = np.zeros(shape, np.int64)
    for box in pieces:
        table[box.within(Box.whole(shape))] += 1
    return bool((table == 1).all())


@st.composite
def box_lists(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Tilings, from which one was left out or moved, or not."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    pieces = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[axis]))
        for start, size in ((0, at), (at, box.sizes[axis] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[axis], sizes[axis] = offsets[axis] + start, size
            pieces.append(Box(tuple(offsets), tuple(sizes)))
    change = draw(st.sampled_from(["none", "drop", "move", "twice"]))
    number = draw(st.integers(0, len(pieces) - 1))
    if change == "drop":
        pieces.pop(number)
    elif change == "twice":
        pieces.append(pieces[number])
    elif change == "move":
        pieces[number] = Box(tuple(draw(st.integers(0, 3)) for _ in shape), pieces[number].sizes)
    return shape, pieces


@given(box_lists())
def test_tilings_are_told_from_what_is_none(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, pieces = case
    inside = all(o + s <= size for box in pieces for o, s, size in zip(box.offsets, box.sizes, shape, strict=True))
    table = np.array([box.offsets + box.sizes for box in pieces], np.int64).reshape(-1, 2 * len(shape))
    found = why_not_tiled(shape, table[:, : len(shape)], table[:, len(shape) :])
    assert (found == "") == (inside and counted(shape, pieces)), found


@given(st.lists(box_lists(), min_size=1, max_size=4))
def test_all_tensors_of_a_checkpoint_are_told_at_once(cases: list[tuple[tuple[int, ...], list[Box]]]) -> None:
    pieces, is_whole = [], True
    for number, (shape, boxes) in enumerate(cases):
        if all(o + s <= size for box in boxes for o, s, size in zip(box.offsets, box.sizes, shape, strict=True)):
            pieces += [Piece(str(number), "U8", shape, box) for box in boxes]
            is_whole = is_whole and (not boxes or counted(shape, boxes))
    parts = parts_of(pieces[::2], pieces[1::2])
    if is_whole:
        assert len(Contents(parts, "here").tensors) == len({piece.name for piece in pieces})
    else:
        with pytest.raises(CheckpointError, match="is damaged"):
            Contents(parts, "here")


def test_hostile_boxes_take_neither_memory_nor_time() -> None:
    random = np.random.default_rng(1)
    offsets = random.integers(0, 1 << 40, (3000, 3))
    sizes = np.ones_like(offsets)
    assert "3000 of its" in why_not_tiled((1 << 41,) * 3, offsets, sizes)
    sizes[0] = (3000, 1, (1 << 41))  # as many elements as there are
    assert why_not_tiled((1, 3000, 1 << 41), offsets, sizes) == "a piece reaches beyond it"
    offsets = np.stack([np.arange(300)] * 3, axis=1)
    shape = (300, 300, 300)
    sizes = np.ones_like(offsets)
    sizes[0] = (300, 300, 300)
    assert why_not_tiled(shape, offsets, sizes) == "its pieces hold 27000299 of its 27000000 elements"
    sizes[0] = (299, 301, 300)
    assert why_not_tiled(shape, offsets, sizes) == "a piece reaches beyond it"


# Checksums


@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=4), st.integers(0, 1 << 40))
def test_checksums_do_not_depend_on_how_it_is_handed_over(lengths: list[int], seed: int) -> None:
    parts = [np.random.default_rng((seed, length)).bytes(length) for length in lengths]
    whole = b"".join(parts)
    sums = checksums([memoryview(part) for part in parts])
    assert sums == checksums([memoryview(whole)])
    assert len(sums) == 8 * -(-len(whole) // BLOCK_BYTES)
    assert damaged_block(sums, 0, memoryview(whole)) is None
    if whole:
        at = seed % len(whole)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << seed % 8
        start, end = blocks_of(at, at + 1, len(whole))
        assert end - start <= BLOCK_BYTES
        assert damaged_block(sums, start, memoryview(flipped)[start:end]) == at // BLOCK_BYTES


# What is damaged or hostile


def good_part() -> Part:
    shape = (4, 6)
    pieces = [Piece("w", "F32", shape, box) for box in cut(Box.whole(shape), 12)] + [Piece("b", "I64", (), Box((), ()))]
    (segment,) = lay_out(pieces)
    return Part.of(ATTEMPT, 3, [(segment, bytes(8))], [("epoch", "msgpack", b"\x01")])


def column(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


HOSTILE = {
    "another attempt": ({"attempt": "f" * 16}, "attempt ffffffffffffffff"),
    "another rank": ({"rank": 4}, "rank 4"),
    "twice": ({"tensors": (("w", "F32", (4, 6)), ("w", "I64", ()))}, "two tensors of one name"),
    "no dtype": ({"tensors": (("b", "I63", ()), ("w", "F32", (4, 6)))}, "of dtype I63"),
    "negative": ({"tensors": (("b", "I64", ()), ("w", "F32", (4, -6)))}, "shape"),
    "endless": ({"tensors": (("b", "I64", ()), ("w", "F32", (1 << 40, 1 << 40)))}, "no machine holds"),
    "endless and empty": ({"tensors": (("b", "I64", ()), ("w", "F32", (0, 1 << 61)))}, "no machine holds"),
    "many dimensions": ({"tensors": (("b", "I64", (1,) * 40), ("w", "F32", (4, 6)))}, "of shape"),
    "beyond the tensor": ({"boxes": column(0, 0, 2, 6, 2, 0, 3, 6)}, "beyond its tensor"),
    "before the tensor": ({"boxes": column(0, 0, 2, 6, -1, 0, 2, 6)}, "beyond its tensor"),
    "negative size": ({"boxes": column(0, 0, 2, 6, 2, 0, -2, 6)}, "beyond its tensor"),
    "huge offset": ({"boxes": column(0, 0, 2, 6, (1 << 63) - 1, 0, 2, 6)}, "beyond its tensor"),
    "huge size": ({"boxes": column(0, 0, 2, 6, 2, 0, (1 << 63) - 1, 6)}, "beyond its tensor"),
    "boxes left": ({"boxes": column(0, 0, 2, 6, 2, 0, 2, 6, 1)}, "other dimensions"),
    "no tensor": ({"tensor": column(0, 1, 2)}, "a piece of no tensor"),
    "tensor before": ({"tensor": column(-1, 1, 1)}, "a piece of no tensor"),
    "no object": ({"object": column(0, 0, 1)}, "a piece in no object"),
    "columns": ({"offset": column(4096, 4104)}, "columns of different lengths"),
    "beyond the object": ({"offset": column(4096, 4104, 4153)}, "beyond its object"),
    "before the object": ({"offset": column(-8, 4104, 4152)}, "beyond its object"),
    "far beyond": ({"offset": column(4096, 4104, (1 << 63) - 1)}, "beyond its object"),
    "overlap": ({"offset": column(4096, 4104, 4148)}, "overlap in their object"),
    "checksums": ({"objects": (Object(object_name(ATTEMPT, 3, 0), 4200, b""),)}, "0 bytes of checksums"),
    "endless object": ({"objects": (Object(object_name(ATTEMPT, 3, 0), 1 << 60, b""),)}, "bytes of checksums"),
    "hashes": ({"hashes": bytes(47)}, "47 bytes of hashes"),
    "encoding": ({"values": (("epoch", "pickle", b""),)}, "encoded as pickle"),
}  # fmt: skip


def test_what_carries_a_part_record_changes_only_checksums() -> None:
    """Of its own objects: not of those that it refers to."""
    other = Object(f"../7/{'b' * 16}/r00000-0001.safetensors", 70_000, b"o" * 16)
    part = replace(good_part(), objects=(*good_part().objects, other))
    record = Record.decode(part.encode(), ATTEMPT, 3, "here")
    assert record.encode() == part.encode()
    assert record.own == list(good_part().objects)
    sums = [b"s" * len(each.sums) for each in record.own]
    own = (replace(each, sums=new) for each, new in zip(good_part().objects, sums, strict=True))
    assert record.with_sums(sums).encode() == replace(part, objects=(*own, other)).encode()


@pytest.mark.parametrize("name", ["checksums", "endless object"])
def test_a_part_record_whose_objects_cannot_be_is_not_carried(name: str) -> None:
    changes, said = HOSTILE[name]
    with pytest.raises(CheckpointError, match=f"here is damaged.*{said}"):
        Record.decode(replace(good_part(), **changes).encode(), ATTEMPT, 3, "here")
    good = good_part().encode()
    for bad, rank in ((good[:-1], 3), (good, 4), (b"", 3)):
        with pytest.raises(CheckpointError, match="here is damaged"):
            Record.decode(bad, ATTEMPT, rank, "here")


@pytest.mark.parametrize("name", HOSTILE)
def test_parts_that_contradict_themselves(name: str) -> None:
    changes, said = HOSTILE[name]
    assert Part.decode(good_part().encode(), ATTEMPT, 3, "here").encode() == good_part().encode()
    with pytest.raises(CheckpointError, match=f"here is damaged.*{said}"):
        Part.decode(replace(good_part(), **changes).encode(), ATTEMPT, 3, "here")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../other/0123456789abcdef/r00003-0000.safetensors",
        "0123456789abcdef/r00004-0000.safetensors", "fedcba9876543210/r00003-0000.safetensors", "",
        "../../0123456789abcdef/r00003-0000.safetensors",
        "../x/0123456789abcdef/r00003-0000.safetensors\n", "../x/0123456789abcdef/../r00003-0000.safetensors",
        ".././0123456789abcdef/r00003-0000.safetensors", "http://x/0123456789abcdef/r00003-0000.safetensors",
    ],
)  # fmt: skip
def test_names_of_objects_lead_nowhere_else(path: str) -> None:
    part = good_part()
    hostile = replace(part, objects=(replace(part.objects[0], name=path),))
    with pytest.raises(CheckpointError, match="an object"):
        Part.decode(hostile.encode(), ATTEMPT, 3, "here")


def test_pieces_with_hashes_and_elsewhere() -> None:
    here, there = (Piece("w", "F32", (2, 3), box) for box in cut(Box.whole((2, 3)), 3))
    (segment,) = lay_out([here])
    other = Object("../1100/fedcba9876543210/r00000-0000.safetensors", 5000, bytes(8))
    hashes = {here: b"h" * 16, there: b"t" * 16}
    part = Part.of(ATTEMPT, 3, [(segment, bytes(8))], (), [Reference(there, other, 4100)], hashes)
    read = Contents([Part.decode(part.encode(), ATTEMPT, 3, "here")], "here")
    own = read.objects[0]
    assert list(read.hashes()) == [(12, b"h" * 16, own, 4096), (12, b"t" * 16, other, 4100)]
    assert [(each.object, each.box) for each in read.places("w")] == [(own, here.box), (other, there.box)]


def test_a_reference_may_be_shared() -> None:
    """What was saved twice before is found at one place."""
    part = good_part()
    name = "../1100/fedcba9876543210/r00003-0000.safetensors"
    shared = replace(part, objects=(replace(part.objects[0], name=name),), offset=column(4096, 4104, 4104))
    there = Contents([Part.decode(shared.encode(), ATTEMPT, 3, "here")], "here")
    assert [each.beside for each in there.objects] == ["1100"]
    assert url_of("s3://b/run/1200/", name) == "s3://b/run/1100/fedcba9876543210/r00003-0000.safetensors"
    (first, second) = there.places("w")
    assert (first.object.name, first.offset) == (second.object.name, second.offset) == (name, 4104)


@given(st.data())
def test_damaged_parts_are_refused_or_whole(data: st.DataObject) -> None:
    good = good_part().encode()
    at = data.draw(st.integers(0, len(good) - 1))
    cut_off = data.draw(st.booleans())
    bad = good[:at] if cut_off else good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    manifest = Manifest.of(ATTEMPT, [good])
    try:
        part = Part.decode(bad, ATTEMPT, 3, "here")
    except CheckpointError:
        pass
    else:  # whatever it says now, it holds together
        assert not cut_off
        Part.decode(part.encode(), ATTEMPT, 3, "here")
    if bad != good:
        with pytest.raises(CheckpointError, match="the manifest has"):
            manifest.part(0, bad, "here")


@pytest.mark.parametrize("bad", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode([1, 2]), b"\x91" * 100_000])
def test_what_is_no_part_at_all(bad: bytes) -> None:
    with pytest.raises(CheckpointError, match="here is damaged"):
        Part.decode(bad, ATTEMPT, 3, "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"}, {"version": 2}, {"version": "1"}, {"attempt": "../x"}, {"attempt": ATTEMPT + "\n"},
        {"parts": []}, {"parts": [[-1, "0"]]}, {"parts": [[1]]}, {"parts": 7}, {"parts": [[1.5, "x"]]},
    ],
)  # fmt: skip
def test_manifests_that_are_none(changes: dict[str, Any]) -> None:
    good = Manifest.of(ATTEMPT, [b"part"]).encode()
    bad = json.dumps({**json.loads(good), **changes}).encode()
    with pytest.raises(CheckpointError, match="here is damaged"):
        Manifest.decode(bad, "here")


@pytest.mark.parametrize("bad", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_record(bad: bytes) -> None:
    for kind in (Manifest, Plan):
        with pytest.raises(CheckpointError, match="here is damaged"):
            kind.decode(bad, "here")


def test_plans_are_read_back() -> None:
    plan = Plan(attempt=new_attempt(), ranks=8, replaces='"etag"', began_s=12.5)
    assert Plan.decode(plan.encode(), "here") == plan
    for bad in (replace_in(plan, ranks=0), replace_in(plan, ranks=1 << 40), replace_in(plan, attempt="x")):
        with pytest.raises(CheckpointError):
            Plan.decode(bad.encode(), "here")


def replace_in(plan: Plan, **changes: Any) -> Plan:
    return msgspec.structs.replace(plan, **changes)


def parts_of(*pieces: list[Piece], values: tuple[tuple[str, str, bytes], ...] = ()) -> list[Part]:
    return [
        Part.of(ATTEMPT, rank, [(segment, bytes(8)) for segment in lay_out(each)], values)
        for rank, each in enumerate(pieces)
    ]


def test_parts_that_contradict_each_other() -> None:
    upper, lower = (Piece("w", "F32", (4, 6), Box((at, 0), (2, 6))) for at in (0, 2))
    assert len(Contents(parts_of([upper], [lower]), "here").places("w")) == 2
    with pytest.raises(CheckpointError, match="its one piece is a part of it"):
        Contents(parts_of([upper], []), "here")
    with pytest.raises(CheckpointError, match="two of its pieces overlap"):
        Contents(parts_of([upper], [upper]), "here")
    with pytest.raises(CheckpointError, match="in one part and"):
        Contents(parts_of([upper], [Piece("w", "F16", (4, 6), Box((2, 0), (2, 6)))]), "here")
    with pytest.raises(CheckpointError, match="epoch comes twice"):
        Contents(parts_of([upper], [lower], values=(("epoch", "msgpack", b""),)), "here")
    with pytest.raises(CheckpointError, match="w comes twice"):
        Contents(parts_of([upper, lower], values=(("w", "msgpack", b""),)), "here")


@pytest.mark.parametrize("ranks", [50, pytest.param(1000, marks=pytest.mark.thorough)])
def test_a_million_pieces(ranks: int) -> None:
    """Of so many ranks with a thousand tensors each."""
    pieces = [Piece(f"layers.{number}.weight", "F32", (8 * ranks, 8), Box((0, 0), (8, 8))) for number in range(1000)]
    segment = Segment(header_of(pieces), tuple(pieces))
    first = Part.of(ATTEMPT, 0, [(segment, bytes(8 * -(-segment.size // BLOCK_BYTES)))])
    encoded = []
    for rank in range(ranks):
        moved = first.boxes.reshape(-1, 4).copy()
        moved[:, 0] = 8 * rank
        objects = (replace(first.objects[0], name=object_name(ATTEMPT, rank, 0)),)
        encoded.append(replace(first, rank=rank, objects=objects, boxes=moved.ravel()).encode())
    manifest = Manifest.decode(Manifest.of(ATTEMPT, encoded).encode(), "here")
    there = Contents([manifest.part(rank, data, "here") for rank, data in enumerate(encoded)], "here")
    assert len(there.tensors) == 1000
    places = there.places("layers.7.weight")
    assert [place.box.offsets[0] for place in places] == list(range(0, 8 * ranks, 8))
