"""The arena: one memory, many processes, one writer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from fastload.cache import Arena, ArenaView, syscalls
from fastload.config import exact_bytes
from fastload.errors import CacheError
from tests.cache.faults import failing

CHUNK_BYTES = 64 << 10


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(10 * CHUNK_BYTES + 100, CHUNK_BYTES)
    yield arena
    arena.close()


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def test_buffers_are_whole_chunks_on_pages(arena: Arena) -> None:
    assert (arena.buffer_count, arena.byte_count) == (10, 10 * CHUNK_BYTES)
    for number in range(10):
        buffer = arena.buffer(number)
        assert len(buffer) == CHUNK_BYTES
        assert not buffer.readonly
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096 == 0
        buffer[:] = bytes([number]) * CHUNK_BYTES
    assert [arena.buffer(number)[5] for number in range(10)] == list(range(10))
    for number in (-1, 10):
        with pytest.raises(IndexError, match=f"no buffer {number} among 10"):
            arena.buffer(number)


def test_a_view_sees_what_is_written_and_cannot_write(arena: Arena) -> None:
    view = ArenaView(arena.fd, arena.byte_count)
    arena.buffer(3)[:5] = b"hello"
    assert view.array.shape == (arena.byte_count,)
    assert view.array.dtype == np.uint8
    assert bytes(view.array[3 * CHUNK_BYTES :][:5]) == b"hello"
    with pytest.raises(ValueError, match="read-only"):
        view.array[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        view.array.flags.writeable = True
    view.close()
    view.close()
    assert len(view.array) == 0


def test_the_kernel_keeps_others_from_writing_and_cutting(arena: Arena) -> None:
    if not syscalls.get_seals(arena.fd) & syscalls.F_SEAL_FUTURE_WRITE:
        pytest.skip("this kernel cannot seal against future writers")
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, arena.byte_count)
    with pytest.raises(PermissionError):
        os.pwrite(arena.fd, b"x", 0)
    for size in (0, 2 * arena.byte_count):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        syscalls.add_seals(arena.fd, fcntl.F_SEAL_WRITE)
    arena.buffer(0)[:1] = b"y"  # the owner still may


def test_an_old_kernel_has_fewer_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    add_seals = syscalls.add_seals

    def as_before_5_1(fd: int, seals: int) -> None:
        if seals & syscalls.F_SEAL_FUTURE_WRITE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        add_seals(fd, seals)

    monkeypatch.setattr(syscalls, "add_seals", as_before_5_1)
    arena = Arena(2 * CHUNK_BYTES, CHUNK_BYTES)
    assert syscalls.get_seals(arena.fd) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    arena.close()


def test_another_process_maps_it(arena: Arena) -> None:
    arena.buffer(9)[-4:] = b"last"
    code = (
        "import sys; from fastload.cache import ArenaView;"
        f"view = ArenaView({arena.fd}, {arena.byte_count});"
        "sys.stdout.buffer.write(bytes(view.array[-4:])); view.close();"
        "assert not {'torch', 'numba', 'obstore'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[arena.fd], capture_output=True, check=True)
    assert done.stdout == b"last"


def test_views_outlive_close(arena: Arena) -> None:
    view = ArenaView(arena.fd, arena.byte_count)
    buffer, part = arena.buffer(1), view.array[CHUNK_BYTES : 2 * CHUNK_BYTES]
    buffer[:3] = b"abc"
    before = descriptors()
    view.close()
    arena.close()
    assert bytes(part[:3]) == b"abc"
    assert bytes(buffer[:3]) == b"abc"
    with pytest.raises(ValueError, match="released"):
        arena.buffer(1)
    del buffer, part
    # The owner's descriptor, and the one that each mapping keeps.
    assert len(before) - len(descriptors()) == 3


def test_close_twice(arena: Arena) -> None:
    arena.close()
    arena.close()


def test_every_call_of_making_one_may_fail() -> None:
    with failing() as calls:
        arena = Arena(2 * CHUNK_BYTES, CHUNK_BYTES)
    for nth in range(len(calls.names)):
        with failing(nth, errno.ENOMEM), pytest.raises(CacheError, match=r"ram_bytes='128KiB': .*lower ram_bytes"):
            Arena(2 * CHUNK_BYTES, CHUNK_BYTES)
    with failing() as calls:
        ArenaView(arena.fd, arena.byte_count).close()
    for nth in range(len(calls.names)):
        with failing(nth, errno.ENOMEM), pytest.raises(CacheError, match="cannot map the arena of 131072 bytes"):
            ArenaView(arena.fd, arena.byte_count)
    arena.close()


@pytest.mark.parametrize("ram_bytes", [1 << 62, 1 << 70])
def test_more_than_there_can_be(ram_bytes: int) -> None:
    with pytest.raises(CacheError, match=f"ram_bytes={exact_bytes(ram_bytes)}"):
        Arena(ram_bytes, CHUNK_BYTES)


def test_less_than_one_chunk() -> None:
    with pytest.raises(CacheError, match="ram_bytes=65535 is below one chunk"):
        Arena(CHUNK_BYTES - 1, CHUNK_BYTES)


def test_a_view_refuses_what_is_no_arena(arena: Arena) -> None:
    with pytest.raises(CacheError, match="is not a sealed one"):
        ArenaView(arena.fd, arena.byte_count + 1)
    unsealed = syscalls.memfd_create("test")
    os.ftruncate(unsealed, 4096)
    with pytest.raises(CacheError, match="is not a sealed one"):
        ArenaView(unsealed, 4096)
    os.close(unsealed)
