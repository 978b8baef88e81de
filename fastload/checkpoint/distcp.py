"""What torch.distributed.checkpoint has written itself: `.metadata`, and `.distcp` files of what `torch.save` writes.

`.metadata` is a pickle, and is read with torch's classes for it and nothing else. An item of a file is a zip archive
with one uncompressed record of the tensor's bytes; its directory says where, and a small pickle how they are laid out,
so that rows are a range within it. There are no checksums.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import msgspec
import torch
from torch.distributed._shard.sharded_tensor import metadata as sharded
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fastload.checkpoint.attempts import Place
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.reading import Wanted, read
from fastload.checkpoint.records import PATHS, Contents, Object, Part, Reference
from fastload.checkpoint.segments import Piece
from fastload.checkpoint.strided import Numbers, dense, extent
from fastload.checkpoint.values import NAMES
from fastload.errors import CheckpointDamagedError, CheckpointError, ObjectMissingError
from fastload.store.types import ObjectInfo

_PICKLE_BYTES_MAX = 1 << 20
_AT_ONCE = 16
# At the start of an item, and at its end, there is as much as a rule that tells how it is laid out.
_EDGE_BYTES = 4096
ALL = 1 << 62

# What a tensor's memory was called before it had no dtype, and is still called in files.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "IntStorage": torch.int32, "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}  # fmt: skip
T = TypeVar("T")
Key = TypeVar("Key")


def metadata_name(rank: int | None = None) -> str:
    """Of all ranks, or of one that saved without collectives."""
    return ".metadata" if rank is None else f"__{rank}.metadata"


@dataclass(frozen=True, slots=True)
class Item:
    """Where one lies: the file's name, and its bytes there."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Of a tensor in an item: where its first element lies in it, in bytes."""

    start: int
    dtype: torch.dtype
    sizes: Numbers
    strides: Numbers

    @property
    def is_dense(self) -> bool:
        """Whether it lies in C order; of a dimension of one element any stride is that."""
        axes = zip(self.sizes, self.strides, dense(self.sizes), strict=True)
        return 0 in self.sizes or all(size == 1 or stride == expected for size, stride, expected in axes)


def read_metadata(data: bytes, where: str) -> tuple[Metadata, dict[MetadataIndex, Item]]:
    """Metadata, and where each of its items lies. Raises `CheckpointDamagedError` where it is not what torch writes."""
    try:
        found = _MetadataUnpickler(io.BytesIO(data)).load()
        entries = {_of(str, name): _entry(entry) for name, entry in _of(dict, found.state_dict_metadata).items()}
        # Other planners than torch's own may keep anything there.
        said = found.planner_data if type(found.planner_data) is dict else {}
        paths = {name: path for name, path in said.items() if _is_path(path)}
        items = {_index(index): _item(info) for index, info in _of(dict, found.storage_data).items()}
    except Exception as error:  # of any kind: a pickle is a program
        raise CheckpointDamagedError(
            f"{where} is damaged, or no metadata of a torch checkpoint: {error}; take another step"
        ) from error
    return Metadata(entries, planner_data={name: paths.get(name, (name,)) for name in entries}), items


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry) is BytesStorageMetadata:
        return entry
    chunks = [
        ChunkStorageMetadata(_size(chunk.offsets), _size(chunk.sizes))
        for chunk in _of(list, _of(TensorStorageMetadata, entry).chunks)
    ]
    return TensorStorageMetadata(TensorProperties(_of(torch.dtype, entry.properties.dtype)), _size(entry.size), chunks)


def _is_path(path: Any) -> bool:
    return type(path) is tuple and len(path) > 0 and all(type(step) in (str, int) for step in path)


def _index(index: Any) -> MetadataIndex:
    offset = _of(MetadataIndex, index).offset
    return MetadataIndex(_of(str, index.fqn), None if offset is None else _size(offset))


def _item(info: Any) -> Item:
    _of(filesystem._StorageInfo, info)
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"items are packed by extensions ({info.transform_descriptors}), which only torch reads")
    name = _of(str, info.relative_path)
    if not name or name.startswith("/") or set(name.split("/")) & {"", ".", ".."}:
        raise ValueError(f"a file {name!r}")
    if min(_of(int, info.offset), _of(int, info.length)) < 0:
        raise ValueError(f"an item at {info.offset} of {info.length} bytes")
    return Item(name, info.offset, info.length)


def _size(size: Any) -> torch.Size:
    numbers = [_of(int, number) for number in _of(torch.Size, size)]
    if min(numbers, default=0) < 0:
        raise ValueError(f"a size {numbers}")
    return torch.Size(numbers)


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


class _MetadataUnpickler(pickle.Unpickler):
    """Makes objects of the classes that metadata are of, and no others."""

    _OF_METADATA = (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )  # fmt: skip
    _CLASSES: ClassVar[dict[tuple[str, str], Any]] = {
        **{(described.__name__, name): getattr(described, name) for name in _OF_METADATA if hasattr(described, name)},
        # Where these were before.
        **{(sharded.__name__, name): getattr(sharded, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")},
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): str,  # which is of no interest here
        ("collections", "OrderedDict"): collections.OrderedDict,
        # Of the path that it was saved to.
        **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"it has a {module}.{name}")
        return found


def contents(place: Place) -> Contents | None:
    """All that a folder holds which torch has written, as if we had; None where it has not. What lies otherwise than in
    C order, or is of a dtype that we have no name for, is no tensor then, but a value of torch's.
    """
    try:
        data, info = place.read(metadata_name())
    except ObjectMissingError:
        return None
    described, items = read_metadata(data, info.url)
    edges = known(place, {index: item for index, item in items.items() if index.offset is not None}, 0, {})
    found: list[Reference] = []
    others = {index: item for index, item in items.items() if index.offset is None}
    for index, held in edges.items():
        entry = described.state_dict_metadata.get(index.fqn)
        box = _box_at(entry, index)
        if box is None:
            raise CheckpointDamagedError(f"{info.url} is damaged: it does not describe {index}; take another step")
        assert isinstance(entry, TensorStorageMetadata)
        layout, shape = held.layout(), tuple(entry.size)
        if layout is not None and layout.is_dense and layout.sizes == box.sizes and layout.dtype in NAMES:
            piece = Piece(index.fqn, NAMES[layout.dtype], shape, box)
            found.append(Reference(piece, held.object, held.item.offset + layout.start))
        elif box == Box.whole(shape):
            others[index] = held.item
        else:
            raise CheckpointError(
                f"{place.folder}: {index.fqn} lies in parts that only dcp.load reads, with checkpoint.Reader"
            )
    values = [(index.fqn, "torch", each.all()) for index, each in known(place, others, ALL, {}).items()]
    paths = {
        name: [[step] if isinstance(step, int) else step for step in path]
        for name, path in described.planner_data.items()
    }
    values.append((PATHS, "msgpack", msgspec.msgpack.encode(paths)))
    return Contents([Part.of("", 0, [], values, found)], place.folder)


def _box_at(entry: Any, index: MetadataIndex) -> Box | None:
    if isinstance(entry, TensorStorageMetadata):
        for chunk in entry.chunks:
            if chunk.offsets == index.offset:
                return Box(tuple(chunk.offsets), tuple(chunk.sizes))
    return None


def known(place: Place, items: Mapping[Key, Item], small_bytes: int, infos: dict[str, ObjectInfo]) -> dict[Key, Known]:
    """Of each item what tells how it is laid out, or all of one that has no more than `small_bytes`. `infos` are of the
    files that were seen before.
    """
    names = {item.file for item in items.values()} - infos.keys()
    with ThreadPoolExecutor(_AT_ONCE, "fastload-checkpoint") as pool:
        infos.update(zip(names, pool.map(lambda name: place.store.head(place.folder + name), names), strict=True))
    found = {key: Known(place, item, infos[item.file], small_bytes) for key, item in items.items()}
    read(place.store, place.folder, [wanted for each in found.values() for wanted in each.wanted()])
    return found


class Known:
    """The first bytes of an item and its last ones, or all of it."""

    def __init__(self, place: Place, item: Item, info: ObjectInfo, small_bytes: int) -> None:
        if item.offset + item.length > info.size:
            raise CheckpointDamagedError(
                f"{info.url} is damaged: it has {info.size} bytes, and an item up to {item.offset + item.length}; take "
                "another step"
            )
        self.item, self._place = item, place
        self.object = Object(item.file, info.size, b"", info)
        self.is_whole = item.length <= max(small_bytes, 2 * _EDGE_BYTES)
        length = item.length if self.is_whole else _EDGE_BYTES
        self._parts = {0: bytearray(length), item.length - length: bytearray(length)}

    def wanted(self) -> Iterator[Wanted]:
        for start, data in self._parts.items():
            yield Wanted(self.object, self.item.offset + start, memoryview(data), _nothing)

    def all(self) -> bytes:
        return self._read(0, self.item.length)

    def layout(self) -> Layout | None:
        return layout_of(self.item.length, self._read)

    def _read(self, start: int, length: int) -> bytes:
        for first, data in self._parts.items():
            if first <= start and start + length <= first + len(data):
                return bytes(data[start - first : start - first + length])
        if start + length > self.item.length:
            raise ValueError("it reaches beyond its end")
        out = bytearray(length)
        wanted = Wanted(self.object, self.item.offset + start, memoryview(out), _nothing)
        read(self._place.store, self._place.folder, [wanted])
        return bytes(out)


def _nothing() -> None:
    pass


def layout_of(length: int, read: Callable[[int, int], bytes]) -> Layout | None:
    """How the tensor lies in an item of so many bytes, of which `read` gives some (from, how many). None where only
    torch itself can tell.
    """
    try:
        with zipfile.ZipFile(cast(Any, _Reading(length, read))) as archive:
            records = {info.filename: info for info in archive.infolist()}
            (pickled,) = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            folder = pickled.removesuffix("data.pkl")
            order = records.get(f"{folder}byteorder")
            if order is not None and _bytes_of(order, read) != b"little":
                return None
            storage, offset, sizes, strides, dtype = _LayoutUnpickler(
                io.BytesIO(_bytes_of(records[pickled], read))
            ).load()
            record = records[f"{folder}data/{storage.key}"]
            start = _start(record, read)
    except (zipfile.BadZipFile, pickle.UnpicklingError, struct.error, LookupError, TypeError, ValueError, EOFError):
        return None
    dtype = dtype or storage.dtype
    if not isinstance(dtype, torch.dtype) or not all(
        type(each) is int and each >= 0 for each in (offset, *sizes, *strides)
    ):
        return None
    needed = (offset + extent(strides, sizes)) * dtype.itemsize if 0 not in sizes else 0
    if needed > record.file_size or start + record.file_size > length:
        return None
    return Layout(start + offset * dtype.itemsize, dtype, tuple(sizes), tuple(strides))


def _start(record: zipfile.ZipInfo, read: Callable[[int, int], bytes]) -> int:
    """Where the bytes of an uncompressed record begin: behind its header, which is as long as that says."""
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise ValueError("it is compressed")
    magic, name, extra = struct.unpack("<4s22xHH", read(record.header_offset, 30))
    if magic != b"PK\3\4":
        raise ValueError("there is no header")
    return record.header_offset + 30 + int(name) + int(extra)


def _bytes_of(record: zipfile.ZipInfo, read: Callable[[int, int], bytes]) -> bytes:
    if record.file_size > _PICKLE_BYTES_MAX:
        raise ValueError("it is too long")
    return read(_start(record, read), record.file_size)


class _Reading(io.RawIOBase):
    """An item as a file."""

    def __init__(self, length: int, read: Callable[[int, int], bytes]) -> None:
        self._length, self._read, self._at = length, read, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, out: Any) -> int:
        data = self._read(self._at, max(0, min(len(out), self._length - self._at)))
        out[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype | None
    key: str


class _LayoutUnpickler(pickle.Unpickler):
    """What a pickled tensor is made of, without making it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return None
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it has a {module}.{name}")

    def persistent_load(self, said: Any) -> _Storage:
        kind, dtype, key, _, _ = said
        if kind != "storage":
            raise pickle.UnpicklingError(f"it has a {kind}")
        return _Storage(dtype, key)


def _tensor(
    storage: Any, offset: Any, sizes: Any, strides: Any, requires_grad: Any, hooks: Any, *more: Any
) -> tuple[Any, ...]:
    dtype = more[0] if more and isinstance(more[0], torch.dtype) else None
    if any(each for each in more if each is not dtype):  # such as that it is conjugated
        raise pickle.UnpicklingError(f"a tensor with {more}")
    return storage, offset, sizes, strides, dtype
