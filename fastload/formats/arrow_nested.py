"""Nested values of Arrow's tables: lists of anything but plain numbers, which are of several pieces of a shard.

Arrow keeps the values of all lists of a column end to end, and offsets beside them. So the list of one row is a piece
of each of these buffers: where it begins and ends, of its items again offsets and values, and of each level that may be
null its bits. `tree` says of a type what is read of it, as JSON: a name, or a list's or struct's with what is in it;
`suffixes` names its pieces, the same whatever else is in the type, so that a piece that a shard has not got is missing,
and then empty; `values` puts them together again. Offsets count from the beginning of the buffers, as they stand there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fastload.decode import Decoder
from fastload.errors import DecodeError

Tree = Any  # a name, or [name, what is in it]

NUMBERS = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
_OFFSETS = {
    "list": "<i4",
    "large list": "<i8",
    "text": "<i4",
    "large text": "<i8",
    "bytes": "<i4",
    "large bytes": "<i8",
}
# Values of no bytes, in one list: before memory is taken.
_NULLS_MAX = 1 << 24
_DEPTH_MAX = 32


def tree(kind: Any) -> Tree | None:
    """What is read of a type of pyarrow; None for one that is not."""
    import pyarrow as pa

    large = "large " if str(kind).startswith("large_") else ""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = tree(kind.value_type)
        return None if item is None else [f"{large}list", item]
    if pa.types.is_struct(kind):
        fields = [[kind.field(number).name, tree(kind.field(number).type)] for number in range(kind.num_fields)]
        is_read = all(field is not None for _, field in fields) and len({name for name, _ in fields}) == len(fields)
        return ["struct", fields] if is_read else None
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return "null" if pa.types.is_null(kind) else "bool"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return f"{large}text"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return f"{large}bytes"
    return number(kind) or None


def number(kind: Any) -> str:
    """The dtype of a type of numbers; empty for others."""
    name = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return name if name in NUMBERS else ""


def checked(node: Tree, depth: int = 0) -> bool:
    """Whether that is a tree."""
    if isinstance(node, str):
        return node in NUMBERS or node in ("null", "bool", "text", "large text", "bytes", "large bytes")
    if depth > _DEPTH_MAX or not isinstance(node, list) or len(node) != 2:
        return False
    name, inner = node
    if name in ("list", "large list"):
        return checked(inner, depth + 1)
    is_fields = isinstance(inner, list) and all(isinstance(each, list) and len(each) == 2 for each in inner)
    if name != "struct" or not is_fields or not all(isinstance(each, str) for each, _ in inner):
        return False
    return len({each for each, _ in inner}) == len(inner) and all(checked(field, depth + 1) for _, field in inner)


def merged(one: Tree, other: Tree) -> Tree | None:
    """The tree of values of both; None where there is none. What is always null is like anything but a struct."""
    if one == other:
        return one
    for first, second in ((one, other), (other, one)):
        if first == "null" and second[0] != "struct":
            return second
    if isinstance(one, str) or isinstance(other, str) or one[0] != other[0]:
        return None
    if one[0] != "struct":
        item = merged(one[1], other[1])
        return None if item is None else [one[0], item]
    if [name for name, _ in one[1]] != [name for name, _ in other[1]]:
        return None
    fields = [[name, merged(a, b)] for (name, a), (_, b) in zip(one[1], other[1], strict=True)]
    return None if any(field is None for _, field in fields) else ["struct", fields]


def in_words(node: Tree) -> str:
    if isinstance(node, str):
        return node
    if node[0] != "struct":
        return f"{node[0]} of {in_words(node[1])}"
    return "{" + ", ".join(f"{name}: {in_words(field)}" for name, field in node[1]) + "}"


def suffixes(root: Tree) -> list[str]:
    """The pieces of a list, the first of which is called as its column is: offsets, or of plain numbers the values, as
    where none is null.
    """
    first = ["", "#"] if root[1] in NUMBERS else [""]
    return first + [each for each in _suffixes(root[1], "[]") if root[1] not in NUMBERS or each != "[]="]


def _suffixes(node: Tree, path: str) -> Iterator[str]:
    name = node if isinstance(node, str) else node[0]
    if name == "null":
        return
    yield f"{path}?"
    if name in _OFFSETS:
        yield f"{path}#"
    if isinstance(node, str):
        yield f"{path}="
    elif name == "struct":
        for field, inner in node[1]:
            yield from _suffixes(inner, f"{path}.{field}")
    else:
        yield from _suffixes(node[1], f"{path}[]")


@dataclass(frozen=True, slots=True)
class NestedList(Decoder):
    """A list: the size (u32) of each of its pieces where there are several, and these. As `to_pylist` gives it."""

    root: bytes  # the tree, as JSON, which can be compared

    def _decode(self, value: memoryview) -> list[Any]:
        root = msgspec.json.decode(self.root)
        names = suffixes(root)
        if not len(value):
            return []
        try:
            sizes = struct.unpack_from(f"<{len(names)}I", value) if len(names) > 1 else (len(value),)
            ends = np.cumsum([4 * len(names) if len(names) > 1 else 0, *sizes], dtype=np.int64).tolist()
            if ends[-1] != len(value):
                raise DecodeError(f"a list of {ends[-1]} bytes in {len(value)}")
            pieces = {name: value[ends[n] : ends[n + 1]] for n, name in enumerate(names)}
            offsets = pieces["#" if root[1] in NUMBERS else ""]
            if root[1] in NUMBERS:
                pieces["[]="] = pieces[""]
                if not len(offsets):
                    plain: list[Any] = np.frombuffer(pieces[""], np.dtype(root[1]).newbyteorder("<")).tolist()
                    return plain
            elif not len(offsets):
                return []
            begin, end = np.frombuffer(offsets, _OFFSETS[root[0]], 2).tolist()
            if not 0 <= begin <= end:
                raise DecodeError(f"a list from item {begin} to {end}")
            return _values(root[1], "[]", begin, end - begin, pieces)
        except (struct.error, ValueError, UnicodeError) as error:
            raise DecodeError(f"{len(value)} bytes are no list: {error}") from error


def _values(node: Tree, path: str, begin: int, count: int, pieces: Mapping[str, memoryview]) -> list[Any]:
    """Values from number `begin` of a column on."""
    if not count:
        return []
    if node == "null":
        if count > _NULLS_MAX:
            raise DecodeError(f"{count} values that are null")
        return [None] * count
    name = node if isinstance(node, str) else node[0]
    if isinstance(node, str) and not len(pieces[f"{path}="]) and (name not in _OFFSETS or not len(pieces[f"{path}#"])):
        return _values("null", path, begin, count, pieces)  # of a shard in which all are
    if name in ("list", "large list") and not len(pieces[f"{path}#"]):
        return _values("null", path, begin, count, pieces)
    found = _present(node, name, path, begin, count, pieces)
    bits = pieces[f"{path}?"]
    if len(bits):
        is_there = _bits(bits, begin, count)
        return [each if there else None for each, there in zip(found, is_there, strict=True)]
    return found


def _present(node: Tree, name: str, path: str, begin: int, count: int, pieces: Mapping[str, memoryview]) -> list[Any]:
    """The same, whatever is said of which there are."""
    if name == "struct":
        if not node[1] and count > _NULLS_MAX:
            raise DecodeError(f"{count} values of nothing")
        fields = {field: _values(inner, f"{path}.{field}", begin, count, pieces) for field, inner in node[1]}
        return [{field: column[row] for field, column in fields.items()} for row in range(count)]
    if name == "bool":
        return _bits(pieces[f"{path}="], begin, count)
    if name in NUMBERS:
        stored = np.dtype(name).newbyteorder("<")
        plain: list[Any] = np.frombuffer(_of_size(pieces[f"{path}="], count * stored.itemsize), stored).tolist()
        return plain
    dtype = np.dtype(_OFFSETS[name])
    ends = np.frombuffer(_of_size(pieces[f"{path}#"], (count + 1) * dtype.itemsize), dtype).astype(np.int64)
    if ends[0] < 0 or (np.diff(ends) < 0).any():
        raise DecodeError("offsets that do not rise")
    ranges = list(zip((ends[:-1] - ends[0]).tolist(), (ends[1:] - ends[0]).tolist(), strict=True))
    if name in ("list", "large list"):
        items = _values(node[1], f"{path}[]", int(ends[0]), int(ends[-1] - ends[0]), pieces)
        return [items[start:end] for start, end in ranges]
    data = _of_size(pieces[f"{path}="], int(ends[-1] - ends[0]))
    if name.endswith("bytes"):
        return [bytes(data[start:end]) for start, end in ranges]
    return [str(data[start:end], "utf-8") for start, end in ranges]


def _of_size(piece: memoryview, byte_count: int) -> memoryview:
    if len(piece) != byte_count:
        raise DecodeError(f"{len(piece)} bytes where {byte_count} are needed")
    return piece


def _bits(piece: memoryview, begin: int, count: int) -> list[bool]:
    first = begin % 8
    bits = np.unpackbits(np.frombuffer(_of_size(piece, (first + count + 7) // 8), np.uint8), bitorder="little")
    found: list[bool] = bits[first : first + count].astype(np.bool_).tolist()
    return found
