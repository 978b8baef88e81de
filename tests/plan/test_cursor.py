"""The cursor against the reference model, and the promises that follow: exactly once, equal counts, exact
resume.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError, StateError
from fastload.plan import (
    OrderOptions,
    Place,
    Position,
    Ranks,
    batch_count_of_rank,
    epoch_order,
    sample_count_of_rank,
)
from tests.plan import reference
from tests.plan.cases import cases
from tests.plan.onepartition import RankCursor
from tests.plan.world import World, bare, samples, worlds

SMALL_WORLDS = [
    World((size,) * len(counts), counts, world_size=world_size, batch_size=batch_size, tail=tail, drop_last=last)
    for counts in [c for n in (1, 2, 3) for c in itertools.product((0, 1, 3), repeat=n)]
    for size in (40, 200)
    for world_size in (1, 2, 3, 5)
    for batch_size in (1, 2)
    for tail in ("pad", "drop", "uneven")
    for last in (False, True)
]


def check_all_ranks(world: World) -> None:
    """Every rank as the reference has it; entries that describe themselves truly; resumption from each of
    them.
    """
    ranks = [world.run(rank) for rank in range(world.world_size)]
    for rank, (cursor, entries) in enumerate(ranks):
        expected = world.reference_batches(rank)
        assert samples(entries) == bare(expected)
        check_entries(world, rank, entries, expected)
        for i, entry in enumerate(entries):
            assert cursor.position(entry).batches == entry.number + 1
            resumed = world.run(rank, saved_and_loaded(cursor.position(entry)))[1]
            if world.tail != "uneven":  # a rank with fewer batches than others does not see the end
                assert samples(resumed) == samples(entries[i + 1 :])
                assert [e.number for e in resumed] == [e.number for e in entries[i + 1 :]]
    check_counts(world, [entries for _, entries in ranks])


def saved_and_loaded(position: Position) -> Position:
    return Position.from_state(json.loads(json.dumps(position.to_state())))


def check_entries(world, rank, entries, expected) -> None:
    assert [entry.number for entry in entries] == list(range(len(entries)))
    for entry, batch in zip(entries, expected, strict=True):
        assert entry.object_no.dtype == np.int32
        assert entry.sample_no.dtype == np.int64
        windows = [sample[0] for sample in batch]
        assert (entry.windows[0].window, entry.windows[-1].window) == (windows[0], windows[-1])
        assert entry.samples_after == min((entry.number + 1) * world.batch_size * world.world_size, world.total)
    total = sum(len(entry) for entry in entries) if not world.drop_last else None
    if total is not None:
        assert total == sample_count_of_rank(world.total, Ranks(rank, world.world_size), world.tail)
    count = batch_count_of_rank(
        world.total, Ranks(rank, world.world_size), world.tail, world.batch_size, world.drop_last
    )
    assert len(entries) == count


def check_counts(world: World, ranks) -> None:
    """Every sample once, apart from the tail's repeats; the same batches' sizes on all ranks."""
    given_out = Counter(sample for entries in ranks for batch in samples(entries) for sample in batch)
    repeats = sum(entry.repeats for entries in ranks for entry in entries)
    if world.tail != "uneven":
        assert len({tuple(len(entry) for entry in entries) for entries in ranks}) == 1
    if world.drop_last:
        return
    every = Counter((shard, i) for shard, count in enumerate(world.counts) for i in range(count))
    assert repeats == reference.repeat_count(world.total, world.world_size, world.tail)
    assert given_out.total() - repeats == world.total - (world.tail == "drop") * (world.total % world.world_size)
    assert given_out <= every if world.tail == "drop" else set(given_out) == set(every)
    if world.tail == "uneven":
        assert given_out == every


def test_small_worlds_are_right_at_every_rank_and_resume_point():
    for world in SMALL_WORLDS:
        check_all_ranks(world)


@cases(300)
@given(worlds())
def test_any_world_is_right_at_every_rank_and_resume_point(world):
    check_all_ranks(world)


@cases(200)
@given(worlds(), st.integers(1, 4), st.sampled_from(["batches", "samples"]), st.data())
def test_workers_share_a_ranks_samples(world, worker_count, split, data):
    rank = data.draw(st.integers(0, world.world_size - 1))
    everything = world.with_(drop_last=world.drop_last and split == "batches")
    delivered = data.draw(st.integers(0, world.total // (world.batch_size * world.world_size)))
    start = position_after(world, delivered)
    expected = everything.reference_batches(rank, delivered * world.batch_size * world.world_size)
    numbers, repeats = [], 0
    for worker in range(worker_count):
        entries = world.run(rank, start, worker=(worker, worker_count), split=split)[1]
        share = reference.worker_batches(expected, worker, worker_count, split, world.batch_size, world.drop_last)
        assert samples(entries) == bare(share)
        assert [e.number for e in entries] == [delivered + worker + i * worker_count for i in range(len(entries))]
        numbers += [entry.number for entry in entries]
        repeats += sum(entry.repeats for entry in entries)
    assert len(set(numbers)) == len(numbers)
    if not world.drop_last:
        missing = (
            -world.total % world.world_size
            if world.tail == "pad" and delivered * world.batch_size * world.world_size < world.total
            else 0
        )
        assert repeats == int(rank >= world.world_size - missing)


def position_after(world: World, batches: int) -> Position | None:
    """The position after so many full global batches."""
    cursor, entries = world.with_(drop_last=True).run(0)
    return cursor.position(entries[batches - 1]) if batches else None


@cases(150)
@given(worlds(), st.data())
def test_repeats_come_last_and_from_the_last_window_with_samples(world, data):
    world = world.with_(tail="pad", drop_last=False)
    rank = data.draw(st.integers(0, world.world_size - 1))
    entries = world.run(rank)[1]
    assert all(entry.repeats == 0 for entry in entries[:-1])
    missing = -world.total % world.world_size
    has_repeat = world.total > 0 and rank >= world.world_size - missing
    assert sum(entry.repeats for entry in entries) == int(has_repeat)


@cases(200)
@given(worlds(), st.data())
def test_resume_at_another_world_and_batch_size_keeps_the_global_batches(world, data):
    """Where a global batch of the new run begins at the position; otherwise a clear error."""
    cursor, entries = world.with_(drop_last=True).run(0)
    if not entries:
        return
    entry = data.draw(st.sampled_from(entries))
    other = world.with_(world_size=data.draw(st.integers(1, 9)), batch_size=data.draw(st.integers(1, 8)))
    position, global_batch = cursor.position(entry), other.batch_size * other.world_size
    fits = entry.samples_after % global_batch == 0 or cursor.position(entry).sources[0].places[0].window == len(
        reference_windows(world)
    )
    if not fits:
        with pytest.raises(StateError, match=rf"after {entry.samples_after} samples .*batch_size={other.batch_size} "):
            other.cursor(0, position)
        return
    for rank in range(other.world_size):
        got = other.run(rank, position)[1]
        assert samples(got) == bare(other.reference_batches(rank, entry.samples_after))
        first = -(-entry.samples_after // global_batch)
        assert [e.number for e in got] == list(range(first, first + len(got)))


def reference_windows(world: World):
    return reference.windows(world.sizes, world.seed, world.epoch, world.shuffle, world.window_bytes)


@cases(100)
@given(worlds())
def test_a_batch_is_given_out_as_soon_as_its_positions_are_known(world):
    cursor, known, given_out = world.cursor(), 0, 0
    for window in cursor.windows:
        counts = world.window_counts(cursor, window)
        known += int(counts.sum())
        given_out += len(cursor.add_window(window, counts))
        assert given_out == known // (world.batch_size * world.world_size)
        assert list(cursor.windows) == list(range(window + 1, len(reference_windows(world))))


@cases(100)
@given(worlds(), st.data())
def test_no_batch_needs_a_window_older_than_the_oldest(world, data):
    cursor, entries, oldest = world.cursor(data.draw(st.integers(0, world.world_size - 1))), [], 0
    for window in cursor.windows:
        entries = cursor.add_window(window, world.window_counts(cursor, window))
        assert all(entry.windows[0].window >= oldest for entry in entries)
        assert oldest <= cursor.oldest_window <= window + 1
        oldest = cursor.oldest_window
    assert all(entry.windows[0].window >= oldest for entry in cursor.finish())


def test_a_tail_may_need_a_window_that_has_given_all_its_samples():
    cursor = World((10, 10), (1, 0), shuffle="none", world_size=3).cursor(rank=2)
    for window, count in enumerate((1, 0)):
        assert cursor.add_window(window, np.array([count])) == []
    assert cursor.oldest_window == 0
    assert samples(cursor.finish()) == [[(0, 0)]]


def test_after_names_the_next_sample():
    world = World((10,) * 6, (5, 0, 4, 3, 0, 2), window_bytes=30, world_size=2, batch_size=1)
    line = world.reference_line()
    cursor, entries = world.run()
    for entry in entries[:-1]:
        window, offset = cursor.position(entry).sources[0].places[0]
        following = line[entry.samples_after]
        assert (following[0], following[1]) == (window, offset) or (offset == 0 and following[1] == 0)


def test_a_position_at_the_end_of_a_window_does_not_need_that_window():
    world = World((10, 10), (4, 4), shuffle="none", batch_size=4)
    cursor, entries = world.run()
    assert cursor.position(entries[0]).sources[0].places[0] == Place(1, 0)
    assert list(world.cursor(start=cursor.position(entries[0])).windows) == [1]
    assert cursor.position(entries[1]).sources[0].places[0] == Place(2, 0)
    assert world.run(start=cursor.position(entries[1]))[1] == []


def test_the_order_does_not_depend_on_the_sizes_of_batches_or_worlds():
    lines = set()
    for world_size, batch_size in ((1, 1), (2, 3), (5, 2), (7, 64)):
        world = World((10,) * 5, (9, 0, 31, 17, 4), window_bytes=30, tail="uneven")
        ranks = [world.with_(world_size=world_size, batch_size=batch_size).run(r)[1] for r in range(world_size)]
        flat = [[sample for batch in samples(entries) for sample in batch] for entries in ranks]
        lines.add(tuple(s for group in itertools.zip_longest(*flat) for s in group if s is not None))
    assert len(lines) == 1


def test_the_cursor_refuses_what_cannot_be():
    world = World((10,), (4,))
    with pytest.raises(ConfigError, match="batch_size=0"):
        world.with_(batch_size=0).cursor()
    with pytest.raises(ConfigError, match="tail='cut'"):
        world.with_(tail="cut").cursor()
    with pytest.raises(ConfigError, match="worker=2 must be from 0 to 1"):
        world.cursor(worker=(2, 2))
    order = epoch_order(world.manifest, OrderOptions(partitions=2), 0)
    with pytest.raises(ConfigError, match="partitions=2"):
        RankCursor(order, Ranks(), 1)


def test_a_shard_with_fewer_samples_than_the_state_says_is_an_error():
    world = World((10,), (4,), shuffle="none")
    cursor, entries = world.run()
    position = cursor.position(entries[2])
    for count in (2, 3):
        with pytest.raises(StateError, match=f"sample 3 of window 0, which has {count} samples"):
            world.with_(counts=(count,)).run(start=position)


def test_planning_calls_no_python_per_sample():
    """Counted by Python's own profiler hook: ten times the samples, the same number of calls."""
    import sys

    def calls(per_shard: int) -> int:
        world = World((10,) * 8, (per_shard,) * 8, window_bytes=40, world_size=2, batch_size=8 * per_shard)
        world.run()
        count = 0

        def hook(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(hook)
        try:
            world.run()
        finally:
            sys.setprofile(None)
        return count

    assert calls(10_000) <= calls(1000) + 5
