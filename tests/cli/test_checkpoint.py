"""`fastload checkpoint`: what is listed, shown, verified, exported, repaired and deleted."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastload import checkpoint
from fastload.checkpoint import Run, attempts
from fastload.checkpoint.foreign import INDEX
from fastload.checkpoint.records import Plan
from fastload.cli import exits
from fastload.errors import AccessDeniedError
from fastload.store.objectstore import ObjectStore
from tests.checkpoint.test_single import model_state, same
from tests.conftest import Bucket
from tests.programs import run_cli_here


def fastload(verb: str, *arguments: object, code: int = 0) -> Any:
    done = run_cli_here("checkpoint", verb, *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def text(verb: str, *arguments: object, code: int = 0) -> str:
    done = run_cli_here("checkpoint", verb, *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run", dedup=True)
    for step in (1, 2, 10):
        run.save(
            step, {"model": {"w": torch.full((50, 20), 1 + step // 5), "b": torch.ones(3)}, "step": step}, metric=0.5
        )
    return run


def test_listing(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "2" / "manifest.json").write_text("{")
    (root / "3" / ("a" * 16)).mkdir(parents=True)
    (root / "3" / ("a" * 16) / "plan.json").write_text("{}")
    (root / "notes.txt").write_text("")
    found = fastload("ls", root)
    assert [(each["name"], each["state"], each["attempts"]) for each in found] == [
        ("1", "committed", 0), ("2", "damaged", 1), ("3", "uncommitted", 1), ("10", "committed", 0),
    ]  # fmt: skip
    assert [each["metric"] for each in found] == [0.5, None, None, 0.5]
    assert found[0]["bytes"] > 4000
    assert found[0]["other_bytes"] == 0
    lines = text("ls", root).splitlines()
    assert lines[0].split() == ["checkpoint", "state", "size", "besides", "attempts", "metric"]
    assert lines[1].startswith("1 ")
    assert lines[1].endswith(" ago")
    assert [each["name"] for each in fastload("ls", root / "10")] == [""]
    assert [each["name"] for each in fastload("ls", tmp_path)] == ["run/1", "run/2", "run/3", "run/10"]
    assert fastload("ls", tmp_path / "none", code=exits.PARTIAL) == []
    assert "no checkpoint is below" in text("ls", tmp_path / "none", code=exits.PARTIAL)


def test_showing(run: Run) -> None:
    found = fastload("show", run.step_url(10))
    assert found["ranks"] == 1
    assert found["tensors"] == [
        {"name": "model.w", "dtype": "I64", "shape": [50, 20], "bytes": 8000, "pieces": 1},
        {"name": "model.b", "dtype": "F32", "shape": [3], "bytes": 12, "pieces": 1},
    ]
    assert found["values"] == [{"name": "step", "encoding": "msgpack", "bytes": 1}]
    assert "model.w  I64" in text("show", run.step_url(10))
    assert "no checkpoint is here" in text("show", run.step_url(11), code=exits.FAILED)
    Path(run.step_url(2), "manifest.json").write_text("{")
    assert "is damaged" in text("show", run.step_url(2), code=exits.DAMAGED)


def test_verifying(run: Run, tmp_path: Path) -> None:
    (whole,) = fastload("verify", run.step_url(10))
    assert whole["damaged"] == []
    assert [bool(each["damaged"]) for each in fastload("verify", tmp_path / "run")] == [False] * 3
    assert "\n3 checkpoints, " in "\n" + text("verify", tmp_path / "run")
    (segment,) = (tmp_path / "run" / "1").rglob("*.safetensors")
    data = bytearray(segment.read_bytes())
    data[4100] ^= 1
    segment.write_bytes(data)
    (part,) = (tmp_path / "run" / "10").rglob("*.part")
    part.unlink()
    found = fastload("verify", tmp_path / "run", code=exits.DAMAGED)
    assert [len(each["damaged"]) for each in found] == [1, 1, 1]  # step 2 refers to step 1
    assert f"damaged: {segment}: " in text("verify", tmp_path / "run", code=exits.DAMAGED)
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    assert "is damaged" in fastload("verify", tmp_path / "a.safetensors", code=exits.DAMAGED)[0]["damaged"][0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_exports(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = model_state()
    url = f"{s3.url}/run/7"
    checkpoint.save(state, url)
    model = dict(state["model"])
    # A file, which is read as any.
    one = tmp_path / "model.safetensors"
    assert "written to" in text("export", url, one, "--part=model")
    same(dict(sorted(model.items())), dict(sorted(checkpoint.load(one).items())))
    assert "is there already" in text("export", url, one, code=exits.FAILED)
    said = text("export", url, one, "--overwrite")
    assert "values are no tensors, and are left out" in said
    assert "optimizer.state.0.exp_avg" in checkpoint.load(one)
    # A folder of several files, and an index.
    text("export", url, tmp_path / "hub", "--part=model", "--shard-bytes=2KiB")
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model)
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "hub").glob("*.safetensors")}
    same(dict(sorted(model.items())), dict(sorted(checkpoint.load(tmp_path / "hub").items())))
    assert not list(tmp_path.rglob("*.part"))
    # What torch itself reads.
    text("export", url, tmp_path / "dcp", "--to=dcp")
    into = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    into_all: dict[str, Any] = {"model": into, "step": 0, "loader": {"epoch": 0, "seen": [0]}}
    dcp.load(into_all, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(model, into_all["model"])
    assert (into_all["step"], into_all["loader"]) == (7, {"epoch": 1, "seen": [1, 2]})


def test_exports_to_a_store(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says which files there are comes last; and where it fails, nothing is left."""
    state, url, out = model_state(), f"{tmp_path}/run/7", f"{s3.url}/out"
    checkpoint.save(state, url)
    model = dict(sorted(state["model"].items()))
    assert "written to" in text("export", url, f"{out}/m.safetensors", "--part=model")
    same(model, dict(sorted(checkpoint.load(f"{out}/m.safetensors").items())))
    assert "is there already; name another URL" in text("export", url, f"{out}/m.safetensors", code=exits.FAILED)
    text("export", url, f"{out}/hub", "--part=model", "--shard-bytes=2KiB")
    text("export", url, f"{out}/hub", "--part=model", "--shard-bytes=2KiB", "--overwrite")
    same(model, dict(sorted(checkpoint.load(f"{out}/hub").items())))
    text("export", url, f"{out}/dcp", "--to=dcp")
    same(state["model"], checkpoint.load(f"{out}/dcp")["model"])
    names: list[str] = []
    put = ObjectStore.put

    def failing(store: ObjectStore, url: str, data: Any) -> Any:
        names.append(url.rpartition("/")[2])
        if names[-1] == INDEX:
            raise AccessDeniedError("no more")
        return put(store, url, data)

    monkeypatch.setattr(ObjectStore, "put", failing)
    assert "no more" in text("export", url, f"{out}/new", "--part=model", "--shard-bytes=2KiB", code=exits.FAILED)
    assert len(names) > 2
    assert names[-1] == INDEX
    with attempts.opened(f"{out}/new", None) as place:
        assert not place.names()


def test_an_export_that_fails_leaves_nothing(run: Run, tmp_path: Path) -> None:
    said = text("export", run.step_url(1), tmp_path / "hub", "--shard-bytes=0", code=exits.FAILED)
    assert "--shard-bytes=0: a file has at least 1 byte" in said
    assert not (tmp_path / "hub").exists()
    (segment,) = (tmp_path / "run" / "1").rglob("*.safetensors")
    segment.write_bytes(bytes(len(segment.read_bytes())))
    said = text("export", run.step_url(1), tmp_path / "out" / "m.safetensors", code=exits.DAMAGED)
    assert "is damaged" in said
    assert list((tmp_path / "out").iterdir()) == []
    said = text("export", run.step_url(1), tmp_path / "dcp", "--to=dcp", code=exits.DAMAGED)
    assert "is damaged" in said
    said = text("export", run.step_url(10), tmp_path / "m.safetensors", "--part=modell", code=exits.FAILED)
    assert "has no tensor below 'modell'" in said


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_export_to_where_nothing_can_be_written_says_why(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    for target, *options in (("folder.safetensors", "--overwrite"), ("file",), ("file", "--to=dcp")):
        said = text("export", run.step_url(10), tmp_path / target, *options, code=exits.FAILED)
        assert f"{tmp_path / target} cannot be written: " in said.replace("\n", "")
    # A disk that is full, which torch's writer reports as a position that it did not expect.
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    said = text("export", run.step_url(10), tmp_path / "dcp", "--to=dcp", code=exits.FAILED)
    assert f"{tmp_path / 'dcp'} cannot be written: No space left on device" in said.replace("\n", "")


def test_an_export_to_a_store_says_that_temporary_files_have_no_room(
    s3: Bucket, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", no_room)
    said = text("export", run.step_url(10), f"{s3.url}/out", code=exits.FAILED).replace("\n", "")
    assert f"{s3.url}/out: " in said
    assert "in TMPDIR, cannot be written: No space left on device" in said


@contextmanager
def full(*_: Any) -> Iterator[Any]:
    with open("/dev/full", "wb", buffering=0) as file:
        yield file


def test_pruning(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert fastload("prune", root, "--keep-last=1", "--keep-every=2", "--dry-run")["steps"] == [1]
    assert run.steps() == [1, 2, 10]
    assert "pass --yes" in text("prune", root, "--keep-last=1", code=exits.FAILED)
    assert "give that as well" in text("prune", root, "--keep-every=2", "--yes", code=exits.FAILED)
    assert run.steps() == [1, 2, 10]
    assert fastload("prune", root, "--keep-last=1", "--keep-every=2", "--yes")["steps"] == [1]
    assert run.steps() == [2, 10]
    assert run.load(step=2)["step"] == 2  # which refers to step 1
    assert "gone: 0 steps" in text("prune", root)
    (left := root / "11" / ("a" * 16)).mkdir(parents=True)
    (left / "plan.json").write_bytes(Plan(attempt=left.name, ranks=1).encode())
    assert "delete 0 steps" in text("prune", root, "--grace=0s", code=exits.FAILED)
    assert fastload("prune", root, "--grace=0s", "--dry-run")["objects"] == 1
    assert fastload("prune", root, "--grace=0s", "--yes")["objects"] == 1
    assert not left.exists()


def test_pruning_one_checkpoint(tmp_path: Path) -> None:
    """What failed or was replaced goes: its plan first, and the rest with the next prune."""
    url = tmp_path / "tokenizer"
    for step in range(2):
        checkpoint.save({"w": torch.full((9,), step)}, url, overwrite=True)
    (left := url / ("a" * 16)).mkdir()
    (left / "plan.json").write_bytes(Plan(attempt=left.name, ranks=1).encode())
    (left / "r00000-0000.safetensors").write_bytes(bytes(9))
    (url / "mine.txt").write_text("")
    assert fastload("prune", url)["objects"] == 0
    assert "pass --yes" in text("prune", url, "--grace=0s", code=exits.FAILED)
    assert fastload("prune", url, "--grace=0s", "--dry-run")["objects"] == 2
    assert left.exists()
    assert fastload("prune", url, "--grace=0s", "--yes")["objects"] == 2
    assert not (left / "plan.json").exists()
    assert fastload("prune", url, "--grace=0s", "--yes")["objects"] == 3
    assert len(list(url.rglob("*.*"))) == 5
    assert checkpoint.load(url)["w"].tolist() == [1] * 9


@pytest.mark.parametrize("below", ["1", ""])
def test_what_a_step_was_before_goes_but_for_what_others_refer_to(run: Run, tmp_path: Path, below: str) -> None:
    run.save(1, {"step": 1})
    run.save(1, {"step": 2})
    for expected in (2, 2, 0):
        assert fastload("prune", tmp_path / "run" / below, "--grace=0s", "--yes")["objects"] == expected
    assert run.load(step=2)["step"] == 2  # which refers to what step 1 was first
    assert run.load(step=1)["step"] == 2


def test_removing(run: Run, tmp_path: Path) -> None:
    assert "pass --yes" in text("rm", run.step_url(1), code=exits.FAILED)
    assert [each["objects"] for each in fastload("rm", run.step_url(1), run.step_url(10), "--yes")] == [3, 4]
    assert run.steps() == [2]
    assert run.load()["step"] == 2
    checkpoint.save({"w": torch.ones(1)}, tmp_path / "best")
    (tmp_path / "best" / "mine.txt").write_text("")
    text("rm", tmp_path / "best", "--yes")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["mine.txt"]
    assert "no checkpoint is here" in text("rm", tmp_path / "best", "--yes", code=exits.FAILED)


def test_repairing(run: Run, tmp_path: Path) -> None:
    assert fastload("repair", tmp_path / "none", code=exits.PARTIAL) == []
    assert text("repair", tmp_path / "none", code=exits.PARTIAL).startswith("fastload: no checkpoint is below")
    assert fastload("repair", tmp_path / "run") == []
    (tmp_path / "run" / "10" / "manifest.json").unlink()
    assert run.steps() == [1, 2]
    (found,) = fastload("repair", tmp_path / "run")
    assert found["checkpoint"] == f"{tmp_path}/run/10/"
    assert run.steps() == [1, 2, 10]
    assert "nothing had to be repaired" in text("repair", run.step_url(10))
