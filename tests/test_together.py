"""Batches that are made several at a time are those that are made one by one: values, order, state, errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
from fastload import decode
from fastload.dataset_base import DatasetBase
from fastload.errors import DecodeError
from fastload.pipeline.gather import SampleGatherer
from tests.decode.pictures import jpeg, photographs
from tests.shards import Corpus, tar_of

COUNT = 120
SHARDS = 5


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets. Samples may lack `txt`; `odd` is an integer, but of every fourth one."""
    photo, rng, made = photographs()[0], np.random.default_rng(3), []
    for name in "ab":
        samples: dict[str, dict[str, bytes]] = {}
        for number in range(COUNT):
            samples[f"{name}/{number:04d}"] = {
                "bin": rng.bytes(number),
                "flat": rng.bytes(24),
                "cls": b"%d" % number,
                "odd": b"many" if number % 4 == 3 else b"%d" % number,
                "jpg": jpeg(photo[number : number + 20, :20]),
                **({"txt": b"text %d" % number} if number % 3 else {}),
            }
        keys = sorted(samples)
        shards = {f"{i}.tar": tar_of({key: samples[key] for key in keys[i::SHARDS]}) for i in range(SHARDS)}
        made.append(Corpus(shards, samples).write(tmp_path_factory.mktemp(name)))
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All that is ready is made together, also where it takes long; the samples that are gathered at once."""
    monkeypatch.setattr("fastload.loader_stream.TASK_S", 1e6)
    monkeypatch.setattr("fastload.loader_stream._TASK_OF_WORKERS_S", 1e6)
    counts: list[int] = []
    gather = SampleGatherer.gather

    def counted(self: SampleGatherer, entry: Any, *more: Any, **named: Any) -> Any:
        counts.append(len(entry))
        return gather(self, entry, *more, **named)

    monkeypatch.setattr(SampleGatherer, "gather", counted)
    return counts


def shifted(sample: dict[str, Any]) -> dict[str, Any]:
    """Draws at random, which is repeatable in worker processes."""
    return {**sample, "drawn": torch.rand(()), "bin": len(sample["bin"])}


def summed(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "sum": batch["cls"].sum()}


def same(mine: Any, other: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return mine.dtype == other.dtype and torch.equal(mine, other)
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)
    if isinstance(mine, tuple | list):
        return len(mine) == len(other) and all(map(same, mine, other))
    return bool(mine == other)


ALL = {"bin": decode.raw(), "flat": decode.flat("<u4", (2, 3)), "cls": decode.integer()}
KINDS: dict[str, Callable[[list[str], Any], DatasetBase[Any]]] = {
    "decoded": lambda urls, options: fastload.StreamingDataset(urls[0], decode=ALL, **options),
    "all columns": lambda urls, options: fastload.StreamingDataset(
        urls[0], columns=["bin", "flat", "cls", "jpg", "txt?"], **options
    ),
    "optional": lambda urls, options: fastload.StreamingDataset(
        urls[0], decode={"txt?": decode.text(), "cls": decode.integer()}, **options
    ),
    "random crops": lambda urls, options: fastload.StreamingDataset(
        urls[0], decode={"jpg": decode.image(8, random_resized_crop=True, hflip=0.5)}, **options
    ),
    "tuples": lambda urls, options: fastload.StreamingDataset(urls[0], decode=ALL, as_tuple=True, **options),
    "global": lambda urls, options: fastload.StreamingDataset(urls[0], decode=ALL, **{**options, "shuffle": "global"}),
    "mixture": lambda urls, options: fastload.Mixture(
        [
            (fastload.StreamingDataset(url, decode=ALL, **options), weight)
            for url, weight in zip(urls, (0.7, 0.3), strict=True)
        ],
        seed=1,
    ),
    "map": lambda urls, options: fastload.StreamingDataset(urls[0], decode=ALL, **options).map(shifted),
    "map_batch": lambda urls, options: fastload.StreamingDataset(urls[0], decode=ALL, **options).map_batch(summed),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_those_that_are_made_alone(
    urls: list[str], cache: fastload.Cache, kind: str, drop_last: bool, gathers: list[int], monkeypatch: Any
) -> None:
    options = {"shuffle": True, "seed": 3, "cache": cache, "shuffle_window": "64KiB"}
    dataset = KINDS[kind](urls, options)
    loader = fastload.DataLoader(dataset, batch_size=3, num_workers=2, drop_last=drop_last)
    with loader:
        together = list(loader)
        assert max(gathers) > 3 * 3, "no batches were made together"
        gathers.clear()
        monkeypatch.setattr("fastload.pipeline.delivery._BATCHES_A_TASK_MAX", 1)
        dataset.set_epoch(0)
        alone = list(loader)
        assert max(gathers) <= 3
    assert len(together) == len(alone) > 10
    assert all(map(same, together, alone))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_state_is_that_of_the_batch_that_was_delivered(
    urls: list[str], cache: fastload.Cache, gathers: list[int], num_workers: int
) -> None:
    dataset = fastload.StreamingDataset(urls[0], decode=ALL, shuffle=True, seed=3, cache=cache)
    with fastload.DataLoader(dataset, batch_size=3, num_workers=num_workers) as loader:
        batches, states = [], []
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
        assert max(gathers) > 3
        for number in (0, 7, 8, 20):
            loader.load_state_dict(states[number])
            assert all(map(same, loader, batches[number + 1 :]))


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_samples_that_cannot_be_read_are_skipped_one_by_one(
    urls: list[str], cache: fastload.Cache, gathers: list[int], workers: Any
) -> None:
    columns = {"odd": decode.integer(), "bin": decode.raw()}
    dataset = fastload.StreamingDataset(urls[0], decode=columns, cache=cache, on_error="skip").map_batch(dict)
    with fastload.DataLoader(dataset, batch_size=3, num_workers=1, workers=workers) as loader:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = list(loader)
        keys = [key for batch in batches for key in batch["__key__"]]
        assert len(batches) == COUNT // 3
        assert len(keys) == loader.stats()["samples"] == COUNT * 3 // 4
        assert loader.stats()["skipped"] == COUNT // 4
        assert [int(key[-4:]) for key in keys] == [number for batch in batches for number in batch["odd"].tolist()]
        assert {len(item) for batch in batches for item in batch["bin"]} == {n for n in range(COUNT) if n % 4 != 3}


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_an_error_comes_in_place_of_its_batch(
    urls: list[str], cache: fastload.Cache, gathers: list[int], workers: Any
) -> None:
    dataset = fastload.StreamingDataset(urls[0], decode={"odd": decode.integer()}, cache=cache).map_batch(dict)
    with fastload.DataLoader(dataset, batch_size=1, num_workers=1, workers=workers) as loader:
        batches = iter(loader)
        # In the order of the shards, each of which has every fifth sample; that of number 15 has no integer.
        assert [int(next(batches)["odd"]) for _ in range(3)] == [0, 5, 10]
        with pytest.raises(DecodeError, match=r"sample 'a/0015'.*many"):
            next(batches)
