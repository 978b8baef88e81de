"""webdataset over `pipe:curl`, which signs with the credentials, and its own cache of whole shards.

As https://webdataset.github.io/webdataset/ has it for object stores ("pipe:" URLs, `cache_dir`, `shardshuffle`, a
shuffle buffer of 1000, batches made in the workers, `WebLoader(batch_size=None)`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import Any

from fastload.bench.peers.job import (
    PREFETCH,
    SHUFFLE_BUFFER,
    About,
    Batch,
    BelowThisProcess,
    Job,
    decoders,
    is_local,
    s3_endpoint,
    s3_region,
    subfolder,
)

ABOUT = About(("webdataset",), "https://webdataset.github.io/webdataset/")


class Loader(BelowThisProcess):
    """`WebDataset` in `WebLoader`."""

    def __init__(self, job: Job) -> None:
        import webdataset

        self._webdataset, self._job = webdataset, job

    def _build(self) -> Any:
        job = self._job
        urls = [pipe(url) for url in job.urls]
        cache = {} if all(map(is_local, job.urls)) else {"cache_dir": subfolder(job, "shards")}
        dataset = self._webdataset.WebDataset(urls, shardshuffle=len(urls), seed=job.seed, **cache)
        dataset = dataset.shuffle(SHUFFLE_BUFFER)
        if job.decode:
            dataset = dataset.map_dict(**decoders(job.decode))
        dataset = dataset.to_tuple("__key__", *job.columns).batched(job.batch_size)
        workers = {"prefetch_factor": PREFETCH, "persistent_workers": True} if job.workers else {}
        return self._webdataset.WebLoader(dataset, batch_size=None, num_workers=job.workers, **workers)

    def epoch(self, number: int) -> Iterator[Batch]:
        """It counts epochs by itself."""
        if self._loader is None:
            self._loader = self._build()
        for keys, *columns in self._loader:
            yield Batch(keys, dict(zip(self._job.columns, columns, strict=True)))


def pipe(url: str) -> str:
    """How webdataset opens a shard: a path as it is, else a command that writes it. The shell fills in the secrets."""
    if is_local(url):
        return url
    if not url.startswith("s3://"):
        return f"pipe:curl -sSfL {shlex.quote(url)}"
    bucket, _, key = url.removeprefix("s3://").partition("/")
    region, endpoint = s3_region(), s3_endpoint()
    address = f"{endpoint}/{bucket}/{key}" if endpoint else f"https://{bucket}.s3.{region}.amazonaws.com/{key}"
    curl = f"curl -sSf --aws-sigv4 aws:amz:{region}:s3 --user $AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"
    if os.environ.get("AWS_SESSION_TOKEN"):
        curl += ' -H "x-amz-security-token: $AWS_SESSION_TOKEN"'
    return f"pipe:{curl} {shlex.quote(address)}"
