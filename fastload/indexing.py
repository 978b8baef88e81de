"""Indexing: how many samples there are and where each lies, for all shards of a data set, before anything reads it.

Only the chunks that hold headers are fetched, from several shards at a time, and through the node's cache like
everything else; shards whose index is known are not read again. The indexes stay in the cache. They can also be written
to a file (see `formats.sidecar`), which saves every other node the same work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.arguments import checked_urls
from fastload.client.cache import AnyCache, handle_of
from fastload.client.consumer import Consumer
from fastload.client.handle import Handle
from fastload.errors import ConfigError
from fastload.formats import ShardIndex
from fastload.pipeline.listing import attach, list_shards
from fastload.pipeline.shards import ShardTable
from fastload.pipeline.windows import window_chunks
from fastload.plan import Manifest
from fastload.store.logins import apart

if TYPE_CHECKING:
    from fastload.formats.sidecar import SidecarWriter

# Each waits for one chunk at a time.
_THREADS_MAX = 16
# Indexes that may be ready before that of an earlier shard is.
_AHEAD_MAX = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """`done_count` of the shards are indexed; they hold `sample_count` samples."""

    done_count: int
    shard_count: int
    sample_count: int


@dataclass(frozen=True, slots=True)
class Indexed:
    """What came of it: the shards, their samples and bytes, and how much had to be fetched."""

    shard_count: int
    sample_count: int
    total_bytes: int
    fetched_bytes: int


def index(
    urls: Sequence[str],
    cache: AnyCache,
    *,
    output: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Indexed:
    """Index all shards of `urls` into `cache`, and write the indexes to the local file `output` where it is given.

    Raises the errors of listing, fetching and indexing, as a job would, and `ConfigError` for `output`.
    """
    checked_urls(urls)
    handle = handle_of(cache)
    urls, storage_options = apart(urls, storage_options)
    with _writer(output) as writer, handle.consumer(storage_options, "index") as consumer:
        manifest = list_shards(consumer, urls)
        attach(consumer, manifest, manifest.sidecars)
        counts = consumer.get_counts(range(len(manifest)))
        wanted = np.arange(len(counts)) if writer is not None else np.flatnonzero(counts < 0)
        known = np.delete(counts, wanted)
        done_count, sample_count = len(known), int(known.sum())
        on_progress(Progress(done_count, len(manifest), sample_count))
        with closing(_indexes(consumer, manifest, wanted.tolist(), handle)) as indexes:
            for number, found in indexes:
                if writer is not None:
                    writer.add(manifest.objects[number], found)
                done_count, sample_count = done_count + 1, sample_count + found.sample_count
                on_progress(Progress(done_count, len(manifest), sample_count))
        if writer is not None:
            writer.close()
        # An answer to this says that the service has what was said before it, the last index too.
        fetched_bytes = consumer.stats()["consumer"]["remote_bytes"]
    return Indexed(len(manifest), sample_count, int(manifest.sizes.sum()), fetched_bytes)


def _writer(output: str | os.PathLike[str] | None) -> AbstractContextManager[SidecarWriter | None]:
    if output is None:
        return nullcontext()
    path = os.fspath(output)
    if "://" in path:
        raise ConfigError(
            f"output={path!r}: fastload cannot write to object stores yet; name a local file, and upload it beside the "
            "shards with your store's own tool"
        )
    from fastload.formats.sidecar import SidecarWriter

    return SidecarWriter(path)


def _indexes(
    consumer: Consumer, manifest: Manifest, object_nos: list[int], handle: Handle
) -> Generator[tuple[int, ShardIndex]]:
    """The indexes of these shards, in their order, made by several threads."""
    first_chunk = manifest.first_chunk(consumer.chunk_bytes)
    shards = ShardTable(manifest, first_chunk, consumer.chunk_bytes, manifest.sidecars)

    def make(number: int) -> ShardIndex:
        try:
            (found,) = shards.get(consumer, [number])
            return found
        finally:
            consumer.release(window_chunks(first_chunk, [number]))

    # Half of the arena is left for chunks that are on their way.
    threads = max(1, min(_THREADS_MAX, handle.ram_bytes // handle.chunk_bytes // 2))
    pool = ThreadPoolExecutor(threads, "fastload-index")
    ahead: deque[tuple[int, Future[ShardIndex]]] = deque()
    try:
        for number in object_nos:
            ahead.append((number, pool.submit(make, number)))
            if len(ahead) == _AHEAD_MAX:
                number, future = ahead.popleft()
                yield number, future.result()
        while ahead:
            number, future = ahead.popleft()
            yield number, future.result()
    finally:
        with consumer.interrupted():
            pool.shutdown(cancel_futures=True)
