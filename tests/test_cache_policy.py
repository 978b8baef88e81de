"""`cache_policy` end to end: data that the cache holds half of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import fastload
from tests.shards import Corpus, check_samples, corpus, samples_of


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus(shard_count=24, samples_per_shard=60)


def loader_of(url: str, directory: Path, data: Corpus, policy: str) -> fastload.DataLoader:
    cache = fastload.Cache(
        directory, ram_bytes="1MiB", disk_bytes=int(0.5 * 1.07 * data.byte_count), chunk_bytes="64KiB"
    )
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, seed=5, cache_policy=policy)
    return fastload.DataLoader(dataset, batch_size=20, num_workers=1)


def fetched_bytes(loader: fastload.DataLoader) -> int:
    return loader.stats().get("node", {}).get("fetched_bytes", 0)


def shares_fetched(loader: fastload.DataLoader, data: Corpus, epochs: int) -> tuple[list[float], list[list[str]]]:
    """Bytes fetched in each epoch, in times of the data; and the order of its samples."""
    fetched, orders = [fetched_bytes(loader)], []
    for _ in range(epochs):
        orders.append([key for batch in loader for key in check_samples(data, samples_of(batch))])
        fetched.append(fetched_bytes(loader))
    return [(after - before) / data.byte_count for before, after in pairwise(fetched)], orders


def test_half_of_it_is_fetched_again_and_the_order_is_the_same(s3, tmp_path: Path, data: Corpus) -> None:
    url = data.put(s3)
    shares, orders = {}, {}
    for policy in ("auto", "pin", "future", "sieve", "lru"):
        with_policy = loader_of(url, tmp_path / policy, data, policy)
        shares[policy], orders[policy] = shares_fetched(with_policy, data, 4)
        with_policy.close()
    assert all(each == orders["auto"] for each in orders.values())
    # An epoch's figure counts the beginning of the next one, so the first may be above 1.
    for policy in ("auto", "pin", "future"):
        assert sum(shares[policy][1:]) / 3 < 0.75, shares  # a busy machine writes late
    assert sum(shares["lru"][1:]) > sum(shares["auto"][1:]), shares


def test_what_a_state_skips_stays_cached(s3, tmp_path: Path, data: Corpus) -> None:
    loader = loader_of(data.put(s3), tmp_path / "cache", data, "auto")
    shares_fetched(loader, data, 2)
    batches = iter(loader)
    for _ in range(36):
        next(batches)
    state = loader.state_dict()
    batches.close()
    loader.load_state_dict(state)
    list(loader)
    shares, _ = shares_fetched(loader, data, 4)
    # One that forgot what was skipped fetches 0.83 or more in each. Where the disk is busy, not all is written at once.
    assert min(shares) < 0.7, shares
    loader.close()


def test_another_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fastload.ConfigError, match=r'cache_policy=.fifo. must be "auto", "pin", "future", "sieve"'):
        fastload.StreamingDataset("data.tar", cache=fastload.Cache(tmp_path / "cache"), cache_policy="fifo")  # type: ignore[arg-type]
