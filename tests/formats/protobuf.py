"""TFRecord files and Examples, in plain Python: written in all the ways in which writers may, and read."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    check = 0xFFFFFFFF
    for byte in data:
        check = check >> 8 ^ _TABLE[(check ^ byte) & 255]
    return check ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    check = crc32c(data)
    return struct.pack("<I", ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data: bytes, length: int | None = None) -> bytes:
    """A record."""
    head = struct.pack("<Q", len(data) if length is None else length)
    return head + _masked(head) + data + _masked(data)


def tfrecord(records: Iterable[bytes]) -> bytes:
    return b"".join(map(framed, records))


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, data: bytes) -> bytes:
    """A field with a piece of bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: Sequence[Any], rng: random.Random | None = None) -> bytes:
    """The Feature of a list of bytes, floats or integers; of none at all, an empty list of integers."""
    if values and isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    is_float = bool(values) and isinstance(values[0], float)
    encoded = [struct.pack("<f", value) if is_float else varint(value) for value in values]
    how = rng.choice(["packed", "packed", "single", "split", "lists"]) if rng is not None else "packed"
    cut = len(values) // 2
    packed = [field(1, b"".join(part)) for part in (encoded, encoded[:cut], encoded[cut:])]
    number = 2 if is_float else 3
    if how == "single":
        return field(number, b"".join(varint(8 | (5 if is_float else 0)) + each for each in encoded))
    if how == "split":
        return field(number, packed[1] + packed[2])
    if how == "lists":  # which a reader of protocol buffers joins
        return field(number, packed[1]) + field(number, packed[2])
    return field(number, packed[0] if values else b"")


_UNKNOWN = [b"", b"", varint(9 << 3) + varint(1 << 40), field(1000, b"x"), varint(12 << 3 | 5) + bytes(4),
            varint(13 << 3 | 1) + bytes(8)]  # fmt: skip


def example(rng: random.Random | None = None, /, **features: Sequence[Any]) -> bytes:
    """An Example. With `rng`, fields in any order, numbers packed or not, and fields that readers pass over."""
    entries = []
    for name, values in features.items():
        parts = [field(1, name.encode()), field(2, feature(values, rng))]
        if rng is not None:
            parts.append(rng.choice(_UNKNOWN))
            rng.shuffle(parts)
        entries.append(field(1, b"".join(parts)))
    if rng is None:
        return field(1, b"".join(entries))
    rng.shuffle(entries)
    cut = rng.randrange(len(entries) + 1)
    halves = [field(1, b"".join(part) + rng.choice(_UNKNOWN)) for part in (entries[:cut], entries[cut:])]
    return halves[0] + rng.choice(_UNKNOWN) + halves[1]


_FLOATS = st.floats(width=32, allow_nan=False)
EXAMPLES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "a": st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=5),
        "bé": st.lists(_FLOATS, min_size=1, max_size=5),
        "c": st.lists(st.binary(max_size=9), min_size=1, max_size=4),
        "one": st.lists(st.integers(0, 3), min_size=1, max_size=1),
        "single": st.lists(st.binary(max_size=9), min_size=1, max_size=1),
    },
)


# Reading: ValueError for what is none.


def parse(data: bytes) -> dict[bytes, tuple[int, list[Any]]]:
    """The features of an Example: of each the kind (1 bytes, 2 floats, 3 integers) and the values."""
    found: dict[bytes, tuple[int, list[Any]]] = {}
    for number, features in _pieces(data, {1: 2}):
        if number == 2:
            raise ValueError("a SequenceExample")
        entries = [piece for each, piece in _pieces(features, {1: 2}) if each == 1] if number == 1 else []
        for entry in entries:
            parts = {1: b"", 2: b""} | dict(_pieces(entry, {1: 2, 2: 2}))
            kind, values = _feature(parts[2])
            if kind:
                found[parts[1]] = kind, values
    return found


def _feature(data: bytes) -> tuple[int, list[Any]]:
    kind, values = 0, list[Any]()
    for number, piece in _pieces(data, {1: 2, 2: 2, 3: 2}):
        if number > 3:
            continue
        if kind not in (0, number):
            raise ValueError("two kinds")
        kind = number
        for each, wire, value in _fields(piece):
            if each != 1:
                continue
            if wire == 2 and kind == 1:
                values.append(value)
            elif wire in (2, 5) and kind == 2 and not len(value) % 4:
                values += [one for (one,) in struct.iter_unpack("<f", value)]
            elif wire in (2, 0) and kind == 3:
                at = 0
                while at < len(value):
                    one, at = _varint(value, at)
                    values.append(one - (1 << 64) if one >> 63 else one)
            else:
                raise ValueError("another wire type")
    return kind, values


def _pieces(data: bytes, wires: dict[int, int]) -> Iterator[tuple[int, bytes]]:
    for number, wire, value in _fields(data):
        if wires.get(number, wire) != wire:
            raise ValueError("another wire type")
        yield number, value


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, at = _varint(data, at)
        elif wire == 0:
            size = _varint(data, at)[1] - at
        else:
            size = {1: 8, 5: 4}.get(wire, len(data))
        if not 8 <= tag < 1 << 32 or at + size > len(data):
            raise ValueError("no field")
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for count, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * count
        if byte < 128:
            return number & (1 << 64) - 1, at + count + 1
    raise ValueError("a number without end")
