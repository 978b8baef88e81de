"""s3torchconnector: shards that are read from front to back in torch's workers, by way of a shuffle buffer.

As https://github.com/awslabs/s3-connector-for-pytorch has it: `S3IterableDataset.from_objects` with `enable_sharding`.
It has no cache: every epoch reads the store. What takes the archives apart is Python's tarfile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from fastload.bench.peers.job import (
    SHUFFLE_BUFFER,
    About,
    Batch,
    BelowThisProcess,
    Collate,
    Job,
    members_of,
    only_s3,
    s3_endpoint,
    s3_region,
    samples_of_members,
    shuffled,
    worker_options,
)

ABOUT = About(
    ("s3torchconnector",),
    "https://github.com/awslabs/s3-connector-for-pytorch",
    caches=False,
    notes=(f"shards are shuffled, and samples by a buffer of {SHUFFLE_BUFFER} in each worker",),
)


class Loader(BelowThisProcess):
    """`S3IterableDataset` in torch's `DataLoader`, made anew for each epoch, since its shards are in another order."""

    def __init__(self, job: Job) -> None:
        import s3torchconnector

        only_s3(job, "s3torchconnector")
        self._connector, self._job = s3torchconnector, job

    def epoch(self, number: int) -> Iterator[Batch]:
        """Shards in another order each epoch."""
        from torch.utils.data import DataLoader

        job, urls = self._job, list(self._job.urls)
        random.Random(f"{job.seed}-{number}").shuffle(urls)
        endpoint = s3_endpoint()
        where: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        shards = self._connector.S3IterableDataset.from_objects(
            urls,
            region=s3_region(),
            s3client_config=self._connector.S3ClientConfig(force_path_style=endpoint is not None),
            enable_sharding=True,
            **where,
        )
        options = {**worker_options(job), "persistent_workers": False}
        yield from DataLoader(_TarSamples(shards, job, number), None, **options)


class _TarSamples(IterableDataset[Batch]):
    """Batches of the samples of tar shards that are read as streams."""

    def __init__(self, shards: Any, job: Job, number: int) -> None:
        self._shards, self._job, self._number = shards, job, number

    def __iter__(self) -> Iterator[Batch]:
        collate = Collate(self._job)
        stored = (sample for shard in self._shards for sample in samples_of_members(members_of(shard)))
        samples = shuffled(stored, self._number)
        while batch := list(islice(samples, self._job.batch_size)):
            yield collate(batch)
