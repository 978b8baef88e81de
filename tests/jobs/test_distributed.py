"""Ranks that are one torch.distributed job: one list of shards, and one error where they are not alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import fastload
from fastload.client.cache import Handle
from tests.jobs.pool import Rank, RankPool
from tests.jobs.reading import SMALL
from tests.shards import corpus


@dataclass(frozen=True)
class Job:
    """Two ranks, of one node or of two, and what is not alike on them: URLs, options and states, one for each rank.
    The one rank named by `without_cache` has none that it could use.
    """

    urls: list[str]
    caches: list[str]
    options: list[Mapping[str, Any]] = field(default_factory=lambda: [{}, {}])
    states: list[Mapping[str, Any] | None] = field(default_factory=lambda: [None, None])
    without_cache: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, pool: RankPool, name: str) -> list[Any]:
        """What `read` returns on each rank."""
        found = pool.run(name, read, [Rank(rank, 2, 2 // len(self.caches), "job") for rank in range(2)], self)
        assert all(isinstance(one, list) for one in found), found
        return found


def read(rank: Rank, job: Job) -> list[Any]:
    """The keys of each batch, or the name and the message of the error."""
    os.environ.update(job.environment)
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(fastload.Cache(job.caches[rank.node], **SMALL))
        dataset = fastload.StreamingDataset(
            job.urls[rank.rank], cache=cache, **{"shuffle": True, **job.options[rank.rank]}
        )
        loader: Any = fastload.DataLoader(dataset, batch_size=4)
        stack.callback(loader.close)
        if rank.rank == job.without_cache:
            error = fastload.CacheError("no room for the cache")
            stack.enter_context(mock.patch.object(Handle, "consumer", side_effect=error))
        if (state := job.states[rank.rank]) is not None:
            loader.load_state_dict(state)
        try:
            return [batch["__key__"] for batch in loader]
        except fastload.FastloadError as error:
            return [type(error).__name__, str(error)]


def test_ranks_take_the_list_of_rank_0(s3, tmp_path: Path, pool: RankPool) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    # Rank 1 would have found other shards.
    job = Job([url, f"{url}shard-0000.tar"], [str(tmp_path / "cache")], environment=s3.server.environment())
    batches = job.run(pool, "one list")
    keys = [key for batches_of_rank in batches for batch in batches_of_rank for key in batch]
    assert set(keys) == set(data.samples)
    assert len(keys) - len(set(keys)) == len(data.samples) % 2


@pytest.mark.parametrize(
    ("options", "says"), [({"seed": 1}, "seed: 0 on rank 0 and 1 on rank 1"), ({"tail": "drop"}, "tail: 'pad' on")]
)
def test_ranks_that_differ_fail_together(tmp_path: Path, pool: RankPool, options: dict[str, Any], says: str) -> None:
    url = corpus(shard_count=1).write(tmp_path / "data")
    for name, message in Job([url, url], [str(tmp_path / "cache")], [{}, options]).run(pool, says):
        assert name == "ConfigError"
        assert says in message


def test_an_error_of_the_listing_reaches_every_rank(s3, tmp_path: Path, pool: RankPool) -> None:
    job = Job([f"{s3.url}/none/"] * 2, [str(tmp_path / "cache")], environment=s3.server.environment())
    for name, message in job.run(pool, "nothing there"):
        assert name == "ObjectMissingError"
        assert "/none/" in message


def test_a_rank_that_lacks_the_state_of_the_others_is_found_out(tmp_path: Path, pool: RankPool) -> None:
    url = corpus(shard_count=1).write(tmp_path / "data")
    options = {"shuffle": True, "shuffle_window": "64KiB"}
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        dataset = fastload.StreamingDataset(url, cache=cache, rank=0, world_size=2, **options)
        loader = fastload.DataLoader(dataset, batch_size=4)
        next(iter(loader))
        state = loader.state_dict()
        loader.close()
    job = Job([url, url], [str(tmp_path / "cache")], [options, options], [state, None])
    for name, message in job.run(pool, "one state"):
        assert name == "ConfigError"
        assert "ranks differ in where they begin" in message
        assert "epoch 0, after 8 samples" in message
        assert "epoch 0, after 0 samples" in message


def test_a_node_without_a_cache_keeps_no_other_waiting(tmp_path: Path, pool: RankPool) -> None:
    url = corpus(shard_count=2).write(tmp_path / "data")
    caches = [str(tmp_path / "cache"), str(tmp_path / "other")]
    (_, of_0), (name, of_1) = Job([url, url], caches, without_cache=1).run(pool, "one cache")
    assert name == "CacheError"
    assert of_0 == f"on rank 1: {of_1}"
