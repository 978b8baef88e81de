"""A disk that does not answer: the consumers get everything from the store, and the disk comes back when it answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastload import protocol
from fastload.cache import syscalls
from fastload.client import Handle as Cache
from fastload.service.core import Core
from fastload.service.host import server
from tests.service.helpers import CHUNK_BYTES, FakeStore, eventually, random_bytes, read_epoch
from tests.service.world import Gate, Side, World, settle, until

DEADLINE_S = 0.1
DISK_BYTES = 64 << 20


class Disk:
    """The system calls of a disk that hangs between `hang` and `answer`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads, self.writes = Gate(is_open=True), Gate(is_open=True)
        monkeypatch.setattr(syscalls, "preadv", _held_back(syscalls.preadv, self.reads))
        monkeypatch.setattr(syscalls, "pwritev", _held_back(syscalls.pwritev, self.writes))

    def hang(self) -> None:
        self.reads.clear()
        self.writes.clear()

    def answer(self) -> None:
        self.reads.set()
        self.writes.set()


def _held_back(call: Callable[..., Any], answers: Gate) -> Callable[..., Any]:
    def made(*arguments: Any) -> Any:
        answers.wait()
        return call(*arguments)

    return made


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.answer()


def fill_disk(world: World) -> None:
    """Have all objects on disk, and nothing in RAM."""

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(*range(len(world.objects)), warm=True)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "all is on disk")

    world.run(work)
    world.store.reads.clear()


def test_a_cache_on_a_disk_that_hangs_is_not_cleared(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks is told, then and as long as it hangs; when it answers, it can be cleared."""
    world = World(tmp_path, 12, DISK_BYTES)
    world.add(6, 2)
    fill_disk(world)
    monkeypatch.setattr(syscalls, "unlink", _held_back(syscalls.unlink, disk.writes))

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        for request in (1, 2):
            side.say(protocol.Clear(request, True))
            await until(lambda request=request: len(side.all(protocol.RequestFailed)) == request, "it is refused")  # type: ignore[misc]
        assert "does not answer" in side.all(protocol.RequestFailed)[0].message
        disk.answer()
        await until(lambda: not core.disk_hangs, "the disk is back")
        assert not side.all(protocol.Cleared)
        side.say(protocol.Clear(3, True))
        await until(lambda: bool(side.all(protocol.Cleared)), "it is empty")
        assert core.disk.keys() == []

    world.run(work, DEADLINE_S)


def test_chunks_whose_reads_hang_come_from_the_store(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 12, DISK_BYTES)
    world.add(6, 2)
    fill_disk(world)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.plan(0)
        side.want(0, 1, 2)
        await until(lambda: sorted(side.granted) == [0, 1, 2], "they came from the store")
        figures = side.node()
        assert figures["disk_stalls"] == 1
        assert figures["disk_reads_hung"] == figures["buffers_stranded"] == 4
        assert core.disk_hangs
        (trouble,) = side.all(protocol.Trouble)
        assert "has not answered for 0.1 s" in trouble.message
        disk.answer()
        await until(lambda: side.node()["buffers_stranded"] == 0, "the reads have returned")
        assert not core.disk_hangs
        fetched = len(world.store.reads)
        side.want(6, 7)
        await until(lambda: sorted(side.granted) == [0, 1, 2, 6, 7], "the disk is used again")
        assert len(world.store.reads) == fetched
        assert side.node()["disk_read_chunks"] == 2
        assert len(side.all(protocol.Trouble)) == 1

    world.run(work, DEADLINE_S)


def test_writes_that_hang_cost_their_buffers_only(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(12)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.want(0)
        await until(lambda: side.granted == [0], "the first is here, and being written")
        await until(lambda: core.disk_hangs, "its write hangs")
        assert side.node()["writes_hung"] == side.node()["buffers_stranded"] == 1
        for chunk in range(1, 12):
            side.want(chunk)
            await until(lambda chunk=chunk: side.granted[-1:] == [chunk], "it is granted")  # type: ignore[misc]
            side.release(chunk)
        # A chunk under a write that hangs can be read as before.
        fetched = len(world.store.reads)
        side.release(0)
        side.want(0)
        await until(lambda: side.granted[-1:] == [0], "it is granted")
        side.release(0)
        assert len(world.store.reads) == fetched
        disk.answer()
        await until(lambda: side.node()["written_chunks"] == 1, "the write has returned")
        assert side.node()["buffers_stranded"] == 0
        side.want(5)
        await until(lambda: side.node()["written_chunks"] == 2, "the disk is used again")

    world.run(work, DEADLINE_S)


def test_a_warm_plan_ends_without_what_could_not_be_written(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 8, DISK_BYTES)
    world.add(20)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.plan(0, warm=True)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "it ends")
        last = side.all(protocol.Progress)[-1]
        assert (last.held_chunks, last.done_chunks, last.error_name) == (0, 20, "")
        figures = side.node()
        assert figures["writes_hung"] == 2
        assert figures["writes_given_up"] >= 4
        disk.answer()
        await until(lambda: not core.disk_hangs, "the disk answers")
        side.plan(0, warm=True)
        await until(lambda: side.all(protocol.Progress)[-1].held_chunks == 20, "now all is held")

    world.run(work, DEADLINE_S)


def test_an_arena_that_is_lost_whole_is_an_error_and_comes_back(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 2, DISK_BYTES)
    world.add(1, 3)
    fill_disk(world)
    next(path for path in world.directory.path.rglob("*.chunk") if path.stem.endswith("00000002")).unlink()

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.want(0)  # its read hangs
        side.want(3)  # not on disk: its write hangs
        await until(lambda: side.node()["buffers_stranded"] == 2, "nothing is left")
        await until(lambda: bool(side.all(protocol.Failed)), "who waits is told")
        failed = side.all(protocol.Failed)[0]
        assert (failed.name, failed.chunks) == ("CacheError", [0])
        assert "raise ram_bytes" in failed.message
        disk.answer()
        await until(lambda: not core.disk_hangs, "the disk answers")
        side.release(3)
        side.want(0)
        await until(lambda: side.granted[-1:] == [0], "it is granted")

    world.run(work, DEADLINE_S)


def test_the_buffer_of_a_read_that_returns_is_used_while_a_write_still_hangs(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 3, DISK_BYTES)
    world.add(1, 2, 1)
    fill_disk(world)
    next(path for path in world.directory.path.rglob("*.chunk") if path.stem.endswith("00000001")).unlink()

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.want(0)  # its read hangs, and it comes from the store
        side.want(2)  # not on disk: its write hangs
        await until(lambda: sorted(side.granted) == [0, 2], "both are here")
        await until(lambda: side.node()["buffers_stranded"] == 2, "a read and a write hang")
        side.want(3)
        await until(lambda: side.recalled == [0], "it waits for a buffer")
        disk.reads.set()
        await until(lambda: side.granted[2:] == [3], "it is granted")
        assert core.disk_hangs
        disk.answer()

    world.run(work, DEADLINE_S)


def test_indexes_are_not_waited_for(tmp_path: Path, disk: Disk) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(*[1] * 100)

    async def fill(core: Core) -> None:
        side = Side(core, world.objects)
        for number in range(100):
            side.say(protocol.PutIndex(number, b"index"))
        await until(lambda: len(core.disk.blob_names()) == 100, "they are on disk")

    async def ask(core: Core) -> None:
        side = Side(core, world.objects)
        disk.hang()
        side.say(protocol.PutIndex(1, b"new"))
        side.say(protocol.GetIndexes(1, list(range(100))))
        side.say(protocol.GetIndexes(2, [1, 2, 3]))
        await until(lambda: len(side.all(protocol.Indexes)) == 2, "both are answered")
        assert [each.objects for each in side.all(protocol.Indexes)] == [[1], [1]]
        disk.answer()
        await until(lambda: not core.disk_hangs, "the disk answers")
        side.say(protocol.GetIndexes(3, list(range(100))))
        await until(lambda: len(side.all(protocol.Indexes)) == 3, "it is answered")
        assert len(side.all(protocol.Indexes)[2].objects) == 100

    world.run(fill)
    world.run(ask, DEADLINE_S)


def test_many_quick_jobs_are_no_stall(tmp_path: Path) -> None:
    world = World(tmp_path, 6, DISK_BYTES)
    world.add(40)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(0, warm=True)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "all is on disk")
        await settle()
        assert side.node()["disk_stalls"] == 0

    world.run(work, 5.0)


def test_training_and_its_end_on_a_disk_that_hangs_for_good(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FakeStore()
    objects = [store.put(str(number), random_bytes(number, 3 * CHUNK_BYTES + 7)) for number in range(6)]
    monkeypatch.setattr(
        server,
        "Core",
        lambda directory, loop: Core(directory, loop, lambda url, options: store, disk_deadline_s=DEADLINE_S),
    )
    monkeypatch.setattr(server, "_END_S", 0.2)
    cache = Cache(
        tmp_path / "cache",
        ram_bytes=10 * CHUNK_BYTES,
        disk_bytes=DISK_BYTES,
        chunk_bytes=CHUNK_BYTES,
        service="inprocess",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cache, cache.consumer() as consumer:
            consumer.attach(objects)
            disk.hang()
            for epoch in range(2):
                assert read_epoch(consumer, objects, range(6), epoch) == list(store.contents.values())
            eventually(lambda: consumer.stats()["node"]["disk_stalls"] == 1, "it is noticed")
            consumer.stats()
    assert [str(each.message).split(" has not answered")[0] for each in caught] == [f"the disk cache {cache.directory}"]
    disk.answer()
