"""LitData: its own chunks of 64 MB, its own loader.

As https://github.com/Lightning-AI/litData has it: `optimize` with `chunk_bytes="64MB"`,
`StreamingDataset(shuffle=True)` in `StreamingDataLoader`. Its obstore client refuses endpoints that are plain http;
that is patched, and said.
"""

from __future__ import annotations

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

ABOUT = About(
    ("litdata",),
    "https://github.com/Lightning-AI/litData",
    reads="litdata",
    notes=("patched: its client for S3 is allowed plain http",),
)


def convert(shards: Sequence[Path], columns: Sequence[str], folder: Path) -> None:
    """The shards' samples as its chunks."""
    import litdata

    litdata.optimize(
        fn=stored_samples,
        inputs=[str(path) for path in shards],
        output_dir=str(folder),
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
    )


class Loader(BelowThisProcess):
    """`StreamingDataset` in its `StreamingDataLoader`."""

    def __init__(self, job: Job) -> None:
        import litdata
        from litdata.streaming import downloader

        options = getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", None)
        if options is not None:
            options["allow_http"] = True
        self._litdata, self._job = litdata, job

    def _build(self) -> Any:
        job = self._job
        remote: dict[str, Any] = {}
        if not is_local(job.source):
            remote = {"cache_dir": subfolder(job, "litdata")}
            if endpoint := s3_endpoint():
                remote["storage_options"] = {"endpoint_url": endpoint}
        dataset = self._litdata.StreamingDataset(job.source, shuffle=True, drop_last=False, **remote)
        return self._litdata.StreamingDataLoader(
            dataset, batch_size=job.batch_size, collate_fn=Collate(job, "key"), **worker_options(job)
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """It counts epochs by itself."""
        if self._loader is None:
            self._loader = self._build()
        yield from self._loader
