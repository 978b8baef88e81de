"""Our data set in torchdata's StatefulDataLoader, and its own state, which that loader saves in each worker."""

import json
from pathlib import Path
from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

import fastload
from tests.shards import Corpus, corpus

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata with a newer torch
]


def keys_of(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus(shard_count=5, samples_per_shard=17)


@pytest.fixture
def url(data: Corpus, tmp_path: Path) -> str:
    return data.write(tmp_path / "data")


def data_set(url: str, tmp_path: Path, **options: Any) -> fastload.StreamingDataset:
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB")
    return fastload.StreamingDataset(url, cache=cache, shuffle=True, seed=1, shuffle_window="128KiB", **options)


def loader_of(url: str, tmp_path: Path, workers: int, batch_size: int | None, **options: Any) -> StatefulDataLoader:
    dataset = data_set(url, tmp_path, batch_size=batch_size)
    return StatefulDataLoader(
        dataset,
        batch_size=8,
        num_workers=workers,
        collate_fn=keys_of,
        multiprocessing_context="fork" if workers else None,
        **options,
    )


# Pairs of each with each.
@pytest.mark.parametrize(("batch_size", "workers", "taken"), [(8, 0, 0), (8, 2, 7), (None, 0, 7), (None, 2, 0)])
def test_a_stateful_loader_goes_on_at_the_next_batch(
    url: str, tmp_path: Path, workers: int, batch_size: int | None, taken: int
) -> None:
    loader = loader_of(url, tmp_path, workers, batch_size)
    list(loader)  # so that it is not the first epoch
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    state = loader.state_dict()
    rest = list(batches)
    following = list(loader)
    resumed = loader_of(url, tmp_path, workers, batch_size)
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    assert list(resumed) == following
    assert rest
    assert following


def test_persistent_workers_go_on_too(url: str, tmp_path: Path, data: Corpus) -> None:
    loader = loader_of(url, tmp_path, 2, 8, persistent_workers=True)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = loader.state_dict()
    rest, following = list(batches), list(loader)
    resumed = loader_of(url, tmp_path, 2, 8, persistent_workers=True)
    resumed.load_state_dict(state)
    assert [list(resumed), list(resumed)] == [rest, following]
    assert sorted(key for batch in following for key in batch) == sorted(data.samples)
    del batches, loader, resumed


@pytest.mark.parametrize("batch_size", [8, None])
def test_samples_one_by_one(url: str, tmp_path: Path, batch_size: int | None) -> None:
    """Before, within and between batches, windows and shards, through JSON."""
    dataset = data_set(url, tmp_path, batch_size=batch_size)
    expected = keys_of(list(dataset))
    dataset.set_epoch(0)
    samples = iter(dataset)
    for number in range(len(expected) + 1):
        if 9 < number < len(expected) - 1 and number % 7:
            next(samples, None)
            continue
        state = json.loads(json.dumps(dataset.state_dict()))
        resumed = data_set(url, tmp_path, batch_size=batch_size)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert keys_of(list(resumed)) == expected[number:]
        assert resumed.state_dict()["epoch"] == 0
        resumed.close()
        next(samples, None)
    dataset.close()


def test_a_state_of_a_resumed_iteration(url: str, tmp_path: Path) -> None:
    dataset = data_set(url, tmp_path, batch_size=8)
    expected = keys_of(list(dataset))
    dataset.set_epoch(0)
    for begin, end in [(0, 13), (13, 14), (14, 40), (40, 40), (40, 60)]:
        samples = iter(dataset)
        assert keys_of([next(samples) for _ in range(begin, end)]) == expected[begin:end]
        dataset.load_state_dict(dataset.state_dict())
    assert keys_of(list(dataset)) == expected[60:]
    assert keys_of(list(dataset)) != expected
    dataset.close()


def test_what_is_no_state_of_this_worker_is_refused(url: str, tmp_path: Path) -> None:
    dataset = data_set(url, tmp_path)
    good = dataset.state_dict()
    for broken in (
        {},
        {**good, "version": 2},
        {**good, "offset": -1},
        {**good, "worker": 1},
        {**good, "epoch": "a"},
        [],
    ):
        with pytest.raises(fastload.StateError):
            dataset.load_state_dict(broken)  # type: ignore[arg-type]
    dataset.load_state_dict({**good, "workers": 2})
    with pytest.raises(fastload.StateError, match="saved by worker 0 of 2, and this is worker 0 of 1"):
        iter(dataset)
    dataset.set_epoch(1)  # of another epoch: the state is dropped
    assert len(list(dataset)) == len(dataset)
    dataset.close()
