"""MDS, the shards of MosaicML's streaming (`streaming/base/format/mds`, version 2).

    u32             n, the number of samples
    u32[n + 1]      where each sample begins, from the start of the file; last, the size of the file
    JSON            column_names, column_encodings, column_sizes (null: it varies), and more that is not needed
    samples         of each the sizes (u32) of the columns whose size varies, then the bytes of all columns

All integers are little-endian. So a shard is smaller than 4 GiB. The header comes first, and is all that indexing
reads.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.decode.flat import Flat
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats.indexers import HeadIndexer
from fastload.formats.mds_lines import lines_layout
from fastload.formats.record_index import Described, ListedShard, RecordIndex, shard_name
from fastload.formats.records import Bytes, Int64s, Pickled, RecordReader, Where, find_by_sizes, layout_of, number_of
from fastload.store.packing import packing_of

# Columns of a shard, and bytes of the JSON that describes them: more is no header that anything wrote.
_COLUMNS_MAX, _JSON_BYTES_MAX = 4096, 1 << 20

_SCALARS = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
    )
}  # fmt: skip
_ARRAY_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip


class _File(msgspec.Struct):
    basename: str
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    hashes: dict[str, str] = {}


class _Listed(msgspec.Struct):
    samples: Annotated[int, msgspec.Meta(ge=0)]
    format: str = "mds"
    raw_data: _File | None = None
    zip_data: _File | None = None
    # Of shards that are text; those of JSON have `columns`, the others the lists.
    columns: dict[str, str] = {}
    column_names: list[str] = []
    column_encodings: list[str] = []
    separator: str | None = None
    newline: str = "\n"


class _Index(msgspec.Struct):
    shards: list[_Listed]
    version: int = 2


def shards_of(data: bytes, url: str) -> list[ListedShard]:
    """The shards that the index at `url` names. ConfigError, naming `url`, for what is none, and for shards that are
    not read, such as those that are packed in ways that are not read.
    """
    found = []
    for shard in _index(data, url).shards:
        if shard.raw_data is None:
            raise ConfigError(f"{url} does not say how large a shard is (raw_data); write the data set again")
        raw, packed, is_digested = shard.raw_data, shard.zip_data, bool(shard.raw_data.hashes)
        if packed is None:
            found.append(ListedShard(raw.basename, (raw.bytes,), shard.samples, is_digested=is_digested))
            continue
        if not packing_of(packed.basename):
            raise ConfigError(
                f"{url} names {packed.basename}, which is packed as nothing that is read (zstd, gz, bz2, br and snappy "
                "are); write the data set with another compression"
            )
        found.append(ListedShard(packed.basename, (packed.bytes,), shard.samples, raw.bytes, is_digested=is_digested))
    return found


def described(data: bytes, url: str) -> dict[str, Described]:
    """What the index at `url` says of shards that cannot be read without, or have digests, by their names. ConfigError
    as above.
    """
    layouts: dict[bytes, bytes] = {}  # made once: they hardly differ
    found = {}
    for shard in _index(data, url).shards:
        layout, files = b"", (shard.raw_data, shard.zip_data)
        if shard.format != "mds":
            said = (
                shard.format,
                shard.columns,
                shard.column_names,
                shard.column_encodings,
                shard.separator,
                shard.newline,
            )
            key = msgspec.json.encode(said)
            layout = layouts[key] = layouts.get(key) or _lines_layout(shard, url)
        digests = {} if shard.raw_data is None else shard.raw_data.hashes
        if layout or digests:
            found.update({each.basename: Described(layout, digests) for each in files if each is not None})
    return found


def _index(data: bytes, url: str) -> _Index:
    try:
        index = msgspec.json.decode(data, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{url} is no index of MDS shards, nor of LitData's chunks: {error}; write it again"
        ) from error
    if index.version != 2:
        raise ConfigError(f"{url} has version {index.version} of MDS; fastload reads version 2")
    odd = next((shard.format for shard in index.shards if shard.format not in ("mds", *_SEPARATORS)), None)
    if odd is not None:
        raise ConfigError(f"{url} names {odd} shards, which fastload does not know; write them as MDS")
    return index


_SEPARATORS = {"json": None, "csv": ",", "tsv": "\t", "xsv": None}
"""Of shards that are text, where the index does not say it."""


def _lines_layout(shard: _Listed, url: str) -> bytes:
    separator = shard.separator if shard.format == "xsv" else _SEPARATORS[shard.format]
    is_json = shard.format == "json"
    names, encodings = shard.column_names, shard.column_encodings
    columns = sorted(shard.columns.items()) if is_json else list(zip(names, encodings, strict=False))
    if not columns or len(names) != len(encodings) or (separator is None) != is_json:
        raise ConfigError(f"{url} does not say what the columns of its {shard.format} shards are; write it again")
    try:
        return lines_layout(columns, separator, shard.newline)
    except ShardError as error:
        raise ConfigError(f"{url}: {error}; write the shards again") from error


class _Header(msgspec.Struct):
    """What is read of the JSON in a shard."""

    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]


class MdsIndexer(HeadIndexer):
    """Makes the index of one shard from its header. Used by one thread."""

    kind, each = "MDS shard", "sample"

    def _check_start(self, count: int, first: int) -> None:
        if not 8 + 4 * count <= first <= self._size or first - (8 + 4 * count) > _JSON_BYTES_MAX:
            raise ShardError(
                f"{self._url}: it begins with {count} samples, the first of them at byte {first} of {self._size}, "
                "which no MDS shard does; name another format, or write it again"
            )

    def finish(self) -> RecordIndex:
        """The index. ShardError: its offsets or the description of its columns make no sense."""
        ends, sizes = self._ends()
        if ends[-1] != self._size:
            raise ShardError(
                f"{self._url} has {self._size} bytes, and its header says {ends[-1]}: it was cut short, or is another "
                "one; upload it again"
            )
        layout = layout_of("mds", {"columns": self._columns(bytes(self._head[4 + 4 * len(ends) :]))})
        return RecordIndex(layout, ends[:-1].copy(), sizes, self._size, shard_name(self._url))

    def _columns(self, described: bytes) -> list[list[object]]:
        try:
            header = msgspec.json.decode(described, type=_Header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ShardError(f"{self._url}: its header describes no columns ({error}); write it again") from error
        lists = header.column_names, header.column_encodings, header.column_sizes
        if len({len(each) for each in lists}) != 1 or len(header.column_names) > _COLUMNS_MAX:
            raise ShardError(f"{self._url}: its header has {[len(each) for each in lists]} names, encodings and sizes")
        columns: list[list[object]] = [list(column) for column in zip(*lists, strict=True)]
        try:
            MdsReader.of({"columns": columns})
        except ShardError as error:
            raise ShardError(f"{self._url}: {error}") from error
        return columns


@dataclass(frozen=True, slots=True)
class MdsReader:
    """Reads records of one set of columns; see `records.RecordReader`."""

    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> MdsReader:
        """From the description that indexes hold. ShardError where it is none."""
        try:
            columns = msgspec.convert(fields.get("columns"), list[tuple[str, str, int | None]])
        except msgspec.ValidationError as error:
            raise ShardError(f"its columns are described by what is no description ({error})") from error
        names = [name for name, _, _ in columns]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ShardError(f"it has the column {twice!r} twice; rename one")
        for name, encoding, size in columns:
            expected = _size_of(encoding)
            if size is not None and not 0 <= size < 1 << 32:
                raise ShardError(f"column {name!r} has a size of {size} bytes")
            if expected is not None and size != expected:
                raise ShardError(f"column {name!r} is {encoding}, and has {size} bytes where that takes {expected}")
        return cls(
            tuple(name for name, _, _ in columns),
            tuple(encoding for _, encoding, _ in columns),
            tuple(-1 if size is None else size for _, _, size in columns),
        )

    def may_have(self, column: str) -> bool:
        return number_of(self.columns, column) >= 0

    def kind(self, column: str) -> str:
        number = number_of(self.columns, column)
        return self.encodings[number] + (f" of {self.sizes[number]} bytes" if self.sizes[number] >= 0 else "")

    def decoder(self, column: str) -> Decoder:
        return _decoder_of(self.encodings[number_of(self.columns, column)])

    def joined(self, other: RecordReader) -> bytes | None:
        return None

    def find(self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where) -> None:
        numbers = [number_of(self.columns, column) for column in columns]
        find_by_sizes(records, offsets, self.sizes, numbers, places, where)


_ARRAY = re.compile(r"ndarray(?::(\w+)(?::([0-9]{1,10}(?:,[0-9]{1,10})*),?)?)?")
_AXES_MAX = 32  # as numpy


def _size_of(encoding: str) -> int | None:
    """The bytes of a value, None where they vary. ShardError for an encoding that is not known."""
    if encoding == "int":
        return 8
    if encoding in _SCALARS:
        return _SCALARS[encoding].itemsize
    array = _array(encoding)
    if array is not None:
        dtype, shape = array
        return None if dtype is None or shape is None else dtype.itemsize * math.prod(shape)
    if encoding in _VARYING:
        return None
    raise ShardError(f"a column has the encoding {encoding!r}, which fastload does not know")


def _array(encoding: str) -> tuple[np.dtype[Any] | None, tuple[int, ...] | None] | None:
    """Dtype and shape of an array's encoding, each where it has one; None for other encodings."""
    match = _ARRAY.fullmatch(encoding)
    if match is None:
        return None
    if match[1] is not None and match[1] not in _SCALARS:
        raise ShardError(f"a column has the encoding {encoding!r}, whose dtype MDS does not know")
    shape = None if match[2] is None else tuple(int(size) for size in match[2].split(",") if size)
    if shape and (len(shape) > _AXES_MAX or max(shape) >= 1 << 32):
        raise ShardError(
            f"a column has the encoding {encoding[:80]!r}, which is larger than an array in a shard can be"
        )
    return None if match[1] is None and shape else (_SCALARS[match[1]] if match[1] else None), shape


def _decoder_of(encoding: str) -> Decoder:
    if encoding == "int":
        return Flat(_SCALARS["int64"], ())
    if encoding in _SCALARS:
        return Flat(_SCALARS[encoding], ())
    array = _array(encoding)
    if array is not None:
        dtype, shape = array
        return Flat(dtype, shape) if dtype is not None and shape is not None else MdsArray(dtype, shape)
    return _VARYING[encoding]()


@dataclass(frozen=True, slots=True)
class MdsArray(Decoder):
    """An array that says its dtype, its shape, or both: `dtype` and `shape` are None where it does."""

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None

    def gives(self) -> tuple[Any, tuple[int, ...] | None]:
        return object if self.dtype is None else self.dtype.newbyteorder("="), self.shape

    def _decode(self, value: memoryview) -> NDArray[Any]:
        at, dtype, shape = 0, self.dtype, self.shape
        if dtype is None:
            if not len(value) or value[0] not in _ARRAY_CODES:
                raise DecodeError(f"{len(value)} bytes begin with no dtype of an MDS array")
            dtype, at = _SCALARS[_ARRAY_CODES[value[0]]], 1
        if shape is None:
            if at >= len(value):
                raise DecodeError(f"{len(value)} bytes are no MDS array: its shape is missing")
            axes, width = value[at] >> 2, 1 << (value[at] & 3)
            at += 1
            if at + axes * width > len(value):
                raise DecodeError(f"{len(value)} bytes are no MDS array of {axes} axes")
            shape = tuple(np.frombuffer(value, f"<u{width}", axes, at).tolist())
            at += axes * width
        count = math.prod(shape)
        if count * dtype.itemsize != len(value) - at:
            raise DecodeError(f"an array of {dtype}{list(shape)} in {len(value) - at} bytes")
        try:
            return np.frombuffer(value, dtype, count, at).reshape(shape).astype(dtype.newbyteorder("="))
        except ValueError as error:  # of no elements, and with axes that are too long
            raise DecodeError(f"an array of {dtype}{list(shape)}: {error}") from error


@dataclass(frozen=True, slots=True)
class DecimalText(Decoder):
    """A decimal number as text."""

    def _decode(self, value: memoryview) -> Decimal:
        try:
            return Decimal(str(value, "utf-8"))
        except (InvalidOperation, UnicodeError) as error:
            raise DecodeError(f"{bytes(value[:40])!r} is no decimal number") from error


@dataclass(frozen=True, slots=True)
class WholeText(Decoder):
    """A whole number of any size as text."""

    def _decode(self, value: memoryview) -> int:
        try:
            return int(str(value, "ascii"))
        except ValueError as error:  # of as many digits as Python reads, too
            raise DecodeError(f"{bytes(value[:40])!r} is no whole number") from error


@dataclass(frozen=True, slots=True)
class Picture(Decoder):
    """An image, as Pillow opens it. `is_bare`: its size and mode, and then its pixels, as `pil` is stored."""

    is_bare: bool = False

    def _decode(self, value: memoryview) -> Any:
        import io

        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise ConfigError(
                "this image is given as Pillow's, which is not installed: pip install pillow, or give "
                "decode={...: fastload.decode.image(size=224)}"
            ) from error
        try:
            if not self.is_bare:
                picture = Image.open(io.BytesIO(bytes(value)))
                picture.load()
                return picture
            width, height, mode_bytes = struct.unpack_from("<III", value)
            mode = str(value[12 : 12 + mode_bytes], "ascii")
            if max(1, width) * max(1, height) > 8 * len(value):  # a pixel takes a bit at least; before memory is taken
                raise ValueError(f"{width} x {height} pixels")
            return Image.frombytes(mode, (width, height), bytes(value[12 + mode_bytes :]))
        except (struct.error, ValueError, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise DecodeError(f"{len(value)} bytes are no such image: {error}") from error


@dataclass(frozen=True, slots=True)
class Several(Decoder):
    """A list of values: after `head` bytes that say nothing how many (u32), the bytes of each (u32), and then these."""

    each: Decoder
    head: int = 0

    def _decode(self, value: memoryview) -> list[Any]:
        try:
            (count,) = struct.unpack_from("<I", value, self.head)
            sizes = struct.unpack_from(f"<{count}I", value, self.head + 4) if count <= len(value) // 4 else None
        except struct.error:
            sizes = None
        first = self.head + 4 + 4 * len(sizes or ())
        if sizes is None or first + sum(sizes) != len(value):
            raise DecodeError(f"{len(value)} bytes are no list of values with their sizes")
        ends = list(accumulate(sizes, initial=first))
        return [
            self.each.decode_one(value[start:end], f"value {number}")
            for number, (start, end) in enumerate(pairwise(ends))
        ]


_VARYING: dict[str, Callable[[], Decoder]] = {
    "bytes": decode.raw,
    "str": decode.text,
    "str_int": WholeText,
    "str_float": decode.number,
    "str_decimal": DecimalText,
    "json": decode.json,
    "jpeg": Picture,
    "png": Picture,
    "pil": lambda: Picture(is_bare=True),
    "jpeg_array": lambda: Several(Picture()),
    "jpegarray": lambda: Several(Picture()),
    "list[pil]": lambda: Several(Picture(is_bare=True), head=4),
    "list[jpeg]": lambda: Several(Picture(), head=4),
    "list[png]": lambda: Several(Picture(), head=4),
    "pkl": Pickled,
}
