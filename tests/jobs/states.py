"""States that earlier versions saved, with all it takes to go on from them: `tests/plan/states/*.json`.

A recording holds the arguments of `tests.shards.corpus` and how the job read it, the state, and what followed in the
run that was not stopped: the global batches of the rest of the epoch, each the keys of its samples in their order, and
the first of the next one.

    python -m tests.jobs.states NAME

makes a recording anew, with the fastload that is imported. Do that for a form of states that is new, and never for one
that is recorded already: what is there was written by the version that had that form first.

The shards are local files, since a state goes with their URLs and versions: they are reached through the current
directory, by a path that is the same everywhere, and their times are set.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.jobs.pool import Failed, Rank, RankPool
from tests.jobs.reading import SMALL, Read, Reading, read
from tests.shards import corpus

FOLDER = Path(__file__).parents[1] / "plan" / "states"
URL = "/proc/self/cwd/shards/"
_MTIME_NS = 1_700_000_000 * 10**9


@dataclass(frozen=True)
class Recording:
    """One file. `stopped_after` batches the job of `nodes` with `local` ranks each was stopped."""

    corpus: dict[str, Any]
    dataset: dict[str, Any]
    epoch: int
    nodes: int
    local: int
    batch_size: int
    stopped_after: int
    state: dict[str, Any]
    rest: list[str]
    next_epoch: str

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.nodes * self.local

    @classmethod
    def load(cls, name: str) -> Recording:
        return cls(**json.loads((FOLDER / f"{name}.json").read_text()))


# All but the last three fields; `partitions` is left out where the version that made them had none.
_TO_RECORD: dict[str, dict[str, Any]] = {
    "one-partition": {
        "corpus": {"shard_count": 6, "samples_per_shard": 20, "value_bytes": 300},
        "dataset": {"shuffle": True, "seed": 7, "shuffle_window": 60_000},
        "epoch": 2,
        "nodes": 1,
        "local": 2,
        "batch_size": 4,
        "stopped_after": 5,
    },
    "one-partition-shards-drop": {
        "corpus": {"shard_count": 5, "samples_per_shard": 9, "value_bytes": 300},
        "dataset": {"shuffle": "shards", "seed": -1, "tail": "drop"},
        "epoch": 0,
        "nodes": 1,
        "local": 3,
        "batch_size": 2,
        "stopped_after": 4,
    },
    "between-epochs": {
        "corpus": {"shard_count": 3, "samples_per_shard": 8, "value_bytes": 300},
        "dataset": {"shuffle": True, "seed": 1},
        "epoch": 4,
        "nodes": 1,
        "local": 1,
        "batch_size": 7,
        "stopped_after": 99,
    },
    "several-partitions": {
        "corpus": {"shard_count": 12, "samples_per_shard": 10, "value_bytes": 300},
        "dataset": {"shuffle": True, "seed": 7, "shuffle_window": 40_000, "partitions": 4},
        "epoch": 1,
        "nodes": 2,
        "local": 2,
        "batch_size": 3,
        "stopped_after": 4,
    },
    # 13 shards in 4 partitions: some have come to their ends.
    "several-partitions-at-their-ends": {
        "corpus": {"shard_count": 13, "samples_per_shard": 10, "value_bytes": 300},
        "dataset": {"shuffle": True, "seed": 8, "shuffle_window": 40_000, "partitions": 4},
        "epoch": 1,
        "nodes": 2,
        "local": 1,
        "batch_size": 6,
        "stopped_after": 11,
    },
}


@contextmanager
def shards_in_place(folder: Path, arguments: dict[str, Any]) -> Iterator[None]:
    """The corpus of a recording, where its state says."""
    shards = folder / "shards"
    corpus(**arguments).write(shards)
    for path in shards.iterdir():
        os.utime(path, ns=(_MTIME_NS, _MTIME_NS))
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def read_in(rank: Rank, folder: str, arguments: dict[str, Any], reading: Reading) -> Read:
    """`read`, with the shards in place."""
    with shards_in_place(Path(folder) / f"of-rank-{rank.rank}", arguments):
        return read(rank, reading)


def record(name: str, pool: RankPool) -> Recording:
    """The recording, made with this fastload."""
    what = _TO_RECORD[name]
    epoch, batch_size, stop = what["epoch"], what["batch_size"], what["stopped_after"]
    world_size = what["nodes"] * what["local"]

    def run(size: int, local: int, batch_size: int, **how: Any) -> list[Read]:
        ranks = [Rank(rank, size, local, "job" if size > 1 else None) for rank in range(size)]
        with tempfile.TemporaryDirectory() as folder:
            caches = [f"{folder}/cache-{node}" for node in range(size // local)]
            # A service in a process of its own would not see the shards.
            cache = {**SMALL, "service": "inprocess"}
            loader = {"batch_size": batch_size}
            reading = Reading([URL], caches, what["dataset"], loader, cache=cache, epoch=epoch, **how)
            answers = pool.run(name, read_in, ranks, folder, what["corpus"], reading)
        assert not any(isinstance(answer, Failed) for answer in answers), answers
        return answers

    state = run(world_size, what["local"], batch_size, take=stop)[0].state
    here, after = run(1, 1, batch_size * world_size, epochs=2)[0].epochs
    return Recording(
        **what, state=state, rest=[" ".join(batch) for batch in here[stop:]], next_epoch=" ".join(after[0])
    )


def main() -> None:
    (name,) = sys.argv[1:]
    pool = RankPool(4)
    try:
        found = record(name, pool)
    finally:
        pool.close()
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
