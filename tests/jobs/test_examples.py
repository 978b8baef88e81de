"""The examples of several processes run as they are."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import simplejpeg

from tests.jobs.launch import ROOT, Launched, free_port
from tests.jobs.pool import Rank, RankPool
from tests.shards import Corpus, tar_of


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


def run_example(rank: Rank, name: str, variables: Mapping[str, str]) -> str:
    """What it prints, in a process that has torch already; one that is alone has no launcher's variables."""
    left_out = rank.environment if rank.world_size == 1 else {}
    outside = {name: value for name, value in os.environ.items() if name not in left_out}
    printed = io.StringIO()
    with mock.patch.dict(os.environ, {**outside, **variables}, clear=True), contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return printed.getvalue()


def outputs(pool: RankPool, world_size: int, name: str, variables: Mapping[str, str]) -> list[str]:
    """Of an example in each rank."""
    ranks = [Rank(rank, world_size, world_size) for rank in range(world_size)]
    found = pool.run(name, run_example, ranks, name, variables)
    assert all(isinstance(one, str) for one in found), found
    return found


def test_device_mesh(s3, tmp_path: Path, mortals: RankPool) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = environment(s3, tmp_path, pictures(), BATCH=4, **meeting)
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


def losses(output: str) -> dict[tuple[int, int], float]:
    """(epoch, step) -> loss."""
    found = re.findall(r"epoch (\d+) step (\d+) loss (\d+\.\d+)", output)
    return {(int(epoch), int(step)): float(loss) for epoch, step, loss in found}
