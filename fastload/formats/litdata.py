"""LitData, the chunks of Lightning's litdata (`litdata/streaming`).

    u32             n, the number of items
    u32[n + 1]      where each item begins, from the start of the file; last, where they end
    items           of each the sizes (u32) of its leaves, then the bytes of all leaves

All integers are little-endian. What the leaves are is not in a chunk but in `index.json` beside it: the serializer of
each (`data_format`), and how they make a sample (`data_spec`, the pytree of torch as JSON). A leaf is a column, whose
name is its path: `image`, `meta/id`, `0`. With zstd an item may be packed by itself. Chunks that are packed as a whole,
in frames of some items each, or as tables, are unpacked before they come here (see `store.packing`); what is encrypted
is refused by name.

Samples of nothing but strings, numbers and lists are written as a table: all items are empty, and behind them lie a
table of Arrow (IPC), its size (u32) and `LDARW01` with a zero.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.decode.base import Keys, Offsets
from fastload.decode.base import Where as ValueWhere
from fastload.decode.flat import Flat
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats.arrow_table import index_of_table
from fastload.formats.indexers import HeadIndexer
from fastload.formats.mds import Picture, Several
from fastload.formats.record_index import Described, ListedShard, RecordIndex, shard_name
from fastload.formats.records import (
    Bytes,
    Fill,
    Int64s,
    Pickled,
    RecordReader,
    Where,
    copy_out,
    find_by_sizes,
    layout_of,
    number_of,
)
from fastload.formats.table_index import TableIndex
from fastload.formats.zstd import unpacked
from fastload.store.packing import FRAMES, TABLE, packing_of

_TABLE_MAGIC = b"LDARW01\0"
_TOKENS_LOADER = "TokensLoader"
_IN_FRAMES = "batch"
_LEVELS = ("chunk", _IN_FRAMES, "sample")
_COLUMNS_MAX = 4096
_AXES_MAX = 32  # as numpy
_TORCH = {
    0: "f4", 1: "f4", 2: "f8", 3: "f8", 4: "c8", 5: "c8", 6: "c16", 7: "c16", 8: "f2", 9: "f2", 11: "u1", 12: "i1",
    13: "i2", 14: "i2", 15: "i4", 16: "i4", 17: "i8", 18: "i8", 19: "?", 20: "u2",
}  # fmt: skip
_NUMPY = dict(enumerate(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "?")))

# The index of a folder.


class _Chunk(msgspec.Struct):
    filename: str
    chunk_bytes: Annotated[int, msgspec.Meta(ge=0)]
    chunk_size: Annotated[int, msgspec.Meta(ge=0)]
    dim: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _Config(msgspec.Struct):
    data_format: list[str]
    data_spec: str | None = None
    compression: str | None = None
    compression_level: Any = None
    ipc_compression: Any = None
    encryption: Any = None
    item_loader: str | None = None
    types: Any = msgspec.UNSET  # the versions that do not write it left a chunk's head out of its size, before 0.2.58


class _Index(msgspec.Struct):
    chunks: list[_Chunk]
    config: _Config


def is_index(data: bytes) -> bool:
    """Whether this is meant as an index of chunks."""
    try:
        return "chunks" in msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def shards_of(data: bytes, url: str) -> list[ListedShard]:
    """The chunks that the index at `url` names. ConfigError, naming `url`, for what is none, and for what is not read:
    see `layout`.
    """
    index = _index(data, url)
    _layout(index, url)
    return [_listed(chunk, index.config) for chunk in index.chunks]


def _listed(chunk: _Chunk, config: _Config) -> ListedShard:
    name, size, samples = chunk.filename, chunk.chunk_bytes, chunk.chunk_size
    is_exact = config.types is not msgspec.UNSET
    if packing_of(name):  # the size is that of the unpacked chunk
        return ListedShard(name, (), samples, size if is_exact else -1)
    if config.compression_level == _IN_FRAMES:
        return ListedShard(name, (size,), samples, packing=FRAMES)
    if config.ipc_compression:
        return ListedShard(name, (size,), samples, packing=TABLE)
    return ListedShard(name, (size,) if is_exact else (size, size + 8 + 4 * samples), samples)


def layout(data: bytes, url: str) -> bytes:
    """How the items are laid out in chunks that the index at `url` names. ConfigError as above."""
    return _layout(_index(data, url), url)


def described(data: bytes, url: str) -> dict[str, Described]:
    """The same for each chunk, by its name."""
    index = _index(data, url)
    found = Described(_layout(index, url))
    return {chunk.filename: found for chunk in index.chunks}


def _index(data: bytes, url: str) -> _Index:
    try:
        return msgspec.json.decode(data, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{url} is no index of LitData's chunks: {error}; write it again") from error


def _check_readable(config: _Config, url: str) -> None:
    if config.encryption:
        raise ConfigError(f"{url}: its chunks are encrypted, which fastload does not read; write them without")
    if config.item_loader not in (None, "PyTreeLoader", _TOKENS_LOADER):
        raise ConfigError(
            f"{url}: its chunks are made for {config.item_loader}, which fastload does not read; write them with the "
            "default item_loader"
        )


def _layout(index: _Index, url: str) -> bytes:
    config = index.config
    _check_readable(config, url)
    if config.item_loader == _TOKENS_LOADER:
        raise ConfigError(
            f"{url}: its chunks hold tokens, whose windows are as long as you say; give "
            'format="tokens(BLOCK_SIZE, overlap=0)", or the adapter item_loader=TokensLoader(BLOCK_SIZE)'
        )
    if config.ipc_compression not in (None, "zstd", "lz4"):
        raise ConfigError(
            f"{url}: its tables are compressed by {config.ipc_compression}, which fastload does not know; write them "
            'with compression="zstd", or without'
        )
    level = config.compression_level or "chunk"
    if config.compression and not (config.compression.partition(":")[0] == "zstd" and level in _LEVELS):
        raise ConfigError(
            f"{url}: its chunks are compressed by {config.compression} in the way {level!r}, which fastload does not "
            'know; write them with compression="zstd", or without'
        )
    is_packed = bool(config.compression) and level == "sample"
    try:
        names = _names(config)
        if len(names) != len(config.data_format):
            raise ValueError(f"it has {len(names)}")
        columns = [[name, form] for name, form in zip(names, config.data_format, strict=True)]
        LitDataReader.of({"columns": columns, "is_packed": is_packed})
    except ValueError as error:
        raise ConfigError(
            f"{url}: its data_spec does not describe {len(config.data_format)} leaves ({error}); write it again"
        ) from error
    except ShardError as error:
        raise ConfigError(f"{url}: {error}") from error
    return layout_of("litdata", {"columns": columns, "is_packed": is_packed})


# Tokens: items of one array each, end to end, without heads.


@functools.lru_cache(maxsize=4)  # all chunks of a folder ask
def token_chunks(data: bytes, url: str) -> dict[str, TokenChunk]:
    """What the chunks hold that the index at `url` names, which are made for `TokensLoader`. ConfigError for others."""
    index = _index(data, url)
    config = index.config
    _check_readable(config, url)
    if config.item_loader != _TOKENS_LOADER:
        raise ConfigError(
            f"{url}: its chunks are made for {config.item_loader or 'PyTreeLoader'}, and hold no bare tokens; leave "
            "format= out"
        )
    if config.compression_level not in (None, "chunk"):
        raise ConfigError(
            f"{url}: its tokens are compressed in the way {config.compression_level!r}, which fastload does not know; "
            'write them with compression="zstd", compression_level="chunk", or without'
        )
    kind, _, code = (config.data_format[0] if len(config.data_format) == 1 else "").partition(":")
    try:
        codes = {"no_header_tensor": _TORCH, "no_header_numpy": _NUMPY}[kind]
        dtype = np.dtype(codes[int(code)]).newbyteorder("<")
    except (KeyError, ValueError):
        dtype = np.dtype("?")
    if dtype.kind not in "iuf":
        raise ConfigError(
            f"{url}: its items are {config.data_format}, and tokens are one array of numbers; write the data set again"
        )
    return {
        chunk.filename: TokenChunk(_listed(chunk, config), 8 + 4 * chunk.chunk_size, chunk.dim, dtype)
        for chunk in index.chunks
    }


class TokenChunk(NamedTuple):
    """Tokens from `start` on, of which there are `token_count`, or as many as fit where that is None."""

    listed: ListedShard
    start: int
    token_count: int | None
    dtype: np.dtype[Any]


class _Spec(msgspec.Struct):
    """A node of a pytree."""

    type: str | None
    context: Any
    children_spec: list[Any]


_OF_KEYS = ("builtins.dict", "collections.OrderedDict", "collections.defaultdict")
_OF_NUMBERS = ("builtins.tuple", "builtins.list", "collections.deque", "collections.namedtuple")


def _names(config: _Config) -> list[str]:
    """The paths of the leaves. ValueError."""
    if config.data_spec is None:
        return [str(number) for number in range(len(config.data_format))]
    try:
        version, root = json.loads(config.data_spec)
        if version != 1:
            raise ValueError(f"its version is {version!r}, and 1 is known")
        return ["/".join(path) or "0" for path in _paths(root, ())]
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except TypeError as error:
        raise ValueError(str(error)) from error


def tree(data: bytes, url: str) -> Any:
    """The sample of the index at `url`, with the names of columns as its leaves: dicts, lists and tuples, or one name.
    ConfigError for what is no index, or not read.
    """
    config = _index(data, url).config
    names = iter(json.loads(layout(data, url))["columns"])
    if config.data_spec is None:
        return [name for name, _ in names]
    return _filled(json.loads(config.data_spec)[1], names)


def serializers(data: bytes, url: str) -> dict[str, str]:
    """The serializer of each column of the index at `url`, without its dtype. ConfigError as above."""
    return {name: form.partition(":")[0] for name, form in json.loads(layout(data, url))["columns"]}


def _filled(node: Any, names: Iterator[Any]) -> Any:
    spec = msgspec.convert(node, _Spec)
    if spec.type is None:
        return next(names)[0]
    children = [_filled(child, names) for child in spec.children_spec]
    if spec.type in _OF_KEYS:
        return dict(zip(_keys(spec), children, strict=True))
    return tuple(children) if spec.type in ("builtins.tuple", "collections.namedtuple") else children


def _keys(spec: _Spec) -> list[Any]:
    """Of what has keys."""
    keys = json.loads(spec.context) if isinstance(spec.context, str) else spec.context
    return list((keys.get("dict_context") if isinstance(keys, dict) else keys) or ())


def _paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    spec = msgspec.convert(node, _Spec)
    if spec.type is None:
        yield path
        return
    keys: Any = range(len(spec.children_spec))
    if spec.type in _OF_KEYS:
        keys = _keys(spec)
    elif spec.type not in _OF_NUMBERS:
        raise ValueError(f"it has a {spec.type!r}, which fastload does not know")
    for key, child in zip(keys, spec.children_spec, strict=True):
        yield from _paths(child, (*path, str(key)))


# Chunks.


class LitDataIndexer(HeadIndexer):
    """Makes the index of one chunk from its table. Used by one thread."""

    kind, each = "chunk of LitData", "item"

    def __init__(self, url: str, size: int, layout: bytes) -> None:
        """ShardError for an empty object."""
        super().__init__(url, size)
        self._layout = layout

    def _check_start(self, count: int, first: int) -> None:
        if first != 8 + 4 * count or first > self._size:
            raise ShardError(self._no_chunk(count, first))

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """As of `Indexer`. A table is read in full."""
        super().feed(chunk, start)
        if len(self._head) == self._head_bytes and self._is_table():
            self._needed = self._size
            self._head += chunk[self._head_bytes - start :].data

    def _is_table(self) -> bool:
        """Whether there are items, and none has a byte: then they are the rows of a table behind the head."""
        count = self._head_bytes // 4 - 2
        return count > 0 and self._head_bytes < self._size and self._head[4:] == self._head[4:8] * (count + 1)

    def _no_chunk(self, count: int, first: int) -> str:
        if self._head.startswith(b"LDFZ"):
            return f"{self._url} is compressed in frames, which its index does not say; write the data set again"
        return (
            f"{self._url}: it begins with {count} items, the first of them at byte {first} of {self._size}, which no "
            "chunk of LitData does; upload it again"
        )

    def finish(self) -> RecordIndex | TableIndex:
        """The index. ShardError: its offsets or its table make no sense."""
        if len(self._head) > self._head_bytes:
            count, end = self._head_bytes // 4 - 2, self._size - 12
            start = end - int.from_bytes(self._head[end : end + 4], "little")
            if end < self._head_bytes or self._head[-8:] != _TABLE_MAGIC or start < self._head_bytes:
                raise ShardError(
                    f"{self._url}: its items are empty, and behind them is no table: it was cut short; upload it again"
                )
            return index_of_table(memoryview(self._head), start, end, self._url, count)
        ends, sizes = self._ends()
        if ends[-1] > self._size:
            raise ShardError(
                f"{self._url} has {self._size} bytes, and its items end at {ends[-1]}: it was cut short; upload it "
                "again"
            )
        return RecordIndex(self._layout, ends[:-1].copy(), sizes, self._size, shard_name(self._url))


@dataclass(frozen=True, slots=True)
class LitDataReader:
    """Reads items of one set of leaves; see `records.RecordReader`."""

    columns: tuple[str, ...]
    formats: tuple[str, ...]
    is_packed: bool

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> LitDataReader:
        """From the description that indexes hold. ShardError for one that makes no sense."""
        try:
            columns = msgspec.convert(fields.get("columns"), list[tuple[str, str]])
            is_packed = msgspec.convert(fields.get("is_packed"), bool)
        except msgspec.ValidationError as error:
            raise ShardError(f"its columns are described by what is no description ({error})") from error
        if len(columns) > _COLUMNS_MAX:
            raise ShardError(f"it has {len(columns)} columns, above {_COLUMNS_MAX}")
        for name, form in columns:
            if _kind(form) not in _DECODERS:
                raise ShardError(f"column {name!r} has the serializer {form!r}, which fastload does not know")
        names = [name for name, _ in columns]
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise ShardError(f"it has the column {twice!r} twice; give its leaves other names")
        return cls(tuple(name for name, _ in columns), tuple(form for _, form in columns), is_packed)

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        return self.formats[number_of(self.columns, column)]

    def decoder(self, column: str) -> Decoder:
        form = self.formats[number_of(self.columns, column)]
        made = _DECODERS[_kind(form)]
        if made is not None:
            return made(form)
        raise ConfigError(
            f"column {column!r} holds a {_kind(form)}, which fastload does not decode; leave it out (columns=[...]), "
            f"or take its bytes: decode={{{column!r}: fastload.decode.raw()}}"
        )

    def joined(self, other: RecordReader) -> bytes | None:
        return None

    @property
    def sizes(self) -> tuple[int, ...] | None:
        return None if self.is_packed else (-1,) * len(self.columns)

    def find(
        self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where
    ) -> Fill | None:
        numbers = [number_of(self.columns, column) for column in columns]
        sizes = (-1,) * len(self.columns)
        if not self.is_packed:
            find_by_sizes(records, offsets, sizes, numbers, places, where)
            return None
        items, item_offsets = unpacked(records, offsets, where)
        find_by_sizes(items, item_offsets, sizes, numbers, places, where)

        def fill(out_offset: Int64s, outs: Sequence[Bytes]) -> None:
            copy_out(items, places[0], places[1], out_offset, outs)

        return fill


def _kind(form: str) -> str:
    """The serializer, without what it says of the values."""
    return form.partition(":")[0]


# Leaves.


@dataclass(frozen=True, slots=True)
class Array(Decoder):
    """An array behind its dtype and shape, all u32: of torch (big-endian) or of numpy. A batch is one array where all
    are of one shape, as litdata's own loader has it.
    """

    is_torch: bool

    def _decode(self, value: memoryview) -> NDArray[Any]:
        order, codes = (">", _TORCH) if self.is_torch else ("<", _NUMPY)
        try:
            code, axes = struct.unpack_from(f"{order}II", value)
            if axes > _AXES_MAX:
                raise DecodeError(f"an array of {axes} axes")
            shape = struct.unpack_from(f"{order}{axes}I", value, 8)
        except struct.error as error:
            raise DecodeError(f"{len(value)} bytes are no array: {error}") from error
        dtype, at = _dtype(codes, code), 8 + 4 * axes
        count = math.prod(shape)
        if count * dtype.itemsize != len(value) - at:
            raise DecodeError(f"an array of {dtype}{list(shape)} in {len(value) - at} bytes")
        try:
            return _elements(value[at:], dtype).reshape(shape)
        except ValueError as error:  # of no elements, and with axes that are too long
            raise DecodeError(f"an array of {dtype}{list(shape)}: {error}") from error

    def decode(
        self, values: NDArray[np.uint8], offsets: Offsets, where: ValueWhere, keys: Keys | None = None
    ) -> list[Any] | NDArray[Any]:
        return _stacked(Decoder.decode(self, values, offsets, where, keys))


def _dtype(codes: Mapping[int, str], code: int) -> np.dtype[Any]:
    """DecodeError for a code that no array can have."""
    if code not in codes:
        raise DecodeError(f"the dtype {code} is one that arrays in fastload cannot have, or none")
    return np.dtype(codes[code]).newbyteorder("<")


def _elements(value: memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    found = np.frombuffer(value, np.uint8 if dtype.kind == "b" else dtype)
    # A boolean that is neither 0 nor 1 breaks the code that gets it.
    return found != 0 if dtype.kind == "b" else found.astype(dtype.newbyteorder("="))


def _stacked(arrays: Any) -> list[Any] | NDArray[Any]:
    kinds = {(each.dtype, each.shape) for each in arrays}
    return np.stack(arrays) if len(kinds) == 1 else list(arrays)


def _flat(codes: Mapping[int, str]) -> Callable[[str], Decoder]:
    def made(form: str) -> Decoder:
        code = form.partition(":")[2]
        try:
            return Flat(_dtype(codes, int(code) if code.isascii() and code.isdigit() and len(code) < 9 else -1))
        except DecodeError as error:
            raise ConfigError(f"a column has the serializer {form!r:.100}: {error}; write it with another") from error

    return made


@dataclass(frozen=True, slots=True)
class RgbPicture(Decoder):
    """An image file, as litdata gives it: an array (3, height, width), turned as its EXIF says."""

    def _decode(self, value: memoryview) -> NDArray[np.uint8]:
        picture = Picture()._decode(value)
        from PIL import ImageOps

        try:
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), np.uint8)
        except (ValueError, OSError, SyntaxError, struct.error) as error:
            raise DecodeError(f"{len(value)} bytes are no image that can be shown: {error}") from error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def decode(
        self, values: NDArray[np.uint8], offsets: Offsets, where: ValueWhere, keys: Keys | None = None
    ) -> list[Any] | NDArray[Any]:
        return _stacked(Decoder.decode(self, values, offsets, where, keys))


@dataclass(frozen=True, slots=True)
class Nested(Decoder):
    """A list or dict, in a binary form of litdata's own, or as JSON."""

    def _decode(self, value: memoryview) -> Any:
        if not len(value) or value[0] > _TAG_MAX:
            return decode.json().decode_one(value, "a nested value")
        try:
            found, end = _nested(value, 0)
        except (struct.error, IndexError, UnicodeError, RecursionError, ValueError) as error:
            raise DecodeError(f"{len(value)} bytes are no nested value: {error}") from error
        if end != len(value):
            raise DecodeError(f"a nested value ends at byte {end} of {len(value)}")
        return found


_TAG_MAX = 0x20
_JSON, _TEXTS, _INTEGERS, _FLOATS, _BOOLEANS, _DICT, _ROWS, _TEXT, _INTEGER, _FLOAT, _BOOLEAN, _NONE = range(12)
_OF_ROW = {0x10: _NONE, 0x11: _TEXT, 0x12: _INTEGER, 0x13: _FLOAT, 0x14: _BOOLEAN}


def _nested(value: memoryview, at: int) -> tuple[Any, int]:
    tag, at = value[at], at + 1
    if tag in (_TEXT, _INTEGER, _FLOAT, _BOOLEAN, _NONE):
        return _single(value, tag, at)
    count, at = _u32(value, at)
    if tag == _JSON:
        return json.loads(bytes(_piece(value, at, count))), at + count
    if tag in (_INTEGERS, _FLOATS):
        found = np.frombuffer(_piece(value, at, 8 * count), "<i8" if tag == _INTEGERS else "<f8")
        return found.tolist(), at + 8 * count
    if tag == _BOOLEANS:
        return [byte != 0 for byte in _piece(value, at, count)], at + count
    if tag == _TEXTS:
        texts = []
        for _ in range(count):
            text, at = _single(value, _TEXT, at)
            texts.append(text)
        return texts, at
    if tag == _DICT:
        made = {}
        for _ in range(count):
            key, at = _single(value, _TEXT, at)
            made[key], at = _nested(value, at)
        return made, at
    if tag == _ROWS:
        key_count, at = _u32(value, at)
        # A value takes a byte at least; before memory is taken.
        if count * key_count > len(value) - at or (count and not key_count):
            raise ValueError(f"{count} rows of {key_count} values")
        keys, rows = [], []
        for _ in range(key_count):
            key, at = _single(value, _TEXT, at)
            keys.append(key)
        for _ in range(count if key_count else 0):
            row = {}
            for key in keys:
                if value[at] not in _OF_ROW:
                    raise ValueError(f"a row has a value of kind {value[at]}")
                row[key], at = _single(value, _OF_ROW[value[at]], at + 1)
            rows.append(row)
        return rows, at
    raise ValueError(f"it has a value of kind {tag}")


def _single(value: memoryview, tag: int, at: int) -> tuple[Any, int]:
    if tag == _TEXT:
        count, at = _u32(value, at)
        return str(_piece(value, at, count), "utf-8"), at + count
    if tag == _BOOLEAN:
        return value[at] != 0, at + 1
    if tag == _NONE:
        return None, at
    return struct.unpack_from("<q" if tag == _INTEGER else "<d", value, at)[0], at + 8


def _u32(value: memoryview, at: int) -> tuple[int, int]:
    (number,) = struct.unpack_from("<I", value, at)
    return number, at + 4


def _piece(value: memoryview, at: int, count: int) -> memoryview:
    if count > len(value) - at:
        raise ValueError(f"{count} bytes from {at} of {len(value)}")
    return value[at : at + count]


_DECODERS: dict[str, Callable[[str], Decoder] | None] = {
    "str": lambda _: decode.text(),
    "text": lambda _: decode.text(),
    "bool": lambda _: Flat(np.dtype("?"), ()),
    "int": lambda _: Flat(np.dtype("<i8"), ()),
    "float": lambda _: Flat(np.dtype("<f8"), ()),
    "bytes": lambda _: decode.raw(),
    "file": lambda _: decode.raw(),
    "tensor": lambda _: Array(is_torch=True),
    "no_header_tensor": _flat(_TORCH),
    "numpy": lambda _: Array(is_torch=False),
    "no_header_numpy": _flat(_NUMPY),
    "jpeg": lambda _: RgbPicture(),
    "image": lambda _: RgbPicture(),
    "pil": lambda _: Picture(is_bare=True),
    "jpeg_array": lambda _: Several(RgbPicture()),
    "json": lambda _: Nested(),
    "pickle": lambda _: Pickled(),
    "video": None,
    "audio": None,
    "nifti": None,
    "mesh": None,
    "pdf": None,
    "graph": None,
    "tifffile": None,
}
"""By serializer; None where a value is not decoded."""
