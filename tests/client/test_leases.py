"""The consumer's table of leases: what crosses on the way is never used, and whoever waits gets something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastload.cache import Arena, ArenaView
from fastload.client.leases import LeaseTable, MappedArena
from fastload.errors import ObjectMissingError

PAGE = 4096


@pytest.fixture
def arena() -> Iterator[MappedArena]:
    owner = Arena(8 * PAGE, PAGE)
    view = ArenaView(owner.fd, 8 * PAGE)
    yield MappedArena(view, PAGE)
    view.close()
    owner.close()


def test_wants_are_sent_once(arena: MappedArena) -> None:
    table = LeaseTable()
    assert table.to_ask([1, 2], urgent=False) == ([1, 2], 1)
    assert table.to_ask([1, 2], urgent=False)[0] == []
    assert table.to_ask([2, 3], urgent=True) == ([2, 3], 2)  # more urgent than before
    assert table.grant(2, 2, arena, 0, 0)
    assert table.to_ask([1, 2, 3], urgent=True) == ([1], 3)


def test_a_grant_that_crosses_a_release_is_not_used(arena: MappedArena) -> None:
    table = LeaseTable()
    table.to_ask([1], urgent=True)
    assert table.release([1]) == [1]
    assert not table.grant(1, 1, arena, 0, 0)
    table.to_ask([1], urgent=True)
    assert not table.grant(1, 1, arena, 0, 0)
    assert table.grant(1, 2, arena, 3, 0)


def test_a_grant_is_pinned_for_the_one_who_waits(arena: MappedArena) -> None:
    table = LeaseTable()
    table.to_ask([1, 2], urgent=True)
    waiter = table.add_waiter([1, 2])
    table.grant(1, 1, arena, 0, 0)
    assert table.recall([1]) == ([], [1])
    assert set(waiter.got) == {1}
    # The second is not: one is enough to go on, and what is not in use has to be given back.
    table.grant(2, 1, arena, 1, 0)
    assert table.recall([2]) == ([2], [])
    table.remove_waiter(waiter)
    assert table.unpin(waiter.got) == [1]
    assert table.counts() == {"leased": 0, "pinned": 0, "asked": 0}


def test_a_recalled_lease_takes_no_new_pins(arena: MappedArena) -> None:
    table = LeaseTable()
    table.to_ask([1], urgent=True)
    table.grant(1, 1, arena, 0, 0)
    first = table.add_waiter([1])
    table.recall([1])
    second = table.add_waiter([1])
    assert set(first.got) == {1}
    assert second.got == {}
    assert table.unpin(first.got) == [1]
    assert table.to_ask([1], urgent=True)[0] == [1]


def test_releasing_leaves_what_others_use_or_wait_for(arena: MappedArena) -> None:
    table = LeaseTable()
    table.to_ask([1, 2], urgent=True)
    table.grant(1, 1, arena, 0, 0)
    holder = table.add_waiter([1])
    waiting = table.add_waiter([2])
    assert table.release([1, 2]) == []
    assert table.unpin(holder.got) == [1]
    assert table.grant(2, 1, arena, 1, 0)
    assert set(waiting.got) == {2}


def test_failures_are_told_once(arena: MappedArena) -> None:
    table = LeaseTable()
    table.to_ask([1], urgent=True)
    assert not table.fail(1, 99, ObjectMissingError("not ours"))
    assert table.fail(1, 1, ObjectMissingError("gone"))
    assert str(table.take_failure([1, 2])) == "gone"
    assert table.take_failure([1, 2]) is None
    assert table.to_ask([1], urgent=True)[0] == [1]


@pytest.mark.parametrize("lost", [False, True])
def test_an_arena_of_the_past(arena: MappedArena, lost: bool) -> None:
    """Leases outlive a dead service; those of one that lives and dropped us end."""
    table = LeaseTable()
    table.to_ask([1, 2, 3], urgent=True)
    table.grant(1, 1, arena, 0, 0)
    table.grant(2, 1, arena, 1, 0)
    held = table.add_waiter([1]).got
    table.leave(arena, lost=lost)
    assert table.counts()["leased"] == (1 if lost else 2)
    assert table.recall([2]) == ([], [])  # another service knows nothing of it
    assert table.ask_again() == [([3], 2, True)]
    assert table.release([2]) == []
    assert arena.view.array.size > 0
    assert table.unpin(held) == []
    table.release([1])
    assert arena.lease_count == 0
    assert arena.view.array.size == 0  # unmapped with its last lease
