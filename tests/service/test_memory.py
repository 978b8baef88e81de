"""How much memory the arena takes up, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastload import protocol
from fastload.client import Handle as Cache
from fastload.service import core
from fastload.service.core import RELEASE_AFTER_S, Core
from tests.conftest import Bucket
from tests.service.helpers import CHUNK_BYTES, eventually, random_bytes, read
from tests.service.world import Side, World, settle, sleep, until


def _touched(core: Core, side: Side) -> int:
    touched: int = side.node()["arena_touched_bytes"]
    return touched


@pytest.mark.parametrize(
    "sizes", [[3 * CHUNK_BYTES, 2 * CHUNK_BYTES], [CHUNK_BYTES + 4096] * 20, [4096] * 100], ids=str
)
def test_data_takes_its_own_size(tmp_path: Path, sizes: list[int]) -> None:
    """Also where it leaves most of a buffer empty."""
    world = World(tmp_path, 500)
    world.objects = [world.store.put(str(number), random_bytes(number, size)) for number, size in enumerate(sizes)]

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await settle()
        assert _touched(core, side) == 0  # nothing is read, nor planned
        side.plan(0)
        await until(lambda: _touched(core, side) == sizes[0], "the first is here")
        side.plan(*range(len(sizes)))
        await until(lambda: _touched(core, side) == sum(sizes), "they are here")
        await settle()
        assert _touched(core, side) == sum(sizes)

    world.run(work)


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


def test_when_that_is_can_be_said_while_it_serves(tmp_path: Path) -> None:
    world = World(tmp_path, 10)
    world.add(3)

    async def work(core: Core) -> None:
        core.rest_after_s = 300.0
        side = Side(core, world.objects)
        side.want(0, 1, 2)
        await until(lambda: len(side.granted) == 3, "they are granted")
        core.disconnect(side.state)
        await sleep(299.0)
        assert not core._table.is_empty
        await sleep(2.0)
        assert core._table.is_empty

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
                arena = service._server.core.arena
                assert arena.touched_bytes >= 3 * CHUNK_BYTES
            eventually(lambda arena=arena: arena.touched_bytes == 0, "its memory is given back")
