"""The core, driven without sockets and with a store whose answers the test holds back, counts and breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import ObjectMissingError, ServiceError, StoreUnavailableError
from fastload.service.core import Core
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Gate, Side, World, settle, until


def test_a_chunk_that_many_want_is_fetched_once(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    world.add(2)

    async def work(core: Core) -> None:
        sides = [Side(core, world.objects) for _ in range(5)]
        with world.held_back():
            for side in sides:
                side.plan(0)
                side.want(0, 1)
            await settle()
        await until(lambda: all(sorted(side.granted) == [0, 1] for side in sides), "all have both")
        assert sorted(world.store.reads) == [("s3://fake/0", 0), ("s3://fake/0", CHUNK_BYTES)]
        buffers = {
            (c, b)
            for side in sides
            for g in side.all(protocol.Grants)
            for c, b in zip(g.chunks, g.buffers, strict=True)
        }
        assert len(buffers) == 2

    world.run(work)


def test_demand_comes_before_prefetch(tmp_path: Path) -> None:
    world = World(tmp_path, 40)
    world.add(36, 1)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        with world.held_back():
            side.plan(0)
            await settle()  # all connections are busy with the plan
            busy = len(world.store.reads)
            side.want(36)
            await settle()
            assert len(world.store.reads) == busy
        await until(lambda: side.granted == [36], "the demanded chunk is here")
        assert world.store.reads[busy] == ("s3://fake/1", 0)

    world.run(work)


def test_prefetch_ends_where_room_ends_and_pins(tmp_path: Path) -> None:
    """What is left of an epoch in RAM is found by the next, however the order changes."""
    world = World(tmp_path, 10)
    world.add(*[1] * 20)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        for epoch, order in enumerate((range(20), range(19, -1, -1), (*range(0, 20, 2), *range(1, 20, 2)))):
            before = len(world.store.reads)
            side.plan(*order)
            for position, chunk in enumerate(order):
                side.want(chunk)
                await until(lambda chunk=chunk: side.granted[-1:] == [chunk], "it is granted")  # type: ignore[misc]
                side.release(chunk)
                side.say(protocol.Advance(position + 1))
            await settle()
            fetched = len(world.store.reads) - before
            assert fetched == 20 if epoch == 0 else 10 <= fetched <= 13

    world.run(work)


def test_failed_prefetch_is_not_tried_again_until_wanted(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(1, 1, 1)
    world.store.errors["s3://fake/1"] = ObjectMissingError("s3://fake/1 is gone")

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(0, 1, 2)
        await settle()
        assert sorted(world.store.reads) == [(f"s3://fake/{number}", 0) for number in range(3)]
        assert side.sent == []
        side.want(1)
        await until(lambda: len(side.all(protocol.Failed)) == 1, "the demand fails")
        (failed,) = side.all(protocol.Failed)
        assert (failed.name, failed.message) == ("ObjectMissingError", "s3://fake/1 is gone")
        del world.store.errors["s3://fake/1"]
        side.want(1)
        await until(lambda: side.granted == [1], "the next demand succeeds")

    world.run(work)


def test_a_failure_is_told_to_those_who_want_the_chunk_only(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(1)
    world.store.errors["s3://fake/0"] = StoreUnavailableError("no answer")

    async def work(core: Core) -> None:
        one, two, three = (Side(core, world.objects) for _ in range(3))
        with world.held_back():
            one.want(0)
            two.want(0, urgent=False)
            three.plan(0)
            await settle()
        await until(lambda: bool(one.all(protocol.Failed) and two.all(protocol.Failed)), "both hear of it")
        assert three.sent == []
        assert len(world.store.reads) == 1

    world.run(work)


def test_leases_are_recalled_for_a_demand_and_not_for_a_wish(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.add(4)

    async def work(core: Core) -> None:
        one, two = Side(core, world.objects), Side(core, world.objects)
        one.want(0, 1)
        await until(lambda: len(one.granted) == 2, "the arena is full")
        two.want(2, urgent=False)
        await settle()
        assert one.recalled == []
        two.want(2)
        await until(lambda: len(one.recalled) == 1, "one lease is asked back")
        # It is in use; so the other one is asked for.
        one.say(protocol.Pinned(one.recalled))
        await until(lambda: len(one.recalled) == 2, "the other lease is asked back")
        one.release(one.recalled[1])
        await until(lambda: two.granted == [2], "its room was used")

    world.run(work)


def test_a_recalled_chunk_is_not_granted_past_the_one_who_waits(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.add(4)

    async def work(core: Core) -> None:
        one, two, waiting = (Side(core, world.objects) for _ in range(3))
        one.want(0, 1)
        two.want(0, 1)
        await until(lambda: len(one.granted) == len(two.granted) == 2, "both have both")
        waiting.want(2)
        await until(lambda: len(one.recalled) == 1, "a lease is asked back")
        chunk = one.recalled[0]
        one.release(chunk)
        one.want(chunk)  # would keep the chunk in use for ever, if the two took turns
        await settle()
        assert len(one.granted) == 2
        two.release(chunk)
        await until(lambda: waiting.granted == [2], "the one who waited has the room")
        assert len(one.granted) == 2

    world.run(work)


def test_leases_end_with_the_consumer(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.add(4)

    async def work(core: Core) -> None:
        one, two = Side(core, world.objects), Side(core, world.objects)
        one.want(0, 1)
        await until(lambda: len(one.granted) == 2, "the arena is full")
        two.want(2, 3)
        await settle()
        core.disconnect(one.state)
        await until(lambda: sorted(two.granted) == [2, 3], "the room is free")

    world.run(work)


def test_messages_that_make_no_sense(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.add(1)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        for message in (
            protocol.Want([1], 1, True),
            protocol.Want([-1], 1, True),
            protocol.SetPlan([1], 0, False, 0),
            protocol.GetIndexes(1, [5]),
            protocol.Hello(protocol.VERSION, 1, "", {}),
        ):
            with pytest.raises(ServiceError):
                side.say(message)

    world.run(work)


def test_eviction_from_disk_spares_live_plans(tmp_path: Path) -> None:
    """With a quota of four chunks: what no live plan names makes room, longest without a plan first."""
    world = World(tmp_path, 16, disk_bytes=4 * (CHUNK_BYTES + 4096))
    world.add(2, 2, 2, 2)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)

        def on_disk() -> set[int]:
            keys = {(number, index): side.state.entries[number].key(index) for number in range(4) for index in (0, 1)}
            here = [number for (number, _), key in keys.items() if core.disk.contains(key)]
            return set(here) if len(here) == 2 * len(set(here)) else set()

        side.plan(0)
        await until(lambda: on_disk() == {0}, "the first is on disk")
        side.plan(1)
        await until(lambda: on_disk() == {0, 1}, "the second is on disk")
        side.plan(1, 2)
        await until(lambda: on_disk() == {1, 2}, "the third took the room of the first")
        side.plan(1, 2, 3)
        await settle()
        assert on_disk() == {1, 2}

    world.run(work)


def test_what_an_earlier_service_left_on_disk_makes_room(tmp_path: Path) -> None:
    world = World(tmp_path, 16, disk_bytes=4 * (CHUNK_BYTES + 4096))
    world.add(4, 4)

    async def fill(core: Core) -> None:
        Side(core, world.objects).plan(0)
        await until(lambda: len(core.disk.keys()) == 4, "the disk is full")

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(1)
        new = {side.state.entries[1].key(index) for index in range(4)}
        await until(lambda: {*core.disk.keys()} == new, "the second took the room of the first")

    world.run(fill)
    world.run(work)


def test_a_write_whose_room_another_took_is_tried_again(tmp_path: Path) -> None:
    """Two begin at once: one sees the room that the other has just made for itself, and makes none."""
    world = World(tmp_path, 16, disk_bytes=8 * (CHUNK_BYTES + 4096))
    world.add(2)

    async def work(core: Core) -> None:
        write, tried = core.disk.write, set[ChunkKey]()

        def find_it_taken_once(key: ChunkKey, buffer: memoryview, length: int) -> bool:
            if key in tried:
                return write(key, buffer, length)
            tried.add(key)
            return False

        core.disk.write = find_it_taken_once  # type: ignore[method-assign]
        Side(core, world.objects).plan(0)
        await until(lambda: len(core.disk.keys()) == 2, "both are on disk")

    world.run(work)


def test_sources(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(1, 1)

    async def work(core: Core) -> None:
        side, other = Side(core, world.objects), Side(core, world.objects)
        side.plan(0, 1)
        await settle()
        side.want(0)
        await until(lambda: side.granted == [0], "it is granted")
        side.release(0)
        side.want(0)
        other.plan(0, 1)
        other.want(0)
        await until(lambda: len(side.granted) == 2 and len(other.granted) == 1, "it is granted again")
        names = [protocol.SOURCES[source] for grants in side.all(protocol.Grants) for source in grants.sources]
        assert names == ["remote", "ram"]
        assert [protocol.SOURCES[s] for g in other.all(protocol.Grants) for s in g.sources] == ["ram"]

    world.run(work)


def test_a_want_that_crosses_its_grant_and_a_recall(tmp_path: Path) -> None:
    """The consumer takes the answer to its latest want only, so a lease that answered an earlier one is nobody's."""
    world = World(tmp_path, 2)
    world.add(4)

    async def work(core: Core) -> None:
        one, waiting = Side(core, world.objects), Side(core, world.objects)
        one.want(0, 1, urgent=False)
        await until(lambda: len(one.granted) == 2, "the arena is full")
        waiting.want(2)
        await until(lambda: len(one.recalled) == 1, "a lease is asked back")
        one.want(one.recalled[0])  # sent before the grant and the recall arrived, which the consumer ignores then
        await until(lambda: waiting.granted == [2], "the recalled lease has ended")
        other = 1 - one.recalled[0]
        one.release(other)
        await until(lambda: len(one.granted) == 3, "the later want is answered")

    world.run(work)


def test_a_slow_disk_costs_the_cache_and_not_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 2, disk_bytes=64 << 20)
    world.add(6)
    gate = Gate()

    async def work(core: Core) -> None:
        write = core.disk.write
        monkeypatch.setattr(core.disk, "write", lambda *arguments: (gate.wait(), write(*arguments))[1])
        side = Side(core, world.objects)
        try:
            for chunk in range(6):
                side.want(chunk)
                await until(lambda chunk=chunk: side.granted[-1:] == [chunk], "it is granted")  # type: ignore[misc]
                side.release(chunk)
        finally:
            gate.set()
        assert side.node()["writes_given_up"] + side.node()["writes_skipped"] >= 4

    world.run(work)
