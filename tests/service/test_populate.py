"""How much memory the arena takes up, and when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import Arena
from fastload.client import Handle as Cache
from fastload.config import MIB
from fastload.service import core
from fastload.service.core import RELEASE_AFTER_S, Core
from fastload.service.threads import Populator
from tests.conftest import Bucket
from tests.service.helpers import CHUNK_BYTES, eventually, random_bytes, read
from tests.service.world import Side, World, settle, sleep, until


def test_use_is_kept_ahead_of_as_far_as_it_has_come() -> None:
    arena = Arena(64 * MIB, MIB)
    populator = Populator(arena, ahead_bytes=(4 * MIB, 16 * MIB))
    try:
        for used, end in ((0, 4), (3, 7), (2, 7), (6, 12), (12, 24)):
            populator.need(used, 1000)
            eventually(lambda end=end: arena.touched_bytes == end * MIB, f"{end} MiB are touched")
        # Use that was quicker has touched what it used: populating goes on beyond that.
        populator.need(30, 1000)
        eventually(lambda: arena.touched_bytes == (24 + 16) * MIB, "it moved on")
        populator.need(60, 1000)
        eventually(lambda: arena.touched_bytes == (24 + 16 + 4) * MIB, "the end is touched")
    finally:
        populator.close()
        arena.close()


def test_no_more_is_touched_than_the_data_takes() -> None:
    arena = Arena(64 * MIB, MIB)
    populator = Populator(arena, ahead_bytes=(16 * MIB, 16 * MIB))
    try:
        populator.need(1, 0)
        populator.need(1, 5)
        eventually(lambda: arena.touched_bytes == 4 * MIB, "what five buffers take, but for the one that was used")
        populator.need(5, 5)
        populator.need(5, 8)
        eventually(lambda: arena.touched_bytes == 7 * MIB, "and what three more take")
    finally:
        populator.close()
        arena.close()


def test_fresh_memory_is_touched_from_its_start() -> None:
    arena = Arena(64 * MIB, MIB)
    populator = Populator(arena, ahead_bytes=(4 * MIB, 4 * MIB))
    try:
        populator.need(20, 1000)
        eventually(lambda: arena.touched_bytes == 4 * MIB, "it is touched ahead")
        arena.renew()()
        populator.renewed()
        assert arena.touched_bytes == 0
        populator.need(0, 1000)
        eventually(lambda: arena.touched_bytes == 4 * MIB, "it is touched again")
        arena.buffer(0)[:] = arena.buffer(3)[:] = bytes(MIB)
        assert arena.touched_bytes == 4 * MIB
    finally:
        populator.close()
        arena.close()


def test_an_end_before_the_end() -> None:
    arena = Arena(64 * MIB, MIB)
    for needed in (0, 64):
        populator = Populator(arena)
        populator.need(0, needed)
        populator.close()
    arena.close()


def _touched(core: Core, side: Side) -> int:
    touched: int = side.node()["arena_touched_bytes"]
    return touched


def test_a_small_data_set_takes_its_own_size(tmp_path: Path) -> None:
    world = World(tmp_path, 500)
    world.add(3, 2)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await settle()
        assert _touched(core, side) == 0  # nothing is read, nor planned
        side.plan(0, 1)
        await until(lambda: _touched(core, side) == 5 * CHUNK_BYTES, "its memory is there")
        side.want(0, 1, 2, 3, 4)
        await until(lambda: len(side.granted) == 5, "they are granted")
        await settle()
        assert _touched(core, side) == 5 * CHUNK_BYTES

    world.run_in_real_time(work)


def test_small_objects_take_no_whole_buffers(tmp_path: Path) -> None:
    world = World(tmp_path, 500)
    world.objects = [world.store.put(str(number), random_bytes(number, 4096)) for number in range(100)]

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(*range(100))
        await until(lambda: side.node()["buffers_free"] == 400, "they are here")
        await settle()
        assert _touched(core, side) == 100 * 4096

    world.run_in_real_time(work)


def test_without_consumers_there_is_no_memory(tmp_path: Path) -> None:
    """It is given back some time after the last has gone, and not while something is on its way into it."""
    world = World(tmp_path, 10)
    world.add(3, 2)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.want(0, 1, 2)
        await until(lambda: len(side.granted) == 3, "they are granted")
        with world.held_back() as gate:
            side.want(3, 4)
            await until(lambda: len(world.store.reads) == 5, "they are on their way")
            core.disconnect(side.state)
            await until(lambda: side.node()["buffers_free"] == 8, "what nobody uses has gone")
            assert core.arena.touched_bytes >= 3 * CHUNK_BYTES
            gate.set()
        await until(lambda: core.arena.touched_bytes == 0, "its memory is given back")
        assert side.node()["buffers_free"] == 10
        # All begins anew, in the memory that whoever comes now is shown.
        again = Side(core, world.objects)
        again.want(4, 0)
        await until(lambda: len(again.granted) == 2, "they are granted")
        (first, *_) = again.all(protocol.Grants)
        data = [bytes(core.arena.buffer(buffer)) for buffer in first.buffers]
        assert sorted(first.buffers)[0] == 0
        assert data[first.chunks.index(4)] == random_bytes(1, 2 * CHUNK_BYTES)[CHUNK_BYTES:]

    world.run(work)


def test_who_comes_again_at_once_finds_what_was_there(tmp_path: Path) -> None:
    world = World(tmp_path, 10)
    world.add(3)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.want(0, 1, 2)
        await until(lambda: len(side.granted) == 3, "they are granted")
        core.disconnect(side.state)
        await sleep(RELEASE_AFTER_S - 1)
        again = Side(core, world.objects)
        await sleep(RELEASE_AFTER_S)
        again.want(0, 1, 2)
        await until(lambda: len(again.granted) == 3, "they are granted")
        assert len(world.store.reads) == 3

    world.run(work)


def test_a_process_that_serves_itself_gives_its_memory_back(
    tmp_path: Path, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a service lives as long as its `Cache`, and who comes back reads on."""
    monkeypatch.setattr(core, "RELEASE_AFTER_S", 0.05)
    limits = {"ram_bytes": 64 * CHUNK_BYTES, "disk_bytes": 0, "chunk_bytes": CHUNK_BYTES}
    with Cache(tmp_path / "cache", service="inprocess", **limits) as cache:
        for _ in range(3):
            with cache.consumer() as consumer:
                objects = consumer.resolve([f"{s3.url}/shard-0.tar"], (".tar",))
                consumer.attach(objects)
                found = read(consumer, [0, 1, 2])
                assert found[0] + found[1] + found[2] == shards[objects[0].url]
                (service,) = cache._connector._services.values()
                arena = service._server._core.arena
                assert arena.touched_bytes >= 3 * CHUNK_BYTES
            eventually(lambda arena=arena: arena.touched_bytes == 0, "its memory is given back")
            eventually(lambda: "fastload-populate" in {each.name for each in threading.enumerate()}, "it lives on")
