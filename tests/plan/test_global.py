"""`shuffle="global"`: a partition is one window, whose samples are shuffled by a bijection, place by place.

The reference model is that of windows but for the permutation, which is the bijection in plain Python.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.plan import (
    BatchEntry,
    Cursor,
    Manifest,
    OrderOptions,
    Place,
    Position,
    Ranks,
    WindowKey,
    epoch_cursor,
    epoch_orders,
    objects_in_use_order,
)
from fastload.store.types import ObjectInfo
from tests.kernels.test_bijection import plain
from tests.plan import reference
from tests.plan.cases import cases
from tests.plan.checks import TOLD, check_resumed_at_another_size, check_workers_share
from tests.plan.cluster import Cluster, Run, clusters
from tests.plan.test_partitions import UNEVEN_SHARDS, check


@dataclass(frozen=True)
class GlobalCluster(Cluster):
    """A cluster that shuffles globally, and plans about `at_once` samples at a time."""

    shuffle: str = "global"
    at_once: int = 1 << 16

    def cursor(self, rank: int = 0, start: Position | None = None, **kwargs) -> Cursor[BatchEntry]:
        with patch("fastload.plan.cursor._SAMPLES_AT_ONCE", self.at_once):
            return super().cursor(rank, start, **kwargs)

    def begun(self, rank: int = 0, start: Position | None = None, **kwargs) -> Run:
        return GlobalRun(self, self.cursor(rank, start, **kwargs))

    def reference_line(self):
        lines = []
        for partition, objects in enumerate(reference.dealt(self.sizes, self.partitions)):
            stored = [(shard, sample) for shard in objects for sample in range(self.counts[shard])]
            key = f"fastload order 1 samples seed={self.seed} epoch={self.epoch} partition={partition} window=0"
            places = [plain(key, len(stored), place) for place in range(len(stored))]
            lines.append([(partition, 0, offset, *stored[place]) for offset, place in enumerate(places)])
        return reference.one_line(lines), [sample for line in lines for sample in line]


class GlobalRun(Run):
    """Asks first for what is settled."""

    def step(self) -> bool:
        entries = self.cursor.settled()
        self._give(entries)
        return len(entries) > 0 or super().step()


@st.composite
def global_clusters(draw: st.DrawFn) -> GlobalCluster:
    cluster = draw(clusters())
    fields = {name: getattr(cluster, name) for name in Cluster.__dataclass_fields__ if name != "shuffle"}
    return GlobalCluster(**fields, at_once=draw(st.sampled_from([1, 10, 1 << 16])))


@cases(150)
@given(global_clusters(), st.sampled_from(TOLD))
def test_any_cluster_is_right_at_every_rank(cluster, told):
    for run in check(cluster, told):
        assert set(run.opened) <= {WindowKey(0, cluster.epoch, partition, 0) for partition in range(cluster.partitions)}


@cases(150)
@given(global_clusters(), st.sampled_from(TOLD), st.sampled_from(TOLD), st.data())
def test_resume_anywhere_with_any_change_of_nodes_ranks_and_batch_size(cluster, told, told_later, data):
    run = cluster.run(data.draw(st.integers(0, cluster.world_size - 1)), told=told)
    check_resumed_at_another_size(cluster, run, told_later, data)


@cases(40)
@given(global_clusters(), st.integers(1, 4), st.sampled_from(["batches", "samples"]), st.data())
def test_workers_share_a_ranks_samples(cluster, worker_count, split, data):
    check_workers_share(cluster, data.draw(st.integers(0, cluster.world_size - 1)), worker_count, split)


def test_the_line_is_fixed_for_ever():
    """If this fails, every run that was saved before would go on with other samples: do not update the digest."""
    cluster = GlobalCluster(*UNEVEN_SHARDS, partitions=4, batch_size=32, seed=7, epoch=3)
    samples = np.array([sample for batch in cluster.run().samples for sample in batch], "<i8")
    assert hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest() == GOLDEN_DIGEST


GOLDEN_DIGEST = "d0a8f997e984d0b0a867b0c561309e08"


def big_data(shards: int) -> Manifest:
    return Manifest(ObjectInfo(f"s3://bucket/{i:06}.tar", 64 << 20, "a") for i in range(shards))


@pytest.mark.parametrize("shards", [100, 10_000])
def test_a_thousand_million_samples_take_no_memory(shards):
    """Not to open, and not to go on from the middle: a hundred bytes a shard, and what is planned at once."""
    manifest, options = big_data(shards), OrderOptions(shuffle="global")
    counts = np.full(shards, 10**9 // shards)
    manifest.fingerprint, manifest.sizes  # noqa: B018
    epoch_cursor(epoch_orders(big_data(1), options, 0), Ranks(), 1).add(WindowKey(0, 0, 0, 0), np.ones(1, np.int64))
    tracemalloc.start()
    cursor = epoch_cursor(epoch_orders(manifest, options, 0), Ranks(), 256)
    entries = cursor.add(WindowKey(0, 0, 0, 0), counts)
    for _ in range(10):
        more = cursor.settled()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 * shards + (12 << 20)
    assert sum(map(len, entries)) == 1 << 16
    start = cursor.position(more[-1])
    assert start.sources[0].places == (Place(0, 11 << 16),)
    resumed = epoch_cursor(epoch_orders(manifest, options, 0), Ranks(), 256, start=start).add(
        WindowKey(0, 0, 0, 0), counts
    )
    assert resumed[0].object_no.tolist() == cursor.settled()[0].object_no.tolist()


def test_batches_that_are_left_are_not_forgotten():
    cursor = epoch_cursor(epoch_orders(big_data(1), OrderOptions(shuffle="global"), 0), Ranks(), 1 << 16)
    assert len(cursor.add(WindowKey(0, 0, 0, 0), np.array([1 << 17]))) == 1
    with pytest.raises(AssertionError, match="more batches that are settled"):
        cursor.finish()
    assert len(cursor.settled()) == 1
    assert cursor.settled() == cursor.finish() == []


def test_shards_are_read_in_their_order_and_states_do_not_depend_on_windows():
    manifest = big_data(9)
    options = OrderOptions(shuffle="global", partitions=3)
    assert sorted(objects_in_use_order(manifest, options, 0).tolist()) == list(range(9))
    for order in epoch_orders(manifest, options, 0):
        assert order.window_count == 1
        assert order.window_objects(0).tolist() == sorted(order.window_objects(0).tolist())
    assert [order.window_count for order in epoch_orders(big_data(0), options, 0)] == [0, 0, 0]
    state = epoch_cursor(epoch_orders(manifest, options, 0), Ranks(), 1).start
    other = OrderOptions(shuffle="global", partitions=3, window_bytes=1)
    assert epoch_cursor(epoch_orders(manifest, other, 0), Ranks(), 1, start=state).start == state
