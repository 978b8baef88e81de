"""MosaicML streaming: MDS shards, shuffled by its default (py1e), in a torch loader.

As https://docs.mosaicml.com/projects/streaming/ has it: `MDSWriter` with shards of 64 MB, `StreamingDataset` with
`remote` and `local` (only `local` where the shards are on this machine) and `batch_size` given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastload.bench.peers.job import (
    SHARD_BYTES,
    About,
    Batch,
    BelowThisProcess,
    Collate,
    Job,
    is_local,
    s3_endpoint,
    stored_samples,
    subfolder,
    worker_options,
)

ABOUT = About(("mosaicml-streaming",), "https://docs.mosaicml.com/projects/streaming/", reads="mds")


def convert(shards: Sequence[Path], columns: Sequence[str], folder: Path) -> None:
    """The shards' samples as MDS."""
    from streaming import MDSWriter

    types = {"key": "str", **dict.fromkeys(columns, "bytes")}
    with MDSWriter(out=str(folder), columns=types, size_limit=SHARD_BYTES) as writer:
        for path in shards:
            for sample in stored_samples(str(path)):
                writer.write({name: sample[name] for name in types})


class Loader(BelowThisProcess):
    """`StreamingDataset` in torch's `DataLoader`."""

    def __init__(self, job: Job) -> None:
        import streaming

        if endpoint := s3_endpoint():
            os.environ["S3_ENDPOINT_URL"] = endpoint
        self._streaming, self._job = streaming, job

    def _build(self) -> Any:
        from torch.utils.data import DataLoader

        job = self._job
        where = {"local": job.source}
        if not is_local(job.source):
            where = {"remote": job.source, "local": subfolder(job, "mds")}
        dataset = self._streaming.StreamingDataset(**where, shuffle=True, batch_size=job.batch_size)
        return DataLoader(dataset, job.batch_size, collate_fn=Collate(job, "key"), **worker_options(job))

    def epoch(self, number: int) -> Iterator[Batch]:
        """It counts epochs by itself."""
        if self._loader is None:
            self._loader = self._build()
        yield from self._loader
