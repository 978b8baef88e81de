"""The shard index and its stored form."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import ShardError
from fastload.formats import ShardIndex
from fastload.formats.shard_index import stored_sample_count
from tests.formats.archives import Member, index, members_of, write

URL = "s3://bucket/a.tar"
DATA = write([Member("a.jpg", b"J" * 700), Member("a.é", b"1"), Member("b.jpg", b"2"), Member("dir/c.é")])
INDEX = index(DATA)
STORED = INDEX.to_bytes()
HEADER_BYTES = 64


def read(data: bytes, size: int = len(DATA)) -> ShardIndex:
    return ShardIndex.from_bytes(data, URL, size)


def sealed(data: bytes) -> bytes:
    """With the checksum that belongs to it, as a careless or hostile writer would have it."""
    return data[:8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[16:])) + data[16:]


def test_the_stored_form_gives_the_index_back() -> None:
    found = read(STORED)
    assert found == INDEX
    assert found.columns == ("jpg", "é")
    assert [found.key(n) for n in range(3)] == ["a", "b", "dir/c"]
    assert found.object_size == len(DATA)
    assert read(memoryview(b"x" + STORED)[1:]) == INDEX
    assert found != read(index(write([Member("z.x")])).to_bytes(), 10240)


def test_the_stored_form_does_not_change() -> None:
    """Other processes, of other versions, read it: a change here needs a new version number."""
    assert STORED[:8] == b"FLSHARDX"
    assert struct.unpack_from("<IIQQQQQ", STORED, 16) == (1, 2, len(DATA), 3, 4, 7, 5)
    assert len(STORED) == HEADER_BYTES + 16 * 4 + 20 * 4 + 7 + 4 * 2 + 5
    assert STORED[HEADER_BYTES:][: 8 * 4] == struct.pack("<4q", 0, 1, 2, 7)
    assert STORED.endswith(b"abdir/c" + struct.pack("<2I", 3, 2) + "jpgé".encode())


def test_arrays_are_read_only_and_counted() -> None:
    with pytest.raises(ValueError, match="read-only"):
        INDEX.member_offset[0] = 1
    assert INDEX.byte_count > len(STORED)
    with pytest.raises(IndexError, match="sample 3 of 3"):
        INDEX.key(3)


def test_every_changed_byte_is_found() -> None:
    for at in range(len(STORED)):
        data = bytearray(STORED)
        data[at] ^= 1 << at % 8
        with pytest.raises(ShardError, match=f"{URL}: its stored index is damaged"):
            read(bytes(data))


def test_every_cut_is_found() -> None:
    for length in range(len(STORED)):
        with pytest.raises(ShardError, match=URL):
            read(STORED[:length])
        with pytest.raises(ShardError, match=URL):
            read(sealed(STORED[: max(length, 16)]))
    with pytest.raises(ShardError, match=URL):
        read(sealed(STORED + b"\0"))


def test_the_count_is_read_from_the_header_alone() -> None:
    assert stored_sample_count(STORED[:HEADER_BYTES], len(STORED)) == 3
    for length in (0, len(STORED) - 1, len(STORED) + 1):
        assert stored_sample_count(STORED[:HEADER_BYTES], length) == -1
    for header in (b"", STORED[: HEADER_BYTES - 1], b"X" + STORED[1:], STORED[:16] + b"\2" + STORED[17:]):
        assert stored_sample_count(header[:HEADER_BYTES], len(STORED)) == -1


def test_another_objects_index_is_refused() -> None:
    with pytest.raises(ShardError, match=rf"of an object of {len(DATA)} bytes, not {len(DATA) + 1}"):
        read(STORED, len(DATA) + 1)


KEYS, STARTS, OFFSETS, SIZES, COLUMNS = (HEADER_BYTES + at for at in (0, 32, 64, 96, 128))
LIES = {
    "version": (16, "<I", 2),
    "columns": (20, "<I", 1),
    "columns huge": (20, "<I", 2**32 - 1),
    "samples huge": (32, "<Q", 2**64 - 1),
    "samples": (32, "<Q", 4),
    "members huge": (40, "<Q", 2**63),
    "key bytes": (48, "<Q", 8),
    "name bytes": (56, "<Q", 6),
    "first key": (KEYS, "<q", 1),
    "a key before the last": (KEYS + 16, "<q", 0),
    "a key outside": (KEYS + 16, "<q", 8),
    "a key far below": (KEYS + 8, "<q", -(2**63)),
    "last key": (KEYS + 24, "<q", 6),
    "first member": (STARTS, "<q", 1),
    "a sample without members": (STARTS + 8, "<q", 0),
    "members out of order": (STARTS + 8, "<q", 4),
    "a member number far above": (STARTS + 8, "<q", 2**63 - 1),
    "last member": (STARTS + 24, "<q", 5),
    "offset below": (OFFSETS, "<q", -1),
    "offset above": (OFFSETS, "<q", len(DATA) + 1),
    "offset far above": (OFFSETS, "<q", 2**63 - 1),
    "size below": (SIZES, "<q", -1),
    "size past the end": (SIZES, "<q", len(DATA) - 511),
    "size far above": (SIZES, "<q", 2**63 - 1),
    "column below": (COLUMNS, "<i", -1),
    "column above": (COLUMNS, "<i", 2),
    "a column's name": (len(STORED) - 13, "<I", 4),
    "a column's name is not UTF-8": (len(STORED) - 1, "<B", 0xFF),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_with_the_right_checksum_are_found(name: str) -> None:
    at, form, value = LIES[name]
    data = bytearray(STORED)
    struct.pack_into(form, data, at, value)
    with pytest.raises(ShardError, match=f"{URL}: its stored index is damaged"):
        read(sealed(bytes(data)))


def test_a_column_named_twice_is_found() -> None:
    stored = index(write([Member("a.x"), Member("a.y")])).to_bytes()
    with pytest.raises(ShardError, match="a column's name is there twice"):
        read(sealed(stored[:-1] + b"x"), 10240)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(16, len(STORED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_what_is_accepted_can_be_used(changes: list[tuple[int, int]]) -> None:
    data = bytearray(STORED)
    for at, byte in changes:
        data[at] = byte
    try:
        found = read(sealed(bytes(data)))
    except ShardError:
        return
    for number in range(found.sample_count):
        found.key(number)
    for column in found.columns:
        assert members_of(found, column).max(initial=-1) < found.member_count
    assert np.all(found.member_offset + found.member_size <= len(DATA))


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_samples_are_taken_out(are_out: list[bool]) -> None:
    index = read(STORED)
    assert index.sample_count == 3
    kept = [sample for sample in range(3) if not are_out[sample]]
    left = index.without(np.array(are_out))
    assert left.sample_count == len(kept)
    assert left.sample_keys() == [index.sample_keys()[sample] for sample in kept]
    for sample, was in enumerate(kept):
        assert left.key(sample) == index.key(was)
        assert _members(left, sample) == _members(index, was)
    assert ShardIndex.from_bytes(left.to_bytes(), "shard", left.object_size) == left


def _members(index: ShardIndex, sample: int) -> list[tuple[str, int, int]]:
    own = range(index.member_start[sample], index.member_start[sample + 1])
    return [
        (index.columns[index.member_column[at]], int(index.member_offset[at]), int(index.member_size[at])) for at in own
    ]
