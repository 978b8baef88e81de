"""What torch.distributed.checkpoint loads, from one of our checkpoints or from one of its own: `checkpoint.Reader`.

torch compares what is there with what each rank holds, whatever mesh either has, and asks for boxes of elements. Of
each exactly the bytes are read that it takes (`strided`). What is no tensor is handed to torch's planner, which
unpickles anything: so it is read here first, by a reader that runs no code, and pickled anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from fastload.checkpoint import attempts, distcp, finding
from fastload.checkpoint.attempts import Place, opened
from fastload.checkpoint.copies import Copies
from fastload.checkpoint.flattening import unflatten
from fastload.checkpoint.foreign import ENDING, contents_of_folder
from fastload.checkpoint.reading import GAP_BYTES, Wanted, read
from fastload.checkpoint.records import MANIFEST_NAME, Contents
from fastload.checkpoint.records import Place as PieceAt
from fastload.checkpoint.strided import Numbers, Strided, dense
from fastload.checkpoint.values import decoded, dtype_of, paths_of
from fastload.client.cache import AnyCache
from fastload.errors import CheckpointDamagedError, CheckpointError, ObjectMissingError
from fastload.store.types import ObjectInfo

# What is read at once, since what does not go straight to its place is held beside it until then.
_ELEMENTS_AT_ONCE = 128 << 20


class Reader(StorageReader):
    """Loads what torch.distributed.checkpoint loads, from the checkpoint at `url`:

        dcp.load(state, storage_reader=checkpoint.Reader("s3://bucket/run/1200"))

    It may be one of `checkpoint.Writer`, of `checkpoint.save`, one that torch has written itself, or safetensors files.
    Each rank reads exactly what it needs, on any mesh. What is no tensor is read without running any code, unless
    pickles are allowed.
    Raises what `checkpoint.load` does, which torch puts into a `CheckpointException` or an `AssertionError`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        cache: AnyCache = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._url = os.fspath(url)
        self._allow_pickle, self._cache, self._storage_options = allow_pickle, cache, storage_options
        self._source: _Ours | _Torchs | None = None

    @property
    def checkpoint_id(self) -> str:
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
        self._source = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where there are none of all ranks, torch calls it once more with `rank`, for what one saved by itself."""
        rank: int | None = kwargs.get("rank")
        with opened(self._url, self._storage_options) as place:
            self._source = _source(place, rank)
        return self._source.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: `read_metadata` has read what this takes."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self._found.version)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        # What a node's ranks need together is found by its service, which fetches each block for the first that asks
        # (`service.loading`): so it is also without collectives, and where jobs are not one process group.
        # Each rank has looked for itself which checkpoint is there.
        if len({plan.storage_data for plan in plans}) > 1:
            raise CheckpointError(f"{self._url} was replaced while the ranks began to read it; load it again")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        others = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        with opened(self._url, self._storage_options) as place, Copies(self._cache, self._storage_options) as copies:
            place = Place(place.store, self._found.folder)
            for item, value in zip(others, self._found.values(place, others, self._allow_pickle), strict=True):
                file = io.BytesIO()
                torch.save(value, file)
                file.seek(0)
                planner.load_bytes(item, file)
            for group in _groups(item for item in plan.items if item.type is not LoadItemType.BYTE_IO):
                targets = [(item, planner.resolve_tensor(item).detach()) for item in group]
                for item, target in targets:
                    if target.shape != item.lengths:
                        raise CheckpointError(f"{item.dest_index.fqn} takes {item.lengths}, and gives {target.shape}")
                self._found.fill(place, targets, copies)
                for item, target in targets:
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def _found(self) -> _Ours | _Torchs:
        if self._source is None:
            self.read_metadata()
        assert self._source is not None
        return self._source


def _groups(items: Iterable[ReadItem]) -> Iterator[list[ReadItem]]:
    """What is read at once, since all that does not go straight to its place is held until then."""
    group: list[ReadItem] = []
    held = 0
    for item in items:
        elements = math.prod(item.lengths)
        if group and held + elements > _ELEMENTS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(item)
        held += elements
    if group:
        yield group


def _source(place: Place, rank: int | None) -> _Ours | _Torchs:
    if place.folder.rstrip("/").endswith(ENDING):
        place, there = finding.at(place)
        return _Ours(there, place.folder)
    name = distcp.metadata_name(rank)
    if rank is None:
        with contextlib.suppress(ObjectMissingError):
            return _Ours(attempts.contents(place), place.folder)
    with contextlib.suppress(ObjectMissingError):
        return _Torchs(place, name, is_of_all=rank is None)
    others = contents_of_folder(place) if rank is None else None
    if others is None:
        raise ObjectMissingError(
            f"{place.folder}: no checkpoint is here ({MANIFEST_NAME}, torch's {name}, or files *{ENDING}); "
            "check its name"
        )
    return _Ours(others, place.folder)


class _Value:
    """Stands where a state has what is no tensor."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Ours:
    """A checkpoint that fastload has saved, or files of other tools that are read as one, as torch would describe it.

    Its leaves are called as torch calls them, which takes a list that holds no tensor as one, where we have each of its
    elements: so a state is made of what is there, without any of it, and torch's own function says what it has.
    """

    def __init__(self, there: Contents, where: str) -> None:
        self._there, self.folder = there, where
        self.version = there.attempt
        self._places: dict[str, dict[Numbers, PieceAt]] = {}
        tensors: dict[int, str] = {}
        leaves = []
        for name, path in paths_of(there, where).items():
            leaf: Any = _Value(name)
            if name in there.tensors:
                leaf = torch.empty(0)
                tensors[id(leaf)] = name
            leaves.append((path, leaf))
        state = unflatten(leaves)
        try:
            named, paths = flatten_state_dict(state)
        except ValueError as error:  # two paths that are one name with dots
            raise CheckpointDamagedError(f"{where} is damaged: {error}; take another step") from error
        self._tensors = {name: tensors[id(leaf)] for name, leaf in named.items() if id(leaf) in tensors}
        self._values = {name: leaf for name, leaf in named.items() if name not in self._tensors}
        self.metadata = Metadata({name: self._described(name) for name in named}, planner_data=paths)

    def _described(self, named: str) -> TensorStorageMetadata | BytesStorageMetadata:
        if named not in self._tensors:
            return BytesStorageMetadata()
        name = self._tensors[named]
        dtype, shape = self._there.tensors[name]
        chunks = [
            ChunkStorageMetadata(torch.Size(piece.box.offsets), torch.Size(piece.box.sizes))
            for piece in self._there.places(name)
        ]
        return TensorStorageMetadata(TensorProperties(dtype_of(dtype, self.folder, name)), torch.Size(shape), chunks)

    def values(self, place: Place, items: Sequence[ReadItem], allow_pickle: bool) -> Iterator[Any]:
        for item in items:
            yield self._value(self._values[item.storage_index.fqn], allow_pickle)

    def _value(self, leaf: Any, allow_pickle: bool) -> Any:
        if isinstance(leaf, list):
            return [self._value(each, allow_pickle) for each in leaf]
        return decoded(*self._there.values[leaf.name], self.folder + leaf.name, allow_pickle)

    def fill(self, place: Place, targets: Sequence[tuple[ReadItem, torch.Tensor]], copies: Copies) -> None:
        wanted = [each for item, target in targets for each in self._strided(item).wanted(item.storage_offsets, target)]
        read(place.store, place.folder, wanted, copies)

    def _strided(self, item: ReadItem) -> Strided:
        name = self._tensors[item.storage_index.fqn]
        if name not in self._places:
            self._places[name] = {piece.box.offsets: piece for piece in self._there.places(name)}
        piece = self._places[name][tuple(item.storage_index.offset or ())]
        dtype, shape = self._there.tensors[name]
        if len(item.lengths) != len(shape):  # before 2.6 torch's planner does not look
            raise CheckpointError(
                f"{self.folder}{name} has shape {tuple(shape)}, and the state has a tensor of {len(item.lengths)} "
                "dimensions there"
            )
        return Strided(piece.object, piece.offset, dtype_of(dtype, self.folder, name), dense(piece.box.sizes))


class _Torchs:
    """A checkpoint that torch has written."""

    def __init__(self, place: Place, name: str, *, is_of_all: bool) -> None:
        self.folder = place.folder
        data, info = place.read(name)
        self.metadata, self._items = distcp.read_metadata(data, info.url)
        self.version = f"{info.etag} {info.mtime_ns} {len(data)}" if is_of_all else ""
        self._infos: dict[str, ObjectInfo] = {}

    def values(self, place: Place, items: Sequence[ReadItem], allow_pickle: bool) -> Iterator[Any]:
        known = self._known(place, items, small_bytes=distcp.ALL)
        for item in items:
            data = known[item.storage_index].all()
            yield decoded("torch", data, place.folder + item.storage_index.fqn, allow_pickle)

    def fill(self, place: Place, targets: Sequence[tuple[ReadItem, torch.Tensor]], copies: Copies) -> None:
        known = self._known(place, [item for item, _ in targets], small_bytes=GAP_BYTES)
        layouts = {index: None if held.is_whole else held.layout() for index, held in known.items()}
        wanted: list[Wanted] = []
        for item, target in targets:
            held, layout = known[item.storage_index], layouts[item.storage_index]
            where = f"{place.folder}{held.item.file}: {item.storage_index.fqn}"
            if layout is None:
                tensor = _loaded(held.all(), where)
                _check_box(item, tuple(tensor.shape), where)
                target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
            else:
                _check_box(item, layout.sizes, where)
                strided = Strided(held.object, held.item.offset + layout.start, layout.dtype, layout.strides)
                wanted += strided.wanted(item.storage_offsets, target)
        read(place.store, place.folder, wanted, copies)

    def _known(self, place: Place, items: Sequence[ReadItem], small_bytes: int) -> dict[MetadataIndex, distcp.Known]:
        indices = {item.storage_index: self._items[item.storage_index] for item in items}
        return distcp.known(place, indices, small_bytes, self._infos)


def _loaded(data: bytes, where: str) -> torch.Tensor:
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: torch's reader
        raise CheckpointDamagedError(f"{where} is damaged: {error}; take another step") from error
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointDamagedError(f"{where} is a {type(tensor).__name__}, and no tensor; take another step")
    return tensor.detach()


def _check_box(item: ReadItem, sizes: tuple[int, ...], where: str) -> None:
    ends = [start + length for start, length in zip(item.storage_offsets, item.lengths, strict=True)]
    if len(ends) != len(sizes) or any(end > size for end, size in zip(ends, sizes, strict=True)):
        raise CheckpointDamagedError(f"{where} has shape {sizes}, and its elements go to {ends}; take another step")
