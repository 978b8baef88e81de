"""Checkpoints on disk (`saving.area`), and what the service makes of messages that make no sense."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from xxhash import xxh3_64_intdigest

import fastload
from fastload import checkpoint, protocol
from fastload.cache import syscalls
from fastload.checkpoint import attempts
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.segments import Piece, checksums
from fastload.checkpoint.writing import start
from fastload.client.connector import Connector
from fastload.client.saver import Saver
from fastload.errors import CacheError, ServiceError
from fastload.service.saving.area import COMMITTED, KEPT, STORED, Area, Found, Kept
from fastload.service.saving.image import Image
from fastload.service.saving.to_disk import _hashed_and_kept
from tests.cache.faults import failing
from tests.patience import PATIENCE_S
from tests.processes import kill_service, until

ATTEMPT = "0123456789abcdef"
SEGMENTS = [b"a" * 4096, b"b" * 5000, b""]
PART = b"a part record"
KEPT_SAVE = Kept("s3://bucket/run/1/", ATTEMPT, 3, True, "http://store", (4096, 5000, 0), xxh3_64_intdigest(PART), 1.5)


@pytest.fixture
def area(tmp_path: Path) -> Area:
    area = Area(tmp_path)
    area.make()
    return area


def save(area: Area) -> Kept:
    kept = KEPT_SAVE
    for number, data in enumerate(SEGMENTS):
        area.write_segment(kept.name, number, memoryview(data))
    area.keep(kept, PART)
    return kept


def test_what_is_kept_is_found_again(area: Area) -> None:
    kept = save(area)
    assert area.scan() == [Found(kept, KEPT)]
    area.note(kept.name, STORED)
    assert area.scan() == [Found(kept, STORED)]
    area.note(kept.name, COMMITTED)
    assert area.scan() == [Found(kept, COMMITTED)]
    assert area.read_part(kept) == PART
    for number, data in enumerate(SEGMENTS):
        with area.segment(kept, number, checksums([memoryview(data)])) as view:
            assert view == data
    area.remove(kept.name)
    assert area.scan() == []
    assert list(area.path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 70_000, (16 << 20) + 4096, (33 << 20) + 65537])
@pytest.mark.parametrize("trouble", [0, errno.EINVAL, errno.ENOSPC])
def test_a_segment_is_hashed_while_it_is_written(area: Area, size: int, trouble: int) -> None:
    """Also where the file system takes no direct writes, or is full in the middle."""
    with open(os.memfd_create("image", os.MFD_ALLOW_SEALING), "r+b") as file:
        file.write(os.urandom(1 << 20) * (size // (1 << 20) + 1))
        file.truncate(size + 4096)
        file.flush()
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        image = Image(os.dup(file.fileno()), size + 4096, [(0, size)], (size, 4096))
    data = bytes(image.segment(0))
    with failing(3, trouble) if trouble else contextlib.nullcontext():
        sums, no_disk = _hashed_and_kept(area, KEPT_SAVE.name, 0, image)
    image.close()
    assert sums == checksums([memoryview(data)])
    assert no_disk or (area.path / f"{KEPT_SAVE.name}-0000.safetensors").read_bytes() == data


def test_the_log_byte_by_byte(area: Area) -> None:
    kept = save(area)
    area.note(kept.name, STORED)
    payload = msgspec.msgpack.encode(
        [kept.folder, ATTEMPT, 3, True, "http://store", [4096, 5000, 0], kept.part_sum, 1.5, None]
    )

    def record(kind: int, payload: bytes) -> bytes:
        head = struct.pack("<II", kind, len(payload))
        return head + hashlib.blake2b(head + payload, digest_size=16).digest() + payload

    log = (area.path / f"{ATTEMPT}-r00003.log").read_bytes()
    assert log == b"FLSAVE\0\1" + record(1, payload) + record(2, b"")


def test_a_log_that_is_cut_off_anywhere(area: Area) -> None:
    """Before the first record is whole nothing is kept, and all of it goes; then what comes next is written over it."""
    kept = save(area)
    path = area.path / f"{kept.name}.log"
    whole = path.read_bytes()
    area.note(kept.name, COMMITTED)
    full = path.read_bytes()
    for length in range(len(whole), len(full)):
        path.write_bytes(full[:length])
        assert area.scan() == [Found(kept, KEPT)]
        area.note(kept.name, COMMITTED)
        assert path.read_bytes() == full
    path.write_bytes(whole[:-1])
    assert area.scan() == []
    assert list(area.path.iterdir()) == []


@pytest.mark.parametrize("how", ["version", "fields"])
def test_what_another_version_has_kept_is_left_alone(area: Area, caplog: pytest.LogCaptureFixture, how: str) -> None:
    kept = save(area)
    path = area.path / f"{kept.name}.log"
    payload = msgspec.msgpack.encode([*msgspec.structs.astuple(kept), "more"])
    head = struct.pack("<II", 1, len(payload))
    record = head + hashlib.blake2b(head + payload, digest_size=16).digest() + payload
    path.write_bytes(b"FLSAVE\0\2" + b"anything" if how == "version" else b"FLSAVE\0\1" + record)
    before = sorted(area.path.iterdir())
    assert area.scan() == []
    assert sorted(area.path.iterdir()) == before
    assert f"{path} is of another version of fastload" in caplog.text


def test_a_log_of_another_name_is_rubbish(area: Area) -> None:
    kept = save(area)
    (area.path / f"{kept.name}.log").rename(area.path / f"{'f' * 16}-r00003.log")
    (area.path / "mine.txt").touch()
    assert area.scan() == []
    assert [path.name for path in area.path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_any_call_fails(tmp_path: Path, number: int) -> None:
    """Then all of it is kept, or nothing is: never a part."""
    for nth in range(200):
        area = Area(tmp_path / str(nth))
        (tmp_path / str(nth)).mkdir()
        kept = None
        with failing(nth, number) as calls:
            try:
                area.make()
                kept = save(area)
            except OSError:
                pass
        found = area.scan()
        if kept is not None:
            assert found == [Found(kept, KEPT)]
        for each in found:
            assert area.read_part(each.kept) == PART
            for segment, data in enumerate(SEGMENTS):
                with area.segment(each.kept, segment, checksums([memoryview(data)])) as view:
                    assert view == data
        if not calls.failed:
            assert kept is not None
            return
    raise AssertionError("it did not come to an end")


def test_what_is_damaged_is_not_stored(area: Area) -> None:
    kept = save(area)
    (area.path / f"{kept.name}.part").write_bytes(b"another one")
    with pytest.raises(CacheError, match=r"\.part is damaged"):
        area.read_part(kept)
    sums = checksums([memoryview(SEGMENTS[0])])
    path = area.path / f"{kept.name}-0000.safetensors"
    path.write_bytes(b"short")
    with pytest.raises(CacheError, match="5 of 4096 bytes"), area.segment(kept, 0, sums):
        pass
    path.write_bytes(b"b" + SEGMENTS[0][1:])
    with pytest.raises(CacheError, match=r"-0000\.safetensors is damaged: the 65536 bytes from 0 on"):
        area.segment(kept, 0, sums).__enter__()


def memory(byte_count: int, seals: int = 0) -> int:
    fd = syscalls.memfd_create("test")
    os.ftruncate(fd, byte_count)
    if seals:
        syscalls.add_seals(fd, seals)
    return fd


def test_an_image_that_is_none(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 8192)
    for fd, byte_count, segments in [
        (file, 8192, []),
        (memory(8192), 8192, []),
        (memory(4096, fcntl.F_SEAL_SHRINK), 8192, []),
        (memory(8192, fcntl.F_SEAL_SHRINK), 8192, [(4096, 4097)]),
        (memory(8192, fcntl.F_SEAL_SHRINK), 8192, [(9000, 0)]),
        (os.pipe()[0], 8192, []),
    ]:
        with pytest.raises(ServiceError, match="image"):
            Image(fd, byte_count, segments, (0, 0))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


SMALL = {"ram_bytes": "1MiB", "disk_bytes": 0, "chunk_bytes": "64KiB"}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        yield cache


def state() -> dict[str, Any]:
    return {"w": torch.arange(3 << 20, dtype=torch.float32)}


def test_a_save_whose_record_is_garbage_fails_and_nothing_else(cache: fastload.Cache, tmp_path: Path) -> None:
    fd = memory(8192, fcntl.F_SEAL_SHRINK)
    with cache._handle.saver(None, "hostile") as saver:
        folder = f"{tmp_path}/1/"
        saver.hand_over(protocol.Save(folder, ATTEMPT, 0, 8192, [(0, 4096)], (4096, 4096), True), fd)
        until(lambda: saver.state is not None and saver.state.error_name)
        assert saver.state is not None
        assert saver.state.error_name == "CheckpointDamagedError"
    os.close(fd)
    checkpoint.save(state(), tmp_path / "2", until="memory", cache=cache).wait("store", PATIENCE_S)
    assert not (tmp_path / "1").exists() or not list((tmp_path / "1").rglob("manifest.json"))


def test_descriptors_that_nobody_asked_for_end_the_conversation(cache: fastload.Cache) -> None:
    cache.stats()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with cache._handle.consumer(), sock:
        sock.connect(str(cache.directory / "socket"))
        fds = [memory(1) for _ in range(3)]
        socket.send_fds(sock, [b"\1\0\0\0"], fds)
        sock.settimeout(PATIENCE_S)
        assert b"more descriptors than one" in sock.recv(1 << 16)
        for fd in fds:
            os.close(fd)


def test_without_any_service_the_process_stores_by_itself(
    tmp_path: Path, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise ServiceError("none can be had")

    monkeypatch.setattr(Connector, "connect", connect)
    with pytest.warns(RuntimeWarning, match="cannot carry checkpoints"):
        saving = checkpoint.save(state(), tmp_path / "1", until="memory", cache=cache)
    assert saving.done("store")
    assert checkpoint.load(tmp_path / "1")["w"].equal(state()["w"])


def test_the_last_service_dies_and_the_process_goes_on_by_itself(
    tmp_path: Path, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt is one of two ranks, so that the save is not over before."""
    half = 3 << 19
    with attempts.opened(tmp_path / "1", None) as place:
        plan = attempts.begin(place, 2, overwrite=False, now_s=0)
    pieces = [Piece("w", "F32", (2 * half,), Box((half * rank,), (half,))) for rank in range(2)]
    given = [(tmp_path / "1", None, plan.attempt, rank, [pieces[rank]], state()) for rank in range(2)]
    first = start(*given[0], cache=cache, until="memory", commits=True)
    until(lambda: list((tmp_path / "1").rglob("*.part")))  # a service that is killed before leaves what it writes
    failed = []

    def connect(*_: object) -> None:
        failed.append(True)
        raise ServiceError("none can be had")

    with monkeypatch.context() as patch:
        patch.setattr(Connector, "connect", connect)
        kill_service(cache.directory)
        until(lambda: failed and not isinstance(first.carrier, Saver))
    start(*given[1], cache=cache, until="memory", commits=False)
    first.wait("store", PATIENCE_S)
    assert checkpoint.load(tmp_path / "1")["w"].equal(state()["w"][: 2 * half])


def test_a_disk_that_is_full_costs_only_its_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    with fastload.Cache(tmp_path / "cache", **SMALL, service="inprocess") as cache:
        monkeypatch.setattr(syscalls, "pwritev", full)
        saving = checkpoint.save(state(), tmp_path / "1", until="memory", cache=cache)
        with pytest.warns(RuntimeWarning, match="is not kept on disk .*is full"):
            saving.wait("disk", PATIENCE_S)
        assert saving.done("store")
        assert saving.progress().disk_bytes == 0
        until(lambda: not list((tmp_path / "cache" / "checkpoints").iterdir()))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "1")["w"].equal(state()["w"])


def test_a_forked_child_leaves_the_parents_save_alone(tmp_path: Path, cache: fastload.Cache) -> None:
    saving = checkpoint.save(state(), tmp_path / "1", until="memory", cache=cache)
    pid = os.fork()
    if not pid:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    saving.wait("store", PATIENCE_S)
    checkpoint.save(state(), tmp_path / "2", until="memory", cache=cache).wait("store", PATIENCE_S)
