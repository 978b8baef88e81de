"""The cursor where all ranks share one partition, against a simpler reference model, and the promises that follow:
exactly once, equal counts, exact resume.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError, StateError
from fastload.plan import Place, Position, Ranks, batch_count_of_rank, sample_count_of_rank
from tests.plan import reference
from tests.plan.cases import cases
from tests.plan.checks import calls_of, saved_and_loaded
from tests.plan.cluster import Cluster, Run, shared, shared_clusters

SMALL_WORLDS = [
    shared((size,) * len(counts), counts, world_size=world_size, batch_size=batch_size, tail=tail, drop_last=last)
    for counts in [c for n in (1, 2, 3) for c in itertools.product((0, 1, 3), repeat=n)]
    for size in (40, 200)
    for world_size in (1, 2, 3, 5)
    for batch_size in (1, 2)
    for tail in ("pad", "drop", "uneven")
    for last in (False, True)
]


def check_all_ranks(world: Cluster) -> None:
    """Every rank as the reference has it; entries that describe themselves truly; resumption from each of
    them.
    """
    runs = world.runs()
    for rank, run in enumerate(runs):
        expected = simple_batches(world, rank)
        assert run.samples == bare(expected)
        check_entries(world, rank, run.entries, expected)
        for i, entry in enumerate(run.entries):
            assert run.cursor.position(entry).batches == entry.number + 1
            resumed = world.run(rank, saved_and_loaded(run.cursor.position(entry)))
            if world.tail != "uneven":  # a rank with fewer batches than others does not see the end
                assert resumed.samples == run.samples[i + 1 :]
                assert [e.number for e in resumed.entries] == [e.number for e in run.entries[i + 1 :]]
    check_counts(world, runs)


def simple_batches(world: Cluster, rank: int, delivered: int = 0) -> list[list[tuple[int, int, int, int]]]:
    """A rank's batches after so many samples, each a list of (window, offset, object, sample)."""
    samples = [sample[1:] for sample in world.reference_line()[0]]
    rest, _ = reference.with_tail(samples, delivered, world.world_size, world.tail)
    return reference.rank_batches(rest, rank, world.world_size, world.batch_size, world.drop_last)


def bare(batches: list[list[tuple[int, int, int, int]]]) -> list[list[tuple[int, int]]]:
    """The reference's batches as a run has its own."""
    return [[sample[2:] for sample in batch] for batch in batches]


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


def check_counts(world: Cluster, runs: list[Run]) -> None:
    """Every sample once, apart from the tail's repeats; the same batches' sizes on all ranks."""
    given_out = Counter(sample for run in runs for batch in run.samples for sample in batch)
    repeats = sum(entry.repeats for run in runs for entry in run.entries)
    if world.tail != "uneven":
        assert len({tuple(map(len, run.entries)) for run in runs}) == 1
    if world.drop_last:
        return
    every = Counter((shard, i) for shard, count in enumerate(world.counts) for i in range(count))
    assert repeats == reference.repeat_count(world.total, world.world_size, world.tail)
    assert given_out.total() - repeats == world.total - (world.tail == "drop") * (world.total % world.world_size)
    assert given_out <= every if world.tail == "drop" else set(given_out) == set(every)
    if world.tail == "uneven":
        assert given_out == every


# Seven has no factor with what they are the product of, so that each part has all of everything.
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.thorough) for part in range(1, 7))])
def test_small_worlds_are_right_at_every_rank_and_resume_point(part):
    for world in SMALL_WORLDS[part::7]:
        check_all_ranks(world)


@cases(300)
@given(shared_clusters())
def test_any_world_is_right_at_every_rank_and_resume_point(world):
    check_all_ranks(world)


@cases(200)
@given(shared_clusters(), st.integers(1, 4), st.sampled_from(["batches", "samples"]), st.data())
def test_workers_share_a_ranks_samples(world, worker_count, split, data):
    rank = data.draw(st.integers(0, world.world_size - 1))
    everything = world.with_(drop_last=world.drop_last and split == "batches")
    delivered = data.draw(st.integers(0, world.total // (world.batch_size * world.world_size)))
    start = position_after(world, delivered)
    expected = simple_batches(everything, rank, delivered * world.global_batch)
    numbers, repeats = [], 0
    for worker in range(worker_count):
        run = world.run(rank, start, worker=(worker, worker_count), split=split)
        share = reference.worker_batches(expected, worker, worker_count, split, world.batch_size, world.drop_last)
        assert run.samples == bare(share)
        mine = [entry.number for entry in run.entries]
        assert mine == [delivered + worker + i * worker_count for i in range(len(mine))]
        numbers += mine
        repeats += sum(entry.repeats for entry in run.entries)
    assert len(set(numbers)) == len(numbers)
    if not world.drop_last:
        missing = (
            -world.total % world.world_size
            if world.tail == "pad" and delivered * world.batch_size * world.world_size < world.total
            else 0
        )
        assert repeats == int(rank >= world.world_size - missing)


def position_after(world: Cluster, batches: int) -> Position | None:
    """The position after so many full global batches."""
    run = world.with_(drop_last=True).run(0)
    return run.cursor.position(run.entries[batches - 1]) if batches else None


@cases(150)
@given(shared_clusters(), st.data())
def test_repeats_come_last_and_from_the_last_window_with_samples(world, data):
    world = world.with_(tail="pad", drop_last=False)
    rank = data.draw(st.integers(0, world.world_size - 1))
    entries = world.run(rank).entries
    assert all(entry.repeats == 0 for entry in entries[:-1])
    missing = -world.total % world.world_size
    has_repeat = world.total > 0 and rank >= world.world_size - missing
    assert sum(entry.repeats for entry in entries) == int(has_repeat)


@cases(200)
@given(shared_clusters(), st.data())
def test_resume_at_another_world_and_batch_size_keeps_the_global_batches(world, data):
    """Where a global batch of the new run begins at the position; otherwise a clear error."""
    run = world.with_(drop_last=True).run(0)
    if not run.entries:
        return
    entry = data.draw(st.sampled_from(run.entries))
    other = world.with_(local=data.draw(st.integers(1, 9)), batch_size=data.draw(st.integers(1, 8)))
    position, global_batch = run.cursor.position(entry), other.global_batch
    is_at_end = position.sources[0].places[0].window == len(reference_windows(world))
    fits = entry.samples_after % global_batch == 0 or is_at_end
    if not fits:
        with pytest.raises(StateError, match=rf"after {entry.samples_after} samples .*batch_size={other.batch_size} "):
            other.cursor(0, position)
        return
    for rank in range(other.world_size):
        got = other.run(rank, position)
        assert got.samples == bare(simple_batches(other, rank, entry.samples_after))
        first = -(-entry.samples_after // global_batch)
        assert [e.number for e in got.entries] == list(range(first, first + len(got.entries)))


def reference_windows(world: Cluster):
    return reference.windows(world.sizes, world.seed, world.epoch, world.shuffle, world.window_bytes)


@cases(100)
@given(shared_clusters())
def test_a_batch_is_given_out_as_soon_as_its_positions_are_known(world):
    run, known = world.begun(), 0
    for number, objects in enumerate(reference_windows(world)):
        known += sum(world.counts[shard] for shard in objects)
        assert run.step()
        assert [key.window for key in run.opened] == list(range(number + 1))
        assert len(run.entries) == known // world.global_batch
    assert run.cursor.next_window is None


@cases(100)
@given(shared_clusters(), st.data())
def test_no_batch_needs_a_window_older_than_the_oldest(world, data):
    run, oldest, seen = world.begun(data.draw(st.integers(0, world.world_size - 1))), 0, 0
    while run.cursor.next_window is not None and run.step():
        next_window = run.opened[-1].window + 1
        assert all(entry.windows[0].window >= oldest for entry in run.entries[seen:])
        older, oldest = oldest, min((key.window for key in run.needed), default=next_window)
        assert older <= oldest <= next_window
        seen = len(run.entries)
    assert all(entry.windows[0].window >= oldest for entry in run.to_the_end().entries[seen:])


def test_a_tail_may_need_a_window_that_has_given_all_its_samples():
    run = shared((10, 10), (1, 0), shuffle="none", world_size=3).begun(rank=2)
    while run.cursor.next_window is not None:
        assert run.step()
        assert run.entries == []
    assert [key.window for key in run.opened] == [0, 1]
    assert 0 in [key.window for key in run.needed]
    assert run.to_the_end().samples == [[(0, 0)]]


def test_after_names_the_next_sample():
    world = shared((10,) * 6, (5, 0, 4, 3, 0, 2), window_bytes=30, world_size=2, batch_size=1)
    line, run = world.reference_line()[0], world.run()
    for entry in run.entries[:-1]:
        window, offset = run.cursor.position(entry).sources[0].places[0]
        following = line[entry.samples_after][1:3]
        assert following == (window, offset) or (offset == 0 and following[1] == 0)


def test_a_position_at_the_end_of_a_window_does_not_need_that_window():
    world = shared((10, 10), (4, 4), shuffle="none", batch_size=4)
    run = world.run()
    first, last = map(run.cursor.position, run.entries)
    assert first.sources[0].places[0] == Place(1, 0)
    assert [key.window for key in world.run(start=first).opened] == [1]
    assert last.sources[0].places[0] == Place(2, 0)
    assert world.run(start=last).entries == []


def test_the_order_does_not_depend_on_the_sizes_of_batches_or_worlds():
    lines = set()
    for world_size, batch_size in ((1, 1), (2, 3), (5, 2), (7, 64)):
        world = shared((10,) * 5, (9, 0, 31, 17, 4), window_bytes=30, tail="uneven")
        runs = world.with_(local=world_size, batch_size=batch_size).runs()
        flat = [[sample for batch in run.samples for sample in batch] for run in runs]
        lines.add(tuple(s for group in itertools.zip_longest(*flat) for s in group if s is not None))
    assert len(lines) == 1


def test_the_cursor_refuses_what_cannot_be():
    world = shared((10,), (4,))
    with pytest.raises(ConfigError, match="batch_size=0"):
        world.with_(batch_size=0).cursor()
    with pytest.raises(ConfigError, match="tail='cut'"):
        world.with_(tail="cut").cursor()
    with pytest.raises(ConfigError, match="worker=2 must be from 0 to 1"):
        world.cursor(worker=(2, 2))


def test_a_shard_with_fewer_samples_than_the_state_says_is_an_error():
    world = shared((10,), (4,), shuffle="none")
    run = world.run()
    position = run.cursor.position(run.entries[2])
    for count in (2, 3):
        with pytest.raises(StateError, match=f"sample 3 of window 0, which has {count} samples"):
            world.with_(counts=(count,)).run(start=position)


def test_planning_calls_no_python_per_sample():
    """Ten times the samples, the same number of calls."""

    def calls(per_shard: int) -> int:
        world = shared((10,) * 8, (per_shard,) * 8, window_bytes=40, world_size=2, batch_size=8 * per_shard)
        return calls_of(world.run)

    assert calls(10_000) <= calls(1000) + 5
