"""The user's loader beside fastload's, ranks of a node, and functions that are mapped over samples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastload.bench import own, process, schema
from fastload.bench.digests import Column, add_batch, compared, merged
from fastload.bench.passes import own_copy, sample_count
from fastload.errors import ConfigError, FastloadError
from tests.patience import PATIENCE_S
from tests.processes import is_running, until
from tests.shards import corpus

CORPUS = corpus(shard_count=4, samples_per_shard=30, value_bytes=2000)
MODULE = """
import glob, os, sys, tarfile, time

def samples():
    for path in sorted(glob.glob(os.environ["MY_DATA"] + "*.tar"), reverse=True):
        with tarfile.open(path) as tar:
            found = {}
            for member in tar:
                key, _, column = member.name.rpartition(".")
                found.setdefault(key, {})[column] = tar.extractfile(member).read()
        for key, sample in found.items():
            yield {"__key__": key, **sample}

def make_loader():
    print("a loader may print")
    batch = []
    for sample in samples():
        batch.append(sample)
        if len(batch) == 16:
            yield batch
            batch = []
    yield batch

def factory():
    return make_loader

def changed():
    for batch in make_loader():
        yield [{**sample, "cls": b"-1"} for sample in batch]

def fewer():
    return list(make_loader())[1:]

class Numbers:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return index, str(index)

def of_torch():
    import torch
    return torch.utils.data.DataLoader(Numbers(), batch_size=16, num_workers=1)

def endless():
    while True:
        yield [1, 2, 3, 4]

def raises():
    yield [1]
    raise ValueError("this\\nwent wrong")

def ends():
    sys.exit(2)

def is_killed():
    os.kill(os.getpid(), 9)

def hangs():
    yield [1]
    time.sleep(3600)

def gives_nothing():
    return iter(())

def gives_none():
    return None

def forks():
    if os.fork():
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
    return make_loader()

def leaves_a_process():
    if (pid := os.fork()) == 0:
        time.sleep(3600)
    with open("pid", "w") as file:
        file.write(str(pid))
    return [[1, 2, 3]]

def halved(sample):
    return {"half": sample["bin"][: len(sample["bin"]) // 2], "cls": int(sample["cls"])}
"""
LATE_S = 1.5


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A working directory with the module; the folder with the data."""
    (tmp_path / "my_train.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_DATA", CORPUS.write(tmp_path / "data"))
    return os.environ["MY_DATA"]


def ask(name: str, timeout_s: float = PATIENCE_S, **settings: Any) -> own.Outcome:
    return own.run(own.Settings(target=f"my_train:{name}", **settings), timeout_s)


def of_corpus() -> dict[str, Column]:
    """Its columns, as fastload gives them."""
    found: dict[str, Column] = {}
    for key, sample in CORPUS.samples.items():
        add_batch(found, {"__key__": [key], **{name: [memoryview(value)] for name, value in sample.items()}})
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["make_loader", "factory", "forks"])
def test_any_iterable_is_measured_and_compared_whatever_it_prints(name: str) -> None:
    outcome = ask(name, passes=2, digests=True, replays=True)
    assert [each.samples for each in outcome.passes] == [len(CORPUS.samples)] * 2
    assert all(each.batches == 8 and each.seconds >= each.wait_max_s > 0 for each in outcome.passes)
    assert outcome.replayed is not None
    assert outcome.replayed.samples > 0
    found = compared(of_corpus(), outcome.columns)
    assert sorted(found.equal) == ["__key__", "bin", "cls"]
    assert not found.different
    assert not found.unchecked


def test_values_that_differ_and_samples_that_lack_are_seen() -> None:
    ours = of_corpus()
    found = compared(ours, ask("changed", digests=True).columns)
    assert (sorted(found.equal), found.different) == (["__key__", "bin"], ["cls"])
    assert "not give the same samples: cls" in found.sentence()
    fewer = compared(ours, ask("fewer", digests=True).columns)
    assert not fewer.equal
    assert "was not checked: it gives 107 samples, fastload 123" in fewer.sentence()


@pytest.mark.thorough
def test_a_torch_loader_and_one_without_end() -> None:
    (found,) = ask("of_torch", passes=1).passes
    assert (found.samples, found.batches) == (100, 7)
    outcome = ask("endless", passes=1, samples_max=40, digests=True, steps_s=[0.001], step_for_s=0.2)
    assert outcome.passes[0].samples == 44
    assert "stopped after 44 samples" in outcome.passes[0].note
    assert 0 < outcome.steps[0].utilisation <= 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "ValueError: this went wrong (my_train.py, line"),
        ("ends", "SystemExit: 2 (my_train.py, line"),
        ("is_killed", "was ended by SIGKILL before it gave its figures; it must not exit by itself"),
        ("hangs", "has not ended after 2 s; it hangs, or needs a longer --for"),
        ("gives_nothing", "it gives no batch; return an iterable that has some"),
        ("gives_none", "gives a NoneType, and an iterable of batches is wanted"),
        ("no_such", "my_train has no no_such; there are glob, os,"),
    ],
)
def test_a_loader_that_cannot_be_measured_is_one_line(name: str, says: str) -> None:
    with pytest.raises(FastloadError) as error:
        ask(name, LATE_S if name == "hangs" else PATIENCE_S, passes=1)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["my_train", "my_train:", ":f", "my train:f", "no_such_module:f", "my_train:a-b"])
def test_what_is_no_target_is_refused_before_anything_runs(target: str) -> None:
    with pytest.raises(ConfigError, match="--against"):
        process.check_target("--against", target)


@pytest.mark.thorough
def test_what_a_loader_leaves_behind_is_ended(tmp_path: Path) -> None:
    ask("leaves_a_process", passes=1)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not is_running(pid))


class Point(tuple[Any, ...]):
    """A batch of a type of its own."""


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"a": np.zeros((3, 2)), "b": [1, 2, 3]}, 3),
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ([torch.zeros(4), ["a", "b", "c", "d"]], 4),
        (Point((np.zeros(2), np.zeros(2))), 2),
        ([{"a": 1}, {"a": 2}], 2),
        ([b"one", b"two", b"three"], 3),
        ([(1, 2), (3, 4), (5,)], 3),
        (torch.zeros(6), 6),
        ({}, 1),
        (object(), 1),
        (7, 1),
    ],
)
def test_samples_are_counted_in_batches_of_any_kind(batch: Any, count: int) -> None:
    assert sample_count(batch) == count
    assert sample_count(own_copy(batch)) == count


def columns(*batches: Any) -> dict[str, Column]:
    found: dict[str, Column] = {}
    for batch in batches:
        add_batch(found, batch)
    return found


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        ({"a": np.arange(3)}, {"a": torch.tensor([2, 0, 1])}, "equal"),
        ({"a": np.arange(3)}, {"a": [0, 1, 2]}, "equal"),
        ({"a": np.arange(3)}, torch.arange(3), "equal"),
        ({"a": [b"x", b"y"]}, [b"y", memoryview(b"x")], "equal"),
        ({"a": np.zeros((2, 3))}, {"a": np.zeros((2, 3))}, "equal"),
        ({"a": np.zeros((2, 3))}, {"a": np.zeros((2, 1, 3))}, "different"),
        ({"a": np.arange(3)}, {"a": [0, 1, 1]}, "different"),
        ({"a": [b"x", b"x"]}, {"a": [b"x", b"y"]}, "different"),
        ({"a": [{"x": [1, None], "y": "z"}, {}]}, {"a": [{}, {"y": "z", "x": [1, None]}]}, "equal"),
        ({"a": [{"x": [1, None]}]}, {"a": [{"x": [2, None]}]}, "different"),
        ({"a": [{"x": 1}]}, {"a": [{"x": object()}]}, "unchecked"),
        ({"a": np.arange(3)}, {"a": np.arange(3, dtype=np.int32)}, "unchecked"),
        ({"a": np.arange(3)}, {"a": [0, 1]}, "unchecked"),
        ({"a": np.arange(3)}, np.arange(1, 4), "unchecked"),
        ({"a": [b"x"]}, {"a": ["x"]}, "unchecked"),
        ({"a": [b"x"]}, {"a": [object()]}, "unchecked"),
        ({"a": [b"x"]}, {"a": torch.zeros(1, dtype=torch.bfloat16)}, "unchecked"),
        ({"a": [b"x"]}, {"a": [b"x"], "b": [object()]}, "unchecked"),
    ],
)
def test_equality_is_claimed_only_of_what_was_compared(ours: Any, theirs: Any, outcome: str) -> None:
    found = compared(columns(ours), columns(theirs))
    assert bool(getattr(found, outcome)), found
    assert bool(found.different) == (outcome == "different"), found
    assert ("same samples as fastload" in found.sentence()) == (outcome == "equal")


def test_the_order_of_samples_and_how_they_are_divided_do_not_matter() -> None:
    whole = columns({"a": np.arange(6)})
    assert merged([columns({"a": np.array([5, 1])}), columns({"a": [0, 2]}, {"a": [3, 4]})]) == whole


def bench(tmp_path: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], schema.Result]:
    """The command in the working directory of the user."""
    command = ["bench", *map(str, arguments), f"--cache={tmp_path}/cache", f"--json={tmp_path}/a.json"]
    done = subprocess.run(
        [sys.executable, "-c", "from fastload.cli import main; main()", *command],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (tmp_path / "a.json").exists(), done.stderr
    return done, schema.read(tmp_path / "a.json")


def figure(result: schema.Result, phase: str, name: str) -> Sequence[float]:
    found = result.phase(phase)
    assert found is not None, [(each.name, each.error) for each in result.phases]
    return next(each.values for each in found.figures if each.name == name)


FAST = ("--skip=store,disk,memory,disk epoch,demand", "--batch-size=16", "--workers=1")


def test_both_loaders_stand_side_by_side(here: str, tmp_path: Path) -> None:
    done, result = bench(tmp_path, here, *FAST, "--against=my_train:make_loader", "--ideal")
    assert done.returncode == 0, done.stderr
    assert figure(result, "yours", "samples of an epoch") == [len(CORPUS.samples)]
    assert figure(result, "yours later", "samples of an epoch") == [len(CORPUS.samples)]
    assert figure(result, "ideal", "samples")[0] > max(figure(result, "yours", "samples"))
    assert "It gives the same samples as fastload (__key__, bin, cls)." in done.stdout
    assert "The first epoch of my_train:make_loader runs at" in done.stdout
    assert "no loader can beat" in done.stdout


@pytest.mark.thorough
def test_a_loader_that_fails_does_not_end_the_rest(here: str, tmp_path: Path) -> None:
    done, result = bench(tmp_path, here, *FAST, "--against=my_train:raises")
    assert done.returncode == 3
    assert figure(result, "cold", "samples of an epoch") == [len(CORPUS.samples)]
    assert done.stdout.count("failed: ValueError: this went wrong (my_train.py, line") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_ranks_share_an_epoch_and_functions_are_mapped(here: str, tmp_path: Path) -> None:
    _, result = bench(tmp_path, here, *FAST, "--ranks=2", "--map=my_train:halved", "--columns=bin,cls")
    repeated = figure(result, "cold", "repeated samples")[0]  # which makes the ranks equal
    assert figure(result, "cold", "samples of an epoch") == [len(CORPUS.samples) + repeated]
    assert figure(result, "cold", "bytes from the store") == [CORPUS.byte_count]
    assert figure(result, "cold", "fastest rank over slowest")[0] >= 1
    cold = result.phase("cold")
    assert cold is not None
    assert len(cold.series[0].ys) == 2
    assert figure(result, "cold", "waited for map")[0] > 0
    assert result.work.options["ranks"] == "2"
