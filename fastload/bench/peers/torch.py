"""torch's `DataLoader` over loose files on this machine: what one has before any of this.

As https://docs.pytorch.org/docs/stable/data.html has it: a map-style data set that opens a sample's files,
`shuffle=True`, persistent workers. Each column of each sample is a file, in one folder a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastload.bench.peers.job import About, Batch, BelowThisProcess, Collate, Job, samples_of, worker_options

ABOUT = About(("torch",), "https://docs.pytorch.org/docs/stable/data.html", reads="files")

_INDEX = "keys.json"


def convert(shards: Sequence[Path], columns: Sequence[str], folder: Path) -> None:
    """A file for each value; they are named by shard, number and column number, since keys are no paths."""
    keys = []
    for shard, path in enumerate(shards):
        (folder / str(shard)).mkdir(parents=True)
        for number, sample in enumerate(samples_of(str(path))):
            keys.append((f"{shard}/{number}", sample["__key__"]))
            for column, name in enumerate(columns):
                (folder / f"{shard}/{number}.{column}").write_bytes(sample[name])
    (folder / _INDEX).write_text(json.dumps(keys))


class _Files:
    """A data set of samples by number."""

    def __init__(self, job: Job) -> None:
        self._folder, self._columns = job.source, job.columns
        self._keys = json.loads((Path(job.source) / _INDEX).read_text())

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> dict[str, Any]:
        stem, key = self._keys[number]
        sample = {"__key__": key}
        for column, name in enumerate(self._columns):
            with open(f"{self._folder}/{stem}.{column}", "rb") as file:
                sample[name] = file.read()
        return sample


class Loader(BelowThisProcess):
    """torch's own `DataLoader`."""

    def __init__(self, job: Job) -> None:
        import torch.utils.data

        self._job, self._data = job, torch.utils.data

    def epoch(self, number: int) -> Iterator[Batch]:
        """Its sampler draws another order each epoch."""
        job = self._job
        if self._loader is None:
            self._loader = self._data.DataLoader(
                _Files(job),  # type: ignore[arg-type]
                job.batch_size,
                shuffle=True,
                collate_fn=Collate(job),
                **worker_options(job),
            )
        yield from self._loader
