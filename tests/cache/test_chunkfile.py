"""The chunk file: what was written is read, and nothing else ever is."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fastload.cache import ChunkKey, chunkfile, syscalls
from fastload.cache.chunkfile import ChunkDamagedError, layout, layout_of_file
from tests.cache.faults import failing, moving_at_most, no_direct_io

KEY = ChunkKey(bytes(range(16)), 7)
ROOM = 256 << 10

# One file serves all examples of a property: each writes it anew.
same_place = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.one_of(
    st.integers(0, ROOM),
    st.sampled_from([0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 131072, ROOM - 1, ROOM]),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chunk"


@pytest.fixture
def room() -> Iterator[memoryview]:
    """Page-aligned memory for one chunk and a page, as in the arena."""
    with mmap.mmap(-1, ROOM + 4096) as memory, memoryview(memory) as view:
        yield view


def content(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def put(path: Path, data: bytes, room: memoryview) -> None:
    room[: len(data)] = data
    chunkfile.write(path, KEY, room[: len(data)])


@same_place
@given(lengths)
def test_any_length_comes_back(path: Path, room: memoryview, length: int) -> None:
    data = content(length)
    put(path, data, room)
    room[:] = b"\xaa" * len(room)
    assert chunkfile.read_into(path, KEY, room) == length
    assert room[:length] == data
    assert not any(byte != 0xAA for byte in room[max(length, layout(length).direct_bytes) :])
    assert path.stat().st_size == layout(length).file_bytes
    assert path.stat().st_mode & 0o777 == 0o600


@same_place
@given(lengths, st.integers(0, 4096), st.booleans())
def test_any_memory_will_do(path: Path, room: memoryview, length: int, start: int, exact: bool) -> None:
    data = content(length)
    chunkfile.write(path, KEY, memoryview(data))  # read-only and unaligned
    stop = start + length if exact else len(room)
    if stop > len(room):
        return
    out = room[start:stop]
    if len(out) >= length:
        assert chunkfile.read_into(path, KEY, out) == length
        assert out[:length] == data


@same_place
@given(st.integers(0, 140000), st.data())
def test_any_flipped_bit_is_found(path: Path, room: memoryview, length: int, choose: st.DataObject) -> None:
    put(path, content(length), room)
    bit = choose.draw(st.integers(0, layout(length).file_bytes * 8 - 1))
    flip(path, bit)
    with pytest.raises(ChunkDamagedError):
        chunkfile.read_into(path, KEY, room)


def test_every_byte_of_a_small_file_is_covered(path: Path, room: memoryview) -> None:
    put(path, content(100), room)
    for byte in (*range(0, 8192, 11), *range(4096, 4096 + 72)):
        flip(path, byte * 8 + byte % 8)
        with pytest.raises(ChunkDamagedError):
            chunkfile.read_into(path, KEY, room)
        flip(path, byte * 8 + byte % 8)
    assert chunkfile.read_into(path, KEY, room) == 100


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@same_place
@given(lengths, st.data())
def test_any_other_size_is_found(path: Path, room: memoryview, length: int, choose: st.DataObject) -> None:
    put(path, content(length), room)
    size = layout(length).file_bytes
    other = choose.draw(st.integers(0, size + 3 * 4096).filter(lambda other: other != size))
    os.truncate(path, other)
    with pytest.raises(ChunkDamagedError):
        chunkfile.read_into(path, KEY, room)


@pytest.mark.parametrize("key", [ChunkKey(KEY.object_id, 8), ChunkKey(bytes(16), 7)])
def test_another_chunk_under_this_name_is_found(path: Path, room: memoryview, key: ChunkKey) -> None:
    put(path, content(5000), room)
    with pytest.raises(ChunkDamagedError, match="it holds 0001"):
        chunkfile.read_into(path, key, room)


def test_a_lost_block_is_named(path: Path, room: memoryview) -> None:
    put(path, content(200000), room)
    with path.open("r+b") as file:
        file.seek(65536)
        file.write(bytes(4096))
    with pytest.raises(ChunkDamagedError, match="block at offset 65536"):
        chunkfile.read_into(path, KEY, room)


def test_a_chunk_too_long_for_the_buffer_is_damage(path: Path, room: memoryview) -> None:
    put(path, content(9000), room)
    for size in (0, 1, 4096, 8192, 8999):
        with pytest.raises(ChunkDamagedError, match=f"do not fit a chunk of {size} bytes"):
            chunkfile.read_into(path, KEY, room[:size])


def test_a_directory_or_link_is_not_followed(tmp_path: Path, path: Path, room: memoryview) -> None:
    put(path, content(10), room)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="symbolic links"):
        chunkfile.read_into(tmp_path / "link", KEY, room)
    with pytest.raises((ChunkDamagedError, OSError)):
        chunkfile.read_into(tmp_path / "folder", KEY, room)


@given(st.integers(0, 1 << 40))
def test_the_size_of_a_file_tells_its_layout(length: int) -> None:
    assert layout_of_file(layout(length).file_bytes) == layout(length)
    assert layout_of_file(layout(length).file_bytes + 1) is None


def test_sizes_that_no_chunk_has() -> None:
    possible = {layout(padded).file_bytes for padded in range(0, 64 << 20, 4096)}
    for size in range(0, 64 << 20, 4096):
        assert (layout_of_file(size) is not None) == (size in possible)


def test_the_format_is_pinned(path: Path, room: memoryview) -> None:
    data = content(70000)
    put(path, data, room)
    head = b"FLCHUNK\n" + b"".join(value.to_bytes(size, "little") for value, size in ((1, 4), (65536, 4)))
    head += KEY.object_id + b"".join(value.to_bytes(8, "little") for value in (7, 70000, 2))
    blocks = [xxh3_64_intdigest(data[:65536]), xxh3_64_intdigest(data[65536:])]
    trailer = (head + b"".join(block.to_bytes(8, "little") for block in blocks)).ljust(4088, b"\0")
    trailer += xxh3_64_intdigest(trailer).to_bytes(8, "little")
    assert path.read_bytes() == data.ljust(73728, b"\0") + trailer


@pytest.mark.parametrize("at", ["open", "transfer"])
def test_without_direct_io_it_goes_through_the_page_cache(path: Path, room: memoryview, at: str) -> None:
    with no_direct_io(at):
        put(path, content(100000), room)
        assert chunkfile.read_into(path, KEY, room) == 100000
    assert room[:100000] == content(100000)


def test_direct_io_is_asked_for(path: Path, room: memoryview) -> None:
    flags: list[int] = []
    open_file = syscalls.open

    def opened(path: Path, wanted: int) -> int:
        flags.append(wanted)
        return open_file(path, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "open", opened)
        put(path, content(100000), room)
        chunkfile.read_into(path, KEY, room)
    assert all(flag & os.O_DIRECT for flag in flags)


@pytest.mark.parametrize("step", [1000, 4096, 70000])
def test_calls_that_move_little_are_repeated(path: Path, room: memoryview, step: int) -> None:
    with moving_at_most(step):
        put(path, content(150000), room)
        room[:] = bytes(len(room))
        assert chunkfile.read_into(path, KEY, room) == 150000
    assert room[:150000] == content(150000)


def test_every_call_of_a_write_and_a_read_may_fail(path: Path, room: memoryview) -> None:
    for step in (lambda: put(path, content(5000), room), lambda: chunkfile.read_into(path, KEY, room)):
        with failing() as calls:
            step()
        for nth in range(len(calls.names)):
            with failing(nth), pytest.raises(OSError, match="Input/output error"):
                step()
        step()
