"""Errors and warnings lead to the user's line, and what is left out of a traceback can be had."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload.pipeline.finish import BatchBuilder
from tests.shards import corpus, tar_of

LIMITS = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}
PACKAGE = str(Path(fastload.__file__).parent)


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(tmp_path / "cache", **LIMITS, service="inprocess") as cache:
        yield cache


@pytest.fixture
def url(tmp_path: Path) -> str:
    return corpus(shard_count=1).write(tmp_path / "shards")


def frames_of_ours(error: BaseException) -> int:
    return sum(each.filename.startswith(PACKAGE) for each in traceback.extract_tb(error.__traceback__))


def read(url: str, cache: fastload.Cache, num_workers: int = 0, workers: str = "auto", **options: Any) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, **options)
    with fastload.DataLoader(dataset, num_workers=num_workers, workers=workers) as loader:  # type: ignore[arg-type]
        list(loader)


def closed_in_mid_epoch(url: str, cache: fastload.Cache) -> None:
    loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), num_workers=1)
    batches = iter(loader)
    next(batches)
    loader.close()
    next(batches)


def nothing(sample: Any) -> None:
    return None


NO_NUMBER = {"bin": fastload.decode.integer()}


CALLS: dict[str, Callable[[str, fastload.Cache], Any]] = {
    "a data set": lambda url, cache: fastload.StreamingDataset(url, cache=cache, seed="0"),  # type: ignore[arg-type]
    "a loader": lambda url, cache: fastload.DataLoader([1], workers="x"),  # type: ignore[arg-type]
    "listing": lambda url, cache: read(f"{url}nothing/", cache),
    "a column": lambda url, cache: read(url, cache, columns=["jpg"]),
    "a column, in a thread": lambda url, cache: read(url, cache, 1, columns=["jpg"]),
    "a column, in a process": lambda url, cache: read(url, cache, 1, workers="process", columns=["jpg"]),
    "a decoder, in a process": lambda url, cache: read(url, cache, 1, workers="process", decode=NO_NUMBER),
    "a loader that was closed": closed_in_mid_epoch,
    "a limit": lambda url, cache: fastload.Cache(cache.directory, chunk_bytes=3),
    "None for a sample": lambda url, cache: list(
        fastload.DataLoader(fastload.StreamingDataset(url, cache=cache).map(nothing), num_workers=1)
    ),
    "samples": lambda url, cache: list(fastload.StreamingDataset(url, cache=cache, columns=["jpg"])),
    "a file": lambda url, cache: fastload.open(f"{url}nothing", cache),
    "a cache": lambda url, cache: fastload.Cache("s3://bucket"),
    "a mixture": lambda url, cache: fastload.Mixture([]),
    "a state": lambda url, cache: fastload.DataLoader(fastload.StreamingDataset(url, cache=cache)).load_state_dict({}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_traceback_ends_where_fastload_was_called(
    name: str, url: str, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(fastload.FastloadError) as caught, caplog.at_level(logging.DEBUG, "fastload.callers"):
        CALLS[name](url, cache)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [each.filename for each in frames[:-1]] == [__file__] * (len(frames) - 1)
    assert frames[-1].filename.startswith(PACKAGE)  # that which raised it, which Python adds
    assert "Traceback" not in str(caught.value.__cause__)
    whole = caplog.text
    caplog.clear()  # it holds all of those frames
    assert caught.typename in whole
    monkeypatch.setenv("FASTLOAD_TRACEBACK", "full")
    with pytest.raises(fastload.FastloadError) as full:
        CALLS[name](url, cache)
    assert str(full.value) == str(caught.value)
    assert frames_of_ours(full.value) > frames_of_ours(caught.value)
    deepest = traceback.extract_tb(full.value.__traceback__)[-1].name
    assert f"in {deepest}\n" in whole


def test_frames_of_the_users_functions_stay(url: str, cache: fastload.Cache, tmp_path: Path) -> None:
    def looks_up(sample: Any) -> Any:
        return fastload.open(tmp_path / "nothing", cache)

    dataset = fastload.StreamingDataset(url, cache=cache).map(looks_up)
    with fastload.DataLoader(dataset, num_workers=1, workers="thread") as loader:
        with pytest.raises(fastload.ObjectMissingError) as caught:
            next(iter(loader))
        names = [each.name for each in traceback.extract_tb(caught.value.__traceback__)]
        assert "looks_up" in names
        assert frames_of_ours(caught.value) <= 3


def test_a_users_folder_may_be_called_as_torch_is(url: str, cache: fastload.Cache, tmp_path: Path) -> None:
    script = str(tmp_path / "torch" / "train.py")
    run = compile("loader(dataset, in_order=False)", script, "exec")
    with pytest.warns(UserWarning, match="in_order=False: ignored") as record:
        exec(run, {"loader": fastload.DataLoader, "dataset": fastload.StreamingDataset(url, cache=cache)})
    assert [each.filename for each in record] == [script]


def loaded(dataset: fastload.StreamingDataset[Any], **options: Any) -> list[Any]:
    with fastload.DataLoader(dataset, batch_size=2, **options) as loader:
        return list(loader)


def pads(value: Any) -> Any:
    return torch.nn.functional.pad(value, (1, 1))  # of a dict: the error is raised in torch


USERS: dict[str, Callable[[fastload.StreamingDataset[Any]], Any]] = {
    "map": lambda dataset: loaded(dataset.map(pads)),
    "map, in a thread": lambda dataset: loaded(dataset.map(pads), num_workers=1, workers="thread"),
    "map, in a process": lambda dataset: loaded(dataset.map(pads), num_workers=1),
    "collate_fn": lambda dataset: loaded(dataset, collate_fn=pads),
    "map_batch": lambda dataset: loaded(dataset.map_batch(pads)),
    "samples": lambda dataset: list(dataset.map(pads)),
    "a sample": lambda dataset: len(list(dataset)) and dataset.map(pads)[0],  # found once shards were read
}


@pytest.mark.parametrize("name", USERS)
def test_an_error_of_a_users_function_shows_the_function_and_what_it_called(
    name: str, url: str, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache)
    with pytest.raises(TypeError) as caught:
        USERS[name](dataset)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count(f'File "{PACKAGE}') == 1  # that which raised it, which Python adds
    assert "in pads\n" in shown
    assert f"{os.sep}torch{os.sep}" in shown
    assert "in pads, called with" in shown
    monkeypatch.setenv("FASTLOAD_TRACEBACK", "full")
    with pytest.raises(TypeError) as full:
        USERS[name](dataset)
    assert "".join(traceback.format_exception(full.value)).count(f'File "{PACKAGE}') > 5


def test_what_is_not_ours_keeps_its_frames(url: str, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a defect of ours."""

    def breaks(*_: Any) -> Any:
        return 1 / 0

    with fastload.DataLoader(fastload.StreamingDataset(url, cache=cache)) as loader:
        monkeypatch.setattr(BatchBuilder, "batch", breaks)
        with pytest.raises(ZeroDivisionError) as caught:
            next(iter(loader))
        assert frames_of_ours(caught.value) > 3


def lines_of(record: list[warnings.WarningMessage]) -> list[tuple[str, bool]]:
    """Where warnings point at: the file, and whether the line is marked."""
    lines = [(each.filename, Path(each.filename).read_text().splitlines()[each.lineno - 1]) for each in record]
    return [(path, line.endswith("# here")) for path, line in lines]


def test_warnings_point_at_the_users_line(tmp_path: Path, cache: fastload.Cache) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a": {"cls": b"0"}, "b": {"cls": b"zero"}}))
    options: dict[str, Any] = {"decode": {"cls": fastload.decode.integer()}, "on_error": "skip"}
    dataset = fastload.StreamingDataset(path, cache=cache, **options)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fastload.DataLoader(dataset, in_order=False)  # here
        for num_workers in (0, 1):  # a thread has no line of the user's
            with fastload.DataLoader(dataset, batch_size=2, num_workers=num_workers, pin_memory=True) as loader:
                for _ in loader:  # here
                    pass
        other = fastload.DataLoader([1], num_workers=1, workers="thread", multiprocessing_context="fork")
        list(other)  # here
        fastload.Cache(cache.directory, disk_bytes="32MiB").close()  # here
    expected = 5 + 2 * (not torch.cuda.is_available())
    assert lines_of(record) == [(__file__, True)] * expected, [str(each) for each in record]
