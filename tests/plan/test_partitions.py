"""Several partitions on several nodes, against the reference model: exactly once, the same batches at every
size, equal counts, exact resume, whatever was known of sample counts and when.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ConfigError, StateError
from fastload.plan import (
    Position,
    Ranks,
    batch_count_of_rank,
    epoch_cursor,
    objects_in_use_order,
    sample_count_of_rank,
)
from tests.plan import reference
from tests.plan.cases import cases
from tests.plan.checks import (
    TOLD,
    calls_of,
    check_nodes_never_wait_for_ever,
    check_resumed_at_another_size,
    check_workers_share,
    saved_and_loaded,
)
from tests.plan.cluster import Cluster, Run, clusters, global_batches

SMALL_CLUSTERS = [
    Cluster((size,) * len(counts), counts, partitions, nodes, local, batch_size, tail=tail)
    for counts in [c for n in (1, 2, 3) for c in itertools.product((0, 1, 4), repeat=n)]
    for size in (40,)  # two shards fit a window
    for partitions in (2, 3)
    for nodes, local in ((1, 1), (1, 2), (2, 1), (3, 1), (3, 2))
    for batch_size in (1, 2)
    for tail in ("pad", "drop", "uneven")
]


def check(cluster: Cluster, told: str) -> list[Run]:
    """Every rank as the reference has it, and the promises that follow."""
    runs = cluster.runs(told=told)
    for rank, run in enumerate(runs):
        assert run.samples == cluster.reference_batches(rank)
        assert [entry.number for entry in run.entries] == list(range(len(run.entries)))
        check_counts_of_rank(cluster, rank, run)
    if cluster.tail != "uneven":
        assert len({tuple(len(entry) for entry in run.entries) for run in runs}) == 1
    if not cluster.drop_last:
        check_exactly_once(cluster, runs)
    return runs


def check_counts_of_rank(cluster: Cluster, rank: int, run: Run) -> None:
    ranks, total = cluster.ranks(rank), cluster.total
    if not cluster.drop_last:
        samples = sample_count_of_rank(total, ranks, cluster.tail, cluster.partitions)
        assert sum(len(entry) for entry in run.entries) == samples
    batches = batch_count_of_rank(total, ranks, cluster.tail, cluster.batch_size, cluster.drop_last, cluster.partitions)
    assert len(run.entries) == batches


def check_exactly_once(cluster: Cluster, runs: list[Run]) -> None:
    given_out = Counter(sample for run in runs for batch in run.samples for sample in batch)
    repeats = sum(entry.repeats for run in runs for entry in run.entries)
    every = Counter((shard, i) for shard, count in enumerate(cluster.counts) for i in range(count))
    assert repeats == reference.repeat_count(cluster.total, cluster.world_size, cluster.tail)
    assert given_out.total() - repeats == cluster.total - (cluster.tail == "drop") * (
        cluster.total % cluster.world_size
    )
    assert given_out <= every if cluster.tail == "drop" else set(given_out) == set(every)
    if cluster.tail == "uneven":
        assert given_out == every


# Seven has no factor with what they are the product of, so that each part has all of everything.
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.thorough) for part in range(1, 7))])
def test_small_clusters_are_right_at_every_rank(part):
    for number, cluster in enumerate(SMALL_CLUSTERS[part::7]):
        check(cluster, TOLD[(number + part) % 3])


@cases(150)
@given(clusters(), st.sampled_from(TOLD))
def test_any_cluster_is_right_at_every_rank(cluster, told):
    check(cluster, told)


@cases(50)
@given(clusters())
def test_the_batches_do_not_depend_on_what_was_known_when(cluster):
    for rank in range(min(3, cluster.world_size)):
        runs = [cluster.run(rank, told=told) for told in TOLD]
        assert runs[0].samples == runs[1].samples == runs[2].samples


@cases(80)
@given(clusters(), st.data())
def test_global_batches_are_the_same_at_every_world_size(cluster, data):
    """Wherever batch_size × world_size is the same; the last batch too, apart from repeats."""
    cluster = cluster.with_(tail="uneven", drop_last=False)
    ranks_of_node = data.draw(st.sampled_from([n for n in range(1, 9) if cluster.global_batch % n == 0]))
    rest = cluster.global_batch // ranks_of_node
    nodes = data.draw(st.sampled_from([n for n in range(1, 9) if rest % n == 0]))
    other = cluster.with_(nodes=nodes, local=ranks_of_node, batch_size=rest // nodes)
    assert other.global_batch == cluster.global_batch
    assert global_batches(cluster.runs()) == global_batches(other.runs())


@cases(150)
@given(clusters(), st.sampled_from(TOLD), st.sampled_from(TOLD), st.data())
def test_resume_anywhere_with_any_change_of_nodes_ranks_and_batch_size(cluster, told, told_later, data):
    saver = data.draw(st.integers(0, cluster.world_size - 1))
    check_resumed_at_another_size(cluster, cluster.run(saver, told=told), told_later, data)


@cases(60)
@given(clusters(), st.sampled_from(TOLD), st.data())
def test_resume_at_every_batch_in_the_same_cluster(cluster, told, data):
    rank = data.draw(st.integers(0, cluster.world_size - 1))
    other = data.draw(st.integers(0, cluster.world_size - 1))  # a state serves every rank
    run, saver = cluster.run(rank), cluster.run(other, told=told)
    if cluster.tail == "uneven" and len(run.entries) != len(saver.entries):
        return
    for i, entry in enumerate(saver.entries):
        start = saved_and_loaded(saver.cursor.position(entry))
        resumed = cluster.run(rank, start, told)
        assert resumed.samples == run.samples[i + 1 :]
        assert [e.number for e in resumed.entries] == list(range(i + 1, len(run.entries)))


@cases(60)
@given(clusters(), st.data())
def test_a_position_in_the_middle_of_a_run_is_one_to_go_on_from(cluster, data):
    """Taken when the batch comes out, with no more known than then."""
    run = cluster.begun()
    while not run.entries and run.step():
        pass
    if not run.entries:
        return
    start = saved_and_loaded(run.cursor.position(run.entries[-1]))
    assert cluster.run(0, start).samples == run.to_the_end().samples[start.batches :]


@cases(100)
@given(clusters(), st.sampled_from(TOLD), st.data())
def test_a_position_where_no_batch_of_this_worker_ends(cluster, told, data):
    """A data set in one of torch's workers saves where a round of all workers' batches ends."""
    workers = data.draw(st.integers(1, 4))
    run = cluster.run(0, told=told, worker=(data.draw(st.integers(0, workers - 1)), workers))
    samples = data.draw(st.integers(0, cluster.total // (cluster.global_batch * workers)))
    samples = data.draw(st.sampled_from([samples * cluster.global_batch * workers, cluster.total]))
    start = saved_and_loaded(run.cursor.position_at(samples))
    for rank in range(min(2, cluster.world_size)):
        assert cluster.run(rank, start, told).samples == cluster.reference_batches(rank, samples)


@cases(50)
@given(clusters(), st.integers(1, 4), st.sampled_from(["batches", "samples"]), st.data())
def test_workers_share_a_ranks_samples(cluster, worker_count, split, data):
    check_workers_share(cluster, data.draw(st.integers(0, cluster.world_size - 1)), worker_count, split)


@cases(80)
@given(clusters(), st.randoms(use_true_random=False))
def test_nodes_that_only_tell_each_other_what_they_counted_never_wait_for_ever(cluster, random):
    check_nodes_never_wait_for_ever(cluster, random)


def test_more_workers_than_batches_are_cut_at_a_time():
    cluster = Cluster((100,) * 9, (100,) * 9, 3, 2, 1, 1, window_bytes=1000, tail="uneven")
    runs = [cluster.run(0, worker=(w, 100), split="samples") for w in range(100)]
    assert [run.samples[0] for run in runs] == cluster.reference_batches(0)[:100]
    given_out = [sample for run in runs for batch in run.samples for sample in batch]
    assert len(given_out) == len(set(given_out)) == 450


def test_the_line_is_fixed_for_ever():
    """If this fails, every run that was saved before would go on with other samples: do not update the digest."""
    cluster = Cluster(*UNEVEN_SHARDS, partitions=4, batch_size=32, window_bytes=400, seed=7, epoch=3)
    samples = np.array([sample for batch in cluster.run().samples for sample in batch], "<i8")
    assert hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest() == GOLDEN_DIGEST


@cases(50)
@given(clusters(nodes_divide=True))
def test_a_node_reads_its_own_partitions_until_one_ends(cluster):
    run = cluster.run(0)
    own = set(range(0, cluster.partitions, cluster.nodes))
    short = -(-cluster.total // cluster.partitions)
    totals = Counter(partition for partition, *_ in cluster.reference_line()[0])
    if all(totals[p] == cluster.total // cluster.partitions for p in range(cluster.partitions)) and not (
        cluster.total % cluster.global_batch
    ):
        assert {key.partition for key in run.opened} <= own
    for entry in run.entries:
        if max(-(-entry.samples_after // cluster.partitions), 1) <= min(short, *(totals[p] for p in own)):
            assert {key.partition for key in entry.windows} <= own or entry.repeats


@cases(50)
@given(clusters(), st.sampled_from(TOLD))
def test_windows_ahead_are_what_is_opened_in_that_order(cluster, told):
    cluster = cluster.with_(tail="uneven")
    run = cluster.begun()
    if told == "all":
        run.tell_early(told)
    ahead = list(run.cursor.windows_ahead())
    assert len(set(ahead)) == len(ahead)
    run.to_the_end()
    used = {key for entry in run.entries for key in entry.windows}
    if told == "all":
        if math.gcd(cluster.nodes, cluster.partitions) in (cluster.nodes, cluster.partitions):
            assert set(run.opened) == set(ahead)  # otherwise some batches need a little of other lanes
        if cluster.partitions == 1:
            assert run.opened == ahead
    elif cluster.nodes == 1:
        assert used <= set(ahead)
        for partition in range(cluster.partitions):
            windows = [key.window for key in ahead if key.partition == partition]
            assert windows == sorted(windows)


def bytes_of(run: Run) -> int:
    return sum(run.world.sizes[object_no] for key in run.opened for object_no in run.cursor.objects_of(key))


@pytest.mark.parametrize("told", ["wanted", "all"])
@pytest.mark.parametrize("partitions", [8, 64])
@pytest.mark.parametrize(("nodes", "batch_size"), [(7, 32), (12, 24), (96, 4)])
def test_nodes_that_do_not_divide_the_partitions_read_little_more_than_their_share(nodes, batch_size, partitions, told):
    """⌈P/K⌉ + 1 partitions, one more where lanes differ by a sample, and a window for each where lanes end."""
    sizes, counts = UNEVEN_SHARDS
    cluster = Cluster(sizes, counts, partitions, nodes, 1, batch_size, window_bytes=200)
    lanes = -(-partitions // nodes) + 1 + (cluster.global_batch % partitions > 0)
    for rank in range(0, nodes, -(-nodes // 4)):
        run = cluster.run(rank, told=told)
        partition_bytes_max = max(int(order.window_bytes.sum()) for order in run.world.orders)
        assert bytes_of(run) <= lanes * (partition_bytes_max + cluster.window_bytes)


@pytest.mark.parametrize("told", ["wanted", "all"])
@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_a_node_reads_beyond_its_own_partitions_only_where_lanes_end(nodes, told):
    sizes, counts = UNEVEN_SHARDS
    cluster = Cluster(sizes, counts, 8, nodes, 1, 64 // nodes, window_bytes=200)
    for rank in range(nodes):
        run = cluster.run(rank, told=told)
        own = sum(int(order.window_bytes.sum()) for order in run.world.orders[rank::nodes])
        lacking = sum(sizes) // 8 // 10  # counts a byte differ by up to a tenth from shard to shard
        assert bytes_of(run) <= own + 8 // nodes * (lacking + 2 * cluster.window_bytes)


GOLDEN_DIGEST = "ea842834f83c2c29d4dce023ab60b708"

# Sizes of 80 to 119, and counts that differ from them by up to a tenth.
UNEVEN_SHARDS = (
    tuple(80 + i * 7 % 40 for i in range(512)),
    tuple((80 + i * 7 % 40) * (90 + i * 13 % 21) // 100 for i in range(512)),
)


@cases(50)
@given(clusters())
def test_what_is_read_ahead_before_counts_are_known(cluster):
    """The plan of prefetch, without a cursor: that of the whole data set, and a node's own."""
    arguments = (cluster.manifest, cluster.options, cluster.epoch)
    assert sorted(objects_in_use_order(*arguments).tolist()) == list(range(len(cluster.counts)))
    cursor = cluster.cursor(cluster.world_size - 1)
    planned = objects_in_use_order(*arguments, None, cursor.ranks).tolist()
    ahead = [cursor.objects_of(key).tolist() for key in cursor.windows_ahead()]
    if ahead and cluster.total:
        assert planned == list(itertools.chain(*ahead))
    if cluster.partitions % cluster.nodes == 0:
        nodes = range(0, cluster.world_size, cluster.local)
        plans = [objects_in_use_order(*arguments, None, cluster.ranks(rank)).tolist() for rank in nodes]
        assert sorted(itertools.chain(*plans)) == list(range(len(cluster.counts)))


def test_windows_of_several_partitions_are_read_ahead_in_turns():
    cluster = Cluster((100,) * 24, (10,) * 24, 3, 1, 1, 8, window_bytes=200)
    ahead = list(cluster.cursor().windows_ahead())
    run = cluster.run()
    assert ahead == run.opened
    run = cluster.run(told="all")
    assert ahead == run.opened


def test_one_shard_a_hundred_times_the_others():
    counts = (1000, *(10,) * 20)
    cluster = Cluster(tuple(c * 10 for c in counts), counts, 4, 4, 2, 8, window_bytes=200)
    for told in TOLD:
        runs = check(cluster, told)
        assert {len(run.entries) for run in runs} == {-(-1200 // 64)}


def test_no_more_windows_are_live_than_two_a_lane_and_the_ends():
    counts = tuple(20 + i % 5 for i in range(64))
    for nodes, told in itertools.product((1, 2, 4), TOLD):
        cluster = Cluster((100,) * 64, counts, 4, nodes, 1, 16 // nodes, window_bytes=200)
        for run in cluster.runs(told=told):
            assert run.live_max <= 2 * (4 // nodes) + 2


def test_batches_take_an_equal_share_of_every_partition():
    cluster = Cluster((100,) * 16, (10,) * 16, 4, 2, 1, 6, window_bytes=200)  # 12 does not depend on the nodes
    line = cluster.reference_line()[0]
    for first in range(0, 160 - 12, 12):
        assert set(Counter(partition for partition, *_ in line[first : first + 12]).values()) == {3}
    uneven = cluster.with_(batch_size=5).reference_line()[0]
    for first in range(0, 160, 10):
        shares = Counter(partition for partition, *_ in uneven[first : first + 10])
        assert max(shares.values()) - min(shares.values()) <= 1


def test_states_with_partitions():
    cluster = Cluster((100,) * 6, (10,) * 6, 3, 3, 1, 2, window_bytes=100)
    run = cluster.run(told="all")
    state = run.cursor.position(run.entries[2]).to_state()
    assert state["samples"] == 18
    assert state["taken"] == [6, 6, 6]
    assert state["places"] == [[0, 6], [0, 6], [0, 6]]
    assert run.cursor.position(run.entries[-1]).to_state()["places"] == [[2, 0]] * 3
    with pytest.raises(StateError, match="taken 1 counts for 3 partitions"):
        Position.from_state({**state, "taken": [6]})
    with pytest.raises(StateError, match="a negative count"):
        Position.from_state({**state, "taken": [6, 6, -1]})
    with pytest.raises(StateError, match="saved with partitions 3, but this run has 2"):
        cluster.with_(partitions=2, nodes=1).cursor(start=Position.from_state(state))
    del state["taken"]  # it follows from the samples, as long as no partition has come to its end
    assert cluster.run(start=Position.from_state(state)).samples == run.samples[3:]


def test_a_state_of_64_partitions_is_small():
    cluster = Cluster((10**9,) * 640, (10**6,) * 640, 64, 8, 8, 256, window_bytes=10**10, shuffle="none")
    cursor = cluster.cursor()
    cursor.add_counts(0, np.arange(640, dtype=np.int32), np.array(cluster.counts))
    entry = cursor.add(cursor.next_window, np.full(1, 10**6))
    assert entry == []  # the other partitions of the node are not open
    assert len(json.dumps(cursor.start.to_state())) < 4000


def test_partitions_with_fewer_samples_than_were_delivered_are_an_error():
    cluster = Cluster((100,) * 4, (10,) * 4, 2, 1, 1, 2, shuffle="none")
    run = cluster.run()
    start = run.cursor.position(run.entries[8])
    with pytest.raises(StateError, match="delivered 18 samples of the 16 that"):
        cluster.with_(counts=(4,) * 4).run(start=start)


def test_a_count_that_was_told_otherwise_is_an_error():
    cursor = Cluster((100,) * 4, (10,) * 4, 2).cursor()
    cursor.add_counts(0, np.array([0], np.int32), np.array([3]))
    cursor.add_counts(0, np.array([0], np.int32), np.array([3]))
    with pytest.raises(StateError, match="object 0 has 4 samples, and 3 were counted before"):
        cursor.add_counts(0, np.array([0], np.int32), np.array([4]))


def test_nodes_that_cannot_be_told_apart_are_refused():
    cluster = Cluster((100,) * 4, (10,) * 4, 2)
    for ranks in (Ranks(1, 4, 0, 2), Ranks(0, 5, 0, 2)):
        with pytest.raises(ConfigError, match="numbered node by node"):
            epoch_cursor(cluster.orders, ranks, 1)


def test_planning_calls_no_python_per_sample():
    """Ten times the samples, the same number of calls."""

    def calls(per_shard: int) -> int:
        cluster = Cluster((10,) * 16, (per_shard,) * 16, 4, 2, 2, 4 * per_shard, window_bytes=40)
        return calls_of(cluster.run)

    assert calls(10_000) <= calls(1000) + 5
