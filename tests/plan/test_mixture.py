"""Mixtures against the reference model: the same batches at every size and whatever was known when, exact resume,
shares within bounds, every sample once in each epoch of its source.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError, StateError
from fastload.plan import MixtureOptions, Position, check_weights, sample_count_of_rank
from fastload.plan.mixture import sample_count
from tests.plan.cases import cases
from tests.plan.checks import (
    TOLD,
    calls_of,
    check_nodes_never_wait_for_ever,
    check_resumed_at_another_size,
    check_workers_share,
    saved_and_loaded,
)
from tests.plan.cluster import Cluster, samples_of
from tests.plan.mixtures import MixtureRun, World, worlds

TWO = World(
    (Cluster((100,) * 20, (10,) * 20, window_bytes=300), Cluster((100,) * 7, (9,) * 7, window_bytes=300, seed=5)),
    (((0, 3),), ((0, 1),)),
    partitions=4,
    nodes=2,
    batch_size=8,
)


@cases(100)
@given(worlds(), st.sampled_from(TOLD))
def test_any_mixture_is_right_at_every_rank(world, told):
    runs = [world.run(rank, told=told) for rank in range(min(4, world.world_size))]
    for rank, run in enumerate(runs):
        assert run.samples == world.reference_batches(rank)
        assert [entry.number for entry in run.entries] == list(range(len(run.entries)))
        for entry in run.entries:
            check_entry(world, entry)
    if world.tail != "uneven":
        assert len({tuple(map(len, run.samples)) for run in runs}) == 1


def check_entry(world, entry) -> None:
    """What an entry says of itself."""
    assert entry.part_of.dtype == np.int32
    parts = [(part.source, part.epoch) for part in entry.parts]
    assert parts == sorted(set(parts))
    assert [len(part) for part in entry.parts] == np.bincount(entry.part_of).tolist()
    assert sum(part.repeats for part in entry.parts) == entry.repeats
    assert {part.number for part in entry.parts} == {entry.number}
    assert len(set(entry.windows)) == len(entry.windows)
    assert entry.source_of.tolist() == [entry.parts[number].source for number in entry.part_of]


@cases(40)
@given(worlds())
def test_how_long_a_mixture_is_follows_from_how_long_its_sources_are(world):
    counts = [source.total for source in world.sources]
    expected = None if world.stop == "never" else world.total
    assert sample_count(world.options, world.epoch, counts, world.partitions) == expected
    cursor = world.run(told="some").cursor
    assert cursor.total == expected
    if expected is not None and not world.drop_last:
        ranks = world.ranks(0)
        given_out = sum(map(len, world.run().samples))
        assert given_out == sample_count_of_rank(expected, ranks, world.tail, world.partitions)


@cases(40)
@given(worlds(stop="all"))
def test_every_sample_of_a_source_comes_once_in_each_of_its_epochs(world):
    world = world.with_(tail="uneven", drop_last=False)
    seen = Counter(sample for rank in range(world.world_size) for batch in world.run(rank).samples for sample in batch)
    assert set(seen.values()) == {1}
    rounds = Counter((source, epoch) for source, epoch, *_ in seen)
    for number, source in enumerate(world.sources):
        of_source = {epoch: n for (s, epoch), n in rounds.items() if s == number}
        first = min(of_source)
        assert first == world.epoch << 20
        assert of_source[first] == source.total
        assert all(n <= source.total for n in of_source.values())


@cases(100)
@given(worlds(), st.sampled_from(TOLD), st.sampled_from(TOLD), st.data())
def test_resume_anywhere_with_any_change_of_nodes_ranks_and_batch_size(world, told, told_later, data):
    saver = data.draw(st.integers(0, world.world_size - 1))
    run = world.run(saver, told=told)
    check_resumed_at_another_size(world, run, told_later, data, nodes_max=5, ranks_max=3)


@cases(50)
@given(worlds(), st.data())
def test_a_position_in_the_middle_of_a_run_is_one_to_go_on_from(world, data):
    """Taken when the batch comes out, with no more known than then; and then again."""
    run = world.begun()
    while not run.entries and not run.is_over and run.step():
        pass
    if not run.entries:
        return
    start = saved_and_loaded(run.cursor.position(run.entries[-1]))
    again = world.begun(start=start)
    assert again.cursor.position_at(start.samples) == start
    while not again.entries and not again.is_over and again.step():
        pass
    later = again.cursor.position(again.entries[0]) if again.entries else start
    rest = world.run(0, saved_and_loaded(later), data.draw(st.sampled_from(TOLD))).samples
    assert rest == run.to_the_end().samples[later.batches :]


@cases(40)
@given(worlds(), st.integers(1, 4), st.sampled_from(["batches", "samples"]), st.data())
def test_workers_share_a_ranks_samples(world, worker_count, split, data):
    world = world.with_(stop=world.stop if world.stop != "never" else "first")
    check_workers_share(world, data.draw(st.integers(0, world.world_size - 1)), worker_count, split)


@pytest.mark.parametrize("counts", [(0, 0, 0, 7, 0), (0, 0, 0, 1, 3)])
def test_a_worker_comes_to_its_own_groups_past_those_of_others(counts):
    """With one partition a node more than nodes, a group is open only once the one before it is given out."""
    four = Cluster((0,), (4,), window_bytes=1)
    uneven = Cluster((0, 0, 0, 1, 0), counts, window_bytes=1)
    world = World((four, uneven, four), (((0, 1),),) * 3, partitions=4, nodes=3, epoch=1)
    for worker in range(3):
        assert world.run(0, worker=(worker, 3)).samples == world.reference_batches(0)[worker::3]


@cases(60)
@given(worlds(), st.randoms(use_true_random=False))
def test_nodes_that_only_tell_each_other_what_they_counted_never_wait_for_ever(world, random):
    check_nodes_never_wait_for_ever(world, random)


@cases(60)
@given(worlds())
def test_every_source_is_near_its_share_at_every_global_batch(world):
    """In a lane within a sample and a little; over all, by the square root of the lanes more."""
    world = world.with_(weights=tuple(((0, schedule[0][1] or 1.0),) for schedule in world.weights))
    total_weight = sum(schedule[0][1] for schedule in world.weights)
    line = [sample[0] for sample in world.reference_line()[0]]
    for number, schedule in enumerate(world.weights):
        share = schedule[0][1] / total_weight
        off_by = np.abs(np.cumsum(np.array(line, np.int64) == number) - share * np.arange(1, len(line) + 1))
        in_lane = 1 + share * max(0, len(world.weights) - 2)
        assert off_by.max(initial=0) <= world.partitions * in_lane
        for lane in range(world.partitions):
            of_lane = np.array(line[lane :: world.partitions], np.int64) == number
            off_by = np.abs(np.cumsum(of_lane) - share * np.arange(1, len(of_lane) + 1))
            assert off_by.max(initial=0) <= in_lane


def test_shares_over_many_lanes_are_closer_than_chance():
    weights = check_weights([0.5, 0.3, 0.15, 0.05])
    world = World((Cluster((10**6,) * 64, (10**5,) * 64),) * 4, weights, "never", 64, 1, 1, 4096)
    source_of = mixed_sources(world, 200)
    counts = np.stack([(source_of == number).sum(axis=1) for number in range(4)], axis=1)
    spread = np.sqrt(((counts - 4096 * np.array([0.5, 0.3, 0.15, 0.05])) ** 2).mean(axis=0))
    independent = np.sqrt(4096 * np.array([0.25, 0.21, 0.1275, 0.0475]))
    assert (spread < 0.4 * independent).all()


def test_ranks_that_take_turns_in_a_lane_each_get_every_source():
    """A source that lags its share most would come every second time, and so belong to every second rank alone."""
    world = World((Cluster((10**6,) * 8, (10**5,) * 8),) * 2, check_weights([1, 1]), "never", 1, 1, 8, 64)
    source_of = mixed_sources(world, 100).reshape(-1, 8)  # by rank
    assert (np.abs((source_of == 0).mean(axis=0) - 0.5) < 0.1).all()


def mixed_sources(world: World, batches: int) -> np.ndarray:
    """The sources of the positions of some global batches."""
    cursor = world.cursor()
    sequence, count = cursor._sequence, batches * world.global_batch
    source_of = np.empty(count, np.int64)
    for lane in range(world.partitions):
        numbers = np.arange(len(range(lane, count, world.partitions)))
        source_of[lane :: world.partitions] = sequence._blend.sources(lane, numbers)[0]
    return source_of.reshape(batches, -1)


def test_weights_change_exactly_where_the_schedule_says():
    schedule = (((0, 1),), ((0, 0), (100, 1)), ((0, 1), (200, 0)))
    world = World((Cluster((100,) * 60, (10,) * 60),) * 3, schedule, "never", 4, 1, 1, 10)
    line = [sample[0] for sample in world.reference_line()[0]]
    run = world.run()
    assert [source for batch in run.samples for source, *_ in batch] == line[: len(line) // 10 * 10]
    source_of = mixed_sources(world, 40).ravel()
    assert 1 not in source_of[:100]
    assert 2 not in source_of[200:]
    assert np.bincount(source_of[:100]).tolist() == [50, 0, 50]
    assert np.abs(np.bincount(source_of[200:]) - 100).max() <= 8


@pytest.mark.parametrize("told", TOLD)
def test_where_a_mixture_ends(told):
    """200 samples of weight 3 and 63 of weight 1."""
    lines = {stop: TWO.with_(stop=stop, nodes=1).run(told=told) for stop in ("first", "all")}
    counts = {stop: Counter(s[:2] for batch in run.samples for s in batch) for stop, run in lines.items()}
    assert 240 < counts["first"].total() <= 252
    assert counts["first"].keys() == {(0, 0), (1, 0)}
    assert counts["all"].total() >= 264
    assert counts["all"][0, 0] == 200
    assert counts["all"][1, 0] == 63
    assert 1 <= counts["all"][1, 1] <= 12
    assert counts["all"][0, 1] <= 12
    epochs = {s[:2] for batch in TWO.with_(epoch=3, nodes=1).run().samples for s in batch}
    assert epochs == {(0, 3), (1, 3)}
    epochs = {s[:2] for batch in TWO.with_(epoch=3, nodes=1, stop="all").run().samples for s in batch}
    assert epochs == {(0, 3 << 20), (0, (3 << 20) + 1), (1, 3 << 20), (1, (3 << 20) + 1)}


def test_a_mixture_without_an_end_goes_through_many_epochs_with_little_kept():
    world = World((Cluster((10,) * 4, (3,) * 4), Cluster((10,) * 4, (300,) * 4)), TWO.weights, "never", 2, 1, 1, 8)
    run = world.begun()
    while not run.entries or run.entries[-1].samples_after < 10_000:
        run.step()
    assert {part.epoch for part in run.entries[-1].parts if part.source == 0} <= set(range(600, 640))
    assert len(run.cursor._sequence._sources[0].epochs.sequences) <= 4
    assert run.live_max <= 8
    start = saved_and_loaded(run.cursor.position(run.entries[-1]))
    again = world.begun(start=start)
    while not again.entries:
        again.step()
    while run.entries[-1].number < again.entries[-1].number:
        run.step()
    assert samples_of(again.entries[0]) == samples_of(run.entries[start.batches])


@cases(40)
@given(worlds(), st.sampled_from(TOLD))
def test_windows_ahead_are_what_is_opened_in_that_order(world, told):
    world = world.with_(tail="uneven", partitions=1, stop="first" if world.stop == "never" else world.stop)
    run = world.begun()
    run.tell_early(told)
    ahead = list(run.cursor.windows_ahead()) if told == "all" or world.stop == "first" else []
    run.to_the_end()
    if told == "all":
        assert run.opened == ahead
    elif world.stop == "first":
        assert set(run.opened) <= set(ahead)


def test_windows_ahead_go_on_without_end():
    world = TWO.with_(stop="never")
    for told in TOLD:
        run = world.begun()
        run.tell_early(told)
        ahead = list(itertools.islice(run.cursor.windows_ahead(), 60))
        assert len(set(ahead)) == 60
        assert {key.epoch for key in ahead if key.source == 1} >= {0, 1, 2}
        assert {key.partition for key in ahead} == {0, 2}


def test_states_of_mixtures():
    run = TWO.run(told="all")
    state = run.cursor.position(run.entries[2]).to_state()
    assert state["samples"] == 48
    assert [source["total"] for source in state["sources"]] == [200, 63]
    assert state["weights"] == [[[0, 3.0]], [[0, 1.0]]]
    ended = run.cursor.position(run.entries[-1])
    assert ended.at_epoch(1).to_state()["sources"][0]["places"] == [[0, 0]] * 4
    beginning = TWO.with_(epoch=1).cursor(start=saved_and_loaded(ended.at_epoch(1)))
    assert MixtureRun(TWO.with_(epoch=1), beginning).to_the_end().samples == TWO.with_(epoch=1).run().samples
    with pytest.raises(StateError, match="that of a mixture"):
        Position.from_state(state)
    of_one = TWO.sources[0].cursor().start.to_state()
    with pytest.raises(StateError, match="that of one data set"):
        Position.from_mixture_state(of_one)


def test_a_state_of_64_partitions_is_small():
    sources = (Cluster((10**9,) * 640, (10**6,) * 640, window_bytes=10**10),) * 2
    world = World(sources, check_weights([1, 1]), "never", 64, 8, 8, 256)
    cursor = world.cursor()
    for source in range(2):
        cursor.add_counts(source, np.arange(640, dtype=np.int32), np.array(sources[0].counts))
    position = cursor.position_at(256 * 64 * 1000)
    assert len(json.dumps(position.to_state())) < 4000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "the state's version is 2"),
        ({"epoch": -1}, "a negative count"),
        ({"stop": "last"}, "stop='last'"),
        ({"weights": [[[0, 1.0]]]}, "1 weights for 2 sources"),
        ({"weights": [[[0, 1.0]], [[1, 1.0]]]}, "begin at .1."),
        ({"sources": []}, "2 weights for 0 sources"),
        ({"seed": "0"}, "Expected `int`"),
    ],
)
def test_a_damaged_state_is_refused(changes, message):
    state = TWO.cursor().start.to_state()
    with pytest.raises(StateError, match=message):
        Position.from_mixture_state({**state, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "saved with seed 0 of the mixture, but this run has 1"),
        ({"stop": "all"}, "saved with stop 'first', but this run has 'all'"),
        ({"tail": "drop"}, "saved with tail 'pad', but this run has 'drop'"),
        ({"epoch": 2}, "saved with epoch 0, but this run has 2"),
        ({"weights": (((0, 3),), ((0, 2),))}, r"saved with weights .*1\.0.*, but this run has .*2\.0"),
        ({"sources": TWO.sources[:1], "weights": (((0, 3),),)}, "saved with sources 2 in number, but this run has 1"),
        ({"sources": TWO.sources[::-1]}, "saved with seed 0 of source 0, but this run has 5"),
        ({"partitions": 2}, "saved with partitions 4 of source 0, but this run has 2"),
        ({"batch_size": 9}, "after 16 samples with batch_size=8 × world_size=2, where no global batch of batch_size=9"),
    ],
)
def test_a_state_of_another_run_is_refused_naming_both(changes, message):
    run = TWO.run()
    start = saved_and_loaded(run.cursor.position(run.entries[0]))
    with pytest.raises(StateError, match=message):
        TWO.with_(**changes).cursor(start=start)


def test_a_source_that_has_lost_samples_is_an_error():
    run = TWO.run(told="all")
    start = saved_and_loaded(run.cursor.position(run.entries[0]))
    fewer = TWO.with_(sources=(TWO.sources[0].with_(counts=(9,) * 20), TWO.sources[1]))
    with pytest.raises(StateError, match="saved with 200 samples in source 0, but there are 180"):
        fewer.run(start=start, told="all")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "no sources"),
        ([-1], "at least 0, not -1"),
        ([float("nan")], "at least 0, not nan"),
        (["much"], "'much', must be a number or a list"),
        ([[(0, 1), (0, 2)]], "rising integers from 0 on"),
        ([[(5, 1)]], r"begin at \[5\]"),
        ([[(0.5, 1)]], "rising integers"),
        ([1, [(0, 1), (7, 1e-12)]], "source 1 from sample 7 on is 1e-12 of all"),
        ([[(0, 1), (9, 0)], 0], "from sample 9 on the weights of all sources are 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(weights)


def test_mixtures_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="stop='last'"):
        MixtureOptions(check_weights([1]), stop="last")
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        TWO.with_(weights=(((0, 1),),)).cursor()
    tiny = TWO.with_(sources=(TWO.sources[0], Cluster((10,) * 3, (1,) * 3)))
    with pytest.raises(ConfigError, match="source 1 of the mixture has 3 samples for 4 partitions"):
        tiny.run()
    ended = TWO.with_(stop="all", weights=(((0, 1),), ((0, 1), (40, 0))))
    with pytest.raises(ConfigError, match="source 1 of the mixture is never gone through"):
        ended.run(told="all")


def test_a_mixtures_line_is_fixed_for_ever():
    """If this fails, every run that was saved before would go on with other samples: do not update the digest."""
    sources, weights = (*TWO.sources, TWO.sources[0].with_(seed=9)), check_weights([3, [(0, 1), (150, 0.5)], 0.7])
    world = TWO.with_(sources=sources, weights=weights, stop="all", nodes=1, seed=7)
    samples = np.array([sample for batch in world.run().samples for sample in batch], "<i8")
    assert hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest() == GOLDEN_DIGEST


GOLDEN_DIGEST = "a017711066b15e0798fe189934a50c12"


def test_planning_calls_no_python_per_sample():
    """Ten times the samples, about the same number of calls."""

    def calls(per_shard: int) -> int:
        sources = (Cluster((10,) * 16, (per_shard,) * 16, window_bytes=40),) * 2
        return calls_of(World(sources, check_weights([2, 1]), "first", 4, 2, 2, 4 * per_shard).run)

    assert calls(10_000) <= 1.1 * calls(1000)
