"""The examples run as they are, alone and in several processes; those for frameworks in `tests.torchloader`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch

from tests.jobs.launch import ROOT, Launched, free_port
from tests.jobs.pool import Rank, RankPool
from tests.shards import Corpus, tar_of

ALONE_AND_IN_SEVERAL = ("device_mesh.py", "open_objects.py", "resume.py", "train_ddp.py", "train_images.py")
KILLED_AND_RESUMED = ("train_resume.py",)


def pictures(shard_count: int = 5, pictures_per_shard: int = 9) -> Corpus:
    """Small pictures of ten classes."""
    random = np.random.default_rng(0)
    shards, samples = {}, {}
    for shard in range(shard_count):
        here = {}
        for number in range(pictures_per_shard):
            label = (shard + number) % 10
            pixels = random.integers(0, 100, (40, 48, 3), np.uint8) + np.uint8(15 * label)
            here[f"{shard}-{number}"] = {"jpg": simplejpeg.encode_jpeg(pixels), "cls": b"%d" % label}
        shards[f"{shard}.tar"] = tar_of(here)
        samples.update(here)
    return Corpus(shards, samples)


def environment(s3, tmp_path: Path, data: Corpus, **more: object) -> dict[str, str]:
    return {
        "SHARDS": data.put(s3),
        "FASTLOAD_CACHE": str(tmp_path / "cache"),
        "CLASSES": "10",
        **s3.server.environment(),
        **{name: str(value) for name, value in more.items()},
    }


Ended = tuple[str, dict[str, Any] | None]
"""What an example prints, and the weights that it ends with, if it trains a network."""


def run_example(rank: Rank, name: str, variables: Mapping[str, str], folder: Path, arguments: Sequence[str]) -> Ended:
    """Start it in a folder, in a process that has torch already; one that is alone has no launcher's variables."""
    left_out = rank.environment if rank.world_size == 1 else {}
    outside = {name: value for name, value in os.environ.items() if name not in left_out}
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {**outside, **variables}, clear=True),
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
    ):
        made = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    network = made.get("network") if name == "train_images.py" else None
    return printed.getvalue(), network and network.state_dict()


def run_in_ranks(
    pool: RankPool,
    world_size: int,
    name: str,
    variables: Mapping[str, str],
    folder: Path = ROOT,
    arguments: Sequence[str] = (),
) -> list[Ended]:
    """An example in each rank."""
    ranks = [Rank(rank, world_size, world_size) for rank in range(world_size)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = pool.run(name, run_example, ranks, name, {**variables, **meeting}, folder, arguments)
    assert all(isinstance(one, tuple) for one in found), found
    return found


def outputs(pool: RankPool, world_size: int, name: str, variables: Mapping[str, str]) -> list[str]:
    """What an example prints in each rank."""
    return [printed for printed, _ in run_in_ranks(pool, world_size, name, variables)]


def test_one_after_the_other_in_one_folder(s3, tmp_path: Path, mortals: RankPool) -> None:
    """Each alone, then in two processes, where it goes on with what it has left there, if it has."""
    data = pictures(4, 8)
    variables = environment(s3, tmp_path, data, GLOBAL_BATCH=8, BATCH=8)
    objects = [f"{variables['SHARDS']}{name}" for name in data.shards]
    ended: dict[tuple[str, int], list[Ended]] = {}
    for world_size in (1, 2):
        for name in ALONE_AND_IN_SEVERAL:
            arguments = objects if name == "open_objects.py" else ()
            here = {**variables, "EPOCHS": str(world_size)}  # what is there is trained for one epoch more
            ended[name, world_size] = run_in_ranks(mortals, world_size, name, here, tmp_path, arguments)
    said = {(*of, rank): printed for of, ranks in ended.items() for rank, (printed, _) in enumerate(ranks)}

    assert re.findall(r"epoch (\d) step", said["train_images.py", 1, 0]) == ["0"]
    assert "train_images.pt: goes on in epoch 1 of 2\n" in said["train_images.py", 2, 0]
    assert re.findall(r"epoch (\d) step", said["train_images.py", 2, 0]) == ["1"]
    assert said["train_images.py", 2, 1] == ""
    # The processes have trained one network, and saved that; statistics of batches are of each one's own.
    saved = torch.load(tmp_path / "train_images.pt", weights_only=True)["network"]
    learned = {name for name in saved if "running" not in name}
    assert len(learned) > 10
    for _, weights in ended["train_images.py", 2]:
        assert weights is not None
        assert [name for name in learned if not torch.equal(weights[name], saved[name])] == []

    assert sorted(losses(said["resume.py", 1, 0])) == [(0, step) for step in range(1, 5)]
    assert "resume.pt: goes on after step 4, in epoch 1 of 2\n" in said["resume.py", 2, 0]
    assert sorted(losses(said["resume.py", 2, 0])) == [(1, step) for step in range(5, 9)]
    for rank in (0, 1):
        assert len(re.findall(rf"rank {rank} epoch \d: ", said["open_objects.py", 2, rank])) == 2
    assert {path.name for path in tmp_path.glob("*.p*t")} == {"train_images.pt", "resume.pt"}  # no part is left


def test_device_mesh(s3, tmp_path: Path, mortals: RankPool) -> None:
    variables = environment(s3, tmp_path, pictures(), BATCH=4)
    output = "".join(outputs(mortals, 4, "device_mesh.py", variables))
    began = dict(re.findall(r"(dp \d tp \d) begins with (\S+, loss \d+\.\d{4})", output))
    assert len(began) == 4, output
    for group in range(2):
        # The same sample and, since the two are one model, the same loss.
        assert began[f"dp {group} tp 0"] == began[f"dp {group} tp 1"]
    assert began["dp 0 tp 0"] != began["dp 1 tp 0"]
    # 45 samples for two groups: one of them reads one twice.
    assert re.findall(r"has read (\d+) samples", output) == ["23"] * 4


def test_resume(s3, tmp_path: Path, mortals: RankPool) -> None:
    """Two processes are stopped, and one goes on: where both have trained a step, the losses are the same.

    No batch is short: of an odd one, the mean of two ranks' means is not the mean of all.
    """
    variables = environment(
        s3, tmp_path, pictures(8, 6), CHECKPOINT=tmp_path / "checkpoint.pt", GLOBAL_BATCH=8, SAVE_EVERY=4, EPOCHS=1000
    )
    with Launched(["--standalone", "--nproc-per-node", "2", "examples/resume.py"], variables) as job:
        printed = job.read_until("step 15 ")
        before = losses(printed + job.end())
    last = max(before)
    variables["EPOCHS"] = str(last[0] + 2)
    (output,) = outputs(mortals, 1, "resume.py", variables)
    after = losses(output)
    assert min(after)[1] % 4 == 1
    assert min(after)[1] <= last[1] + 2  # the last step that was saved may not have been printed
    # 48 samples are six steps an epoch.
    assert [epoch for epoch, step in sorted(after)] == [(step - 1) // 6 for epoch, step in sorted(after)]
    assert max(after) == (last[0] + 1, 6 * (last[0] + 2))
    both = before.keys() & after.keys()
    differences = {step: (before[step], after[step]) for step in both if abs(before[step] - after[step]) >= 2e-3}
    assert not differences


def test_train_resume(s3, tmp_path: Path, mortals: RankPool) -> None:
    """Four processes are killed, and two go on: where both have trained a step, the losses are the same."""
    variables = environment(
        s3, tmp_path, pictures(8, 6), CHECKPOINTS=f"{s3.url}/run", GLOBAL_BATCH=8, SAVE_EVERY=2, EPOCHS=1000
    )
    with Launched(["--standalone", "--nproc-per-node", "4", f"examples/{KILLED_AND_RESUMED[0]}"], variables) as job:
        printed = job.read_until("step 9 ")
        before = losses(printed + job.end())
    last = max(before)
    variables["EPOCHS"] = str(last[0] + 2)
    output = outputs(mortals, 2, "train_resume.py", variables)[0]
    after = losses(output)
    assert f"/run/{min(after)[1] - 1}: goes on after step" in output
    assert min(after)[1] % 2 == 1
    assert 5 <= min(after)[1] <= last[1] + 1
    assert max(after) == (last[0] + 1, 6 * (last[0] + 2))  # 48 samples are six steps an epoch
    both = before.keys() & after.keys()
    differences = {step: (before[step], after[step]) for step in both if abs(before[step] - after[step]) >= 2e-3}
    assert both
    assert not differences


def losses(output: str) -> dict[tuple[int, int], float]:
    """(epoch, step) -> loss."""
    found = re.findall(r"epoch (\d+) step (\d+) loss (\d+\.\d+)", output)
    return {(int(epoch), int(step)): float(loss) for epoch, step, loss in found}
