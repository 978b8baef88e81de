"""SPDL: a pipeline of threads in this process, which fetches shards, takes them apart, decodes and batches.

As https://facebookresearch.github.io/spdl/ has it for archives: sources of shards, `iter_tarfile`, stages of
`PipelineBuilder` with a concurrency each. It has no store and no cache: obstore fetches whole shards, every epoch
reads them again, and only the shards are shuffled. Pictures are decoded as with torch's loaders, which was faster than
its own FFmpeg.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastload.bench.peers.job import (
    PREFETCH,
    About,
    Batch,
    BelowThisProcess,
    Collate,
    Job,
    is_local,
    only_s3,
    s3_endpoint,
    samples_of_members,
)

ABOUT = About(
    ("spdl",),
    "https://facebookresearch.github.io/spdl/",
    caches=False,
    notes=("shuffles shards only", "threads only: workers are its concurrency"),
)


class Loader(BelowThisProcess):
    """A `Pipeline`, built for each epoch."""

    def __init__(self, job: Job) -> None:
        import spdl.io
        import spdl.pipeline

        self._io, self._pipeline, self._job = spdl.io, spdl.pipeline, job
        self._collate = Collate(job)
        self._stores: dict[str, Any] = {}
        if not all(map(is_local, job.urls)):
            only_s3(job, "spdl (by way of obstore, as it is set up here)")
            self._open_stores()

    def _open_stores(self) -> None:
        from obstore.store import S3Store

        endpoint = s3_endpoint()
        where: dict[str, Any] = {"endpoint": endpoint, "client_options": {"allow_http": True}} if endpoint else {}
        for url in self._job.urls:
            bucket = url.removeprefix("s3://").partition("/")[0]
            if bucket not in self._stores:
                self._stores[bucket] = S3Store(bucket, **where)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Whole shards, in another order each epoch."""
        urls, threads = list(self._job.urls), max(1, self._job.workers)
        random.Random(f"{self._job.seed}-{number}").shuffle(urls)
        builder = self._pipeline.PipelineBuilder().add_source(urls)
        builder = builder.pipe(self._fetch, concurrency=threads).pipe(self._samples, concurrency=threads)
        builder = builder.aggregate(self._job.batch_size)
        if self._job.decode:
            builder = builder.pipe(self._collate, concurrency=threads)
        pipeline = builder.add_sink(PREFETCH).build(num_threads=(3 if self._job.decode else 2) * threads)
        with pipeline.auto_stop():
            for batch in pipeline.get_iterator():
                yield batch if isinstance(batch, Batch) else self._collate(batch)

    def _fetch(self, url: str) -> bytes:
        if is_local(url):
            return Path(url).read_bytes()
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return bytes(self._stores[bucket].get(key).bytes())

    def _samples(self, shard: bytes) -> Iterator[dict[str, Any]]:
        yield from samples_of_members(self._io.iter_tarfile(shard))  # a pipeline asks whether it is a generator
