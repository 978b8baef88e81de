"""Which shard a sample lies in, against numpy's search, and the samples of a window."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.plan.order import WindowKey
from fastload.plan.permutation import Bijection
from fastload.plan.samples import OpenWindow


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 7, 64, 1000]), min_size=1, max_size=40), st.integers(0, 99))
def test_every_sample_of_any_shards(counts, seed):
    """Empty shards, one shard much larger than the others, and samples in no order."""
    random = np.random.default_rng(seed)
    objects = random.permutation(100)[: len(counts)].astype(np.int32)
    shard_of, number_of = np.repeat(objects, counts), np.concatenate([np.arange(count) for count in counts])
    line = random.permutation(sum(counts))
    window = OpenWindow(line, objects, np.array(counts))
    for offsets in (np.arange(len(line)), np.arange(len(line))[::-3], np.arange(0)):
        found = window.located(offsets, WindowKey(2, 3))
        assert (found.object_no == shard_of[line[offsets]]).all()
        assert (found.sample_no == number_of[line[offsets]]).all()
        assert found.windows() == ((WindowKey(2, 3),) if len(offsets) else ())


def test_very_many_shards_and_samples():
    counts = np.random.default_rng(0).integers(0, 2_000_000, 100_000)
    ends = np.cumsum(counts)
    line, offsets = Bijection("key", int(ends[-1])), np.arange(10_000)
    found = OpenWindow(line, np.arange(100_000, dtype=np.int32), counts).located(offsets, WindowKey(0, 0))
    numbers = line[offsets]
    shards = np.searchsorted(ends, numbers, side="right")
    assert (found.object_no == shards).all()
    assert (found.sample_no == numbers - (ends - counts)[shards]).all()
