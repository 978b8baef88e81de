"""What `bench.plan` measures with: whole epochs and bytes of nodes."""

from __future__ import annotations

import numpy as np

from bench.plan import Data, remote_shares, walk
from fastload.plan import OrderOptions, Ranks, epoch_cursor, epoch_orders

DATA = Data(64, 50)
MANIFEST = DATA.manifest()
COUNTS = DATA.counts(MANIFEST)


def test_a_walk_gives_every_sample_and_opens_every_shard() -> None:
    for shuffle in ("window", "global"):
        orders = epoch_orders(MANIFEST, OrderOptions(0, shuffle, partitions=4), 0)
        steps = list(walk(epoch_cursor(orders, Ranks(), 16), COUNTS))
        assert sum(len(entry) for _, entries in steps for entry in entries) == COUNTS.sum()
        assert sorted(set(np.concatenate([objects for objects, _ in steps]).tolist())) == list(range(64))


def test_a_node_that_keeps_its_partition_fetches_it_once() -> None:
    small_windows = OrderOptions(window_bytes=1, partitions=4)
    first, second = remote_shares(MANIFEST, COUNTS, small_windows, nodes=4)
    assert 1 <= first < 1.2
    assert second < 0.15  # a shard or two, where a partition is larger than a quarter or lanes end
    assert remote_shares(MANIFEST, COUNTS, OrderOptions(window_bytes=1), nodes=1) == (1, 0)


def test_with_one_partition_every_node_fetches_everything_again() -> None:
    first, second = remote_shares(MANIFEST, COUNTS, OrderOptions(window_bytes=1), nodes=4)
    assert first == 4
    assert 3 <= second < 3.2  # a cache holds whole shards
