"""Decisions on small worlds: what is loaded, what goes for it, and what never does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.cache.policy import PolicyName
from fastload.service.deciding import buffers, scheduler
from fastload.service.deciding.buffers import BufferTable
from fastload.service.deciding.scheduler import (
    Action,
    Candidate,
    Capacity,
    Drop,
    Load,
    Need,
    RecallChunk,
    decide,
    upcoming,
)
from fastload.service.state import ChunkState, ObjectEntry, Plan, WriteState
from fastload.store.types import ObjectInfo

CHUNK = 1 << 16


def entry(name: str, chunk_count: int) -> ObjectEntry:
    return ObjectEntry(ObjectInfo(name, chunk_count * CHUNK), name.encode().ljust(16), CHUNK, {})


def put(table: BufferTable, of: ObjectEntry, index: int, *, write: WriteState = WriteState.NONE) -> int:
    """A resident chunk in the next free buffer, let go of just now."""
    chunk = of.chunk(index)
    chunk.state, chunk.write = ChunkState.RESIDENT, write
    table.place(chunk, table.free()[-1])
    return chunk.buffer


def begin(table: BufferTable, *objects: ObjectEntry, cursor: int = 0) -> Plan:
    plan = Plan(objects, "", 0, cursor)
    for each in plan.objects():
        each.plan_count += 1
    table.add_plan(plan)
    return plan


def nowhere(of: ObjectEntry, index: int) -> bool:
    return False


def shown(actions: list[Action]) -> list[object]:
    """Actions in short: ("load", name, index), ("drop", buffer), ("recall", buffer)."""
    found: list[object] = []
    for action in actions:
        match action:
            case Load(candidate, _):
                found.append(("load", candidate.entry.info.url, candidate.index))
            case Drop(buffer):
                found.append(("drop", buffer))
            case RecallChunk(buffer):
                found.append(("recall", buffer))
    return found


def demand(of: ObjectEntry, index: int) -> Candidate:
    return Candidate(of, index, Need.DEMANDED, 0, False)


def test_nearest_first_over_all_plans() -> None:
    table = BufferTable(16)
    a, b = entry("a", 3), entry("b", 3)
    plans = [begin(table, a, b, cursor=1), begin(table, b)]
    found = decide(upcoming(plans, 100, nowhere), table, Capacity(0, 4))
    assert shown(found) == [("load", "a", 1), ("load", "b", 0), ("load", "a", 2), ("load", "b", 1)]


def test_the_order_in_which_chunks_go() -> None:
    table = BufferTable(6)
    old, spent, later = entry("old", 2), entry("spent", 2), entry("later", 2)
    order = [put(table, old, 0), put(table, old, 1), put(table, spent, 0), put(table, spent, 1)]
    near, far = put(table, later, 0), put(table, later, 1)
    begin(table, spent, later, cursor=2)
    wanted = entry("wanted", 6)
    found = decide((demand(wanted, index) for index in range(6)), table, Capacity(0, 6))
    dropped = [action.buffer for action in found if isinstance(action, Drop)]
    # No plan: the oldest first. Used up: the latest first. To be used: the farthest first.
    assert dropped == [order[0], order[1], order[3], order[2], far, near]


@pytest.mark.parametrize(("policy", "order"), [("lru", [2, 0, 1]), ("sieve", [1, 2, 0])])
def test_what_is_read_in_an_unknown_order_goes_by_its_policy(policy: PolicyName, order: list[int]) -> None:
    table = BufferTable(3)
    covered = entry("covered", 3)
    covered.policy, covered.plan_count = policy, 1
    placed = [put(table, covered, index) for index in range(3)]
    table.use(covered.chunks[0])
    for index in (2, 0, 1):
        table.touch(covered.chunks[index])
    assert table.by_usefulness([buffers.IDLE])[0] == [placed[index] for index in order]


def test_prefetch_takes_only_what_is_needed_later() -> None:
    table = BufferTable(2)
    plan_object = entry("plan", 10)
    begin(table, plan_object)
    put(table, plan_object, 0)
    far = put(table, plan_object, 9)
    plan = next(iter(table._positions))
    found = decide(upcoming([plan], 100, nowhere), table, Capacity(0, 8))
    # Chunk 2 would have to take the room of chunk 0, which is needed before it.
    assert shown(found) == [("drop", far), ("load", "plan", 1)]


def test_prefetch_beyond_its_distance_displaces_nothing() -> None:
    table = BufferTable(2)
    plan_object = entry("plan", 10)
    plan = begin(table, plan_object)
    put(table, plan_object, 0)
    put(table, plan_object, 9)
    assert shown(decide(upcoming([plan], 1, nowhere), table, Capacity(0, 8))) == []
    assert len(decide(upcoming([plan], 2, nowhere), table, Capacity(0, 8))) == 2


def test_what_is_in_use_or_on_its_way_stays() -> None:
    table = BufferTable(4)
    other = entry("other", 4)
    queued, running = put(table, other, 0, write=WriteState.QUEUED), put(table, other, 1, write=WriteState.RUNNING)
    loading = other.chunk(2)
    loading.state = ChunkState.LOADING
    table.place(loading, table.free()[-1])
    leased = other.chunk(3)
    leased.state = ChunkState.RESIDENT
    leased.lessees = {("somebody", 3): 0}  # type: ignore[dict-item]
    table.place(leased, table.free()[-1])
    wanted = entry("wanted", 3)
    demands = [demand(wanted, index) for index in range(3)]
    # Where the disk is slow a write that has not begun is given up; the rest is asked back, or waited for.
    assert shown(decide(demands, table, Capacity(0, 3))) == [
        ("drop", queued),
        ("load", "wanted", 0),
        ("recall", leased.buffer),
    ]
    assert shown(decide(demands[:1], table, Capacity(0, 3), coming=2, disk_is_quick=True)) == []
    assert shown(decide(demands[:1], table, Capacity(0, 3), disk_is_quick=True)) == [("recall", leased.buffer)]
    wants = [Candidate(wanted, index, Need.WANTED, 0, False) for index in range(2)]
    assert shown(decide(wants, table, Capacity(0, 3))) == []
    assert table.status[running] == buffers.WRITING


def test_where_a_slow_disk_has_too_much_to_write_what_is_fetched_ahead_finds_room() -> None:
    table = BufferTable(4)
    spent, later = entry("spent", 3), entry("later", 1)
    queued = [put(table, spent, index, write=WriteState.QUEUED) for index in range(3)]
    put(table, later, 0, write=WriteState.QUEUED)
    begin(table, spent, later, cursor=3)
    wanted = entry("wanted", 8)
    ahead = [Candidate(wanted, index, Need.PREFETCHED, 0, False) for index in range(8)]
    some = decide(ahead, table, Capacity(0, 8), writes_excess=2)
    assert [action.buffer for action in some if isinstance(action, Drop)] == [queued[2], queued[1]]
    # What will be used keeps its room, however many there are; all do where the disk is quick, or the room is not near.
    assert len(decide(ahead, table, Capacity(0, 8), writes_excess=8)) == 2 * 3
    assert decide(ahead, table, Capacity(0, 8), writes_excess=8, disk_is_quick=True) == []
    far = [replace(each, may_displace=False) for each in ahead]
    assert decide(far, table, Capacity(0, 8), writes_excess=8) == []


def test_no_room_for_what_is_behind_a_candidate_without_a_connection() -> None:
    table = BufferTable(2)
    a = entry("a", 4)
    plan = begin(table, a)
    on_disk = {2, 3}
    found = decide(upcoming([plan], 100, lambda of, index: index in on_disk), table, Capacity(4, 0))
    assert found == []  # chunks 0 and 1 keep the room although nothing can fetch them now
    found = decide(upcoming([plan], 100, lambda of, index: index in {1, 2, 3}), table, Capacity(4, 0))
    assert shown(found) == [("load", "a", 1)]


def test_a_plan_remembers_where_it_was() -> None:
    table = BufferTable(8)
    a, b = entry("a", 3), entry("b", 0)
    plan = begin(table, a, b, a)  # an empty object, and one that comes twice
    for index in range(3):
        put(table, a, index)
    assert list(plan.missing()) == []
    assert plan.frontier == plan.chunk_count == 6
    chunk = a.chunks[1]
    table.clear(chunk)
    chunk.state = ChunkState.ABSENT
    plan.dropped(a, 1)
    assert [position for position, _, _ in plan.missing()] == [1, 4]
    plan.advance(2)
    assert [position for position, _, _ in plan.missing()] == [4]
    assert plan.position(a, 1) == 4


def test_used_buffers_are_used_again_before_fresh_ones() -> None:
    table = BufferTable(8)
    a = entry("a", 8)
    assert [put(table, a, index) for index in range(3)] == [0, 1, 2]
    table.clear(a.chunk(1))
    table.clear(a.chunk(0))
    assert sorted(put(table, a, index) for index in range(2)) == [0, 1]
    assert put(table, a, 3) == 3


def test_a_stranded_buffer_is_nobodys() -> None:
    table = BufferTable(2)
    a = entry("a", 4)
    first, hung = a.chunk(0), put(table, a, 1, write=WriteState.HUNG)
    put(table, a, 0)
    lost = table.quarantine(first)
    assert {lost, hung} == {0, 1}
    assert table.quarantined_count == 2
    assert decide([demand(a, 2)], table, Capacity(1, 1)) == []
    table.release(lost)
    assert shown(decide([demand(a, 2)], table, Capacity(1, 1))) == [("load", "a", 2)]


def stored(at: str, index: int, chunk_count: int = 200) -> Candidate:
    """Demanded of an object at the endpoint `at`."""
    found = ENTRIES.setdefault(
        at, ObjectEntry(ObjectInfo(f"s3://{at}/x", chunk_count * CHUNK), at.encode().ljust(16), CHUNK, {}, at)
    )
    return demand(found, index)


ENTRIES: dict[str, ObjectEntry] = {}


def free_at(**free: int) -> Capacity:
    return Capacity(0, 8, lambda endpoint: free.get(endpoint, 0))


def test_a_store_that_hangs_holds_up_no_other() -> None:
    table = BufferTable(300)
    waiting = [stored("hangs", index) for index in range(200)]
    found = decide([*waiting, stored("answers", 0)], table, free_at(answers=8))
    assert shown(found) == [("load", "s3://answers/x", 0)]


def test_what_waits_for_a_store_that_hangs_keeps_no_room_from_what_is_demanded_of_another() -> None:
    table, resident = BufferTable(4), entry("resident", 4)
    held = [put(table, resident, index) for index in range(4)]
    waiting = [stored("hangs", index) for index in range(10)]
    found = decide([*waiting, stored("answers", 0)], table, free_at(answers=8))
    assert shown(found)[:2] == [("drop", held[3]), ("load", "s3://answers/x", 0)]
    ahead = Candidate(stored("answers", 1).entry, 1, Need.PREFETCHED, 1, False, begin(table, entry("p", 1)))
    assert shown(decide([*waiting, ahead], table, free_at(answers=8))) == []


def test_places_that_are_reserved_are_not_for_what_is_fetched_ahead() -> None:
    table = BufferTable(16)
    ahead, wanted = entry("ahead", 4), entry("wanted", 4)
    candidates = [
        *(Candidate(wanted, index, Need.WANTED, index, False) for index in range(2)),
        *upcoming([begin(table, ahead)], 100, nowhere),
    ]
    found = decide(candidates, table, Capacity(0, 16, lambda endpoint: 6, lambda endpoint: 3))
    assert shown(found) == [("load", "wanted", 0), ("load", "wanted", 1), ("load", "ahead", 0)]


def test_no_order_of_usefulness_is_made_while_nothing_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most ticks with a busy store and a full arena are so, and over a large one it takes half a millisecond."""
    table, resident = BufferTable(2), entry("resident", 2)
    for index in range(2):
        put(table, resident, index)
    plan = begin(table, entry("ahead", 100))
    monkeypatch.setattr(table, "by_usefulness", lambda *arguments: pytest.fail("an order was made"))
    candidates = list(upcoming([plan], 100, nowhere))
    assert decide(candidates, table, Capacity(4, 8, lambda endpoint: 0)) == []
    assert decide(candidates[:3], table, Capacity(4, 8, lambda endpoint: 0)) == []


@pytest.mark.parametrize("waiting", range(25, 40))
def test_how_many_are_passed_over_for_one_that_can_start(waiting: int) -> None:
    table = BufferTable(300)
    ahead = [("hangs", index) for index in range(waiting)] + [("answers", 0)]
    candidates = [Candidate(stored(at, index).entry, index, Need.PREFETCHED, index, False) for at, index in ahead]
    found = decide(candidates, table, free_at(answers=8))
    assert shown(found) == ([("load", "s3://answers/x", 0)] if waiting <= 32 else [])


wants = st.lists(
    st.tuples(
        st.sampled_from(Need), st.sampled_from(["one", "other"]), st.integers(0, 50), st.booleans(), st.booleans()
    ),
    max_size=120,
)


@settings(deadline=None)
@given(wants, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.lists(st.booleans(), max_size=6))
def test_what_is_decided_does_not_hang_on_that(
    wanted: list[tuple[Need, str, int, bool, bool]], disk: int, one: int, other: int, held: list[bool]
) -> None:
    table, resident = BufferTable(8), entry("resident", 8)
    for index, is_queued in enumerate(held):
        put(table, resident, index, write=WriteState.QUEUED if is_queued else WriteState.NONE)
    objects = {name: stored(name, 0).entry for name in ("one", "other")}
    candidates = [
        Candidate(objects[name], index, need, index, on_disk, may_displace=displaces)
        for need, name, index, on_disk, displaces in sorted(wanted)
    ]

    def decided() -> list[Action]:
        return decide(iter(candidates), table, Capacity(disk, 4, lambda endpoint: one if "one" in endpoint else other))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_if_any_can_start", lambda candidates, capacity: candidates)
        expected = decided()
    assert decided() == expected
