"""Our own data sets under Lightning, accelerate and transformers: the examples, stopped and gone on with.

Each process writes down which points it was given in which epoch. `make frameworks` installs the frameworks.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastload import Cache, prepare
from tests.jobs.launch import ROOT, Launched
from tests.jobs.pool import Failed, Rank, RankPool
from tests.jobs.test_examples import ALONE_AND_IN_SEVERAL, KILLED_AND_RESUMED
from tests.shards import Corpus, tar_of
from tests.torchloader.test_frameworks import FRAMEWORK, QUIET, example

POINTS = 44  # eleven batches of four; five or six for each of two processes
SHARDS = 4

# Frameworks take long to be imported, in each process.
pytestmark = FRAMEWORK


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skipped before anything is made for the test."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed; `make frameworks` installs them")


NEEDS = {
    "lightning": needs("lightning"),
    "accelerate": needs("accelerate"),
    "transformers": needs("transformers", "accelerate"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks."""
    pool = RankPool(2)
    try:
        yield pool
    finally:
        pool.close()


def npy(point: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, point)
    return out.getvalue()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Points whose first number says which one each is, indexed."""
    found = {}
    for shard in range(SHARDS):
        numbers = range(shard, POINTS, SHARDS)
        points = {f"{n:03}": np.full(8, n, np.float32) / POINTS for n in numbers}
        found[f"{shard}.tar"] = tar_of(
            {key: {"npy": npy(point), "cls": str(int(key) % 2).encode()} for key, point in points.items()}
        )
    url = Corpus(found, {}).write(tmp_path / "points")
    monkeypatch.setenv("FASTLOAD_CACHE", str(tmp_path / "cache"))
    with Cache() as cache:
        prepare.index([url], cache)
    return url


class Log:
    """What each process was given: lines of an epoch and the numbers of a batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, rank: int, epoch: int, points: torch.Tensor) -> None:
        numbers = (points[:, 0] * POINTS).round().long().tolist()
        with open(self.folder / f"{rank}.jsonl", "a") as file:
            print(json.dumps([epoch, numbers]), file=file)

    def batches(self, rank: int = 0) -> list[tuple[int, list[int]]]:
        return [tuple(json.loads(line)) for line in (self.folder / f"{rank}.jsonl").read_text().splitlines()]

    def epoch(self, epoch: int, ranks: int = 1) -> list[list[int]]:
        """All batches of an epoch, rank by rank."""
        return [batch for rank in range(ranks) for at, batch in self.batches(rank) if at == epoch]


def check_epochs(log: Log, ranks: int, epochs: int = 3) -> None:
    """Each epoch has every point once, over all ranks, and an order of its own."""
    orders = [log.epoch(epoch, ranks) for epoch in range(epochs)]
    for order in orders:
        assert Counter(number for batch in order for number in batch) == Counter(range(POINTS))
    assert len({str(order) for order in orders}) == epochs
    assert {epoch for epoch, _ in log.batches()} == set(range(epochs))


def two_logs(tmp_path: Path) -> tuple[Log, Log]:
    """One of a run that is not stopped, and one of a run that is."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    return Log(tmp_path / "whole"), Log(tmp_path / "stopped")


def check_runs(log: Log, stopped: Log, ranks: int) -> None:
    check_epochs(log, ranks)
    for rank in range(ranks):
        assert stopped.batches(rank) == log.batches(rank)


# Lightning


def lightning_run(module: ModuleType, log: Log, shards: str, folder: Path, **settings: Any) -> None:
    """The example, which writes down its batches."""

    class Logged(module.Classifier):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            log.write(self.global_rank, self.current_epoch, batch[0])
            return super().training_step(batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Classifier", Logged)
        module.train(shards, str(folder), save_every=1, default_root_dir=str(folder), **QUIET, **settings)


@NEEDS["lightning"]
@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_goes_on_where_it_was_stopped(shards: str, tmp_path: Path, ranks: int) -> None:
    module = example("train_lightning_streaming")
    processes: dict[str, Any] = {"devices": 1} if ranks == 1 else {"devices": 2, "strategy": "ddp_fork"}
    log, stopped = two_logs(tmp_path)
    lightning_run(module, log, shards, tmp_path / "a", **processes)
    lightning_run(module, stopped, shards, tmp_path / "b", max_steps=8, **processes)
    lightning_run(module, stopped, shards, tmp_path / "b", **processes)
    check_runs(log, stopped, ranks)


# accelerate


def accelerate_run(log: Log, shards: str, folder: str, stop_after: int | None = None) -> None:
    module = example("train_accelerate_streaming")
    from accelerate.state import AcceleratorState

    accelerator = module.Accelerator(cpu=True)
    steps = 0

    def on_step(epoch: int, points: torch.Tensor) -> None:
        nonlocal steps
        log.write(accelerator.process_index, epoch, points)
        steps += 1
        if steps == stop_after:
            raise KeyboardInterrupt

    try:
        module.train(accelerator, shards, folder, save_every=1, on_step=on_step)
    except KeyboardInterrupt:
        assert stop_after is not None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@NEEDS["accelerate"]
def test_accelerate_goes_on_where_it_was_stopped(shards: str, tmp_path: Path) -> None:
    log, stopped = two_logs(tmp_path)
    accelerate_run(log, shards, str(tmp_path / "a"))
    accelerate_run(stopped, shards, str(tmp_path / "b"), stop_after=15)
    accelerate_run(stopped, shards, str(tmp_path / "b"))
    check_runs(log, stopped, 1)


# transformers


def transformers_run(log: Log, shards: str, folder: str, rank: int = 0, **settings: Any) -> None:
    module = example("train_transformers_streaming")

    class Logged(module.StreamingTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            log.write(rank, self.loader.state_dict()["epoch"], inputs["inputs"])
            return super().training_step(model, inputs, *args, **options)

    options = {"save_steps": 1, "disable_tqdm": True, "report_to": [], "logging_strategy": "no", **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "StreamingTrainer", Logged)
        module.train(shards, folder, **options)


@NEEDS["transformers"]
def test_transformers_goes_on_where_it_was_stopped(shards: str, tmp_path: Path) -> None:
    log, stopped = two_logs(tmp_path)
    transformers_run(log, shards, str(tmp_path / "a"))
    transformers_run(stopped, shards, str(tmp_path / "b"), max_steps=15)
    transformers_run(stopped, shards, str(tmp_path / "b"))
    check_runs(log, stopped, 1)


# Two processes


def in_rank(rank: Rank, name: str, folder: str, cache: str, *arguments: Any) -> None:
    os.environ["FASTLOAD_CACHE"] = cache
    if name == "accelerate":
        accelerate_run(Log(Path(folder)), *arguments)
    else:
        url, trained, max_steps = arguments
        settings: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
        # Of several processes on CPUs, transformers 4.57 saves an optimizer that it cannot load.
        settings |= {"ddp_backend": "gloo", "save_only_model": True}
        transformers_run(Log(Path(folder)), url, trained, rank.rank, **settings)


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS[name]) for name in ("accelerate", "transformers")])
def test_two_processes_go_on_where_they_were_stopped(pool: RankPool, shards: str, tmp_path: Path, name: str) -> None:
    ranks = [Rank(rank, 2, 2, meets=name) for rank in range(2)]
    log, stopped = two_logs(tmp_path)
    cache = os.environ["FASTLOAD_CACHE"]
    for where, trained, steps in ((log, "a", None), (stopped, "b", 8), (stopped, "b", None)):
        arguments = (name, str(where.folder), cache, shards, str(tmp_path / trained), steps)
        answers = pool.run(name, in_rank, ranks, *arguments, deadline_s=120.0)
        assert not [answer for answer in answers if isinstance(answer, Failed)], answers
    check_runs(log, stopped, 2)


SCRIPTS = (
    "train_lightning",
    "train_accelerate",
    "train_transformers",
    "train_lightning_streaming",
    "train_accelerate_streaming",
    "train_transformers_streaming",
)


@pytest.mark.timeout(3600)  # eighteen processes that import frameworks
@needs("lightning", "accelerate", "transformers")
def test_all_run_one_after_the_other_in_one_folder(shards: str, tmp_path: Path) -> None:
    """Alone, then under torchrun, as users start them; what one has left there is in no other's way."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in SCRIPTS:
        script, environ = str(ROOT / f"examples/{name}.py"), {"SHARDS": shards, "PYTHONPATH": str(ROOT)}
        command, outside = [sys.executable, script], {**os.environ, **environ}
        alone = subprocess.run(command, env=outside, cwd=folder, capture_output=True, text=True, check=False)
        assert alone.returncode == 0, alone.stderr
        with Launched(["--standalone", "--nproc-per-node", "2", script], environ, folder) as job:
            output = job.output()
        if "lightning" in name:
            assert "MEMBER: 2/2" in output  # and not a network for each
        if name == "train_accelerate":
            assert output.count("epoch 1 loss") == alone.stdout.count("epoch 1 loss") == 1


def test_no_example_is_left_out() -> None:
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == {*(f"{name}.py" for name in SCRIPTS), *ALONE_AND_IN_SEVERAL, *KILLED_AND_RESUMED}
