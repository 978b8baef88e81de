"""`shuffle="global"` end to end: every batch takes its samples from anywhere."""

from pathlib import Path

import numpy as np
import pytest

import fastload
from fastload.pipeline.reader import check_allowed, fetched_share, holds
from tests.shards import Corpus, check_samples, corpus, samples_of


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus(shard_count=8, samples_per_shard=30)


def loader_of(url: str, directory: Path, ram_bytes: str = "1MiB", num_workers: int = 2) -> fastload.DataLoader:
    cache = fastload.Cache(directory, ram_bytes=ram_bytes, disk_bytes="64MiB", chunk_bytes="64KiB")
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle="global", seed=5)
    return fastload.DataLoader(dataset, batch_size=10, num_workers=num_workers)


def test_every_sample_once_from_anywhere_and_each_byte_fetched_once(s3, tmp_path: Path, data: Corpus) -> None:
    loader = loader_of(data.put(s3), tmp_path / "cache")
    orders = []
    for _ in range(2):
        batches = list(loader)
        keys = [key for batch in batches for key in check_samples(data, samples_of(batch))]
        assert sorted(keys) == sorted(data.samples)
        shards_of_batches = [{key.split("/")[0] for key in batch["__key__"]} for batch in batches[:-1]]
        assert np.mean([len(shards) for shards in shards_of_batches]) > 4.5  # of 8; windows of two shards give 2
        orders.append(keys)
    assert orders[0] != orders[1]
    assert loader.stats()["node"]["fetched_bytes"] == data.byte_count
    loader.close()


def test_the_order_is_the_same_in_a_small_arena_and_after_a_resume(s3, tmp_path: Path, data: Corpus) -> None:
    url = data.put(s3)
    large = loader_of(url, tmp_path / "large", ram_bytes="16MiB", num_workers=0)
    batches = iter(large)
    expected = []
    for _ in range(9):
        expected.append(next(batches)["__key__"])
    state = large.state_dict()
    rest = [batch["__key__"] for batch in batches]
    large.close()
    small = loader_of(url, tmp_path / "small", ram_bytes="256KiB")
    assert [batch["__key__"] for batch in small] == expected + rest
    small.load_state_dict(state)
    assert [batch["__key__"] for batch in small] == rest
    small.close()


def test_leaving_early_gives_everything_back(s3, tmp_path: Path, data: Corpus) -> None:
    loader = loader_of(data.put(s3), tmp_path / "cache")
    for _ in zip(range(3), loader, strict=False):
        pass
    assert len(list(loader)) == len(loader)
    loader.close()


def test_it_is_refused_with_the_figure_where_the_cache_does_not_hold_the_data(s3, tmp_path: Path, data: Corpus) -> None:
    url = data.put(s3)
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="512KiB", disk_bytes="256KiB", chunk_bytes="64KiB")
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle="global")
    with pytest.raises(fastload.ConfigError, match=r"holds 512.0 KiB.*not indexed yet: raise disk_bytes to 1\.\d MiB"):
        next(iter(dataset))
    list(fastload.StreamingDataset(url, cache=cache))
    with pytest.raises(fastload.ConfigError, match=r"an epoch would fetch 8\.\d times the data"):
        next(iter(dataset))
    dataset.close()


def test_what_an_epoch_fetches() -> None:
    mebi = 1 << 20
    assert holds(100, 100, 0)
    assert holds(97, 0, 100)
    assert not holds(98, 0, 100)
    # Half of it is cached; a sample of 100 kB costs an 8 MiB chunk, or two of them now and then.
    assert fetched_share(1000 * mebi, 500 * mebi, 8 * mebi, 10000) == pytest.approx(40.5)
    assert fetched_share(0, 1, 1, 0) == 0.0
    large = np.full(10, 10, np.int64)
    check_allowed(100 * 100 * mebi, 50 * 100 * mebi, 0, 8 * mebi, large)
    with pytest.raises(fastload.ConfigError, match=r"would fetch 1\.\d times the data"):
        check_allowed(100 * 10 * mebi, 10 * mebi, 0, 8 * mebi, large)
