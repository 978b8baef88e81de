"""The next use of what lies in the arena, by many short plans that come and go: against looking at each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.service.core import Core
from fastload.service.deciding.buffers import BufferTable
from fastload.service.replay import ReplayPlan
from fastload.service.state import NEVER, Chunk, ChunkState, ObjectEntry, Plan
from fastload.store.types import ObjectInfo
from tests.service import world

BUFFERS, OBJECTS, CHUNKS = 6, 3, 4


def entry(name: str) -> ObjectEntry:
    return ObjectEntry(ObjectInfo(f"s3://bucket/{name}", CHUNKS * 100, "etag"), name.encode().ljust(16), 100, {})


def expected(table: BufferTable, plans: list[Plan]) -> list[int]:
    """The slow twin: of each buffer's chunk, the nearest position ahead in any plan's sight."""
    found = [NEVER] * table.count
    for buffer, chunk in enumerate(table.chunks):
        if chunk is not None:
            found[buffer] = min(distance(plan, chunk) for plan in plans)
    return found


def distance(plan: Plan, chunk: Chunk) -> int:
    position = plan.position(chunk.entry, chunk.index)
    in_sight = position < plan.prefetched_to or not plan.is_blind
    return position - plan.cursor if position >= plan.cursor and in_sight else NEVER


class Arena:
    """A table, and what is done to it."""

    def __init__(self) -> None:
        self.table = BufferTable(BUFFERS)
        self.entries = [entry(str(number)) for number in range(OBJECTS)]
        self.told = Plan(self.entries[:2], "options", 0)
        self.table.add_plan(self.told)
        self.short: list[ReplayPlan] = []

    def chunk(self, number: int) -> Chunk:
        return self.entries[number // CHUNKS].chunk(number % CHUNKS)

    def begin(self, numbers: list[int]) -> None:
        steps = [(self.entries[number // CHUNKS], number % CHUNKS) for number in numbers]
        self.short.append(ReplayPlan(steps, "options", range(len(steps)), len(steps)))
        self.table.add_plan(self.short[-1])

    def load(self, number: int) -> None:
        chunk = self.chunk(number)
        if chunk.buffer >= 0:
            self.table.clear(chunk)
            chunk.state = ChunkState.ABSENT
        elif self.table.free_count:
            self.table.place(chunk, self.table.free()[-1])
            chunk.state = ChunkState.RESIDENT


numbers = st.integers(0, OBJECTS * CHUNKS - 1)
steps = st.one_of(
    st.tuples(st.just("begin"), st.lists(numbers, max_size=12)),
    st.tuples(st.just("load"), numbers),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("advance"), st.tuples(st.integers(0, 9), st.integers(0, 12), st.integers(0, 12))),
)


@settings(deadline=None)
@given(st.lists(steps, max_size=40))
def test_the_next_use_is_the_nearest_of_all_plans(does: list[tuple[str, object]]) -> None:
    arena = Arena()
    for what, value in does:
        match what, value:
            case "begin", list():
                arena.begin(value)
            case "load", int():
                arena.load(value)
            case "end", int() if arena.short:
                arena.table.remove_plan(arena.short.pop(value % len(arena.short)))
            case "advance", (int(which), int(cursor), int(sight)) if arena.short:
                plan = arena.short[which % len(arena.short)]
                plan.advance(cursor)
                plan.prefetched_to = sight
        found = arena.table.next_use()
        found[[chunk is None for chunk in arena.table.chunks]] = NEVER  # nobody asks for those
        assert found.tolist() == expected(arena.table, [arena.told, *arena.short])
    for plan in arena.short:
        arena.table.remove_plan(plan)
    assert not arena.table._short_plans._buffers
    assert not arena.table._short_plans._naming


def test_a_reader_that_goes_costs_nothing_of_what_the_arena_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the workers that come and go had all buffers looked through as it went."""
    here = world.World(tmp_path, 8)
    here.add(2)

    async def work(core: Core) -> None:
        side = world.Side(core, here.objects)
        side.want(0)
        await world.until(lambda: side.granted == [0], "it is granted")
        monkeypatch.setattr(
            core._table, "recompute_eviction_classes", lambda: pytest.fail("looked through all buffers")
        )
        core.disconnect(side.state)

    here.run(work)


def test_a_reader_more_costs_what_its_prediction_names_and_not_what_the_arena_holds() -> None:
    table, one = BufferTable(10_000), entry("one")
    for _ in range(3):
        table.add_plan(ReplayPlan([(one, 0), (one, 1)], "options", range(2), 2))
    assert table._positions == {}
    assert [len(buffers) for buffers in table._short_plans._buffers.values()] == [2, 2, 2]
