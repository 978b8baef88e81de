"""Data of odd shapes, read by each rank in turn, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import ConfigError
from fastload.plan import Tail
from tests.jobs.case import Case, Size
from tests.jobs.pool import Rank
from tests.jobs.reading import SMALL
from tests.jobs.shelf import HUGE, KEYS, Shelf

ONE, TWO, EMPTY, FEW, OTHER = 2, 4, 0, 5, 6


TAILS: tuple[Tail, ...] = ("pad", "drop", "uneven")

# That a rank gets nothing is a warning, which is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:(the epoch had no|this rank got no) samples:UserWarning")


@pytest.fixture
def urls(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> tuple[str, ...]:
    """The shelf, in reach of this process."""
    for name, value in shelf.environment.items():
        monkeypatch.setenv(name, value)
    return shelf.urls


def index(urls: list[str], cache: fastload.Cache) -> None:
    """Read all shards once."""
    dataset = fastload.StreamingDataset(urls, cache=cache, columns=["cls"])
    assert sum(1 for _ in dataset) == dataset.sample_count
    dataset.close()


def read(urls: list[str], cache: fastload.Cache, batch_size: int, tail: Tail, **options: Any) -> list[list[str]]:
    """The batches of the rank that the environment says, whose counts must agree with them."""
    dataset = fastload.StreamingDataset(urls, cache=cache, shuffle=True, columns=["cls"], tail=tail)
    loader = fastload.DataLoader(dataset, batch_size=batch_size, **options)
    batches = [batch["__key__"] for batch in loader]
    assert len(dataset) == sum(map(len, batches)) == loader.stats()["samples"]
    assert len(loader) == len(batches) == loader.stats()["batches"]
    loader.close()
    return batches


SHAPES = {
    "one sample": ((ONE,), Size(1, 1, 4)),
    "one sample on two ranks": ((ONE,), Size(1, 2, 1)),
    "one sample on three nodes": ((ONE,), Size(3, 1, 2)),
    "more ranks than samples": ((FEW, ONE), Size(1, 7, 1)),
    "more nodes than samples": ((EMPTY, TWO), Size(4, 1, 1)),
    "batches larger than the data": ((FEW, OTHER), Size(1, 2, 1000)),
    "only empty shards": ((0, 1), Size(1, 2, 4)),
    "only empty shards on two nodes": ((0, 1, 0), Size(2, 1, 4)),
    "empty shards between": ((0, TWO, 1, FEW, 0), Size(2, 1, 2)),
    "fewer shards than nodes": ((FEW, 12), Size(3, 1, 2)),
    "one shard": ((12,), Size(2, 1, 2)),
    "one shard a hundred times the others": ((FEW, OTHER, 7, 8, 9, 10, HUGE), Size(2, 2, 16)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes(monkeypatch: pytest.MonkeyPatch, urls: tuple[str, ...], tmp_path: Path, name: str) -> None:
    """Each node has a cache of its own; where there are several, it knows all counts."""
    shards, size = SHAPES[name]
    these = [urls[shard] for shard in shards]
    for node in range(size.nodes):
        with fastload.Cache(tmp_path / f"cache-{node}", **SMALL, service="inprocess") as cache:
            index(these, cache)
            for rank in range(node * size.local, (node + 1) * size.local):
                with monkeypatch.context() as patch:
                    for variable, value in Rank(rank, size.world_size, size.local).environment.items():
                        patch.setenv(variable, value)
                    for tail in TAILS:
                        expected = Case(shards, size, tail=tail).model(size, 0).batches(rank)
                        assert read(these, cache, size.batch_size, tail) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_sample_at_all_is_no_batch_in_any_epoch(urls: tuple[str, ...], tmp_path: Path, num_workers: int) -> None:
    with fastload.Cache(tmp_path / "cache", **SMALL, service="inprocess") as cache:
        dataset = fastload.StreamingDataset(list(urls[:2]), cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=2, num_workers=num_workers)
        for epoch in range(3):
            assert list(loader) == []
            assert loader.state_dict()["epoch"] == epoch + 1
        assert len(loader) == len(dataset) == 0
        assert list(dataset) == []
        loader.load_state_dict(loader.state_dict())
        assert list(loader) == []
        loader.close()


def test_nodes_with_different_numbers_of_ranks_need_one_partition(
    monkeypatch: pytest.MonkeyPatch, urls: tuple[str, ...], tmp_path: Path
) -> None:
    """Three ranks, two of them on one node: a rank cannot see how many nodes there are."""
    these = [urls[shard] for shard in (FEW, OTHER, 12)]
    given: list[str] = []
    with fastload.Cache(tmp_path / "cache", **SMALL, service="inprocess") as cache:
        for rank, local_rank, local_world_size in ((0, 0, 2), (1, 1, 2), (2, 0, 1)):
            where = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
            for name, value in where.items():
                monkeypatch.setenv(name, str(value))
            if local_world_size == 2:
                with pytest.raises(ConfigError, match="world_size=3 is not a multiple of local_world_size=2"):
                    next(iter(fastload.StreamingDataset(these, cache=cache)))
            dataset = fastload.StreamingDataset(these, cache=cache, partitions=1, tail="uneven", columns=["cls"])
            given += [sample["__key__"] for sample in dataset]
            dataset.close()
    assert sorted(given) == sorted(key for shard in (FEW, OTHER, 12) for key in KEYS[shard])
