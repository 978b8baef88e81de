"""Prepare a node's cache before a job runs: warm it with the data, or index the shards.

Warming fills the cache in the order in which a job will read. The plan is the job's own: the same URLs, seed, shuffle
and epoch give the same order. The service fetches along it and keeps every chunk that the disk tier has room for;
meanwhile this process indexes the shards as their chunks arrive, so that the job neither fetches nor parses, and knows
how many samples there are. It stands back behind jobs that train (`service.fetching.warming_limit`).

Indexing alone fetches only the chunks that hold headers, from several shards at a time; shards whose index is known are
not read again. The indexes stay in the cache. They can also be written to a file (see `formats.sidecar`), which saves
every other node the same work.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastload import shares
from fastload.arguments import checked_urls
from fastload.cache import ChunkKey
from fastload.cache.directory import opened
from fastload.cache.disk import take_inventory
from fastload.cache.key import object_id
from fastload.cache.limits import stored as stored_limits
from fastload.client.cache import AnyCache, Handle, handle_of
from fastload.client.consumer import Consumer, HeldBytes
from fastload.client.operator import is_served
from fastload.config import CacheLimits, default_ram_bytes
from fastload.errors import (
    ConfigError,
    FastloadError,
    ObjectChangedError,
    ObjectMissingError,
    ShardError,
    StoreError,
    WaitTimeoutError,
    WriteConflictError,
    from_wire,
)
from fastload.formats import Format, Index, is_cut, side_index
from fastload.formats.pieces import in_pieces
from fastload.formats.splits import with_split
from fastload.history.archive import Archive
from fastload.history.library import WARMING
from fastload.pipeline.manifest_files import frozen, shared_manifest
from fastload.pipeline.shard_listing import attach, check_reading, find_sidecars, list_shards
from fastload.pipeline.shards import ShardTable
from fastload.plan import Manifest, Ranks, RequestedOrder, objects_in_use_order
from fastload.protocol import Progress, WarmTerms
from fastload.redaction import redact
from fastload.service.recording import learnt_by_runs
from fastload.service.unpacking_children import PART_BYTES
from fastload.store import StoreOptions, open_store
from fastload.store.logins import apart
from fastload.store.table import ObjectTable
from fastload.store.urls import scheme, store_root

if TYPE_CHECKING:
    from fastload.formats.sidecar import SidecarWriter


_ANY_TERMS = WarmTerms()


@dataclass(frozen=True, slots=True)
class WarmJob:
    """The arguments of a job. `ranks` are those of any rank of this node: they say which partitions the node
    reads. `index`, `manifest_file`, `format` and `split` are the job's, where it names them.
    """

    urls: Sequence[str]
    order: RequestedOrder
    epoch: int = 0
    ranks: Ranks = Ranks()  # noqa: RUF009  # immutable
    index: str | None = None
    manifest_file: str | None = None
    format: Format = "auto"
    split: str | None = None

    def list_shards(self, consumer: Consumer, bad: dict[str, ShardError] | None = None) -> Manifest:
        """The shards as they are now."""
        return list_shards(consumer, self.urls, self.format, self.split, bad)

    @property
    def names(self) -> list[str]:
        """What its data is called in files of lists of shards."""
        return with_split(self.urls, self.split)


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """What an earlier run read: the objects at these URLs, whole, or where `format` is given, large ones in the pieces
    in which data sets of that format read them.
    """

    urls: Sequence[str]
    format: Format | None = None

    def objects(self, consumer: Consumer) -> ObjectTable:
        """Those that are there, as they are now."""
        there, how = consumer.present(self.urls), self.format
        return there if how is None else in_pieces(there, lambda url: is_cut(url, how))


@dataclass(frozen=True, slots=True)
class Warmed:
    """The result: `held_bytes` of `total_bytes` are cached, and `fetched_bytes` were fetched. Of packed shards all of
    these are unpacked bytes; `stored_bytes` are what the store has for `total_bytes`.

    `sample_count` is that of a job's shards, and 0 where a run's objects were warmed, which are not parsed;
    `missing_count` of what the run had read are not there any more. `failed` are the shards that could not be had, by
    URL, where it went on without them.
    """

    object_count: int
    total_bytes: int = 0
    held_bytes: int = 0
    fetched_bytes: int = 0
    sample_count: int = 0
    missing_count: int = 0
    failed: Mapping[str, FastloadError] = field(default_factory=dict)
    stored_bytes: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the job, or the same run, would fetch nothing now."""
        return self.held_bytes >= self.total_bytes and not self.failed


@dataclass(frozen=True, slots=True)
class PinTerms:
    """The pin of what is warmed: see `Consumer.pin`."""

    name: str
    ttl_s: float = 0.0
    quota_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the cache holds of a job's data, by tier, and what fetching the rest would take.

    `bytes_per_s` is what the store was measured to give, by this service or an earlier one; 0: nothing is known. Of
    packed shards bytes are unpacked ones, but for `stored_bytes`, which the store has for `total_bytes`.
    """

    object_count: int
    total_bytes: int
    stored_bytes: int
    held_bytes: int
    ram_bytes: int
    disk_bytes: int
    request_count: int
    bytes_per_s: float

    @property
    def is_complete(self) -> bool:
        """Whether the job would fetch nothing now."""
        return self.held_bytes >= self.total_bytes

    @property
    def to_fetch_bytes(self) -> int:
        """What the store would send for the rest, if as much is missing of all shards alike."""
        return self.stored_bytes * (self.total_bytes - self.held_bytes) // max(1, self.total_bytes)


def warm(
    job: WarmJob,
    cache: AnyCache,
    *,
    storage_options: Mapping[str, Any] | None = None,
    terms: WarmTerms = _ANY_TERMS,
    pin: PinTerms | None = None,
    label: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Warmed:
    """Fill `cache` for one epoch of a job. Blocks until everything is there, or the cache is full.

    Raises the errors of listing, fetching and indexing, as a job would; where `terms.goes_on`, those of listing only,
    and shards that cannot be had or unpacked are `failed`. `pin` is set before anything is fetched, so that
    what comes has room and stays. Operators see the data under `label`, or the pin's name.
    """
    checked_urls(job.urls)
    handle = handle_of(cache)
    urls, storage_options = apart(job.urls, storage_options)
    job = replace(job, urls=urls)
    with handle.consumer(storage_options, WARMING) as consumer:
        unlisted: dict[str, ShardError] | None = {} if terms.goes_on else None
        manifest = _manifest(consumer, job, unlisted)
        sidecars = find_sidecars(consumer, manifest, job.index)
        if isinstance(job.format, str):  # what lies beside the shards of others is a part of their format
            sidecars = _provable(sidecars)
        attach(consumer, manifest, sidecars)
        order = job.order.settled(job.ranks, handle.limits.ram_bytes)
        plan = objects_in_use_order(manifest, order, job.epoch, ranks=job.ranks)
        if label:
            consumer.label(label)
        if pin is not None:
            consumer.pin(pin.name, pin.ttl_s, pin.quota_bytes, plan)
        consumer.set_plan(plan, job.epoch, warm=True, terms=terms)
        nos = plan.tolist()
        counter = _Counter(consumer, manifest, sidecars, nos, goes_on=terms.goes_on, how=job.format)
        indexing = ThreadPoolExecutor(1, "fastload-index")
        counting = indexing.submit(counter.run)

        def came(progress: Progress) -> None:
            counter.follow(progress)
            on_progress(progress)

        try:
            progress = _follow(consumer, came)
            sample_count = counting.result()
        finally:
            counter.stop()
            with consumer.interrupted():
                indexing.shutdown()
    return Warmed(
        len(plan),
        progress.total_bytes,
        progress.held_bytes,
        progress.fetched_bytes,
        sample_count=sample_count,
        failed=dict(unlisted or {}) | counter.failed | _failed(progress),
        stored_bytes=_stored_bytes(manifest.objects.take(plan), progress.total_bytes),
    )


def _stored_sizes(objects: ObjectTable) -> NDArray[np.int64]:
    """How many bytes the store sends for each: packed ones for what is in packed objects."""
    _, object_sizes, packings = objects.all_pieces()
    return np.where(packings > 0, object_sizes, objects.sizes)


def _stored_bytes(objects: ObjectTable, byte_count: int) -> int:
    """The same for all, which have so many bytes where each counts once."""
    return int(_stored_sizes(objects).sum()) * byte_count // max(1, int(objects.sizes.sum()))


def _failed(progress: Progress) -> dict[str, FastloadError]:
    return {url: from_wire(name, message) for url, name, message in progress.failures}


def look(
    what: WarmJob | EarlierRun,
    directory: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    limits: CacheLimits | None = None,
) -> Outlook:
    """What the cache at `directory` holds of what a job reads in an epoch, or of what an earlier run read. Lists the
    store and fetches nothing; raises its errors.

    Where no service runs, that is read from the directory's files, of which none is made or changed, and nothing is
    started; it need not be there. `limits` are those that one would have which is not.
    """
    if isinstance(what, WarmJob):
        urls, storage_options = apart(checked_urls(what.urls), storage_options)
        what = replace(what, urls=urls)
    if is_served(directory):
        handle = handle_of(directory)
        with handle.consumer(storage_options, WARMING) as consumer:
            objects = _objects_of(consumer, what, handle.limits.ram_bytes)
            consumer.attach(objects)
            endpoints = consumer.stats()["node"]["endpoints"]
            return _outlook(consumer.held(), consumer.chunk_bytes, objects, directory, endpoints)
    limits = stored_limits(directory) or limits or CacheLimits(default_ram_bytes(), 0)
    objects = _listed_apart(what, limits, storage_options)
    endpoint = StoreOptions.from_environment(storage_options).endpoint
    held = _held_on_disk(objects, directory, limits.chunk_bytes, endpoint)
    return _outlook(held, limits.chunk_bytes, objects, directory, {})


def _objects_of(consumer: Consumer, what: WarmJob | EarlierRun, ram_bytes: int) -> ObjectTable:
    if isinstance(what, EarlierRun):
        return what.objects(consumer)
    found = None if what.manifest_file is None else frozen(what.manifest_file, what.names)
    manifest = found or what.list_shards(consumer)
    check_reading(manifest, what.format)
    plan = objects_in_use_order(manifest, what.order.settled(what.ranks, ram_bytes), what.epoch, ranks=what.ranks)
    return manifest.objects.take(plan)


def _listed_apart(
    what: WarmJob | EarlierRun, limits: CacheLimits, storage_options: Mapping[str, Any] | None
) -> ObjectTable:
    """What the store has, asked for by a cache that is gone afterwards."""
    sizes = {"ram_bytes": 8 * limits.chunk_bytes, "disk_bytes": 0, "chunk_bytes": limits.chunk_bytes}
    with (
        tempfile.TemporaryDirectory(prefix="fastload-") as place,
        Handle(place, service="inprocess", history_bytes=0, **sizes) as handle,
        handle.consumer(storage_options, WARMING) as consumer,
    ):
        return _objects_of(consumer, what, limits.ram_bytes)


def _held_on_disk(objects: ObjectTable, directory: Path, chunk_bytes: int, endpoint: str) -> HeldBytes:
    on_disk: dict[bytes, set[int]] = {}
    with contextlib.suppress(FileNotFoundError), opened(directory) as root:
        for _, key, _ in take_inventory(root, sweep=False).held:
            if isinstance(key, ChunkKey):
                on_disk.setdefault(key.object_id, set()).add(key.index)
    total = held = 0
    for info in dict.fromkeys(objects):
        total += info.size
        indexes = on_disk.get(object_id(info, chunk_bytes, endpoint), ())
        held += sum(max(0, min(chunk_bytes, info.size - index * chunk_bytes)) for index in indexes)
    return HeldBytes(byte_count=total, ram_bytes=0, disk_bytes=held, held_bytes=held, pinned_bytes=0)


def _outlook(
    held: HeldBytes, chunk_bytes: int, objects: ObjectTable, directory: Path, endpoints: Mapping[str, Any]
) -> Outlook:
    missing_bytes = held.byte_count - held.held_bytes
    request_bytes = np.where(objects.all_pieces()[2] > 0, PART_BYTES, chunk_bytes)
    request_count = int((-(-_stored_sizes(objects) // request_bytes)).sum())
    return Outlook(
        object_count=len(objects),
        total_bytes=held.byte_count,
        stored_bytes=_stored_bytes(objects, held.byte_count),
        held_bytes=held.held_bytes,
        ram_bytes=held.ram_bytes,
        disk_bytes=held.disk_bytes,
        request_count=-(-request_count * missing_bytes // max(1, held.byte_count)),
        bytes_per_s=_measured(endpoints, directory, objects),
    )


def _measured(endpoints: Mapping[str, Any], directory: Path, objects: ObjectTable) -> float:
    """How many bytes a second the store of these was measured to give, now or in an earlier run; 0: not known."""
    rates = {name: each.bytes_per_s for name, each in learnt_by_runs(Archive(directory)).items()}
    rates |= {name: each["bytes_per_s"] for name, each in endpoints.items() if each["bytes_per_s"] > 0}
    own = redact(store_root(objects[0].url)) if len(objects) else ""
    return float(rates.get(own, max(rates.values(), default=0.0)))  # else the endpoint has a name of its own


def warm_run(
    run: EarlierRun,
    cache: AnyCache,
    *,
    storage_options: Mapping[str, Any] | None = None,
    terms: WarmTerms = _ANY_TERMS,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Warmed:
    """Fill `cache` with what an earlier run read, as it is now and in this order.

    Blocks until everything is there, or the cache is full. Objects that are gone are left out; other errors of the
    store are raised.
    """
    with handle_of(cache).consumer(storage_options, WARMING) as consumer:
        objects = run.objects(consumer)
        missing_count = len(run.urls) - len({info.url for info in objects})
        if not len(objects):
            return Warmed(0, missing_count=missing_count)
        consumer.attach(objects)
        consumer.set_plan(range(len(objects)), 0, warm=True, terms=terms)
        progress = _follow(consumer, on_progress)
    return Warmed(
        len(objects),
        progress.total_bytes,
        progress.held_bytes,
        progress.fetched_bytes,
        missing_count=missing_count,
        failed=_failed(progress),
        stored_bytes=progress.total_bytes,
    )


def _manifest(consumer: Consumer, job: WarmJob, bad: dict[str, ShardError] | None) -> Manifest:
    """The list of shards that the job will read, which is frozen where it is in a file. `bad`: see `list_shards`; a
    file is of all shards.
    """
    if job.manifest_file is None:
        return job.list_shards(consumer, bad)
    names = job.manifest_file, job.names
    manifest = shared_manifest(*names, is_first=True, list_shards=lambda: job.list_shards(consumer))
    check_reading(manifest, job.format)
    return manifest


def _provable(sidecars: ObjectTable) -> ObjectTable:
    """Those without what other tools left beside shards: what is made ahead, for all that come, is of the shards."""
    return ObjectTable.of(info for info in sidecars if not info.url.endswith(side_index.ENDING))


def _follow(consumer: Consumer, on_progress: Callable[[Progress], None]) -> Progress:
    progress = None
    while progress is None or not progress.finished:
        progress = consumer.wait_progress(progress)
        on_progress(progress)
    return progress


class _Counter:
    """Counts samples by indexing one shard after the other, each when it has been fetched, as far as counts can say:
    what is indexed is in RAM then, and wants no request of its own.
    """

    def __init__(
        self,
        consumer: Consumer,
        manifest: Manifest,
        sidecars: ObjectTable,
        object_nos: list[int],
        *,
        goes_on: bool,
        how: Format,
    ) -> None:
        self._consumer, self._manifest, self._object_nos, self._goes_on = consumer, manifest, object_nos, goes_on
        self._shards = _shard_table(consumer, manifest, sidecars, how)
        self._changed = threading.Condition()
        self._done_chunks = 0
        self._is_finished = self._is_stopped = False
        self.failed: dict[str, FastloadError] = {}

    def run(self) -> int:
        """The number of samples; to be called once, in a thread of its own."""
        sample_count = chunk_count = 0
        for number in self._object_nos:
            chunk_count += -(-int(self._manifest.sizes[number]) // self._consumer.chunk_bytes)
            if not self._wait_for(chunk_count):
                return 0
            sample_count += self._count(number)
        self._consumer.stats()  # once it has answered this, the service has all that was sent before
        return sample_count

    def _wait_for(self, chunk_count: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._is_finished or self._done_chunks >= chunk_count)
            return not self._is_stopped

    def _count(self, number: int) -> int:
        while True:
            try:
                (index,) = self._shards.index(self._consumer, [number])
            except WaitTimeoutError:  # warming stands back: how long is no sign of anything, and the plan has its own
                continue
            except (ShardError, StoreError) as error:
                if not self._goes_on:
                    raise
                self.failed[redact(self._manifest.objects[number].url)] = error
                return 0
            return index.sample_count

    def follow(self, progress: Progress) -> None:
        """So far has been fetched."""
        with self._changed:
            self._done_chunks, self._is_finished = progress.done_chunks, progress.finished
            self._changed.notify_all()

    def stop(self) -> None:
        """Nothing more is wanted of it."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


# Each waits for one chunk at a time.
_THREADS_MAX = 16
# Indexes that may be ready before that of an earlier shard is.
_AHEAD_MAX = 64


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """`done_count` of the shards are indexed; they hold `sample_count` samples."""

    done_count: int
    shard_count: int
    sample_count: int


@dataclass(frozen=True, slots=True)
class Indexed:
    """The result: the shards, their samples and bytes, and how much had to be fetched."""

    shard_count: int
    sample_count: int
    total_bytes: int
    fetched_bytes: int
    bad: tuple[str, ...] = ()


def index(
    urls: Sequence[str],
    cache: AnyCache,
    *,
    output: str | os.PathLike[str] | None = None,
    how: Format = "auto",
    split: str | None = None,
    skips_bad: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[IndexProgress], None] = lambda progress: None,
) -> Indexed:
    """Index all shards of `urls` into `cache`, and write the indexes to `output`, a local file or an object, where it
    is given: in the end, in one piece. With `skips_bad`, what is wrong with a shard is in the result's `bad`, and the
    others go on.

    Of a format whose indexes are computed, all is read that says how many samples there are, and nothing is stored.
    Raises the errors of listing, fetching and indexing, as a job would, and `ConfigError` for `output`.
    """
    checked_urls(urls)
    if output is not None and not isinstance(how, str):
        raise ConfigError(f"output={os.fspath(output)!r}: the indexes of {how.reading} are computed; leave it out")
    handle = handle_of(cache)
    urls, storage_options = apart(urls, storage_options)
    unlisted: dict[str, ShardError] = {}
    with _writer(output, storage_options) as writer, handle.consumer(storage_options, "index") as consumer:
        manifest = list_shards(consumer, urls, how, split, unlisted if skips_bad else None)
        is_stored = isinstance(how, str)
        if is_stored:  # of whole shards: what is indexed is of use to all that read them
            manifest = Manifest(manifest.objects, promised=manifest.promised, sidecars=_provable(manifest.sidecars))
        bad = list(map(str, unlisted.values()))
        shard_count = len(manifest) + len(bad)
        attach(consumer, manifest, manifest.sidecars)
        counts = consumer.get_counts(range(len(manifest))) if is_stored else manifest.promised
        assert counts is not None, "of a format that is computed it is said which are known"
        wanted = np.arange(len(counts)) if writer is not None else np.flatnonzero(counts < 0)
        known = np.delete(counts, wanted)
        done_count, sample_count = len(known) + len(bad), int(known.sum())
        on_progress(IndexProgress(done_count, shard_count, sample_count))
        shards = _shard_table(consumer, manifest, manifest.sidecars, how)
        # Half of the arena is left for chunks that are in flight.
        threads = max(1, min(_THREADS_MAX, int(handle.limits.ram_bytes // handle.limits.chunk_bytes * shares.INDEXING)))
        with closing(_index_ahead(shards, consumer, wanted.tolist(), threads)) as indexes:
            for number, found in indexes:
                done_count += 1
                if isinstance(found, ShardError):
                    if not skips_bad:
                        raise found
                    bad.append(str(found))
                    continue
                if writer is not None:
                    writer.add(manifest.objects[number], found)
                sample_count += found.sample_count
                on_progress(IndexProgress(done_count, shard_count, sample_count))
        if writer is not None:
            writer.close()
        # Once it has answered this, the service has all that was sent before, the last index included.
        fetched_bytes = consumer.stats()["consumer"]["remote_bytes"]
    return Indexed(shard_count, sample_count, int(manifest.sizes.sum()), fetched_bytes, tuple(bad))


@contextmanager
def _writer(
    output: str | os.PathLike[str] | None, storage_options: Mapping[str, Any] | None
) -> Iterator[SidecarWriter | None]:
    """What writes to `output`; an object is put there when it is closed and the block ends."""
    if output is None:
        yield None
        return
    from fastload.formats.sidecar import SidecarWriter

    path = os.fspath(output)
    if "://" not in path:
        with SidecarWriter(path) as writer:
            yield writer
        return
    from fastload.store.objectstore import SCHEMES

    if scheme(path) not in SCHEMES or path.endswith("/"):
        raise ConfigError(f"output={path!r} is not the name of an object in an object store, and no file; name either")
    store = open_store(path, StoreOptions.from_environment(storage_options))
    with closing(store), tempfile.TemporaryDirectory(prefix="fastload-index-") as folder:
        local = Path(folder) / "index.arrow"
        try:
            there = store.head(path)
        except ObjectMissingError:
            there = None
        with SidecarWriter(local) as writer:
            yield writer
        try:
            if there is None:
                store.put_if_absent(path, local.read_bytes())
            else:
                store.put_if_match(path, local.read_bytes(), there.etag or "")
        except WriteConflictError as error:
            raise ObjectChangedError(
                f"{path} was written by another meanwhile, and is left as that did; run this again"
            ) from error


def _shard_table(consumer: Consumer, manifest: Manifest, sidecars: ObjectTable, how: Format) -> ShardTable:
    places = manifest.first_chunk(consumer.chunk_bytes), consumer.chunk_bytes
    return ShardTable(manifest, *places, sidecars, how)


def _index_ahead(
    shards: ShardTable, consumer: Consumer, object_nos: list[int], threads: int
) -> Generator[tuple[int, Index | ShardError]]:
    """The indexes of these shards, in their order, made by several threads; what is wrong with a shard instead."""
    pool = ThreadPoolExecutor(threads, "fastload-index")
    numbers = iter(object_nos)
    ahead: deque[tuple[int, Future[list[Index]]]] = deque()
    try:
        while True:
            for number in islice(numbers, _AHEAD_MAX - len(ahead)):
                ahead.append((number, pool.submit(shards.index, consumer, [number])))
            if not ahead:
                return
            number, future = ahead.popleft()
            try:
                (found,) = future.result()
            except ShardError as error:
                yield number, error
            else:
                yield number, found
    finally:
        with consumer.interrupted():
            pool.shutdown(cancel_futures=True)
