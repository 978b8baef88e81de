"""The order: its fixed bytes, its independence of counts, windows, partitions and what is read ahead."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import ConfigError
from fastload.plan import Manifest, OrderOptions, epoch_order, objects_in_use_order
from fastload.plan.order import WINDOW_ARRAY_SAMPLES_MAX, cut_windows, deal_to_partitions
from fastload.plan.permutation import keyed_permutation
from fastload.store.types import ObjectInfo
from tests.plan import reference
from tests.plan.cluster import shared, shared_clusters

MIB = 1 << 20


def manifest_of(sizes) -> Manifest:
    return Manifest(ObjectInfo(f"s3://bucket/{i:06}.tar", int(size), f"etag{i}") for i, size in enumerate(sizes))


def test_the_order_is_fixed_for_ever():
    """If this fails, every run that was saved before would go on with other samples: do not update the
    figures.
    """
    order = epoch_order(manifest_of([64 * MIB] * 16), OrderOptions(seed=7, window_bytes=256 * MIB), epoch=3)
    assert order.object_order.tolist() == GOLDEN_OBJECTS
    assert order.window_start.tolist() == [0, 1, 3, 7, 11, 15, 16]
    assert order.window_permutation(2, 10).tolist() == GOLDEN_WINDOW
    permutations = [order.window_permutation(w, 10_000).astype("<i8").tobytes() for w in range(order.window_count)]
    assert hashlib.blake2b(b"".join(permutations), digest_size=16).hexdigest() == GOLDEN_DIGEST


GOLDEN_OBJECTS = [0, 2, 6, 13, 4, 9, 8, 5, 7, 14, 11, 12, 10, 15, 1, 3]
GOLDEN_WINDOW = [2, 9, 6, 8, 4, 1, 3, 5, 7, 0]
GOLDEN_DIGEST = "1ef83d151d22a8a50a0ba253ba8e2794"


@settings(max_examples=100, deadline=None)
@given(shared_clusters())
def test_windows_are_the_reference_models(world):
    order = epoch_order(world.manifest, world.options, world.epoch)
    windows = [order.window_objects(window).tolist() for window in range(order.window_count)]
    assert windows == reference.windows(world.sizes, world.seed, world.epoch, world.shuffle, world.window_bytes)
    assert order.window_bytes.tolist() == [sum(world.sizes[shard] for shard in window) for window in windows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 2000))
def test_windows_ramp_fit_and_waste_nothing(sizes, window_bytes):
    starts = cut_windows(np.array(sizes, np.int64), window_bytes).tolist()
    assert starts[0] == 0
    assert starts[-1] == len(sizes)
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        assert 1 <= end - start <= 2**number
        assert end - start == 1 or sum(sizes[start:end]) <= window_bytes
        could_grow = end < len(sizes) and end - start < 2**number
        assert not could_grow or sum(sizes[start : end + 1]) > window_bytes


def test_every_epoch_seed_and_window_has_an_order_of_its_own():
    manifest = manifest_of([MIB] * 50)
    seen = set()
    for seed in range(4):
        for epoch in range(4):
            order = epoch_order(manifest, OrderOptions(seed), epoch)
            assert sorted(order.object_order.tolist()) == list(range(50))
            seen.add(tuple(order.object_order.tolist()))
            seen |= {tuple(order.window_permutation(window, 50).tolist()) for window in range(3)}
    assert len(seen) == 4 * 4 * 4


def test_without_shuffle_everything_keeps_its_order():
    order = epoch_order(manifest_of([5, 0, 7]), OrderOptions(shuffle="none"), epoch=9)
    assert order.object_order.tolist() == [0, 1, 2]
    assert order.window_start.tolist() == [0, 1, 2, 3]
    assert order.window_permutation(1, 4)[np.arange(4)].tolist() == [0, 1, 2, 3]


def test_an_empty_manifest_has_no_windows():
    for shuffle in ("none", "window", "shards"):
        order = epoch_order(manifest_of([]), OrderOptions(shuffle=shuffle), epoch=0)
        assert order.window_count == 0
        assert order.window_bytes.tolist() == []


def test_another_process_has_the_same_order():
    program = (
        "from fastload.plan import *; from fastload.store.types import ObjectInfo\n"
        "m = Manifest(ObjectInfo(f's3://b/{i}', 10, 'e') for i in range(30))\n"
        "o = epoch_order(m, OrderOptions(1, 'window', 100), 2)\n"
        "print(m.fingerprint, o.object_order.tolist(), o.window_permutation(3, 20).tolist())\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    runs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert runs.pop()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 6))
def test_partitions_hold_every_object_once_and_are_even(sizes, partitions):
    dealt = deal_to_partitions(np.array(sizes, np.int64), partitions)
    loads = [sum(size for size, at in zip(sizes, dealt, strict=True) if at == p) for p in range(partitions)]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    manifest, options = manifest_of(sizes), OrderOptions(partitions=partitions)
    for epoch in range(2):
        parts = [epoch_order(manifest, options, epoch, p).object_order.tolist() for p in range(partitions)]
        assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
        assert [sorted(part) for part in parts] == [np.flatnonzero(dealt == p).tolist() for p in range(partitions)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 2, 3, 500]), max_size=40), st.integers(1, 9), st.data())
def test_shards_are_dealt_largest_first_to_the_partition_with_least(sizes, partitions, data):
    """Those of a later version when all of the former have been."""
    starts = sorted(data.draw(st.lists(st.integers(0, len(sizes)), max_size=3)))
    loads = [(0, 0, partition) for partition in range(partitions)]
    expected = [0] * len(sizes)
    for first, stop in itertools.pairwise([0, *starts, len(sizes)]):
        for shard in sorted(range(first, stop), key=lambda shard: (-sizes[shard], shard)):
            byte_count, count, expected[shard] = least = min(loads)
            loads[loads.index(least)] = (byte_count + sizes[shard], count + 1, least[2])
    assert deal_to_partitions(np.array(sizes, np.int64), partitions, starts).tolist() == expected


def test_shards_that_come_later_leave_the_others_where_they_were():
    sizes = np.random.default_rng(0).integers(1, 1000, 300)
    before = deal_to_partitions(sizes[:200], 7)
    assert (deal_to_partitions(sizes, 7, [200])[:200] == before).all()
    assert (deal_to_partitions(sizes, 7, [200, 250])[:250] == deal_to_partitions(sizes[:250], 7, [200])).all()


def test_many_shards_and_partitions_are_dealt_as_ever():
    """If this fails, what nodes have cached would be of no use to them: do not update the digest."""
    sizes = np.array([(i * 7919) % 10_007 for i in range(50_000)], np.int64)
    dealt = deal_to_partitions(sizes, 300)
    assert hashlib.blake2b(dealt.astype("<i4").tobytes(), digest_size=16).hexdigest() == GOLDEN_DEAL


GOLDEN_DEAL = "c3803a1150ab24828d2269e74da3ca7a"


@settings(max_examples=60, deadline=None)
@given(shared_clusters(), st.data())
def test_what_is_read_ahead_is_what_the_rest_needs_in_the_order_of_first_use(world, data):
    run, (order,) = world.with_(tail="uneven", drop_last=False).run(), world.orders
    entry = data.draw(st.sampled_from([None, *run.entries]))
    position = run.cursor.position(entry)
    planned = objects_in_use_order(world.manifest, world.options, world.epoch, position).tolist()
    assert len(set(planned)) == len(planned)
    rest = [e for e in run.entries if entry is None or e.number > entry.number]
    used_in = [(e.windows[0].window, e.windows[-1].window, set(e.object_no.tolist())) for e in rest]
    for first, last, objects in used_in:
        windows = [shard for w in range(first, last + 1) for shard in order.window_objects(w).tolist()]
        assert objects <= set(windows) & set(planned)
    window = position.sources[0].places[0].window
    windows_left = [order.window_objects(w).tolist() for w in range(window, order.window_count)]
    assert planned == list(itertools.chain(*windows_left))


def test_the_whole_epoch_is_read_ahead_from_its_start():
    world = shared((10,) * 7, (1,) * 7, window_bytes=30)
    order = epoch_order(world.manifest, world.options, 0)
    planned = objects_in_use_order(world.manifest, world.options, 0)
    assert planned.tolist() == order.object_order.tolist()


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="shuffle='all' must be 'none', 'window', 'shards' or 'global'"):
        OrderOptions(shuffle="all")
    with pytest.raises(ConfigError, match="window_bytes=0"):
        OrderOptions(window_bytes=0)
    with pytest.raises(ConfigError, match="partitions=0"):
        OrderOptions(partitions=0)
    with pytest.raises(ConfigError, match="partition=2 must be from 0 to 1"):
        epoch_order(manifest_of([1]), OrderOptions(partitions=2), 0, partition=2)
    with pytest.raises(ConfigError, match="4294967296 samples in one window"):
        keyed_permutation("key", 2**32)


def test_a_window_of_many_samples_is_permuted_without_an_array():
    order = epoch_order(manifest_of([5]), OrderOptions(), epoch=9)
    assert isinstance(order.window_permutation(0, WINDOW_ARRAY_SAMPLES_MAX), np.ndarray)
    count = WINDOW_ARRAY_SAMPLES_MAX + 1
    line = order.window_permutation(0, count)
    assert len(line) == count
    assert np.array_equal(np.sort(line[np.arange(count)]), np.arange(count))
    assert line[np.arange(3)].tolist() != [0, 1, 2]
