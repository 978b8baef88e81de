"""A run: steps are saved, the newest whole one is loaded, old ones go, and what is there already is not sent again."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastload import checkpoint
from fastload.checkpoint import Keep, Run, dedup
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.inventory import rows
from fastload.checkpoint.records import Manifest, Plan
from fastload.errors import CheckpointDamagedError, CheckpointError, ConfigError, ObjectMissingError
from fastload.store.local import LocalStore
from tests.checkpoint.test_single import same
from tests.conftest import Bucket


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/run" if request.param == "local" else f"{request.getfixturevalue('s3').url}/run"


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((100,), step), "step": step}


def test_a_run(url: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(url, keep=Keep(last=2, every=10, best=1))
    assert run.steps() == []
    assert run.latest() is None
    with pytest.raises(ObjectMissingError, match="no step of a run is here"):
        run.load()
    for step in (9, 10, 11, 12, 13, 100):
        run.save(step, state(step), metric=float(abs(step - 11)))
        assert run.step == step
    assert run.steps() == [10, 11, 13, 100]  # every tenth, the best, the last two
    assert run.latest() == 100
    same(state(100), run.load())
    same(state(11), run.load(step=11))
    assert run.step == 11
    into = state(0)
    assert run.load(into=into) is into
    same(state(100), into)
    same({"step": 100}, run.load(names=["step"]))
    same(state(11), run.load(step=np.int64(11)))
    same(state(13), checkpoint.load(run.step_url(13)))
    # A step that is there is replaced, also by one that has gone back.
    run.save(10, {"w": 1})
    same({"w": 1}, run.load(step=10))
    run.save(12, state(12), metric=float("nan"))
    assert run.steps() == [10, 11, 12, 13, 100]  # the newest, and what was saved last
    assert caplog.records == []


def test_the_step_before_is_taken_of_one_that_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3, 4):
        run.save(step, state(step))
    (tmp_path / "4" / "manifest.json").write_text("{")
    (part,) = (tmp_path / "3").rglob("*.part")
    part.unlink()
    (segment,) = (tmp_path / "2").rglob("*.safetensors")
    segment.write_bytes(bytes(len(segment.read_bytes())))
    into = state(0)
    same(state(1), run.load(into=into))
    assert run.step == 1
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" cannot be loaded, and the step before is taken: ")[0] for text in said] == [
        f"step {step} of {tmp_path}" for step in (4, 3, 2)
    ]
    assert "manifest.json is damaged" in said[0]
    assert "r00000.part" in said[1]
    assert "are not what was written" in said[2]
    with pytest.raises(CheckpointDamagedError, match="are not what was written"):
        run.load(step=2)
    # What does not fit would not fit the step before either.
    with pytest.raises(CheckpointError, match=r"has no v \(1 of 1 are missing\)"):
        run.load(into={"v": torch.ones(1)}, step=1)
    (tmp_path / "1" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointDamagedError, match="no step can be loaded; the oldest: "):
        run.load()


def rewrite(folder: Path, changes: Callable[[list[Any]], None]) -> None:
    """Change what a part record says, and have the manifest agree with it."""
    manifest = Manifest.decode((folder / "manifest.json").read_bytes(), "here")
    (path,) = folder.rglob("*.part")
    fields = msgspec.msgpack.decode(path.read_bytes())
    changes(fields)
    path.write_bytes(msgspec.msgpack.encode(fields))
    (folder / "manifest.json").write_bytes(Manifest.of(manifest.attempt, [path.read_bytes()]).encode())


REFERENCE = f"{'0' * 16}/r00000-0000.safetensors"


@pytest.mark.parametrize(
    "hostile",
    [
        {"w": [[]], "step": ["step"]},
        {"w": [[0, 1]], "step": ["step"]},
        {"w": ["w"] + ["x"] * 100_000, "step": ["step"]},
        {"w": ["w"] * 201, "step": ["step"]},
        {"w": ["step"], "step": ["step"]},
        {"w": ["step", "w"], "step": ["step"]},
        {"step": ["step"], "w": ["step", "w"]},
        {"w": ["step", [0]], "step": ["step", 0]},
        f"../a\0b/{REFERENCE}",
        f"../a\nb/{REFERENCE}",
    ],
    ids=lambda each: str(each)[:40],
)
def test_the_step_before_is_taken_of_one_that_is_hostile(tmp_path: Path, hostile: dict[str, Any] | str) -> None:
    def changes(fields: list[Any]) -> None:
        if isinstance(hostile, str):
            fields[5][0][0] = hostile
        else:
            fields[10] = [
                value if value[0] else ["", "msgpack", msgspec.msgpack.encode(hostile)] for value in fields[10]
            ]

    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step, state(step))
    rewrite(tmp_path / "2", lambda _: None)
    same(state(2), run.load())
    rewrite(tmp_path / "2", changes)
    same(state(1), run.load())
    assert run.step == 1
    if not isinstance(hostile, str):  # torch's reader makes the same state of it
        with pytest.raises(CheckpointDamagedError):
            checkpoint.Reader(tmp_path / "2").read_metadata()


def test_two_paths_of_one_name_are_damage(tmp_path: Path) -> None:
    checkpoint.save(state(1), tmp_path / "1")
    paths = msgspec.msgpack.encode({"w": ["a.b"], "step": ["a", "b"]})
    rewrite(tmp_path / "1", lambda fields: fields[10].append(["", "msgpack", paths]))
    with pytest.raises(CheckpointDamagedError, match=r"duplicated flatten key a\.b"):
        checkpoint.Reader(tmp_path / "1").read_metadata()


def test_what_does_not_fit_is_not_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.save(1, {"v": torch.ones(1)})
    run.save(2, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="has no v") as caught:
        run.load(into={"v": torch.zeros(1)})
    assert not isinstance(caught.value, CheckpointDamagedError)
    assert caplog.records == []


def test_a_save_that_fails_need_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match="run"):
        Run(tmp_path / "run").save(1, state(1))
    run = Run(tmp_path / "run", on_error="warn")
    run.save(1, state(1))
    run.save(2, {"w": torch.ones(1).as_subclass(type("Sharded", (torch.Tensor,), {}))})
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert said[0].startswith(f"step 1 of {tmp_path}/run was not saved: ")
    assert "step 2" in said[1]
    assert "gather it first" in said[1]
    assert run.step is None


def test_mistakes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (-1, True, "1", 10**18):
        with pytest.raises(ConfigError, match="give a whole number from 0 on"):
            run.save(step, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="write raise or warn"):
        Run(tmp_path, on_error="ignore")  # type: ignore[arg-type]


def test_what_others_have_put_there_stays(tmp_path: Path) -> None:
    for name in ("notes.txt", "01/manifest.json", "best/manifest.json", "1/mine.txt", "7/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    run = Run(tmp_path, keep=Keep(last=1))
    for step in (1, 2, 3):
        run.save(step, state(step))
    assert run.steps() == [3]
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "01", "best", "1", "3", "7"}
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["mine.txt"]


def test_records_that_name_no_steps(tmp_path: Path) -> None:
    """What a plan or manifest claims to refer to is no reason to fail."""
    run = Run(tmp_path, keep=Keep(last=1))
    run.save(1, state(1))
    odd = ("..", "\u00b2", "9" * 5000, "", "01", "1/..")
    plan = Plan(attempt="a" * 16, ranks=1, began_s=time.time(), refers=odd)
    (tmp_path / "2" / plan.attempt).mkdir(parents=True)
    (tmp_path / "2" / plan.attempt / "plan.json").write_bytes(plan.encode())
    manifest = Manifest.of("b" * 16, [b"part"], odd)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "manifest.json").write_bytes(manifest.encode())
    assert run.prune().steps == []  # step 3 seems to be there, but its part is not
    assert [row.name for row in rows(Place.of(LocalStore(), str(tmp_path)))] == ["1", "2", "3"]


def test_what_saves_that_failed_have_left_goes(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=Keep(last=1))
    run.save(1, state(1))
    attempt = tmp_path / "2" / ("a" * 16)
    attempt.mkdir(parents=True)
    (attempt / "plan.json").write_bytes(Plan(attempt="a" * 16, ranks=1, began_s=time.time()).encode())
    (attempt / "r00000-0000.safetensors").write_bytes(bytes(5000))
    assert run.prune().objects == 0  # within a day
    before = run.prune(grace_s=0, dry_run=True)
    assert (before.steps, before.objects) == ([], 1)
    assert attempt.exists()
    run.prune(grace_s=0)  # its plan
    run.prune(grace_s=0)
    assert not attempt.exists()
    assert run.steps() == [1]


def test_a_save_that_was_whole_is_committed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, state(1))
    (tmp_path / "1" / "manifest.json").unlink()
    assert run.steps() == []
    run.prune()
    assert run.steps() == [1]
    same(state(1), run.load())


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_run_that_torch_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=Keep(last=2))
    for step in (1, 2, 3):
        dcp.save(state(step), storage_writer=checkpoint.Writer(run.step_url(step)), no_dist=True)
    assert run.prune().steps == [1]
    assert run.steps() == [2, 3]
    same(state(3), run.load())
    into = state(0)
    dcp.load(into, storage_reader=checkpoint.Reader(run.step_url(2)), no_dist=True)
    same(state(2), into)


# dedup


def stored(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.safetensors"))


def test_what_is_there_already_is_not_stored_again(tmp_path: Path) -> None:
    weights = {name: torch.randn(1 << 20) for name in "ab"} | {"small": torch.randn(10), "none": torch.empty(0)}
    run = Run(tmp_path, dedup=True, keep=Keep(last=2))
    run.save(1, weights)
    first = stored(tmp_path)
    weights["a"][300_000:300_010] += 1  # in one piece
    weights["small"] += 1
    run.save(2, weights)
    assert stored(tmp_path) - first <= dedup.PIECE_BYTES + 40 + 4096
    weights["b"][-1] += 1
    run.save(3, weights)
    assert run.steps() == [2, 3]
    same(weights, run.load())
    # Of step 1 is left what others refer to, and it is what they need.
    assert not (tmp_path / "1" / "manifest.json").exists()
    assert len(list((tmp_path / "1").rglob("*"))) == 2
    run.save(4, {"w": torch.zeros(1)})
    run.save(5, {"w": torch.zeros(1)})
    run.prune(grace_s=0)
    assert not (tmp_path / "1").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"4", "5"}


def test_dedup_in_a_store_of_objects(s3: Bucket) -> None:
    weights = {"w": torch.randn(1 << 19)}
    run = Run(f"{s3.url}/run", dedup=True, keep=Keep(last=1))
    for step in range(3):
        weights["w"][0] = step
        run.save(step, weights)
    assert run.steps() == [2]
    same(weights, run.load())


def test_a_base_that_is_damaged_is_not_referred_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, dedup=True)
    run.save(1, state(1))
    (part,) = (tmp_path / "1").rglob("*.part")
    part.write_bytes(b"")
    run.save(2, state(1))
    same(state(1), run.load())


_SAVES = """
import itertools, sys, torch
from fastload.checkpoint import Keep, Run
run = Run(sys.argv[1], dedup=True, keep=Keep(last=2, every=7))
weights = torch.arange(400_000.0)
for step in itertools.count(int(sys.argv[2])):
    weights[step % 3 * 100_000] = step
    run.save(step, {"w": weights.clone(), "step": step})
    print(step, flush=True)
"""


@pytest.mark.thorough
def test_killed_at_any_time(tmp_path: Path) -> None:
    """What was said to be saved is there, or what was saved after it; what is there is whole; all else goes."""
    said = 0
    for turn in range(8):
        command = [sys.executable, "-c", _SAVES, str(tmp_path), str(said + 1)]
        root = str(Path(__file__).parent.parent.parent)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            said = int(process.stdout.readline())
            time.sleep(random.Random(turn).uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            said = int((process.stdout.read().splitlines() or [said])[-1])
        run = Run(tmp_path, keep=Keep(last=2, every=7))
        run.prune(grace_s=0)
        for step in run.steps():
            assert run.load(step=step)["step"] == step
        latest = run.latest()
        assert latest is not None
        assert said <= latest <= said + 1
        said = latest
    for _ in range(3):
        run.prune(grace_s=0)
    refers = {row.name for row in rows(Place.of(LocalStore(), str(tmp_path))) if row.state == "remains"}
    assert all(int(name) < said - 1 for name in refers)
    assert run.steps() == sorted({said - 1, said, *range(7, said, 7)})
