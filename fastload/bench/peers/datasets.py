"""Hugging Face datasets, streaming: its webdataset builder over the tar shards, in torch's `DataLoader`.

As https://huggingface.co/docs/datasets/stream and https://huggingface.co/docs/hub/datasets-webdataset have it:
`load_dataset("webdataset", streaming=True)`, a shuffle buffer of 1000 which also shuffles the shards, `set_epoch`. By
way of s3fs (2026.9) datasets 5.2 cannot stream archives, since it passes `block_size` to a constructor that refuses it:
so it reads copies of the shards on this machine. Columns whose names it knows (cls, txt, json) it decodes in any case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from fastload.bench.peers.job import (
    SHUFFLE_BUFFER,
    About,
    Batch,
    BelowThisProcess,
    Collate,
    Job,
    subfolder,
    worker_options,
)

ABOUT = About(
    ("datasets",),
    "https://huggingface.co/docs/datasets/stream",
    reads="copies",
    notes=("decodes columns such as cls, txt and json in any case",),
)


class Loader(BelowThisProcess):
    """A streaming `IterableDataset` of datasets."""

    def __init__(self, job: Job) -> None:
        os.environ["HF_HOME"] = subfolder(job, "huggingface")
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing of it is asked
        import datasets

        self._datasets, self._job = datasets, job

    def _build(self) -> Any:
        from torch.utils.data import DataLoader

        job = self._job
        dataset = self._datasets.load_dataset(
            "webdataset", data_files={"train": job.urls}, split="train", streaming=True
        )
        for name, feature in (dataset.features or {}).items():
            if isinstance(feature, self._datasets.Image):
                dataset = dataset.cast_column(name, self._datasets.Image(decode=False))
        self._dataset = dataset.shuffle(seed=job.seed, buffer_size=SHUFFLE_BUFFER)
        return DataLoader(self._dataset, job.batch_size, collate_fn=_Stored(job), **worker_options(job))

    def epoch(self, number: int) -> Iterator[Batch]:
        """The data set is told the epoch, which the shuffle depends on."""
        if self._loader is None:
            self._loader = self._build()
        self._dataset.set_epoch(number)
        yield from self._loader


class _Stored(Collate):
    """Pictures come as their bytes with a path; what the builder decoded by itself stays as it is."""

    def _column(self, name: str, samples: Sequence[dict[str, Any]]) -> Any:
        values = [sample[name] for sample in samples]
        plain = [
            value["bytes"] if isinstance(value, dict) and set(value) == {"bytes", "path"} else value for value in values
        ]
        if isinstance(plain[0], bytes):
            return super()._column(name, [{name: value} for value in plain])
        return plain
