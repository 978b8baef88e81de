"""Code that was written for MosaicML's streaming, with the import changed."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fastload
from fastload.adapters.streaming import Stream, StreamingDataLoader, StreamingDataset
from fastload.errors import ConfigError
from tests.conftest import Bucket
from tests.formats.test_mds import COUNT, WRITTEN, check, shard


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


@pytest.fixture
def remote(s3: Bucket) -> str:
    for path in WRITTEN.iterdir():
        s3.put(f"data/train/{path.name}", path.read_bytes())
    return f"s3://{s3.name}/data"


class Doubled(StreamingDataset):
    """As streaming's users write theirs."""

    def __init__(self, remote: str, cache: fastload.Cache, shuffle: bool) -> None:
        super().__init__(remote=remote, split="train", shuffle=shuffle, batch_size=4, cache=cache)

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return 2 * int(sample["id"]), sample["Name"]


def test_samples_are_dicts_of_the_columns(remote: str, cache: fastload.Cache) -> None:
    dataset = StreamingDataset(remote=remote, split="train", cache=cache)
    assert len(dataset) == dataset.size == COUNT
    for i, sample in enumerate(dataset):
        check(sample, i)
        assert "__key__" not in sample
    check(dataset[5], 5)
    assert [int(sample["id"]) for sample in dataset[3:6]] == [0, 1, 2]
    dataset._data.close()


def test_arrays_of_one_shape_are_a_tensor(remote: str, cache: fastload.Cache) -> None:
    dataset = StreamingDataset(remote=remote, split="train", cache=cache)
    arrays = [name for name, value in dataset[0].items() if isinstance(value, np.ndarray) and value.ndim]
    assert arrays
    batch = next(iter(StreamingDataLoader(dataset, batch_size=1)))
    assert {name: batch[name].shape for name in arrays} == {name: (1, *dataset[0][name].shape) for name in arrays}
    assert {type(batch[name]) for name in arrays} == {torch.Tensor}
    dataset.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_subclass_changes_samples_under_torch_and_under_the_loader(
    remote: str, cache: fastload.Cache, workers: int
) -> None:
    expected = sorted((2 * (i - 3), f"näme {i}") for i in range(COUNT))
    dataset = Doubled(remote, cache, shuffle=True)
    found = [
        pair for numbers, names in DataLoader(dataset, batch_size=5, num_workers=workers)
        for pair in zip(numbers.tolist(), names, strict=True)
    ]  # fmt: skip
    assert sorted(set(found)) == expected
    loader = StreamingDataLoader(dataset, num_workers=workers)
    assert loader.batch_size == 4
    found = [pair for numbers, names in loader for pair in zip(numbers.tolist(), names, strict=True)]
    assert sorted(found) == expected
    assert found != expected
    assert dataset[7] == (8, "näme 7")
    loader.close()


def test_the_loader_resumes_where_it_was(remote: str, cache: fastload.Cache) -> None:
    def opened() -> StreamingDataLoader:
        return StreamingDataLoader(
            StreamingDataset(remote=remote, split="train", shuffle=True, batch_size=5, cache=cache)
        )

    loader = opened()
    batches = iter(loader)
    seen = [int(number) for _ in range(2) for number in next(batches)["id"]]
    state = loader.state_dict()
    rest = [int(number) for batch in batches for number in batch["id"]]
    resumed = opened()
    resumed.load_state_dict(state)
    batch = next(iter(resumed))
    assert isinstance(batch["id"], torch.Tensor)
    assert batch["id"].tolist() == rest[:5]
    assert sorted(seen + rest) == [i - 3 for i in range(COUNT)]
    loader.close()
    resumed.close()


def test_pickles_are_read_where_that_is_allowed(cache: fastload.Cache, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.00000.mds").write_bytes(shard([("a", "pkl", None)], [[pickle.dumps({"x": 1})]]))
    allowed = StreamingDataset(local=str(tmp_path / "data"), cache=cache, allow_unsafe_types=True)
    assert [sample["a"] for sample in allowed] == [{"x": 1}]
    refused = StreamingDataset(local=str(tmp_path / "data"), cache=cache)
    with pytest.raises(ConfigError, match="it holds pickles"):
        list(refused)
    allowed._data.close()
    refused._data.close()


def test_streams_are_read_one_after_the_other_or_by_proportion(remote: str, cache: fastload.Cache) -> None:
    both = StreamingDataset(streams=[Stream(remote=remote, split="train"), Stream(local=str(WRITTEN))], cache=cache)
    assert both.size == 2 * COUNT
    assert sorted(int(sample["id"]) for sample in both) == sorted([i - 3 for i in range(COUNT)] * 2)
    streams = [Stream(remote=remote, split="train", proportion=0.75), Stream(local=str(WRITTEN), proportion=0.25)]
    mixed = StreamingDataset(streams=streams, cache=cache)
    drawn = [sample["Name"] for sample in mixed]
    assert len(drawn) > COUNT
    both._data.close()
    mixed._data.close()


def test_what_has_no_part_here_is_said_and_what_cannot_be_is_refused(remote: str, cache: fastload.Cache) -> None:
    with pytest.warns(UserWarning, match=r"cache_limit='1gb' is not used: fastload's cache has limits of its own"):
        StreamingDataset(remote=remote, split="train", cache=cache, cache_limit="1gb")
    with pytest.warns(UserWarning, match="local= is not used"):
        StreamingDataset(remote=remote, local="/tmp/mds", split="train", cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StreamingDataset(remote=remote, split="train", cache=cache, shuffle=True, shuffle_seed=3, batch_size=8)
    for arguments, says in (
        ({"epoch_size": 5}, "each sample once an epoch"),
        ({"streams": [], "remote": remote}, "not both"),
        ({"streams": []}, "name at least one"),
        ({"streams": [Stream(remote=remote, repeat=2)]}, r"no repeat= and choose="),
        ({"streams": [Stream(remote=remote, proportion=1), Stream(remote=remote)]}, "or none of them"),
        ({}, r"needs remote="),
    ):
        with pytest.raises(ConfigError, match=says):
            StreamingDataset(cache=cache, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        StreamingDataset(remote=remote, nonsense=1)
