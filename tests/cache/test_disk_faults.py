"""Whichever system call of the disk tier fails, and in whatever way: no exception, no wrong byte, no leak."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastload.cache import ChunkKey, DiskTier, disk
from tests.cache.faults import CALLS, failing

CHUNK_BYTES = 64 << 10
QUOTA_BYTES = 1 << 20
KEY, OTHER = ChunkKey(bytes(16), 1), ChunkKey(bytes(16), 2)
DATA = os.urandom(CHUNK_BYTES)
ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOENT, errno.ESTALE]

Step = Callable[[DiskTier, memoryview], object]
STEPS: dict[str, Step] = {
    "write": lambda tier, buffer: tier.write(OTHER, buffer, CHUNK_BYTES),
    "read": lambda tier, buffer: tier.read_into(KEY, buffer),
    "remove": lambda tier, buffer: tier.remove(KEY),
    "put_blob": lambda tier, buffer: tier.put_blob("b", b"new"),
    "get_blob": lambda tier, buffer: tier.get_blob("a"),
    "remove_blob": lambda tier, buffer: tier.remove_blob("a"),
}


@pytest.fixture
def buffer() -> Iterator[memoryview]:
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        view[:] = DATA
        yield view


def filled(directory: Path, buffer: memoryview, troubles: list[str]) -> DiskTier:
    """A tier that holds one chunk and one blob."""
    directory.mkdir()
    tier = DiskTier(directory, QUOTA_BYTES, CHUNK_BYTES, on_trouble=troubles.append, margin_bytes=0)
    assert tier.write(KEY, buffer, CHUNK_BYTES)
    assert tier.put_blob("a", b"old")
    return tier


def check(tier: DiskTier, buffer: memoryview) -> None:
    """What is held is right, what is used is what is on disk, and a tier opened anew agrees."""
    anew = DiskTier(tier.directory, QUOTA_BYTES, CHUNK_BYTES, margin_bytes=0)
    for held in (tier, anew):
        for key in list(held.keys()):
            buffer[:] = bytes(CHUNK_BYTES)
            assert held.read_into(key, buffer) in (CHUNK_BYTES, None)
            assert not held.contains(key) or buffer == DATA
        for name in held.blob_names():
            assert held.get_blob(name) in (b"old", b"new", None)
    assert set(tier.keys()) == set(anew.keys())
    assert set(tier.blob_names()) == set(anew.blob_names())
    files = [path for path in tier.directory.rglob("*") if path.is_file()]
    assert tier.used_bytes == anew.used_bytes == sum(path.stat().st_blocks * 512 for path in files)
    assert tier.free_bytes == QUOTA_BYTES - tier.used_bytes  # no reservation is left
    assert not [path for path in files if path.name.startswith(".tmp-")]
    buffer[:] = DATA


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", STEPS)
def test_every_call_may_fail(tmp_path: Path, buffer: memoryview, name: str, number: int) -> None:
    if number == errno.ENOENT and "put" not in name and name != "write":
        return  # that answer is no failure: it says that the file is gone
    step = STEPS[name]
    with failing() as calls:
        step(filled(tmp_path / "count", buffer, []), buffer)
    for nth in range(len(calls.names)):
        troubles: list[str] = []
        tier = filled(tmp_path / str(nth), buffer, troubles)
        with failing(nth, number):
            step(tier, buffer)
        assert len(troubles) <= 1
        buffer[:] = DATA
        check(tier, buffer)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_call_of_the_scan_may_fail(tmp_path: Path, buffer: memoryview, number: int) -> None:
    directory = tmp_path / "cache"
    tier = filled(directory, buffer, [])
    assert tier.write(OTHER, buffer, CHUNK_BYTES)
    dead = directory / "index" / ".tmp-4194999-1-00000000-0"
    cut = disk.path_in(directory, ChunkKey(bytes(16), 9))
    cut.parent.mkdir()

    def leave_litter() -> None:
        dead.write_bytes(b"half")
        cut.write_bytes(b"cut")

    def opened(troubles: list[str]) -> DiskTier:
        return DiskTier(directory, QUOTA_BYTES, CHUNK_BYTES, on_trouble=troubles.append, margin_bytes=0)

    leave_litter()
    with failing() as calls:
        assert len(opened([]).keys()) == 2
    for nth in range(len(calls.names)):
        leave_litter()
        troubles: list[str] = []
        with failing(nth, number) as made:
            found = opened(troubles)
        assert made.failed
        for key in list(found.keys()):
            assert found.read_into(key, buffer) == CHUNK_BYTES
            assert buffer == DATA
        assert found.write(ChunkKey(bytes(16), 50 + nth), buffer, 10) == found.writable
        # A scan that missed something must not write, since what it missed takes room.
        assert bool(troubles) == (not found.writable)
        # Not knowing our own start time, or whether a temp file's writer lives, costs nothing.
        assert troubles or number == errno.ENOENT or made.names[nth] == "read_file"
        found.remove(ChunkKey(bytes(16), 50 + nth))
    assert opened([]).counters["errors"] == 0
    assert not dead.exists()
    assert not cut.exists()


def test_a_failed_cleaning_up_leaves_a_temp_file_for_later(tmp_path: Path, buffer: memoryview) -> None:
    tier = filled(tmp_path / "cache", buffer, [])
    with failing(0, errno.EIO, frozenset({"rename"})), failing(0, errno.EIO, frozenset({"unlink"})):
        assert not tier.write(OTHER, buffer, CHUNK_BYTES)
    left = list(tier.directory.rglob(".tmp-*"))
    assert len(left) == 1
    assert tier.counters["errors"] == 2
    left[0].unlink()
    check(tier, buffer)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_cannot_be_written_is_still_read(tmp_path: Path, buffer: memoryview, number: int) -> None:
    troubles: list[str] = []
    tier = filled(tmp_path / "cache", buffer, troubles)
    with failing(0, number, frozenset({"pwritev"}), times=100):
        assert not tier.write(OTHER, buffer, CHUNK_BYTES)
        assert not tier.writable
        with failing() as calls:
            assert not tier.write(OTHER, buffer, CHUNK_BYTES)
            assert not tier.put_blob("b", b"x")
        assert calls.names == []  # the disk is left in peace
        assert tier.read_into(KEY, buffer) == CHUNK_BYTES
    assert len(troubles) == 1
    assert os.strerror(number) in troubles[0]
    assert str(tier.directory) in troubles[0]
    assert ("lower disk_bytes" in troubles[0]) == (number in (errno.ENOSPC, errno.EDQUOT))
    tier.set_quota(QUOTA_BYTES)
    assert tier.write(OTHER, buffer, CHUNK_BYTES)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_was_full_is_tried_again(tmp_path: Path, buffer: memoryview, number: int) -> None:
    now = [0.0]
    troubles: list[str] = []
    tier = DiskTier(
        tmp_path, QUOTA_BYTES, CHUNK_BYTES, on_trouble=troubles.append, margin_bytes=0, clock=lambda: now[0]
    )
    with failing(0, number, frozenset({"pwritev"}), times=100):
        for now[0] in (0.0, 601.0):
            assert not tier.write(KEY, buffer, CHUNK_BYTES)
            assert not tier.writable
    now[0] = 1200.0
    assert not tier.write(KEY, buffer, CHUNK_BYTES)
    now[0] = 1202.0
    assert tier.writable
    assert tier.write(KEY, buffer, CHUNK_BYTES)
    assert len(troubles) == 1
    assert "10 minutes" in troubles[0]


def test_a_disk_that_cannot_be_read_is_given_up(tmp_path: Path, buffer: memoryview) -> None:
    troubles: list[str] = []
    tier = filled(tmp_path / "cache", buffer, troubles)
    keys = [ChunkKey(bytes(16), 20 + number) for number in range(10)]
    for key in keys:
        assert tier.write(key, buffer, CHUNK_BYTES)
    with failing(0, errno.EIO, CALLS - {"statvfs"}, times=1000):
        assert [tier.read_into(key, buffer) for key in keys] == [None] * 10
    assert not tier.readable
    assert not tier.writable
    assert [trouble.partition(" failed")[0][:7] for trouble in troubles] == ["reading", "the dis"]
    assert "8 reads in a row" in troubles[1]
    buffer[:] = DATA
    tier.set_quota(QUOTA_BYTES)  # takes stock anew
    assert len(tier.keys()) == 11
    assert tier.write(OTHER, buffer, CHUNK_BYTES)
    check(tier, buffer)


def test_bad_spots_here_and_there_are_not_a_dead_disk(tmp_path: Path, buffer: memoryview) -> None:
    tier = filled(tmp_path / "cache", buffer, [])
    for number in range(20):
        key = ChunkKey(bytes(16), 20 + number)
        assert tier.write(key, buffer, CHUNK_BYTES)
        with failing(0, errno.EIO, frozenset({"preadv"})):
            assert tier.read_into(key, buffer) is None
        assert not tier.contains(key)
        assert tier.read_into(KEY, buffer) == CHUNK_BYTES
    assert tier.readable
    assert tier.counters["errors"] == 20


def test_a_shortage_of_our_own_costs_no_chunk(tmp_path: Path, buffer: memoryview) -> None:
    tier = filled(tmp_path / "cache", buffer, [])
    for _ in range(10):
        with failing(0, errno.EMFILE, frozenset({"open"})):
            assert tier.read_into(KEY, buffer) is None
    assert tier.read_into(KEY, buffer) == CHUNK_BYTES


def test_the_file_system_keeps_its_margin(tmp_path: Path, buffer: memoryview) -> None:
    troubles: list[str] = []
    directory = tmp_path / "cache"
    filled(directory, buffer, [])
    tier = DiskTier(directory, QUOTA_BYTES, CHUNK_BYTES, on_trouble=troubles.append, margin_bytes=1 << 62)
    for _ in range(2):
        assert not tier.write(OTHER, buffer, CHUNK_BYTES)
    assert tier.writable
    assert tier.counters["refused"] == 2
    assert len(troubles) == 1
    assert "are left alone" in troubles[0]


def test_a_disk_that_does_not_let_go_keeps_its_room(tmp_path: Path, buffer: memoryview) -> None:
    tier = filled(tmp_path / "cache", buffer, [])
    used = tier.used_bytes
    with failing(0, errno.EROFS, frozenset({"unlink"})):
        assert not tier.remove(KEY)
    assert tier.used_bytes == used
    assert tier.read_into(KEY, buffer) == CHUNK_BYTES


def test_a_disk_that_hangs_is_bypassed_until_it_answers(tmp_path: Path, buffer: memoryview) -> None:
    troubles: list[str] = []
    tier = filled(tmp_path / "cache", buffer, troubles)
    for _ in range(2):
        tier.stalled(20)
        assert not any((tier.readable, tier.writable, tier.contains(KEY)))
        with failing() as calls:
            assert tier.read_into(KEY, buffer) is None
            assert not tier.write(OTHER, buffer, CHUNK_BYTES)
        assert calls.names == []
        tier.answered()
        check(tier, buffer)
    assert len(troubles) == 1
    assert f"{tier.directory} has not answered for 20 s" in troubles[0]
    # The third time it is given up, until somebody sets it going again.
    tier.stalled(20)
    tier.answered()
    assert not any((tier.readable, tier.writable))
    assert "stalled 3 times" in troubles[1]
    tier.set_quota(QUOTA_BYTES)
    check(tier, buffer)
    assert tier.counters["stalls"] == 3
