"""Any tensors, cut for any ranks in any way, saved and loaded as torch's planners have it: without processes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fastload.checkpoint import Reader, Writer, attempts, writing
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.images import Image
from fastload.checkpoint.segments import DTYPES, PAGE_BYTES, Piece, arrange, header_of
from fastload.checkpoint.values import NAMES
from tests.checkpoint.saving import MemoryStore

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""A mesh, and for each of its dimensions which one of the tensor it cuts; -1: none."""


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> Cut:
    first = draw(st.sampled_from([size for size in range(1, ranks + 1) if ranks % size == 0]))
    return (first, ranks // first), tuple(draw(st.integers(-1, len(shape) - 1)) for _ in range(2))


def boxes(shape: tuple[int, ...], cut: Cut) -> list[Box]:
    """What each rank holds: parts as those of torch.chunk, of which the last may be short, or empty. One that is empty
    begins where the tensor ends, as torch has it: of parts that begin at one place torch saves only one.
    """
    mesh, axes = cut
    found = []
    for place in itertools.product(*map(range, mesh)):
        offsets, sizes = [0] * len(shape), list(shape)
        for number, count, axis in zip(place, mesh, axes, strict=True):
            if axis >= 0:
                step = -(-sizes[axis] // count)
                start = min(number * step, sizes[axis])
                sizes[axis] = min(step, sizes[axis] - start)
                offsets[axis] = offsets[axis] + start if sizes[axis] else shape[axis]
        found.append(Box(tuple(offsets), tuple(sizes)))
    return found


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, int, list[tuple[torch.dtype, tuple[int, ...], Cut, Cut]]]:
    """How many ranks save and load, and tensors with how they are cut for either."""
    saves, loads = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(sorted(NAMES, key=str)))
        tensors.append((dtype, shape, draw(cuts(shape, saves)), draw(cuts(shape, loads))))
    return saves, loads, tensors


class Planner:
    """What a rank holds, by name and where it begins."""

    def __init__(self, held: dict[MetadataIndex, torch.Tensor]) -> None:
        self.held = held

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        return self.held[item.index]

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        where = zip(item.dest_offsets, item.lengths, strict=True)
        return self.held[item.dest_index][tuple(slice(start, start + length) for start, length in where)]

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        pass

    def load_bytes(self, item: Any, value: io.BytesIO) -> None:
        raise AssertionError


def content(number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    values = (torch.arange(count * dtype.itemsize) * 7 + number) % (2 if dtype == torch.bool else 251)
    return values.to(torch.uint8).view(dtype).reshape(shape)


def index(name: str, box: Box) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(box.offsets))


def chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def written(name: str, whole: torch.Tensor, box: Box) -> WriteItem:
    data = TensorWriteData(chunk(box), TensorProperties(whole.dtype), whole.shape)
    return WriteItem(index(name, box), WriteItemType.SHARD, tensor_data=data)


def save(plans: Sequence[SavePlan], planners: Sequence[Planner]) -> None:
    """As the ranks would, one after the other."""
    global_plans, metadata = create_default_global_save_plan(dedup_save_plans(list(plans)))
    coordinator = Writer("memory")
    coordinator.set_up_storage_writer(True)
    global_plans = coordinator.prepare_global_plan(global_plans)
    results = []
    for plan, planner in zip(global_plans, planners, strict=True):
        results.append(Writer("memory").write_data(plan, planner).value())  # type: ignore[arg-type]
    coordinator.finish(metadata, results)


@given(worlds(), st.integers(8, 200))
def test_what_any_ranks_save_any_others_load(world: Any, segment_bytes: int) -> None:
    saves, loads, tensors = world
    wholes = {str(number): content(number, dtype, shape) for number, (dtype, shape, _, _) in enumerate(tensors)}
    held: list[dict[MetadataIndex, torch.Tensor]] = [{} for _ in range(saves)]
    items: list[list[WriteItem]] = [[] for _ in range(saves)]
    for (name, whole), (_, shape, cut, _) in zip(wholes.items(), tensors, strict=True):
        for rank, box in enumerate(boxes(shape, cut)):
            held[rank][index(name, box)] = whole[box.within(Box.whole(shape))]
            items[rank].append(written(name, whole, box))
    store = MemoryStore()
    with (
        mock.patch.object(attempts, "open_store", return_value=store),
        mock.patch.object(writing, "SEGMENT_BYTES", segment_bytes),
    ):
        save([SavePlan(each) for each in items], [Planner(each) for each in held])
        stored = sum(info.size for url, (_, info) in store.objects.items() if url.endswith(".safetensors"))
        pages = 4096 * sum(url.endswith(".safetensors") for url in store.objects)
        assert stored - pages == sum(whole.nbytes for whole in wholes.values())  # each element once
        for rank in range(loads):
            load(rank, wholes, tensors)


@given(
    st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), st.integers(0, 3000), st.booleans()), max_size=20
    ),
    st.sets(st.integers(0, 19)),
    st.sampled_from([1000, 5000, 20000]),
)
def test_what_lies_in_memory_becomes_segments_there(
    tensors: list[tuple[str, int, bool]], left_out: set[int], segment_bytes: int
) -> None:
    """Also where some of it is not to be saved: what is left is moved together, and no byte of it is lost."""
    placed, data, end = [], {}, 0
    for number, (dtype, count, is_apart) in enumerate(sorted(tensors, key=lambda each: -DTYPES[each[0]])):
        start = (end // PAGE_BYTES + 2) * PAGE_BYTES if is_apart else end
        piece = Piece(str(number), dtype, (count,), Box((0,), (count,)))
        data[piece.name] = start, bytes((number + at) % 251 for at in range(piece.length))
        placed += [(piece, start)] if number not in left_out else []
        end = start + piece.length
    arrangement = arrange(placed, segment_bytes)
    assert arrangement is not None
    image = Image(max(end, arrangement.starts[-1]) + 1)
    for start, content in data.values():
        image.view[start : start + len(content)] = content
    image.move(arrangement.moves)
    found: dict[str, dict[int, bytes]] = {}
    end = 0
    for segment, start in zip(arrangement.segments, arrangement.starts, strict=False):
        assert start % PAGE_BYTES == 0
        assert start >= end
        end = start + segment.size
        widths = [DTYPES[piece.dtype] for piece in segment.pieces]
        assert widths == sorted(widths, reverse=True)
        assert segment.header == header_of(segment.pieces)
        for piece, offset in zip(segment.pieces, segment.offsets, strict=True):
            where = slice(start + offset, start + offset + piece.length)
            found.setdefault(piece.name, {})[piece.box.offsets[0]] = bytes(image.view[where])
    whole = {name: b"".join(parts[at] for at in sorted(parts)) for name, parts in found.items()}
    assert whole == {piece.name: data[piece.name][1] for piece, _ in placed}


def load(rank: int, wholes: dict[str, torch.Tensor], tensors: Any) -> None:
    reader = Reader("memory")
    metadata = reader.read_metadata()
    targets, items, expected = {}, [], {}
    for (name, whole), (dtype, shape, _, cut) in zip(wholes.items(), tensors, strict=True):
        box = boxes(shape, cut)[rank]
        expected[index(name, box)] = whole[box.within(Box.whole(shape))]
        targets[index(name, box)] = torch.zeros(box.sizes, dtype=dtype)
        described: Any = metadata.state_dict_metadata[name]
        assert (described.size, described.properties.dtype) == (whole.shape, dtype)
        items += create_read_items_for_chunk_list(name, described, [chunk(box)])
    plan = reader.prepare_local_plan(LoadPlan(items))
    reader.read_data(plan, Planner(targets))  # type: ignore[arg-type]
    for each, tensor in expected.items():
        assert (
            targets[each].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
            if tensor.dim()
            else (targets[each].item() == tensor.item() or tensor.isnan())
        )
