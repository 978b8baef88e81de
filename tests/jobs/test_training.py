"""A training is killed, and goes on at other sizes: its steps and its weights are those of one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

from tests.jobs.pool import Rank, RankPool, Started
from tests.jobs.training import Training, train
from tests.processes import service_pids, until
from tests.shards import corpus

SEED = 20


def training(folder: Path, name: str, urls: list[str], environment: dict[str, str], nodes: int, batch: int) -> Training:
    (folder / name).mkdir()
    caches = [str(folder / f"cache-{node}") for node in range(nodes)]
    return Training(urls, caches, str(folder / name), batch, 3, environment)


def kill_all(job: Started, caches: list[str]) -> None:
    """Ranks and cache services, in mid-air. Ranks first: those that were left would start other services."""
    for pid in [*job.pids, *(pid for cache in caches for pid in service_pids(Path(cache)))]:
        with contextlib.suppress(ProcessLookupError):  # a service's starter, which ends by itself
            os.kill(pid, signal.SIGKILL)
    job.forget()


def test_a_killed_training_goes_on_at_other_sizes_as_if_nothing_had_been(s3, tmp_path: Path, mortals: RankPool) -> None:
    data = corpus(shard_count=7, samples_per_shard=26, value_bytes=400)
    assert len(data.samples) % 16 == 12  # a last step that is short, and needs no repeats at 4, 2 and 1 ranks
    pool = mortals
    urls, environment = [data.put(s3)], s3.server.environment()
    four = [Rank(rank, 4, 2, "job") for rank in range(4)]

    whole = training(tmp_path, "whole", urls, environment, 2, 4)
    weights = pool.run("whole", train, four, whole)
    assert weights[1:] == weights[:1] * 3
    steps = whole.steps(4)
    assert len(steps) == 3 * 12

    killed = training(tmp_path, "killed", urls, environment, 2, 4)
    last = random.Random(SEED).randint(killed.save_every, len(steps) - 3)
    killed = replace(killed, held_after=last + 2)
    job = pool.start("killed", train, four, killed)
    until(lambda: len(killed.steps(4)) >= last)
    kill_all(job, killed.caches)
    assert last <= len(killed.steps(4)) <= last + 2
    for step, keys in killed.steps(4).items():
        assert keys == steps[step]

    for name, size, batch in (("two", 2, 8), ("one", 1, 16)):
        resumed = training(tmp_path, name, urls, environment, 1, batch)
        shutil.copy(killed.checkpoint, resumed.checkpoint)
        ranks = [Rank(rank, size, size, "job" if size > 1 else None) for rank in range(size)]
        assert pool.run(name, train, ranks, resumed) == weights[:size]
        rest = resumed.steps(size)
        assert last - killed.save_every <= min(rest) - 1 <= last + 2
        assert rest == {step: keys for step, keys in steps.items() if step >= min(rest)}
