"""A limit for what is written to disk."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastload import protocol
from fastload.cache import CacheDirectory, DiskTier, limits
from fastload.service.core import Core
from fastload.service.fetching.rate_budget import RateBudget
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Side, World, settle, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)


@given(
    rate=st.integers(1, 1000),
    writes=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5000)), max_size=60),
)
def test_no_more_is_let_through_than_was_earned(rate: int, writes: list[tuple[int, int]]) -> None:
    budget, now, through, largest = RateBudget(rate, 0.0, 10.0), 0.0, 0, 0
    for pause_s, byte_count in writes:
        now += pause_s
        wait_s = budget.wait_s(now)
        is_through = budget.take(byte_count, now)
        assert is_through == (wait_s == 0)
        if is_through:
            through, largest = through + byte_count, max(largest, byte_count)
        else:
            assert RateBudget.take(_copy(budget), byte_count, now + wait_s + 1e-6)
    assert through <= rate * (now + 10) + largest


def _copy(budget: RateBudget) -> RateBudget:
    copy = RateBudget(0, 0.0, 10.0)
    copy.__dict__.update(budget.__dict__)
    return copy


def test_what_is_given_back_may_be_used_and_no_limit_is_none() -> None:
    budget = RateBudget(10, 0.0, 10.0)
    assert budget.take(100, 0.0)
    assert not budget.take(1, 0.0)
    budget.give_back(100)
    assert budget.take(1, 0.0)
    assert budget.take(500, 0.0, on_credit=True)
    assert budget.wait_s(0.0) > 40
    budget.change(0, 1.0)
    assert budget.wait_s(1.0) == 0
    assert all(budget.take(1 << 40, 1.0) for _ in range(5))


def limit(core: Core, bytes_per_s: int) -> None:
    """A consumer comes whose user has just set this."""
    limits = {"disk_write_bytes_per_s": bytes_per_s}
    core.connect(protocol.Hello(protocol.VERSION, 1, "", {}, limits), lambda message: None)


def test_a_chunk_above_the_limit_is_read_and_not_cached(tmp_path: Path) -> None:
    world = World(tmp_path, 16, disk_bytes=64 * FILE_BYTES)
    world.add(8)

    async def work(core: Core) -> None:
        # A byte a second: the first write is let through on what was saved, and then none for a day.
        limit(core, 1)
        side = Side(core, world.objects)
        side.want(*range(8))
        await until(lambda: len(side.granted) == 8, "all are read")
        await settle()
        assert len(core.disk.keys()) <= 1
        assert side.node()["writes_over_budget"] >= 7
        limit(core, 0)
        side.release(*range(8))

    world.run(work)


def test_warming_waits_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, 16, disk_bytes=64 * FILE_BYTES)
    world.add(24)

    async def work(core: Core) -> None:
        limit(core, FILE_BYTES // 2)
        side = Side(core, world.objects)
        side.plan(0, warm=True)
        await settle()
        held = len(core.disk.keys())
        assert 5 <= held < 24
        assert not any(each.finished for each in side.all(protocol.Progress))
        limit(core, 0)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "it goes on")
        assert len(core.disk.keys()) == 24

    world.run(work)


def test_it_belongs_to_the_directory(tmp_path: Path) -> None:
    CacheDirectory.open(tmp_path / "cache", ram_bytes=1 << 20, chunk_bytes=1 << 16, disk_write_bytes_per_s=5)
    found = CacheDirectory.open(tmp_path / "cache")
    assert (found.limits.disk_write_bytes_per_s, found.warnings) == (5, ())
    old = '{"format": 1, "ram_bytes": 1048576, "disk_bytes": 0, "chunk_bytes": 65536}'
    limits.path_of(found.path).write_text(old)
    assert CacheDirectory.open(tmp_path / "cache").limits.disk_write_bytes_per_s == 0
