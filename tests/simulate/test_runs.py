"""What the service's core does for whole jobs, in virtual time: what is hit, who waits, and what is fetched."""

from __future__ import annotations

import math
import resource
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pytest

from fastload.cache.policy import PolicyName
from fastload.config import GIB, MIB
from fastload.errors import ConfigError
from fastload.pipeline.windows import window_chunks
from fastload.service.disk_io import QUICK_S
from fastload.simulate import STORES, Job, Node, Run, StoreProfile, World, simulate, sweep

# A chunk on disk takes its data and a trailer.
FILE_BYTES = MIB + 8192


def small(**options: object) -> Job:
    """512 chunks of 1 MiB in shards of eight, sixteen samples each, windows of eight chunks."""
    job = Job(
        data_bytes=512 * MIB,
        sample_bytes=MIB // 16,
        shard_bytes=8 * MIB,
        batch_size=64,
        samples_per_s=2000.0,
        window_bytes=8 * MIB,
        is_indexed=True,
    )
    return replace(job, **options)  # type: ignore[arg-type]


def cache(share: float = 0.0, ram_chunks: int = 32) -> Node:
    """With a disk for a share of those 512 chunks, and RAM for little more than what is on its way."""
    return Node(ram_bytes=ram_chunks * MIB, disk_bytes=int(share * 512 * FILE_BYTES), chunk_bytes=MIB)


def run(job: Job, node: Node, store: StoreProfile | None = None, **options: int) -> Run:
    """All of the job."""
    return simulate(job, node, store or StoreProfile(), chunks_max=None, **options)


# One seed replays everything


def test_the_same_seed_gives_the_same_figures_and_another_does_not() -> None:
    job = small(ranks_per_node=2, nodes=2, data_bytes=128 * MIB)
    store = StoreProfile(first_byte_s=0.05, slow_share=0.02, throttles_above=12, total_bytes_per_s=150e6)
    first, again = (asdict(run(job, cache(0.3), store, seed=3)) for _ in range(2))
    assert first == again
    assert asdict(run(job, cache(0.3), store, seed=4)) != first


def test_a_machine_that_opens_few_files_finds_the_same() -> None:
    with mock.patch.object(resource, "getrlimit", return_value=(16, 16)):
        core = World(small(), cache(ram_chunks=32), StoreProfile()).nodes[0].core
    assert core._fetches.idle == 32


# Everything is read, and nothing is fetched for nothing


@pytest.mark.parametrize("shuffle", ["window", "shards", "none"])
def test_each_epoch_reads_every_chunk_once_and_fetches_none_twice(shuffle: str) -> None:
    job = small(ranks_per_node=2, nodes=2, shuffle=shuffle, is_indexed=False)
    world = World(job, cache(0.3), StoreProfile())
    world.run()
    samples = job.data_bytes // job.sample_bytes
    for node in world.nodes:
        own = window_chunks(world.data.first_chunk, node.own.astype(np.int64))
        own_bytes = int(world.data.manifest.sizes[node.own].sum())
        assert np.array_equal(np.flatnonzero(node.chunks_read[0]), np.sort(own))
        assert (node.chunks_read == node.chunks_read[0]).all()
        assert (node.remote_bytes <= own_bytes).all()
        assert node.remote_bytes[0] == own_bytes
        assert node.remote_bytes[-1] == 0
        assert not any(consumer.leases or consumer.wants for consumer in node.core.consumers)
    for epoch in range(job.epochs):
        assert sum(rank.epochs[epoch].samples for rank in world.ranks) == samples
    assert len({rank.epochs[0].batches for rank in world.ranks}) == 1


@pytest.mark.parametrize("is_indexed", [True, False])
def test_global_shuffle_fetches_the_data_once_and_reads_from_the_disk_then(is_indexed: bool) -> None:
    job = small(data_bytes=64 * MIB, shuffle="global", epochs=2, is_indexed=is_indexed)
    world = World(job, cache(0.2), StoreProfile())
    world.run()
    assert not any(consumer.leases or consumer.wants for consumer in world.nodes[0].core.consumers)
    found = world.figures()
    assert [round(each.remote_share, 6) for each in found.epochs] == [1.0, 0.0]
    assert found.epochs[1].disk_share + found.epochs[1].ram_share == pytest.approx(1.0)
    assert found.epochs[1].ram_share > 0.1


def test_what_the_loader_refuses_is_refused_with_its_words() -> None:
    job = small(data_bytes=64 * MIB, shuffle="global", epochs=1)
    small_one, good = sweep(job, [cache(0.05), cache(0.2)], STORES["near"])
    assert "an epoch would fetch" in small_one.refused
    assert not good.refused
    assert good.epochs


# What is hit


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_pinning_hits_what_the_cache_holds_of_the_data(share: float) -> None:
    found = run(small(epochs=4), cache(share))
    assert found.mean("hit_share") == pytest.approx(share, abs=0.01)
    assert max(epoch.remote_share for epoch in found.later) <= 1 - share + 0.02


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_lru_keeps_next_to_nothing_of_what_is_read_in_rounds(share: float) -> None:
    found = run(small(policy="lru", shuffle="none"), cache(share))
    assert found.mean("hit_share") < 0.02


@pytest.mark.parametrize(("policy", "least"), [("pin", 0.49), ("sieve", 0.1), ("lru", 0.1)])
def test_of_a_shuffled_order_the_others_keep_some(policy: PolicyName, least: float) -> None:
    hit_share = run(small(policy=policy), cache(0.5)).mean("hit_share")
    assert least <= hit_share <= 0.51
    assert (hit_share > 0.3) == (policy == "pin")


# What is written

# Of 1 MiB in two threads, at which a write takes two seconds.
SLOW_BYTES_PER_S = 2 * MIB / QUICK_S


def written(rate: float, ram_chunks: int = 32, **options: object) -> tuple[Run, dict[str, int]]:
    """A disk for all the data at this rate, and a store that is much faster; also what the first node counted."""
    node = replace(cache(2.0, ram_chunks), disk_write_bytes_per_s=rate)
    world = World(small(data_bytes=128 * MIB, **options), node, StoreProfile(total_bytes_per_s=400e6))
    world.run()
    core = world.nodes[0].core
    return world.figures(), core._writer.counters + core._shared.counters + core._residency.counters


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("ram_chunks", [16, 64])
@pytest.mark.parametrize("times", [1.1, 40])
def test_each_byte_is_fetched_once_where_the_disk_has_room(times: float, ram_chunks: int, ranks: int) -> None:
    found, counted = written(times * SLOW_BYTES_PER_S, ram_chunks, ranks_per_node=ranks)
    assert [epoch.remote_share for epoch in found.epochs] == [1.0, 0.0, 0.0]
    assert counted["fetched_chunks"] == 128
    assert not counted["dropped_unwritten"]


@pytest.mark.parametrize("ram_chunks", [16, 32])
@pytest.mark.parametrize("times", [0.9, 1e-3])
def test_a_slow_disk_is_not_waited_for(times: float, ram_chunks: int) -> None:
    found, counted = written(times * SLOW_BYTES_PER_S, ram_chunks)
    writing_s = 128 * MIB / (times * SLOW_BYTES_PER_S)
    assert found.epochs[0].stall_s < min(20.0, writing_s / 4)
    assert 0 < counted["dropped_unwritten"] <= counted["writes_skipped"] + counted["writes_given_up"]
    assert counted["fetched_chunks"] > 128 + 64


# Who waits


def loaded(store: StoreProfile, share_of_rate: float, **options: object) -> Run:
    """6 GB an epoch through a cache that holds next to none of it, at a part of what the store gives: 400 MB/s."""
    job = Job(
        data_bytes=6_000_000_000,
        shard_bytes=32_000_000,
        samples_per_s=share_of_rate * 4000,
        epochs=2,
        is_indexed=True,
    )
    node = Node(ram_bytes=GIB)
    return run(replace(job, **options), node, replace(store, total_bytes_per_s=400e6))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(STORES))
def test_at_seven_tenths_of_what_can_be_had_nobody_waits(name: str) -> None:
    found = loaded(STORES[name], 0.7, epochs=3)
    assert found.epochs[1].remote_share > 0.8
    (rank,) = found.ranks
    assert rank.stall_share < 0.02
    assert found.epochs[1].stall_share < 0.005


@pytest.mark.parametrize("core_wait_s", [0.02, 0.1])
def test_a_node_without_free_cores_makes_use_of_a_narrow_link(core_wait_s: float) -> None:
    job = Job(data_bytes=6_000_000_000, shard_bytes=32_000_000, samples_per_s=1e5, epochs=1, is_indexed=True)
    store = StoreProfile(connection_bytes_per_s=1e9, total_bytes_per_s=200e6)
    found = run(job, Node(ram_bytes=GIB, core_wait_s=core_wait_s), store)
    (epoch,) = found.epochs
    assert epoch.remote_bytes_per_node / epoch.seconds >= 0.95 * 200e6


@pytest.mark.parametrize("name", ["far", "slow"])
def test_few_answers_that_hang_cost_a_third_of_what_they_would_or_less(name: str) -> None:
    store = replace(STORES[name], slow_share=0.01, slow_times=50.0)
    hedged, waited = (loaded(store, 0.7, hedging=hedging).ranks[0].stall_s for hedging in (True, False))
    assert waited > 3.0
    assert hedged <= waited / 3


@pytest.mark.parametrize("seed", [13, 33, 35])
def test_a_second_request_that_hangs_too_is_not_waited_for(seed: int) -> None:
    job = Job(data_bytes=2_000_000_000, shard_bytes=32_000_000, samples_per_s=2000.0, epochs=1, is_indexed=True)
    store = StoreProfile(first_byte_s=0.2, total_bytes_per_s=400e6, slow_share=0.02, slow_times=50.0)
    found = run(job, Node(ram_bytes=GIB), store, seed=seed)
    assert found.epochs[0].stall_s < 5.0  # what hangs takes ten


def four_ranks(**options: object) -> Job:
    """Each at 100 MB/s, of 2 GB."""
    job = Job(
        data_bytes=2_000_000_000,
        shard_bytes=32_000_000,
        ranks_per_node=4,
        samples_per_s=1000.0,
        epochs=2,
        is_indexed=True,
        in_step=False,
    )
    return replace(job, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("node", [Node(ram_bytes=GIB), Node(ram_bytes=GIB, disk_bytes=5 * GIB)], ids=["ram", "disk"])
def test_one_slow_rank_of_four_starves_nobody(node: Node) -> None:
    job = four_ranks(rate_factors=(1.0, 1.0, 1.0, 0.25))
    store = replace(STORES["near"], total_bytes_per_s=1600e6)
    found = run(job, node, store)
    alike = run(four_ranks(), node, store)
    assert {rank.samples for rank in found.ranks} == {10_000}
    for rank, usual in zip(found.ranks, alike.ranks, strict=True):
        assert rank.stall_s <= usual.stall_s + 0.5
    # Ranks in different windows, or epochs, share an arena that is meant for two windows.
    assert found.epochs[1].stall_share < 0.03
    *fast, slow = found.ranks
    assert slow.seconds > 3.5 * max(rank.seconds for rank in fast)


def test_a_step_that_all_wait_for_takes_as_long_as_the_slowest_trainer() -> None:
    found = run(four_ranks(rate_factors=(1.0, 0.9, 0.8, 0.5), in_step=True), Node(ram_bytes=GIB), STORES["near"])
    # 5,000 samples a rank and epoch, of which the slowest takes 500 a second.
    assert found.epochs[1].seconds == pytest.approx(10.0, rel=0.03)


def test_a_step_that_all_wait_for_takes_as_long_as_the_slowest_link() -> None:
    job = four_ranks(
        data_bytes=4_000_000_000,
        nodes=4,
        ranks_per_node=1,
        samples_per_s=2000.0,
        link_factors=(1.0, 1.0, 1.0, 0.25),
        in_step=True,
    )
    node = Node(ram_bytes=256 * MIB, link_bytes_per_s=400e6)
    found = run(job, node, STORES["near"], simulated_nodes=4)
    # 1 GB a node and epoch: 5 s of steps, 10 s of the slow node's link, and not the sum.
    remote_share = sum(epoch.remote_share for epoch in found.epochs)
    assert 0.97 * 10.0 * remote_share <= sum(epoch.seconds for epoch in found.epochs) <= 1.15 * 10.0 * remote_share
    *fast, slow = found.ranks
    assert slow.stall_s > 5 * max(rank.stall_s for rank in fast)
    assert min(rank.peers_s for rank in fast) > 0.7 * slow.stall_s


# What is simulated of what was asked for


def test_two_nodes_and_a_part_of_their_data_stand_for_all() -> None:
    job = small(data_bytes=1024 * MIB * 20, nodes=20, ranks_per_node=2)
    node = replace(cache(), disk_bytes=512 * FILE_BYTES)
    part = simulate(job, node, replace(STORES["near"], total_bytes_per_s=20 * 400e6), chunks_max=256)
    # The arena is not made smaller, so more data is simulated.
    assert (part.simulated_nodes, part.scale, part.simulated_ram_bytes) == (2, 0.5, 32 * MIB)
    assert part.data_bytes_per_node == 1024 * MIB
    assert 0.48 <= part.mean("hit_share") <= 0.5 + 16 / 512
    assert part.epochs[1].samples_per_s == pytest.approx(20 * 2 * 2000, rel=0.02)


@pytest.mark.parametrize(
    ("ram_bytes", "shard_bytes", "least"),
    [(8 * GIB, 256_000_000, 2 * GIB), (GIB, 256_000_000, GIB), (16 * GIB, 2**30, 4 * GIB)],
)
def test_the_arena_of_a_part_has_room_for_what_batches_are_made_from(
    ram_bytes: int, shard_bytes: int, least: int
) -> None:
    """With less it read windows again, and had nothing ahead while an answer was late: stalls of 29 % instead of 0."""
    job = Job(data_bytes=10**14, nodes=100, shard_bytes=shard_bytes)
    world = World(job, Node(ram_bytes=ram_bytes), StoreProfile(), chunks_max=1)
    assert world.node.ram_bytes == least
    assert world.scale == pytest.approx(16 * least / 1e12)


def test_a_cache_below_one_chunk_is_refused_as_the_loader_would() -> None:
    (found,) = sweep(small(), [replace(cache(), disk_bytes=1000)], StoreProfile())
    assert "disk_bytes=1000 is below one chunk on disk" in found.refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"first_byte_s": -1.0}, "first_byte_s=-1.0"), ({"slow_times": math.inf}, "slow_times=inf")],
)
def test_a_store_that_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoreProfile(**options)


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="less than a batch for each of its 8 ranks"):
        run(small(ranks_per_node=8, nodes=4, data_bytes=8 * MIB), cache())
