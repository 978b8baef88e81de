"""What several nodes read: each its own part, ranks of one model-parallel group the same."""

from __future__ import annotations

import os
import random
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed

import fastload
from fastload.pipeline import counts
from tests.jobs.case import Case, Size
from tests.jobs.pool import Failed, Rank, RankPool
from tests.jobs.reading import SMALL, Read, Reading, read
from tests.jobs.shelf import Shelf
from tests.shards import Corpus, corpus, tar_of


def even_corpus(shard_count: int, samples_per_shard: int = 8, value_bytes: int = 9_000) -> Corpus:
    """Shards that are all alike in bytes and in samples, so that partitions are."""
    keys = [[f"{shard:02}-{sample}" for sample in range(samples_per_shard)] for shard in range(shard_count)]
    samples = {key: {"cls": key.encode(), "bin": bytes(value_bytes)} for of_shard in keys for key in of_shard}
    shards = {f"{i:02}.tar": tar_of({key: samples[key] for key in of_shard}) for i, of_shard in enumerate(keys)}
    return Corpus(shards, samples)


def run(pool: RankPool, s3: Any, folder: Path, name: str, local: int, size: int, **how: Any) -> list[Read]:
    ranks = [Rank(rank, size, local, "job") for rank in range(size)]
    caches = [str(folder / f"cache-{node}") for node in range(size // local)]
    cache = {**SMALL, "service": "inprocess"}
    reading = Reading(caches=caches, environment=s3.server.environment(), cache=cache, **how)
    found = pool.run(name, read, ranks, reading)
    assert all(isinstance(one, Read) for one in found), found
    return found


def keys_of(batches: list[list[str]]) -> Counter[str]:
    return Counter(chain.from_iterable(batches))


def fetched(of_rank: Read, epoch: int) -> int:
    """Bytes that the node had fetched by the end of an epoch."""
    return int(of_rank.stats[epoch]["node"]["fetched_bytes"])


def test_nodes_that_do_not_divide_the_partitions_fetch_few_of_them(s3, tmp_path: Path, pool: RankPool) -> None:
    data = even_corpus(24)
    urls, window_bytes = [data.put(s3)], 200_000
    dataset = {"shuffle": True, "partitions": 4, "shuffle_window": window_bytes, "columns": ["cls"]}
    found = run(
        pool, s3, tmp_path, "3 nodes, 4 partitions", 1, 3,
        urls=urls, dataset=dataset, loader={"batch_size": 4}, epochs=2,
    )  # fmt: skip
    for epoch in range(2):
        assert keys_of(list(chain.from_iterable(one.epochs[epoch] for one in found))) == Counter(list(data.samples))
        assert len({len(one.epochs[epoch]) for one in found}) == 1
    # A third of every batch lies in two of four lanes, where batches divide by these.
    for one in found:
        assert fetched(one, 0) <= data.byte_count // 2 + window_bytes
        assert fetched(one, 1) == fetched(one, 0)


def test_uneven_partitions_cost_little_of_the_others(s3, tmp_path: Path, pool: RankPool) -> None:
    """Two nodes; shards hold 20 to 22 samples, so that one partition ends first, and its node helps with the rest."""
    data = corpus(shard_count=15, samples_per_shard=20, value_bytes=3000)
    urls, window_bytes = [data.put(s3)], 150_000
    found = run(
        pool, s3, tmp_path, "uneven", 2, 4,
        urls=urls, dataset={"shuffle": True, "shuffle_window": window_bytes}, loader={"batch_size": 3}, epochs=2,
    )  # fmt: skip
    for epoch in range(2):
        given = keys_of(list(chain.from_iterable(one.epochs[epoch] for one in found)))
        assert set(given) == set(data.samples)
        assert sum(one.stats[epoch]["repeats"] for one in found) == given.total() - len(data.samples)
        assert len({len(one.epochs[epoch]) for one in found}) == 1
    sizes = [len(shard) for shard in data.shards.values()]
    for one in (found[0], found[2]):
        own = sum(sizes) // 2 + max(sizes)
        # What one partition has more than the other: a shard's samples, and as many as bytes say nothing of.
        assert fetched(one, 0) <= own + max(sizes) + 2 * window_bytes
        assert fetched(one, 1) - fetched(one, 0) <= max(sizes) + 2 * window_bytes


@pytest.mark.parametrize(("local", "replicas"), [(4, 2), (2, 2), (2, 4), (1, 2)])
def test_ranks_of_one_group_read_the_same(s3, tmp_path: Path, pool: RankPool, local: int, replicas: int) -> None:
    """Within a node, as a node, and over nodes."""
    data = corpus(shard_count=6, samples_per_shard=7, value_bytes=300)
    found = run(
        pool, s3, tmp_path, f"replicas={replicas}, {local} ranks a node", local, 4,
        urls=[data.put(s3)], dataset={"shuffle": True, "replicas": replicas}, loader={"batch_size": 3}, epochs=2,
    )  # fmt: skip
    for epoch in range(2):
        batches = [one.epochs[epoch] for one in found]
        groups = batches[::replicas]
        for rank in range(4):
            assert batches[rank] == groups[rank // replicas]
        given = keys_of(list(chain.from_iterable(groups)))
        assert set(given) == set(data.samples)
        assert given.total() - len(data.samples) == -len(data.samples) % len(groups)


def read_until_it_fails(rank: Rank, reading: Reading) -> tuple[str, str]:
    """The error's type and message."""
    os.environ.update(reading.environment)
    with fastload.Cache(reading.caches[rank.node], **reading.cache) as cache:
        loader = fastload.DataLoader(reading.open(cache), **reading.loader)
        try:
            with pytest.raises(fastload.FastloadError) as error:
                list(loader)
            distributed.barrier()  # a rank that is gone could not say what is wrong
            return type(error.value).__name__, str(error.value)
        finally:
            loader.close()


def test_a_shard_that_cannot_be_read_fails_every_rank_by_name(s3, tmp_path: Path, pool: RankPool) -> None:
    """Those of the other node too, which only want to know how many samples it holds."""
    data = corpus(shard_count=6, samples_per_shard=7, value_bytes=300)
    prefix = data.put(s3)
    s3.put("data/shard-0003.tar", random.Random(0).randbytes(30_000))
    reading = Reading(
        [prefix],
        [str(tmp_path / f"cache-{node}") for node in range(2)],
        {"shuffle": True},
        {"batch_size": 3, "num_workers": 1},
        s3.server.environment(),
        {**SMALL, "service": "inprocess"},
    )
    ranks = [Rank(rank, 4, 2, "job") for rank in range(4)]
    for kind, message in pool.run("a bad shard", read_until_it_fails, ranks, reading):
        assert kind == "ShardError"
        assert f"{prefix}shard-0003.tar, offset 0" in message


def take_and_close(rank: Rank, reading: Reading) -> list[list[str]]:
    """Take the first batches; rank 0 before rank 1, and closes what it has."""
    os.environ.update(reading.environment)
    with (
        pytest.MonkeyPatch.context() as patch,
        fastload.Cache(reading.caches[rank.node], **reading.cache) as cache,
    ):
        patch.setattr(counts, "_COUNT_OURSELVES_AFTER_S", 1.0)
        dataset = fastload.StreamingDataset(reading.urls, cache=cache, **reading.dataset)
        loader = fastload.DataLoader(dataset, **reading.loader)
        batches = iter(loader)
        try:
            if rank.rank == 1:
                distributed.barrier()
            return [batch["__key__"] for batch in islice(batches, reading.take)]
        finally:
            loader.close()
            if rank.rank == 0:
                distributed.barrier()


def test_a_node_that_has_closed_after_as_many_batches_is_not_waited_for(
    tmp_path: Path, pool: RankPool, shelf: Shelf
) -> None:
    """Node 0 has 24 samples and an empty shard that it has not come to; node 1 has 11, and asks what comes then."""
    shards, size = (16, 6, 11, 8, 0), Size(2, 1, 3)
    reading = Reading(
        [shelf.urls[shard] for shard in shards],
        [str(tmp_path / f"cache-{node}") for node in range(2)],
        {"columns": ["cls"]},
        {"batch_size": 3},
        dict(shelf.environment),
        {**SMALL, "service": "inprocess"},
        take=4,
    )
    found = pool.run("closed early", take_and_close, size.ranks(), reading)
    model = Case(shards, size, shuffle=False).model(size, 0)
    for rank, batches in enumerate(found):
        assert not isinstance(batches, Failed), batches.message
        assert batches == model.batches(rank)[:4]
