"""How much of the arena is touched, and when."""

from __future__ import annotations

from pathlib import Path

from fastload.cache import Arena
from fastload.config import MIB
from fastload.service.core import Core
from fastload.service.populate import Populator
from tests.service.helpers import eventually
from tests.service.world import Side, World, until


def test_only_a_look_ahead_is_touched() -> None:
    arena = Arena(64 * MIB, MIB)
    populator = Populator(arena, look_ahead_bytes=8 * MIB)
    try:
        eventually(lambda: arena.touched_bytes == 8 * MIB, "the look-ahead is touched")
        populator.used(3)
        eventually(lambda: arena.touched_bytes == 11 * MIB, "it moved with the use")
        populator.used(2)
        # Use that was quicker has touched what it used: populating goes on beyond that.
        populator.used(40)
        eventually(lambda: arena.touched_bytes == (11 + 8) * MIB, "it moved on")
        populator.used(60)
        eventually(lambda: arena.touched_bytes == (11 + 8 + 4) * MIB, "the end is touched")
    finally:
        populator.close()
        arena.close()


def test_an_end_before_the_end() -> None:
    arena = Arena(64 * MIB, MIB)
    for look_ahead in (0, 64 * MIB):
        Populator(arena, look_ahead_bytes=look_ahead).close()
    arena.close()


def test_the_figure(tmp_path: Path) -> None:
    world = World(tmp_path, 10)
    world.add(3)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.want(0, 1, 2)
        await until(lambda: len(side.granted) == 3, "they are granted")
        await until(lambda: core._stats(side.state)["node"]["arena_touched_bytes"] == core.arena.byte_count, "touched")

    world.run(work)
