"""The contract of the disk tier, walked on every kind of file system that it meets."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload.cache import ChunkKey, DiskTier, disk, syscalls, tempfiles
from tests.cache.faults import no_direct_io
from tests.patience import PATIENCE_S

CHUNK_BYTES = 128 << 10
QUOTA_BYTES = 4 << 20


@dataclass
class Place:
    """A directory for tiers, one page-aligned buffer, and what the tiers complained of."""

    directory: Path
    buffer: memoryview
    troubles: list[str] = field(default_factory=list)

    def open(self, quota_bytes: int = QUOTA_BYTES, margin_bytes: int = 0) -> DiskTier:
        return DiskTier(
            self.directory, quota_bytes, CHUNK_BYTES, on_trouble=self.troubles.append, margin_bytes=margin_bytes
        )

    def put(self, tier: DiskTier, key: ChunkKey, data: bytes) -> bool:
        self.buffer[: len(data)] = data
        return tier.write(key, self.buffer, len(data))

    def get(self, tier: DiskTier, key: ChunkKey) -> bytes | None:
        self.buffer[:] = b"\xee" * CHUNK_BYTES
        length = tier.read_into(key, self.buffer)
        return None if length is None else bytes(self.buffer[:length])

    def file(self, name: ChunkKey | str) -> Path:
        return disk.path_in(self.directory, name)


@pytest.fixture
def buffer() -> Iterator[memoryview]:
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        yield view


@pytest.fixture(params=["direct", "refuses O_DIRECT", "refuses direct transfers", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, buffer: memoryview) -> Iterator[Place]:
    refusal = {"refuses O_DIRECT": "open", "refuses direct transfers": "transfer"}.get(request.param)
    with no_direct_io(refusal) if refusal else contextlib.nullcontext():
        if request.param == "tmpfs":
            with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
                yield Place(Path(directory), buffer)
        else:
            yield Place(tmp_path, buffer)


@pytest.fixture
def here(tmp_path: Path, buffer: memoryview) -> Place:
    return Place(tmp_path, buffer)


def key(number: int) -> ChunkKey:
    return ChunkKey(bytes([number % 5]) * 16, number)


def content(number: int, length: int = CHUNK_BYTES) -> bytes:
    return random.Random(number).randbytes(length)


def on_disk(place: Place) -> int:
    """The allocated bytes of all files."""
    return sum(path.stat().st_blocks * 512 for path in place.directory.rglob("*") if path.is_file())


# Chunks


@pytest.mark.parametrize("length", [1, 4096, 70000, CHUNK_BYTES])
def test_what_is_written_is_read(place: Place, length: int) -> None:
    tier = place.open()
    assert not tier.contains(key(1))
    assert place.get(tier, key(1)) is None
    assert place.put(tier, key(1), content(1, length))
    assert tier.contains(key(1))
    assert place.get(tier, key(1)) == content(1, length)
    assert tier.used_bytes == on_disk(place) == tier.file_bytes(length)
    assert place.troubles == []


def test_a_new_tier_finds_what_an_old_one_wrote_in_its_order(place: Place) -> None:
    old = place.open()
    for number in (3, 1, 2, 300):
        assert place.put(old, key(number), content(number))
        os.utime(place.file(key(number)), ns=(number + 5, number + 5))
    assert old.put_blob("a", b"x" * 10)
    os.utime(place.file("a"), ns=(1, 1))
    new = place.open()
    assert new.keys() == [key(1), key(2), key(3), key(300)]
    assert new.blob_names() == ["a"]
    assert new.used_bytes == old.used_bytes == on_disk(place)
    assert place.get(new, key(300)) == content(300)


def test_remove_frees_the_room(place: Place) -> None:
    tier = place.open()
    assert place.put(tier, key(1), content(1))
    assert tier.remove(key(1))
    assert not tier.remove(key(1))
    assert not tier.contains(key(1))
    assert place.get(tier, key(1)) is None
    assert (tier.used_bytes, tier.free_bytes, tier.keys()) == (0, QUOTA_BYTES, [])
    assert on_disk(place) == 0


def test_the_quota_is_never_passed(place: Place) -> None:
    tier = place.open(quota_bytes=3 * DiskTier.file_bytes(CHUNK_BYTES))
    assert [place.put(tier, key(number), content(number)) for number in range(5)] == [True] * 3 + [False] * 2
    assert tier.counters["refused"] == 2
    assert tier.free_bytes == 0
    assert on_disk(place) == tier.quota_bytes
    assert tier.remove(key(0))
    assert place.put(tier, key(3), content(3))
    assert place.troubles == []


def test_the_quota_may_change_while_running(place: Place) -> None:
    chunk = DiskTier.file_bytes(CHUNK_BYTES)
    tier = place.open(quota_bytes=chunk)
    assert place.put(tier, key(0), content(0))
    assert not place.put(tier, key(1), content(1))
    tier.set_quota(3 * chunk)
    assert place.put(tier, key(1), content(1))
    tier.set_quota(chunk)
    assert (tier.quota_bytes, tier.free_bytes) == (chunk, -chunk)
    assert place.get(tier, key(0)) == content(0)
    assert not place.put(tier, key(2), content(2))


def test_a_quota_of_zero_leaves_the_disk_alone(place: Place) -> None:
    assert place.put(place.open(), key(1), content(1))
    tier = place.open(quota_bytes=0)
    assert not any((tier.readable, tier.writable, tier.contains(key(1))))
    assert place.get(tier, key(1)) is None
    assert not place.put(tier, key(2), content(2))
    assert not tier.put_blob("a", b"")
    tier.set_quota(QUOTA_BYTES)
    assert place.get(tier, key(1)) == content(1)
    tier.set_quota(0)
    assert place.get(tier, key(1)) is None
    assert place.file(key(1)).exists()


def test_a_held_chunk_is_not_written_again(place: Place) -> None:
    tier = place.open()
    assert place.put(tier, key(1), content(1))
    before = place.file(key(1)).stat()
    assert place.put(tier, key(1), content(1))
    assert os.path.samestat(before, place.file(key(1)).stat())
    assert tier.counters["writes"] == 1


def test_counters(place: Place) -> None:
    tier = place.open()
    place.put(tier, key(1), content(1, 5000))
    place.get(tier, key(1))
    tier.put_blob("a", b"123")
    tier.get_blob("a")
    expected = dict.fromkeys(("refused", "damaged", "errors", "swept", "stalls"), 0)
    assert tier.counters == {"reads": 2, "read_bytes": 5003, "writes": 2, "written_bytes": 5003, **expected}


# Blobs


@pytest.mark.parametrize("data", [b"", b"x", bytes(5000), content(1, 100000)])
def test_blobs(place: Place, data: bytes) -> None:
    tier = place.open()
    assert tier.get_blob("a.b-c_D0") is None
    assert tier.put_blob("a.b-c_D0", b"earlier")
    assert tier.put_blob("a.b-c_D0", data)
    assert tier.get_blob("a.b-c_D0") == data
    assert place.open().get_blob("a.b-c_D0") == data
    assert tier.used_bytes == place.open().used_bytes == on_disk(place)
    assert tier.remove_blob("a.b-c_D0")
    assert not tier.remove_blob("a.b-c_D0")
    assert tier.used_bytes == 0


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 40])
def test_the_head_of_a_blob(place: Place, data: bytes) -> None:
    tier = place.open()
    assert not tier.has_blob("a")
    assert tier.get_blob_head("a", 64) is None
    tier.put_blob("a", data)
    assert tier.has_blob("a")
    assert tier.get_blob_head("a", 64) == (data[:64], len(data))
    assert tier.get_blob("a") == data
    place.file("a").rename(place.file("b"))
    tier = place.open()
    assert tier.get_blob_head("b", 64) is None, "it is another blob's"
    assert not tier.has_blob("b")


def test_a_cut_blob_has_no_head(place: Place) -> None:
    tier = place.open()
    for length in range(0, 140, 7):
        tier.put_blob("a", bytes(100))
        os.truncate(place.file("a"), length)
        assert tier.get_blob_head("a", 64) is None


def test_blobs_count_in_the_quota(place: Place) -> None:
    tier = place.open(quota_bytes=8192)
    assert tier.put_blob("a", bytes(4000))
    assert tier.put_blob("b", bytes(4000))
    assert not tier.put_blob("c", b"")
    assert not place.put(tier, key(1), b"")


@pytest.mark.parametrize("name", ["", ".", "..", ".tmp", "a/b", "../a", "a\0", "ä", "a" * 201])
def test_a_blobs_name_is_never_a_path(here: Place, name: str) -> None:
    tier = here.open()
    for call in (tier.get_blob, tier.remove_blob, lambda name: tier.put_blob(name, b"")):
        with pytest.raises(ValueError, match="is no name for a blob"):
            call(name)


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"?!")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def swap(path: Path) -> None:
    shutil.copy(next(other for other in path.parent.parent.rglob("*.*") if other != path), path)


@pytest.mark.parametrize("damage", [cut, flip, empty, swap])
def test_damage_is_no_chunk_and_told_once(place: Place, damage: Callable[[Path], None]) -> None:
    tier = place.open()
    for number in range(3):
        assert place.put(tier, key(number), content(number))
    for number in range(2):
        damage(place.file(key(number)))
        assert place.get(tier, key(number)) is None
        assert not tier.contains(key(number))
        assert not place.file(key(number)).exists()
    assert tier.counters["damaged"] == 2
    assert len(place.troubles) == 1
    assert "was damaged" in place.troubles[0]
    assert str(place.file(key(0))) in place.troubles[0]
    assert tier.used_bytes == on_disk(place) == tier.file_bytes(CHUNK_BYTES)
    assert place.put(tier, key(0), content(0))
    assert place.get(tier, key(0)) == content(0)


@pytest.mark.parametrize("damage", [cut, flip, empty, swap])
def test_damage_of_a_blob(place: Place, damage: Callable[[Path], None]) -> None:
    tier = place.open()
    assert tier.put_blob("a", content(1, 5000))
    assert tier.put_blob("b", content(2, 5000))
    damage(place.file("a"))
    assert tier.get_blob("a") is None
    assert tier.get_blob("b") == content(2, 5000)
    assert tier.counters["damaged"] == len(place.troubles) == 1
    assert tier.used_bytes == on_disk(place)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.data())
def test_any_flipped_bit_of_a_blob_is_found(here: Place, data: bytes, choose: st.DataObject) -> None:
    tier = here.open()
    assert tier.put_blob("a", data)
    damaged = bytearray(here.file("a").read_bytes())
    bit = choose.draw(st.integers(0, len(damaged) * 8 - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    here.file("a").write_bytes(damaged)
    assert tier.get_blob("a") is None


def test_a_file_that_vanished_is_a_miss(place: Place) -> None:
    tier = place.open()
    assert place.put(tier, key(1), content(1))
    place.file(key(1)).unlink()
    assert place.get(tier, key(1)) is None
    assert (tier.used_bytes, tier.contains(key(1)), place.troubles) == (0, False, [])


def test_the_whole_directory_may_vanish(here: Place, tmp_path: Path) -> None:
    here.directory = tmp_path / "cache"
    here.directory.mkdir()
    tier = here.open()
    assert here.put(tier, key(1), content(1))
    shutil.rmtree(here.directory)
    assert here.get(tier, key(1)) is None
    assert not here.put(tier, key(2), content(2))
    assert not here.directory.exists()
    assert len(here.troubles) == 1


# What lies there already


def test_the_scan_takes_only_what_is_ours(here: Place) -> None:
    assert here.put(here.open(), key(1), content(1))
    folder = here.file(key(1)).parent
    foreign = [
        here.directory / "chunks" / "README",
        here.directory / "chunks" / "zz" / here.file(key(1)).name,
        folder / "notes.txt",
        folder / f"{key(2).name}.chunk",  # belongs in another directory
        folder / "not-a-key.chunk",
        here.directory / "index" / "x.blob.old",
        here.directory / "index" / ".hidden.blob",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    (folder / f"{ChunkKey(key(1).object_id, 257).name}.chunk").symlink_to(here.file(key(1)))
    tier = here.open()
    assert tier.keys() == [key(1)]
    assert tier.blob_names() == []
    assert all(path.read_bytes() == b"mine" for path in foreign)
    assert tier.counters["damaged"] == 0


def test_the_scan_removes_what_a_crash_cut(here: Place) -> None:
    tier = here.open()
    for number in range(3):
        assert here.put(tier, key(number), content(number))
    empty(here.file(key(0)))
    os.truncate(here.file(key(1)), 5000)
    tier = here.open()
    assert tier.keys() == [key(2)]
    assert tier.counters["damaged"] == 2
    assert not here.file(key(0)).exists()


def test_temp_files_of_the_dead_are_swept_those_of_the_living_are_not(here: Place) -> None:
    assert here.put(here.open(), key(1), content(1))
    folder = here.file(key(1)).parent
    code = "from fastload.cache import tempfiles; print(next(tempfiles.temp_names()))"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    pid = dead.split("-")[1]
    reused = dead.replace(f"-{pid}-", f"-{os.getpid()}-")  # another process has the number by now
    living = next(tempfiles.temp_names())
    foreign = ".tmp-something"
    for name in (dead, reused, living, foreign):
        (folder / name).write_bytes(b"half")
    tier = here.open()
    assert tier.counters["swept"] == 2
    assert sorted(path.name for path in folder.glob(".tmp-*")) == sorted([living, foreign])
    for name in (living, foreign):
        (folder / name).unlink()


# Several at once


def test_two_writers_of_one_chunk(place: Place) -> None:
    tier = place.open()
    barrier = threading.Barrier(2)
    rename = syscalls.rename

    def together(source: Path, target: Path) -> None:
        barrier.wait(PATIENCE_S)
        rename(source, target)

    place.buffer[:] = content(1)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(syscalls, "rename", together)
        assert list(pool.map(lambda _: tier.write(key(1), place.buffer, CHUNK_BYTES), range(2))) == [True, True]
    assert place.get(tier, key(1)) == content(1)
    assert tier.used_bytes == on_disk(place) == tier.file_bytes(CHUNK_BYTES)
    assert tier.free_bytes == QUOTA_BYTES - tier.used_bytes


def test_two_tiers_of_one_directory(place: Place) -> None:
    # Only where locks do not work; then chunks are written twice and all stays right.
    one, two = place.open(), place.open()
    assert place.put(one, key(1), content(1))
    assert place.put(two, key(1), content(1))
    assert place.get(one, key(1)) == place.get(two, key(1)) == content(1)
    assert one.remove(key(1))
    assert place.get(two, key(1)) is None


def test_writers_together_keep_to_the_quota(place: Place) -> None:
    room = 5
    tier = place.open(quota_bytes=room * DiskTier.file_bytes(CHUNK_BYTES))
    place.buffer[:] = content(1)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda number: tier.write(key(number), place.buffer, CHUNK_BYTES), range(20)))
    assert sum(done) == room == len(tier.keys())
    assert tier.used_bytes == tier.quota_bytes == on_disk(place)


def test_readers_writers_and_removers_together(here: Place) -> None:
    tier = here.open(quota_bytes=6 * DiskTier.file_bytes(CHUNK_BYTES))

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
            for _ in range(60):
                number = draw.randrange(8)
                if draw.random() < 0.4:
                    view[:] = content(number)
                    tier.write(key(number), view, CHUNK_BYTES)
                elif draw.random() < 0.3:
                    tier.remove(key(number))
                elif (length := tier.read_into(key(number), view)) is not None:
                    assert view[:length] == content(number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert tier.counters["damaged"] == tier.counters["errors"] == 0
    assert here.troubles == []
    left = {number for number in range(8) if here.get(tier, key(number)) is not None}
    assert {number for number in range(8) if here.file(key(number)).exists()} >= left
    assert tier.used_bytes == len(left) * DiskTier.file_bytes(CHUNK_BYTES)


def test_temp_names_are_drawn_by_many_threads() -> None:
    names = tempfiles.temp_names()
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: next(names), range(2000)))
    assert len(set(drawn)) == 2000
    assert not any(tempfiles.is_stale(name) for name in drawn[:10])


def test_a_writer_that_is_a_zombie_is_gone() -> None:
    """It has its number and its entry in /proc until its parent looks."""
    code = "from fastload.cache import tempfiles; print(next(tempfiles.temp_names()), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        name = writer.stdout.readline().decode().strip()
        assert not tempfiles.is_stale(name)
        writer.kill()
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert Path(f"/proc/{writer.pid}").exists()
        assert tempfiles.is_stale(name)
