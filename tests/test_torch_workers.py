"""Our data set in torch's own DataLoader, with worker processes that share one cache service."""

import os
import time
from pathlib import Path

import pytest
import torch.utils.data

import fastload
from tests.patience import PATIENCE_S
from tests.shards import Corpus, check_samples, corpus

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
each_method = pytest.mark.parametrize("method", ["fork", "forkserver"])

# `make starts` sets how often workers are started in each way; 0 leaves that out.
STARTS = int(os.environ.get("FASTLOAD_STARTS", "0"))
START_S = 60.0  # what one may take, from the first process to the end of the last


def first(samples: list) -> list:
    return samples


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB") as cache:
        yield cache


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus()


def torch_loader(dataset, method: str, workers: int, batch_size: int = 8, **options) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        multiprocessing_context=method,
        collate_fn=first,
        timeout=PATIENCE_S,
        **options,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_sample_once_and_each_byte_fetched_once(s3, cache, data: Corpus, method: str) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    workers = 1 if method == "spawn" else 2  # a start takes seconds
    keys = [key for batch in torch_loader(dataset, method, workers) for key in check_samples(data, batch)]
    assert sorted(keys) == sorted(data.samples)
    # The parent has connected nowhere; it can count, and iterate, all the same.
    assert len(dataset) == len(data.samples)
    dataset.close()


@each_method
def test_batches_are_the_same_for_any_number_of_workers(s3, cache, data: Corpus, method: str) -> None:
    url = data.put(s3)
    ours = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
    expected = [batch["__key__"] for batch in ours]
    ours.close()
    for workers in (1, 2):
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, batch_size=8)
        found = [[sample["__key__"] for sample in batch] for batch in torch_loader(dataset, method, workers)]
        assert found == expected


@each_method
def test_epochs_advance_in_workers(s3, cache, data: Corpus, method: str) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True, batch_size=50)
    orders = [[sample["__key__"] for sample in dataset] for _ in range(3)]
    dataset.close()
    dataset.set_epoch(0)
    loader = torch_loader(dataset, method, 2, batch_size=50, persistent_workers=True)
    for epoch in (0, 1):
        assert [sample["__key__"] for batch in loader for sample in batch] == orders[epoch]
    dataset.set_epoch(0)
    assert [sample["__key__"] for batch in loader for sample in batch] == orders[0]
    del loader
    for epoch in (1, 2):
        loader = torch_loader(dataset, method, 2, batch_size=50)
        assert [sample["__key__"] for batch in loader for sample in batch] == orders[epoch]


@each_method
def test_a_parent_that_is_connected_already(s3, cache, data: Corpus, method: str) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    samples = iter(dataset)
    assert next(samples)["__key__"] == "s00/000000"
    dataset.set_epoch(0)
    keys = [key for batch in torch_loader(dataset, method, 2) for key in check_samples(data, batch)]
    assert sorted(keys) == sorted(data.samples)
    assert [sample["__key__"] for sample in samples] == list(data.samples)[1:]
    dataset.close()


@each_method
def test_an_inprocess_service_serves_workers(s3, tmp_path: Path, data: Corpus, method: str) -> None:
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
        assert next(iter(dataset))["__key__"] == "s00/000000"
        dataset.set_epoch(0)
        keys = [key for batch in torch_loader(dataset, method, 2) for key in check_samples(data, batch)]
        assert sorted(keys) == sorted(data.samples)
        dataset.close()


def test_forked_workers_find_a_service_where_the_parent_has_used_the_store(s3, tmp_path: Path, data: Corpus) -> None:
    """Whose threads they have not."""
    url = data.put(s3)
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, service="inprocess") as cache:
        dataset = fastload.StreamingDataset(url, cache=cache)
        keys = [key for batch in torch_loader(dataset, "fork", 2) for key in check_samples(data, batch)]
        assert sorted(keys) == sorted(data.samples)


@pytest.mark.slow
@pytest.mark.timeout(2 * STARTS * START_S + 60)
@pytest.mark.skipif(not STARTS, reason="`make starts` runs it: it takes minutes")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_start_every_time(s3, cache, data: Corpus, method: str) -> None:
    """Also where the parent has threads and a connection of its own, as in every other start."""
    url = data.put(s3)
    for start in range(STARTS):
        began = time.monotonic()
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True)
        if start % 2:
            next(iter(dataset))
            dataset.set_epoch(0)
        keys = [key for batch in torch_loader(dataset, method, 2) for key in check_samples(data, batch)]
        assert sorted(keys) == sorted(data.samples), f"start {start}"
        dataset.close()
        taken_s = time.monotonic() - began
        assert taken_s < START_S, f"start {start} took {taken_s:.1f} s"
