"""`filter`: samples are left out of their batches, wherever these are made, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastload
from fastload.errors import ConfigError
from tests.shards import Corpus, corpus

PLACES = [("auto", 0), ("thread", 2), ("process", 2), ("side", 2)]


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus(4, 15)


@pytest.fixture
def new(data: Corpus, tmp_path: Path) -> Iterator[Callable[..., fastload.StreamingDataset]]:
    url = data.write(tmp_path / "data")
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        options: dict[str, Any] = {"cache": cache, "shuffle": True, "shuffle_window": "64KiB", "seed": 3}
        decode = {"bin": fastload.decode.raw(), "cls": fastload.decode.integer()}
        yield lambda **others: fastload.StreamingDataset(url, decode=decode, **{**options, **others})


def is_third(sample: dict[str, Any]) -> bool:
    return bool(sample["cls"] % 3 == 0)


def number(sample: dict[str, Any]) -> int:
    return int(sample["cls"])


def numbers(loader: fastload.DataLoader) -> list[list[int]]:
    with loader:
        return [list(map(int, batch)) for batch in loader]


def loaded(dataset: Any, workers: str = "auto", count: int = 0, **options: Any) -> fastload.DataLoader:
    return fastload.DataLoader(dataset, **{"batch_size": 8, **options}, num_workers=count, workers=workers)


@pytest.mark.parametrize(("workers", "count"), PLACES)
def test_batches_get_shorter_and_others_keep_their_samples(new, workers: str, count: int) -> None:
    whole = numbers(loaded(new().map(number)))
    dataset = new().filter(is_third).map(number)
    loader = loaded(dataset, workers, count)
    kept = numbers(loader)
    assert kept == [[each for each in batch if each % 3 == 0] for batch in whole]
    stats = loader.stats()
    assert stats["filtered"] == sum(map(len, whole)) - sum(map(len, kept)) > 0
    assert (stats["batches"], stats["samples"], stats["skipped"]) == (len(whole), sum(map(len, whole)), 0)


@pytest.mark.parametrize(("workers", "count"), [("auto", 0), ("process", 2)])
def test_filters_and_functions_are_applied_in_order(new, workers: str, count: int) -> None:
    called: list[int] = []

    def noted(each: int) -> int:
        called.append(each)
        return each * 10

    dataset = new(shuffle=False).map(number).filter(lambda each: each % 2).map(noted).filter(lambda each: each > 50)
    found = [each for batch in numbers(loaded(dataset, workers, count)) for each in batch]
    whole = [each for batch in numbers(loaded(new(shuffle=False).map(number))) for each in batch]
    assert found == [each * 10 for each in whole if each % 2 and each > 5]
    assert called == ([] if count else [each for each in whole if each % 2])  # and not with what was left out


def test_a_batch_of_which_nothing_is_left_is_an_empty_list(new) -> None:
    dataset = new().filter(lambda sample: False)
    assert numbers(loaded(dataset.map(number), batch_size=20)) == [[]] * 4
    collated = fastload.DataLoader(dataset, batch_size=20, collate_fn=len)
    assert list(collated) == [0, 0, 0, 0]
    assert list(new().filter(lambda sample: False)) == []


def test_samples_one_by_one_and_their_state(new) -> None:
    whole = [number(sample) for sample in new()]
    kept = [each for each in whole if each % 3 == 0]
    dataset = new().filter(is_third).map(number)
    assert list(dataset) == kept
    for count in (1, len(kept) // 2, len(kept)):
        dataset = new().filter(is_third).map(number)
        samples = iter(dataset)
        assert [next(samples) for _ in range(count)] == kept[:count]
        resumed = new().filter(is_third).map(number)
        resumed.load_state_dict(dataset.state_dict())
        assert list(resumed) == kept[count:]


@pytest.mark.parametrize(("workers", "count"), [("auto", 0), ("process", 2)])
def test_a_loader_goes_on_with_what_follows(new, workers: str, count: int) -> None:
    expected = numbers(loaded(new().filter(is_third).map(number)))
    with loaded(new().filter(is_third).map(number), workers, count) as loader:
        batches = iter(loader)
        begun = [list(map(int, next(batches))) for _ in range(3)]
        state = loader.state_dict()
    resumed = loaded(new().filter(is_third).map(number), workers, count)
    resumed.load_state_dict(state)
    assert begun + numbers(resumed) == expected


def test_all_ranks_have_as_many_steps(new) -> None:
    found = [
        numbers(loaded(new(rank=rank, world_size=3).filter(is_third).map(number), batch_size=4)) for rank in range(3)
    ]
    assert {len(batches) for batches in found} == {6}
    assert sorted(each for batches in found for batch in batches for each in batch) == sorted(
        each for each in (number(sample) for sample in new()) if each % 3 == 0
    )


def test_of_a_source_of_a_mixture_and_of_the_mixture(new) -> None:
    def mixed(first: Any, second: Any) -> fastload.Mixture:
        return fastload.Mixture([(first, 0.5), (second, 0.5)], seed=1)

    def pair(sample: dict[str, Any]) -> tuple[int, int]:
        return int(sample["__source__"]), number(sample)

    def pairs(mixture: fastload.Mixture) -> list[list[tuple[int, int]]]:
        loader = fastload.DataLoader(mixture.map(pair), batch_size=8, collate_fn=list)
        return list(loader)

    whole = pairs(mixed(new(), new(seed=9)))
    assert {source for batch in whole for source, _ in batch} == {0, 1}
    one = pairs(mixed(new(), new(seed=9).filter(is_third)))
    assert one == [[(source, each) for source, each in batch if source == 0 or each % 3 == 0] for batch in whole]
    both = pairs(mixed(new(), new(seed=9)).filter(is_third))
    assert both == [[(source, each) for source, each in batch if each % 3 == 0] for batch in whole]


def test_numbers_are_refused_with_the_cure(new) -> None:
    dataset = new()
    list(dataset)  # so that its counts are known
    filtered = dataset.filter(is_third)
    assert len(filtered) == len(dataset) == 63
    for read in (lambda: filtered[3], lambda: filtered.take([3]), lambda: filtered.samples([3]), filtered.indexed):
        with pytest.raises(ConfigError, match=r"read by number from the data set before filter\(\)"):
            read()
    with pytest.raises(ConfigError, match="filter\\(3\\): give a function of one argument"):
        dataset.filter(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"filter\(\) after map_batch\(\)"):
        dataset.map_batch(len).filter(is_third)


def test_an_error_names_the_function_and_the_sample(new) -> None:
    def broken(sample: dict[str, Any]) -> bool:
        raise ZeroDivisionError("divided")

    with pytest.raises(ZeroDivisionError) as caught:
        next(iter(loaded(new().filter(broken))))
    assert any("filter(" in note and "broken" in note and "sample '" in note for note in caught.value.__notes__)
    with pytest.raises(ConfigError, match=r"map\(.*\): it returned None for a sample of a batch"):
        next(iter(loaded(new().filter(is_third).map(lambda sample: None))))


def test_arrays_of_several_shapes_are_an_error_that_names_their_column(new) -> None:
    def ragged(sample: dict[str, Any]) -> dict[str, Any]:
        return {"n": sample["cls"], "x": np.zeros(2 + int(sample["cls"]) % 2)}

    says = r"arrays of column 'x' have the shapes \(\d,\) and \(\d,\), .* give the loader a collate_fn"
    with loaded(new().map(ragged).filter(lambda sample: True)) as loader, pytest.raises(ConfigError, match=says):
        next(iter(loader))
