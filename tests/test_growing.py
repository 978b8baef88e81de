"""Lists of shards that are kept: in the user's file, and as versions of data that grows while it is read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.utils.data

import fastload
from tests.shards import Corpus, corpus

DATA = corpus(shard_count=6, samples_per_shard=12, value_bytes=500)
NAMES = sorted(DATA.shards)


def keys_of(names: list[str]) -> set[str]:
    """The keys in these shards."""
    return {key for key in DATA.samples if f"shard-00{key[1:3]}.tar" in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the first four shards."""
    Corpus({name: DATA.shards[name] for name in NAMES[:4]}, {}).write(tmp_path / "data")
    return tmp_path / "data"


def add(folder: Path, name: str) -> None:
    (folder / name).write_bytes(DATA.shards[name])


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


def loader_of(folder: Path, cache: fastload.Cache, **options: Any) -> fastload.DataLoader:
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, shuffle=True, **options)
    return fastload.DataLoader(dataset, batch_size=4, num_workers=1)


def read(loader: fastload.DataLoader) -> list[list[str]]:
    return [batch["__key__"] for batch in loader]


def flat(batches: list[list[str]]) -> set[str]:
    return {key for batch in batches for key in batch}


def test_data_that_grows_is_listed_again_between_epochs(folder: Path, cache: fastload.Cache) -> None:
    loader = loader_of(folder, cache, refresh="epoch")
    batches = iter(loader)
    first = [next(batches)["__key__"]]
    add(folder, NAMES[4])
    state = json.loads(json.dumps(loader.state_dict()))
    first += [batch["__key__"] for batch in batches]
    assert flat(first) == keys_of(NAMES[:4])  # the running epoch keeps its list
    second = read(loader)
    assert flat(second) == keys_of(NAMES[:5])
    add(folder, NAMES[5])
    # The state is of a list that is two versions old.
    loader.load_state_dict(state)
    assert read(loader) == first[1:]
    assert flat(read(loader)) == keys_of(NAMES)
    loader.close()
    # In a new process it is found too.
    other = loader_of(folder, cache, refresh="epoch")
    other.load_state_dict(state)
    assert read(other) == first[1:]
    other.close()


def test_a_version_that_was_not_kept_is_an_error(folder: Path, cache: fastload.Cache, tmp_path: Path) -> None:
    loader = loader_of(folder, cache, refresh="epoch")
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    add(folder, NAMES[4])
    elsewhere = fastload.Cache(
        tmp_path / "other", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    )
    other = loader_of(folder, elsewhere, refresh="epoch")
    other.load_state_dict(state)
    with pytest.raises(fastload.StateError, match=f"list of shards {state['position']['order']['manifest']}"):
        next(iter(other))
    other.close()


def test_a_file_of_the_users_freezes_the_list(folder: Path, cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    loader = loader_of(folder, cache, manifest=path)
    first = read(loader)
    loader.close()
    add(folder, NAMES[4])
    again = loader_of(folder, cache, manifest=path)
    assert read(again) == first
    again.close()
    before = loader_of(folder, cache, manifest=path)
    assert len(before.dataset) == len(flat(first))  # also where nothing has been read yet
    before.close()
    without = loader_of(folder, cache)
    assert flat(read(without)) == keys_of(NAMES[:5])
    without.close()


def test_ranks_that_nothing_connects_take_the_list_of_rank_0(folder: Path, cache, tmp_path: Path) -> None:
    options = {"manifest": tmp_path / "train.json", "world_size": 2}
    loaders = [loader_of(folder, cache, rank=rank, **options) for rank in range(2)]
    zero = read(loaders[0])
    add(folder, NAMES[4])  # rank 1 would see this
    one = read(loaders[1])
    assert flat(zero) | flat(one) == keys_of(NAMES[:4])
    assert len(zero) == len(one)
    for loader in loaders:
        loader.close()


def test_a_file_with_versions(folder: Path, cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    loader = loader_of(folder, cache, manifest=path, refresh="epoch")
    first = read(loader)
    add(folder, NAMES[4])
    second = read(loader)
    loader.close()
    add(folder, NAMES[5])
    # A run that is repeated reads what the first one read, epoch by epoch, and then what is there.
    again = loader_of(folder, cache, manifest=path, refresh="epoch")
    assert [read(again), read(again)] == [first, second]
    assert flat(read(again)) == keys_of(NAMES)
    again.close()


def test_worker_processes_cannot_list_for_all(folder: Path, cache: fastload.Cache, monkeypatch) -> None:
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, refresh="epoch")
    worker = SimpleNamespace(id=0, num_workers=1, seed=1)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)
    with pytest.raises(fastload.ConfigError, match='refresh="epoch" needs a loader'):
        iter(dataset)
    with pytest.raises(fastload.ConfigError, match="refresh='always' must be"):
        fastload.StreamingDataset(f"{folder}/", cache=cache, refresh="always")  # type: ignore[arg-type]
