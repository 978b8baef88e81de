"""On the declared path nothing runs Python for a sample: batches with four times the samples take as many calls.

Calls of Python functions and of C functions are counted alike, in the user's thread, the feeder's and those that
decode, over an epoch that finds everything in the cache. How often threads wait for one another differs from run to
run, by some hundreds of calls on a busy machine; a call for each sample would be thousands.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastload
from fastload import decode
from fastload.decode import native
from fastload.strings import Strings
from tests.decode.helpers import npy
from tests.decode.pictures import jpeg, photographs
from tests.shards import tar_of

SHARDS, BATCHES, FEW, TIMES = 3, 12, 64, 4
DECODERS = {
    "bin": decode.raw(),
    "cls": decode.integer(),
    "npy": decode.array((4, 5), "float32"),
    "txt": decode.number("float32"),
    "jpg": decode.image(16, random_resized_crop=True, hflip=0.5),
}


class Calls:
    """Counts calls by what is called, in this thread and in those of the loader."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._is_on = False

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if not self._is_on:
            return
        if event == "call":
            self.counts[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            self.counts[argument.__qualname__] += 1

    def of_epoch(self, loader: fastload.DataLoader) -> Counter[str]:
        """Those of one epoch."""
        self.counts = Counter()
        self._is_on = True
        try:
            for _ in loader:
                pass
        finally:
            self._is_on = False
        return self.counts


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Counts in threads that are started from now on, but for the one that listens to the cache service."""
    counter = Calls()

    def begin(frame: Any, event: str, argument: Any) -> None:
        own = threading.current_thread().name.startswith(("fastload-decode", "fastload-feed"))
        sys.setprofile(counter if own else None)

    threading.setprofile(begin)
    sys.setprofile(counter)
    try:
        yield counter
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same shards with `FEW` samples for each batch, and with `TIMES` as many."""
    rng = np.random.default_rng(0)
    photo = photographs()[0]
    # Of more than 1 kB, so that both sizes of batches are large enough for memory that is used again.
    pictures = [jpeg(photo[at : at + 64, at : at + 64]) for at in range(0, 200, 10)]
    made = []
    for times in (1, TIMES):
        folder = tmp_path_factory.mktemp(f"of-{times}")
        count = BATCHES * FEW * times // SHARDS
        for shard in range(SHARDS):
            samples = {
                f"{shard}/{number:06d}": {
                    "bin": rng.bytes(int(rng.integers(1, 60))),
                    "cls": b"%d" % number,
                    "npy": npy(rng.random((4, 5), np.float32)),
                    "txt": repr(rng.random()).encode(),
                    "jpg": pictures[number % len(pictures)],
                }
                for number in range(count)
            }
            (folder / f"{shard}.tar").write_bytes(tar_of(samples))
        made.append(f"{folder}/")
    return made


@pytest.mark.parametrize("column", [*DECODERS, "all as they are"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_calls_do_not_grow_with_the_samples_of_a_batch(
    folders: list[str], calls: Calls, tmp_path: Path, column: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastload.pipeline.delivery._BATCHES_A_TASK_MAX", 1
    )  # how many are made together varies with time
    if column == "jpg" and native.c_unit() is None:
        pytest.skip("without the C unit each picture is decoded by a call of simplejpeg")
    decoders = {column: DECODERS[column]} if column in DECODERS else None
    found = []
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes=0) as cache:
        for times, url in zip((1, TIMES), folders, strict=True):
            dataset = fastload.StreamingDataset(url, cache=cache, decode=decoders, shuffle=True)
            loader = fastload.DataLoader(dataset, batch_size=FEW * times, num_workers=num_workers)
            for batch in loader:
                assert set(batch) == {"__key__", "__url__", *(decoders or DECODERS)}
                assert {len(values) for values in batch.values()} == {FEW * times}
                for name in ("__key__", "__url__"):
                    assert type(batch[name]) is Strings
                    assert {type(value) for value in batch[name]} == {str}
            found.append(calls.of_epoch(loader))
            loader.close()
    few, many = found
    assert few.total() > 10 * BATCHES
    more_samples = BATCHES * FEW * (TIMES - 1)
    grown = {name: many[name] - few[name] for name in many if many[name] - few[name] >= BATCHES}
    assert many.total() - few.total() < more_samples / 3, grown
    # One for each batch, which are not made together here; a second one where some of its chunks are on their way.
    gathers = sum(count for name, count in many.items() if name.endswith("kernels/gather.py:gather_columns"))
    assert 1 <= gathers / BATCHES < 1.5
