"""Small jobs of any kind: they end, everything is read, nothing is kept back."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.config import MIB
from fastload.pipeline.windows import window_chunks
from fastload.simulate import Job, Node, StoreProfile, World

CHUNK_BYTES = MIB // 4
CHUNKS = 24  # a node

jobs = st.builds(
    Job,
    data_bytes=st.just(CHUNKS * CHUNK_BYTES),
    sample_bytes=st.sampled_from([CHUNK_BYTES // 16, CHUNK_BYTES // 3, CHUNK_BYTES + 77]),
    shard_bytes=st.sampled_from([2 * CHUNK_BYTES, 5 * CHUNK_BYTES]),
    ranks_per_node=st.integers(1, 3),
    batch_size=st.sampled_from([2, 5]),
    samples_per_s=st.sampled_from([10.0, 1e5]),
    epochs=st.integers(1, 2),
    shuffle=st.sampled_from(["window", "shards", "none"]),
    window_bytes=st.just(4 * CHUNK_BYTES),
    policy=st.sampled_from(["auto", "lru", "sieve"]),
    in_step=st.booleans(),
    is_indexed=st.booleans(),
    threads=st.integers(1, 3),
)
nodes = st.builds(
    Node,
    ram_bytes=st.sampled_from([2, 3, 8, 32]).map(lambda count: count * CHUNK_BYTES),
    disk_bytes=st.sampled_from([0, 2, 12, 30]).map(lambda count: count * (CHUNK_BYTES + 8192)),
    chunk_bytes=st.just(CHUNK_BYTES),
    disk_read_bytes_per_s=st.sampled_from([5e6, 3e9]),
    disk_write_bytes_per_s=st.sampled_from([1e6, 1e9]),
)
stores = st.builds(
    StoreProfile,
    first_byte_s=st.sampled_from([0.001, 0.2]),
    total_bytes_per_s=st.sampled_from([5e6, 1e9]),
    slow_share=st.sampled_from([0.0, 0.1]),
    throttles_above=st.sampled_from([1.0, math.inf]),
)


@given(jobs, nodes, stores, st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_any_small_job_ends_and_reads_everything(job: Job, node: Node, store: StoreProfile, seed: int) -> None:
    world = World(job, node, store, seed=seed)
    world.run()
    (simulated,) = world.nodes
    own = window_chunks(world.data.first_chunk, simulated.own.astype(np.int64))
    for epoch in range(job.epochs):
        assert np.array_equal(np.flatnonzero(simulated.chunks_read[epoch]), np.sort(own))
        assert sum(rank.epochs[epoch].samples for rank in world.ranks) == int(world.data.counts.sum())
    core = simulated.core
    assert not any(consumer.leases or consumer.wants for consumer in core.consumers)
    assert core.disk.used_bytes <= node.disk_bytes
