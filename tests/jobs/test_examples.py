"""The examples of several processes run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import simplejpeg

from tests.jobs.launch import ROOT, Launched
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
        **{name: str(value) for name, value in more.items()},
    }


def test_device_mesh(s3, tmp_path: Path) -> None:
    data = pictures()
    arguments = ["--standalone", "--nproc-per-node", "4", "examples/device_mesh.py"]
    with Launched(arguments, environment(s3, tmp_path, data, BATCH=4)) as job:
        output = job.output()
    # Lines of several ranks may run into one another.
    began = dict(re.findall(r"(dp \d tp \d) begins with (\S+, loss \d+\.\d{4})", output))
    assert len(began) == 4, output
    for group in range(2):
        # The same sample and, since the two are one model, the same loss.
        assert began[f"dp {group} tp 0"] == began[f"dp {group} tp 1"]
    assert began["dp 0 tp 0"] != began["dp 1 tp 0"]
    # 45 samples for two groups: one of them reads one twice.
    assert re.findall(r"has read (\d+) samples", output) == ["23"] * 4


def test_resume(s3, tmp_path: Path) -> None:
    """Two processes are stopped, and one goes on: where both have trained a step, the losses are the same."""
    variables = environment(
        s3, tmp_path, pictures(), CHECKPOINT=tmp_path / "checkpoint.pt", GLOBAL_BATCH=8, SAVE_EVERY=4, EPOCHS=1000
    )
    with Launched(["--standalone", "--nproc-per-node", "2", "examples/resume.py"], variables) as job:
        printed = job.read_until("step 15 ")
        before = losses(printed + job.end())
    last = max(before)
    variables["EPOCHS"] = str(last[0] + 2)
    command = [sys.executable, "examples/resume.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=True
    )
    after = losses(done.stdout)
    assert min(after)[1] % 4 == 1
    assert min(after)[1] <= last[1] + 2  # the last step that was saved may not have been printed
    # 45 samples are six steps an epoch.
    assert [epoch for epoch, step in sorted(after)] == [(step - 1) // 6 for epoch, step in sorted(after)]
    assert max(after) == (last[0] + 1, 6 * (last[0] + 2))
    both = before.keys() & after.keys()
    assert all(abs(before[step] - after[step]) < 2e-3 for step in both)


def losses(output: str) -> dict[tuple[int, int], float]:
    """(epoch, step) -> loss."""
    found = re.findall(r"epoch (\d+) step (\d+) loss (\d+\.\d+)", output)
    return {(int(epoch), int(step)): float(loss) for epoch, step, loss in found}
