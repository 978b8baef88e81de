"""What the core keeps over epochs, and what it fetches again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastload import protocol
from fastload.cache import DiskTier
from fastload.cache.policy import PolicyName
from fastload.errors import ServiceError
from fastload.service.core import Core
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Side, World, settle, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)
OBJECTS, CHUNKS = 16, 4


def keep(side: Side, *objects: int, policy: PolicyName = "pin") -> None:
    side.say(protocol.Keep(list(objects), policy))


async def read(side: Side, order: Sequence[int], epoch: int) -> None:
    """One object after the other, each as a window of its own."""
    side.say(protocol.SetPlan(list(order), epoch, False, 0))
    for number, each in enumerate(order):
        chunks = [each * CHUNKS + index for index in range(CHUNKS)]
        before = len(side.granted)
        side.want(*chunks)
        await until(lambda before=before: len(side.granted) == before + CHUNKS, "all are granted")  # type: ignore[misc]
        await settle()  # what was fetched is written
        side.release(*chunks)
        side.say(protocol.Advance((number + 1) * CHUNKS))


async def fetched_by_epoch(core: Core, world: World, policy: PolicyName, epochs: int) -> list[int]:
    side, counts = Side(core, world.objects), []
    keep(side, *range(OBJECTS), policy=policy)
    for epoch in range(epochs):
        order = list(range(OBJECTS))
        random.Random(epoch).shuffle(order)
        before = len(world.store.reads)
        await read(side, order, epoch)
        counts.append(len(world.store.reads) - before)
        side.say(protocol.SetPlan([0], epoch + 1, False, 0))  # the beginning of the next, as loaders say it
        await settle()
    return counts


def half(tmp_path: Path, buffer_count: int = 16) -> World:
    """A disk for half the data, and an arena for little more than what is being read."""
    world = World(tmp_path, buffer_count, disk_bytes=OBJECTS * CHUNKS // 2 * FILE_BYTES)
    world.add(*[CHUNKS] * OBJECTS)
    return world


def test_pins_hit_their_share_while_they_move_on(tmp_path: Path) -> None:
    world = half(tmp_path)
    data = OBJECTS * CHUNKS

    async def work(core: Core) -> None:
        fetched = await fetched_by_epoch(core, world, "pin", 6)
        assert fetched[0] == data
        # The beginning of the next epoch is fetched at the end of one, so some are counted an epoch early.
        assert all(count <= data // 2 + 6 for count in fetched[2:]), fetched
        assert sum(fetched[2:]) <= 4 * (data // 2 + 2), fetched
        side = next(iter(core.consumers))
        # What is to be on disk is no figure: the test is that of the two together.
        pinned = [core._shared.arcs.belongs_on_disk(entry, index) for entry in side.entries for index in range(CHUNKS)]
        on_disk = [core.disk.contains(entry.key(index)) for entry in side.entries for index in range(CHUNKS)]
        assert sum(on_disk) == data // 2
        assert sum(each and not here for each, here in zip(pinned, on_disk, strict=True)) <= 8
        by_object = [sum(on_disk[first : first + CHUNKS]) for first in range(0, data, CHUNKS)]
        assert sum(count in (0, CHUNKS) for count in by_object) <= 5  # most have a share, where it was all or none

    world.run(work)


@pytest.mark.parametrize("policy", ["lru", "sieve"])
def test_policies_that_see_no_order_keep_less(tmp_path: Path, policy: PolicyName) -> None:
    world = half(tmp_path)

    async def work(core: Core) -> None:
        fetched = await fetched_by_epoch(core, world, policy, 4)
        data = OBJECTS * CHUNKS
        assert all(data // 2 <= count <= data + 8 for count in fetched[1:]), fetched
        assert sum(fetched[1:]) > 3 * data * 0.55

    world.run(work)


def test_what_is_claimed_stays_while_a_plan_names_something_else(tmp_path: Path) -> None:
    world = World(tmp_path, CHUNKS + 1, disk_bytes=CHUNKS * FILE_BYTES)
    world.add(CHUNKS, CHUNKS)

    async def work(core: Core) -> None:
        side, other = Side(core, world.objects), Side(core, world.objects)

        def on_disk(number: int) -> int:
            entry = side.state.entry(number)
            return sum(core.disk.contains(entry.key(index)) for index in range(CHUNKS))

        keep(side, 0)
        await read(side, [0], 0)
        side.plan()
        await read(other, [1], 0)
        assert (on_disk(0), on_disk(1)) == (CHUNKS, 0)
        keep(side)
        await read(side, [0], 0)  # in between, so that the other has to be fetched again
        side.plan()
        await read(other, [1], 1)
        assert on_disk(1) >= CHUNKS - 1
        kept = side.state.entries
        core.disconnect(other.state)
        core.disconnect(side.state)
        assert not any(entry.plan_count for entry in kept)

    world.run(work)


def test_ram_and_disk_hold_different_chunks(tmp_path: Path) -> None:
    """A quarter of the data on disk and an arena of half: together they hit more than either."""
    world = World(tmp_path, OBJECTS * CHUNKS // 2, disk_bytes=OBJECTS * CHUNKS // 4 * FILE_BYTES)
    world.add(*[CHUNKS] * OBJECTS)
    data = OBJECTS * CHUNKS

    async def work(core: Core) -> None:
        fetched = await fetched_by_epoch(core, world, "pin", 5)
        assert sum(fetched[2:]) / 3 <= 0.55 * data, fetched  # the arena alone would leave more than half

    world.run(work)


def belady(batches: list[list[int]], capacity: int) -> int:
    """How many loads a cache needs that sees all of the order, where a batch is read all at once."""
    held: set[int] = set()
    loads = 0
    for number, batch in enumerate(batches):
        loads += len(set(batch) - held)
        held |= set(batch)

        def next_use(chunk: int, number: int = number) -> int:
            later = (at for at in range(number + 1, len(batches)) if chunk in batches[at])
            return next(later, len(batches))

        while len(held) > capacity:
            held.remove(max(sorted(held - set(batch)), key=next_use))
    return loads


@pytest.mark.parametrize("foresees", [True, False])
def test_ram_over_disk_keeps_what_is_needed_soonest(tmp_path: Path, foresees: bool) -> None:
    """Chunks are read many times, in a random order that is told ahead; all of them are on disk."""
    chunks, capacity = 24, 12
    world = World(tmp_path, capacity, disk_bytes=2 * chunks * FILE_BYTES)
    world.add(*[1] * chunks)
    random_batches = random.Random(1)
    batches = [random_batches.sample(range(chunks), 2) for _ in range(300)]
    uses = [chunk for batch in batches for chunk in batch]

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(*range(chunks), warm=True)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "all is on disk")
        before = side.node()["disk_read_chunks"]
        for number, batch in enumerate(batches):
            if foresees:
                told = 2 * number + 4 * chunks
                more = uses[told : told + 2] if number else uses[: told + 2]
                side.say(protocol.Uses(told if number else 0, np.array(more, "<i4").tobytes()))
            granted = len(side.granted)
            side.want(*batch)
            await until(lambda granted=granted: len(side.granted) == granted + 2, "both are granted")  # type: ignore[misc]
            side.say(protocol.Advance(2 * (number + 1)))
            side.release(*batch)
        loads, best = side.node()["disk_read_chunks"] - before, belady(batches, capacity)
        if foresees:
            assert loads <= best * 1.03 + capacity, (loads, best)
        else:
            assert loads > best * 1.5, (loads, best)

    world.run(work)


def test_uses_of_no_chunk_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    world.add(2)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Uses(0, np.array([5], "<i4").tobytes()))  # there is no plan any more
        side.plan(0, warm=True)
        for wrong in (2, -1):
            with pytest.raises(ServiceError, match="position"):
                side.say(protocol.Uses(0, np.array([wrong], "<i4").tobytes()))

    world.run(work)


def test_uses_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """Whoever says so is cut off; nothing else would do with what was said after it."""
    world = World(tmp_path, 8)
    world.add(4)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(0, warm=True)
        with pytest.raises(ServiceError, match="positions in 3 bytes, not four for each"):
            side.say(protocol.Uses(0, b"abc"))
        side.say(protocol.Uses(1 << 62, b"\0\0\0\0"))
        with pytest.raises(ServiceError, match="Expected `int` <= 4611686018427387904"):
            protocol.from_consumer(protocol.frame(protocol.Uses(1 << 63, b""))[4:])

    world.run(work)
