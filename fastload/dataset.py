"""StreamingDataset: sharded data in object storage, as a torch `IterableDataset`.

A data set holds the checked arguments, the manifest once it is listed, and the job that reads it. It connects to the
cache service when it is first iterated, never before, so that it can be made in one process and used in another: it
pickles, and survives a fork.

Samplers need a map-style data set. `IndexedDataset` is the same data behind `__getitem__`; it pickles, survives a fork,
and is thread-safe.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, TypeAlias, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt
import torch.utils.data

from fastload.arguments import (
    CachePolicy,
    checked_batch_size,
    checked_cache_policy,
    checked_count,
    checked_number,
    checked_numbers,
    checked_on_error,
    checked_path,
    checked_refresh,
    checked_seed,
    checked_split,
    checked_urls,
)
from fastload.callers import public
from fastload.client.cache import AnyCache, handle_of
from fastload.config import parse_bytes
from fastload.dataset_base import BatchOf, Columns, DatasetBase, Result, Row, Sample, Unsaid
from fastload.decode import Decoder
from fastload.errors import ConfigError
from fastload.formats import Format, Index, checked_format
from fastload.pipeline.columns import ColumnSet, Decoding
from fastload.pipeline.epoch_pass import EpochPass, PassOptions, SourcePass, open_source
from fastload.pipeline.finish import BatchBuilder, ColumnFunctions, Filter, Finish, Function, SourceBuilder
from fastload.pipeline.gather import Skips
from fastload.pipeline.job import Job, PassStart
from fastload.pipeline.lookup import Lookup
from fastload.pipeline.source import Source, SourceOptions
from fastload.plan import (
    OrderOptions,
    Position,
    Ranks,
    RequestedOrder,
    Shuffle,
    SourcePlan,
    Tail,
    check_tail,
    epoch_cursor,
    epoch_orders,
    sample_count_of_rank,
)
from fastload.redaction import redact
from fastload.store.logins import apart

# Of a long list of URLs, how many are enough to know it by.
_URLS_SHOWN = 2
_UNKNOWN_COUNTS = (
    "the number of samples is not known before every shard has been read once; iterate one epoch, or run "
    "`fastload index` or `fastload warm` on the same URLs and cache"
)


Urls: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"


class StreamingDataset(DatasetBase[Sample]):
    """Samples from shards in object storage, through the node's cache.

    `urls`: brace patterns (`s3://bucket/train-{000000..001023}.tar`), prefixes that end in "/", plain URLs or local
    paths; one or a list. `cache`: a `fastload.Cache`, or its directory; without one, `$FASTLOAD_CACHE` or the user's
    cache directory.

    `shuffle`: False (where nothing is said, a loader's `shuffle=True` counts); True or "window", which shuffles shards
    and then the samples of several shards together; "shards", which shuffles shards only; "global", which takes every
    sample from anywhere, and needs a cache that holds the data and its index (see docs/shuffling.md). `shuffle_window`
    is the size of such a window; "auto" is 512 MiB, or less where the cache's arena is below 2 GiB, and what a state
    says where one is loaded. The order is a function of the data, `seed`, the window and the epoch, on every machine.

    `columns`: the columns of a sample, by name (the part of a member's name after the first dot, in any case);
    `"txt?"` is one that samples may lack, and `["*?"]` all that each sample has, for `map` and for samples one by one
    (docs/decode.md). `decode`: a decoder of `fastload.decode` a column, or any function of bytes, which is called as
    those of `map` are; columns without one are raw bytes, and where `decode` is given and `columns` is not, only its
    columns are read. `as_tuple`: tuples in that order, not dicts.

    `tail`: what to do where ranks do not divide the samples: "pad" (a few are repeated, and counted), "drop",
    "uneven". `rank`, `world_size`: from torch.distributed or the launcher's environment unless given. `replicas`: so
    many ranks that follow one another read the same samples (a tensor- or context-parallel group; with a `DeviceMesh`
    whose last dimensions these are, their size). `batch_size`: for use in torch's own DataLoader, so that its batches
    are the same for any number of workers.

    `partitions`: parts of the data that each stay with one node, and of which every global batch takes an equal share;
    the number of nodes unless given. Where the number of nodes will change, give one that all of them divide: global
    batches then stay the same.

    `on_error`: what to do where a sample cannot be decoded or lacks a column: "raise", or "skip", which leaves it out
    of its batch with one warning an epoch, and counts it in `stats()`; batches get shorter by that, never fewer. What
    is wrong with a whole shard, or with the store, is always raised.

    `manifest`: a file for the list of shards. It is made at the first iteration, by rank 0, and taken as it is wherever
    it exists: so ranks that nothing else connects read the same, and so do runs at other times. `refresh`: "epoch"
    lists the data again for each epoch, so that it can grow; what was there keeps its partition. `index`: a file made
    by `fastload index`, with which no shard is parsed and all sample counts are known; without, one that lies beside
    the shards is used.

    `split`: which of the splits under a prefix is read, such as "train" (docs/formats.md); where there are several, one
    has to be named.

    `format`: of the shards; "auto" goes by the endings of their names, `fastload.formats.tokens(...)`, or the same as a
    text, reads files of tokens (docs/formats.md). `allow_pickle`: columns that hold pickles are read, which may run any
    code: only for data whose writer you trust.
    `cache_policy`: what the cache keeps where it cannot keep all. "auto" is "pin" (a fixed part of each shard, which
    moves on slowly), and with `shuffle="global"` "future" (in RAM, what is needed soonest); "sieve" and "lru" make
    nothing of the known order, and are there to be compared with (docs/tuning.md).

    `storage_options`: endpoint and credentials, where the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...)
    does not say them.

    A sample is a dict of column -> value with `__key__` and `__url__`. Raises `ConfigError` here, and when iterated
    the errors of `fastload.errors`.
    """

    if TYPE_CHECKING:  # what a sample is depends on one argument; the others are listed once more for that

        class _Options(TypedDict, total=False):
            cache: AnyCache
            shuffle: bool | Literal["window", "shards", "global"] | None
            seed: int
            shuffle_window: int | str
            columns: Sequence[str] | None
            decode: Mapping[str, Decoder | Decoding] | None
            tail: Tail
            storage_options: Mapping[str, Any] | None
            rank: int | None
            world_size: int | None
            replicas: int
            partitions: int | None
            batch_size: int | None
            on_error: Literal["raise", "skip"]
            manifest: str | os.PathLike[str] | None
            refresh: Literal["never", "epoch"]
            index: str | os.PathLike[str] | None
            cache_policy: CachePolicy
            format: Format
            allow_pickle: bool
            split: str | None

        @overload
        def map(self, function: Callable[[Any], Unsaid]) -> StreamingDataset[Any]: ...
        @overload
        def map(self, function: Callable[[Any], dict[str, Any]]) -> StreamingDataset[Row]: ...
        @overload
        def map(self, function: Callable[[Any], Result]) -> StreamingDataset[Result]: ...
        def map(self, function: Function) -> StreamingDataset[Any]: ...

        @overload
        def map_batch(self, function: Callable[[Any], Unsaid]) -> StreamingDataset[Any]: ...
        @overload
        def map_batch(self, function: Callable[[Any], dict[str, Any]]) -> StreamingDataset[Row]: ...  # type: ignore[overload-overlap]
        @overload
        def map_batch(self, function: Callable[[Any], Result]) -> StreamingDataset[BatchOf[Result]]: ...
        def map_batch(self, function: Function) -> StreamingDataset[Any]: ...

    @overload
    def __init__(
        self: StreamingDataset[Row], urls: Urls, *, as_tuple: Literal[False] = False, **options: Unpack[_Options]
    ) -> None: ...

    @overload
    def __init__(
        self: StreamingDataset[Columns], urls: Urls, *, as_tuple: Literal[True], **options: Unpack[_Options]
    ) -> None: ...

    @overload
    def __init__(
        self: StreamingDataset[Any], urls: Urls, *, as_tuple: bool = False, **options: Unpack[_Options]
    ) -> None: ...

    @public
    def __init__(
        self,
        urls: Urls,
        *,
        cache: AnyCache = None,
        shuffle: bool | Literal["window", "shards", "global"] | None = None,
        seed: int = 0,
        shuffle_window: int | str = "auto",
        columns: Sequence[str] | None = None,
        decode: Mapping[str, Decoder | Decoding] | None = None,
        as_tuple: bool = False,
        tail: Tail = "pad",
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        replicas: int = 1,
        partitions: int | None = None,
        batch_size: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        manifest: str | os.PathLike[str] | None = None,
        refresh: Literal["never", "epoch"] = "never",
        index: str | os.PathLike[str] | None = None,
        cache_policy: CachePolicy = "auto",
        format: Format = "auto",  # noqa: A002  # what users call it
        allow_pickle: bool = False,
        split: str | None = None,
    ) -> None:
        how = checked_format(format)  # what is none is an error now
        handle = handle_of(cache)
        super().__init__(checked_batch_size(batch_size), check_tail(tail))
        skips_errors = checked_on_error(on_error) == "skip"
        if not isinstance(allow_pickle, bool):
            raise ConfigError(
                f"allow_pickle={allow_pickle!r} must be True, where pickles in the data are read, or False"
            )
        column_set = replace(ColumnSet.of(columns, decode, as_tuple), allow_pickle=allow_pickle)
        policy = checked_cache_policy(cache_policy)
        self._passes = PassOptions(handle, column_set, self.tail, skips_errors, cache_policy=policy)
        shards, options = apart(checked_urls(urls), storage_options)
        self._data = SourceOptions(
            shards,
            handle,
            options,
            index=checked_path(index, "index"),
            manifest_file=checked_path(manifest, "manifest"),
            grows=checked_refresh(refresh) == "epoch",
            kernels=column_set.kernel_modules(),
            format=how,
            split=checked_split(split),
        )
        requested = _requested_order(shuffle, seed, shuffle_window, partitions)
        if column_set.functions:
            self._on_samples = (ColumnFunctions(column_set),)
        self._shuffle = shuffle
        self._job = Job((rank, world_size), checked_count(replicas, "replicas"), requested, handle.limits.ram_bytes)
        self._source_here = Source(self._data)
        self._lookup_here: Lookup | None = None

    @property
    @public
    def sample_count(self) -> int:
        """Samples in all shards, over all ranks and without repeats. TypeError while it is not known: see `len`."""
        return int(self.known_counts().sum())

    @public
    def known_counts(self) -> npt.NDArray[np.int64]:
        """int64[shards]: samples of each shard. TypeError while they are not known: see `len`."""
        counts = self._source.sample_counts(is_needed=True)
        if counts is None:
            raise TypeError(_UNKNOWN_COUNTS)
        return counts

    @public
    def __getitem__(self, number: Any) -> Any:
        """Sample `number` of all (not of this rank's), as iterating gives it: a dict, or a tuple.

        Shards count in the order in which they are listed, and samples in the order in which they lie in their shard;
        negative numbers count from the end. Random choices of decoders are those of the epoch that the next iteration
        will be (`set_epoch`). A sample that cannot be read is an error here, also with `on_error="skip"`. TypeError
        while the counts of samples are not known (see `len`), IndexError for a number beyond them. See docs/open.md.
        """
        if self._on_batches:
            raise ConfigError("map_batch() functions need batches, and this is one sample; use take()")
        starts = self._starts()
        (sample,) = self._make([checked_number(number, int(starts[-1]))], starts, "samples")
        return sample

    @public
    def take(self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor) -> Any:
        """The samples with these numbers (see `dataset[number]`) as one batch, as a `fastload.DataLoader` makes it: in
        the order of `numbers`, which may name a sample twice. All that they need is fetched at once.
        """
        starts = self._starts()
        return self._make(checked_numbers(numbers, int(starts[-1])), starts, "batch")

    @public
    def samples(self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor) -> list[Any]:
        """The samples with these numbers, as a list; read together, as `take` does."""
        if self._on_batches:
            raise ConfigError("map_batch() functions need batches, and these are samples; use take()")
        starts = self._starts()
        found: list[Any] = self._make(checked_numbers(numbers, int(starts[-1])), starts, "samples")
        return found

    @public
    def indexed(self) -> IndexedDataset:
        """The same samples as a map-style data set, for samplers and torch's worker processes. TypeError while the
        counts of samples are not known: see `len`.
        """
        self._check_unfiltered()
        return IndexedDataset(self)

    @public
    def __len__(self) -> int:
        """Samples of this rank, repeats included. TypeError, with the cure, while shards are not indexed."""
        return sample_count_of_rank(self.sample_count, self.ranks, self.tail, self.partitions)

    @property
    def urls(self) -> tuple[str, ...]:
        """What was named: patterns, prefixes, URLs, paths."""
        return tuple(self._data.urls)

    @property
    def shuffle(self) -> bool | Literal["window", "shards", "global"]:
        """How it shuffles, as it was given; False where nothing was said. A loader's `shuffle=True` changes nothing
        here.
        """
        return self._shuffle or False

    @property
    def seed(self) -> int:
        """The seed of its order."""
        return self._job.seed

    def shuffled(self) -> Self:
        if self._shuffle:
            return self
        if self._shuffle is not None:
            raise ConfigError(
                f"shuffle=True of the loader contradicts shuffle=False of {self!r}; leave one of the two out"
            )
        dataset = copy.copy(self)
        dataset._shuffle, dataset._job, dataset._source_here = True, self._job.shuffled(), self._source
        return dataset

    def __repr__(self) -> str:
        urls = [redact(url) for url in self.urls[:_URLS_SHOWN]]
        more = f" and {len(self.urls) - len(urls)} more" if len(self.urls) > len(urls) else ""
        more += "" if self._data.split is None else f", split={self._data.split!r}"
        columns = "" if self.columns.names is None else f", columns={list(self.columns.names)}"
        return (
            f"{type(self).__name__}({urls[0] if len(self.urls) == 1 else urls!r}{more}, shuffle={self.shuffle!r}, "
            f"seed={self.seed}, epoch={self.epoch}{columns}, cache={self._passes.cache.directory})"
        )

    @property
    @public
    def ranks(self) -> Ranks:
        """Which share of the samples is this process's; settled at the first iteration."""
        return self._job.ranks

    @property
    @public
    def partitions(self) -> int:
        """Into how many partitions the data is dealt."""
        return self._job.partition_count

    @property
    def columns(self) -> ColumnSet:
        """Which columns a sample has, and how each is decoded."""
        return self._passes.columns

    @property
    def cache_name(self) -> str:
        """The directory of its cache."""
        return self._source.cache_name

    @property
    def skips_errors(self) -> bool:
        """Whether samples that cannot be read are left out."""
        return self._passes.skips_errors

    def begin(self, epoch: int, batch_size: int, *, start: Any = None, **options: Any) -> EpochPass:
        begin = PassStart(epoch) if start is None else PassStart(epoch, start.fingerprints[0], start.samples)
        self.settle({"tail": self.tail, "batch_size": batch_size}, begin)
        skips = Skips() if self.skips_errors else None
        opened = self.open(skips, next_epoch=epoch + 1)
        try:
            orders = epoch_orders(*self.plan(), epoch)
            cursor = epoch_cursor(orders, self.ranks, batch_size, tail=self.tail, start=start, **options)
            return EpochPass.over(cursor, [opened], skips)
        except BaseException:
            opened.end()
            raise

    def settle(self, settings: Mapping[str, Any], begin: PassStart, sharers: int = 1) -> None:
        """Agree with the other ranks of the job on what is read in which order; see `Job.settle`."""
        in_worker = torch.utils.data.get_worker_info() is not None
        self._job.settle(self._source, settings, begin, in_worker=in_worker, sharers=sharers)

    def open(self, skips: Skips | None, next_epoch: int | None = None) -> SourcePass:
        """Open a consumer for a pass over this, or over a mixture of which it is a source; its `end` must follow."""
        passes = replace(self._passes, functions=self._on_samples)
        return open_source(self._source, self._job, passes, skips, next_epoch)

    def first_index(self) -> Index:
        """The index of the first shard, which says what columns there are; None where no shard is there any more."""
        return self._source.first_index()

    def plan(self) -> SourcePlan:
        """What is read, and in which order; before a pass has begun, as far as this process can say by itself."""
        return SourcePlan(self._source.list_shards(), self._job.order)

    def adopt(self, position: Position) -> None:
        assert position.mixture is None, "it was read from a state of one data set"
        self.adopt_order(position.orders[0])

    def adopt_order(self, saved: OrderOptions) -> None:
        """Go on in a saved order, where it was left to us."""
        self._job.adopt(saved)

    def read_position(self, state: Mapping[str, Any]) -> Position:
        return Position.from_state(state)

    def close(self) -> None:
        self._job.close()
        self._source.close()

    @property
    def _source(self) -> Source:
        """The data as this process sees it; after a fork the child makes its own."""
        if self._source_here.is_inherited:
            self._source_here = Source(self._data, self._source_here.manifest)
        return self._source_here

    def _starts(self) -> npt.NDArray[np.int64]:
        """The number of each shard's first sample, and last that of all. TypeError while they are not known."""
        starts = self._lookup.starts()
        if starts is None:
            raise TypeError(_UNKNOWN_COUNTS)
        return starts

    def _check_unfiltered(self) -> None:
        if any(isinstance(function, Filter) for function in self._on_samples):
            raise ConfigError(
                "a sample's number counts those that filter() leaves out, too; read by number from the data set before "
                "filter()"
            )

    def _make(self, numbers: Any, starts: npt.NDArray[np.int64], gives: Literal["batch", "samples"]) -> Any:
        self._check_unfiltered()
        on_batches = self._on_batches if gives == "batch" else ()
        finish = Finish(BatchBuilder((SourceBuilder(self.columns, self._on_samples),)), gives, on_batches=on_batches)
        return self._lookup.make(np.asarray(numbers, np.int64), starts, self.next_epoch(), finish)

    @property
    def _lookup(self) -> Lookup:
        """What finds samples by number, in this process."""
        lookup, source = self._lookup_here, self._source
        if lookup is None or lookup.source is not source:
            builder = SourceBuilder(self.columns, self._on_samples)
            lookup = self._lookup_here = Lookup(source, builder, self._job.order.seed)
        return lookup

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs."""
        return {**super().__getstate__(), "_source_here": self._source_here.manifest, "_lookup_here": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._source_here = Source(self._data, state["_source_here"])


def _requested_order(
    shuffle: bool | str | None, seed: int, shuffle_window: int | str, partitions: int | None
) -> RequestedOrder:
    ways: dict[bool | str | None, Shuffle] = {
        None: "none",
        False: "none",
        True: "window",
        "window": "window",
        "shards": "shards",
        "global": "global",
    }
    if not isinstance(shuffle, bool | str | None) or shuffle not in ways:
        raise ConfigError(f'shuffle={shuffle!r} must be False, True, "window", "shards" or "global"')
    window_bytes = None if shuffle_window == "auto" else parse_bytes(shuffle_window, "shuffle_window")
    if window_bytes is not None and window_bytes < 1:
        raise ConfigError(f'shuffle_window={shuffle_window!r} must be at least 1 byte, or "auto"')
    count = None if partitions is None else checked_count(partitions, "partitions")
    return RequestedOrder(checked_seed(seed), ways[shuffle], window_bytes, count)


Numbers = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor


class IndexedDataset(torch.utils.data.Dataset[Any]):
    """The samples of a `StreamingDataset` by number; see `StreamingDataset.indexed`."""

    def __init__(self, dataset: StreamingDataset) -> None:
        self.dataset = dataset
        self._count = dataset.sample_count

    def __len__(self) -> int:
        """All samples: which of them a rank reads is the sampler's business."""
        return self._count

    def __getitem__(self, number: SupportsIndex | Numbers) -> Any:
        """A sample; for several numbers a batch, as `StreamingDataset.take` makes it."""
        if isinstance(number, SupportsIndex) and not _is_list(number):
            return self.dataset[operator.index(number)]
        return self.dataset.take(number)  # type: ignore[arg-type]

    def __getitems__(self, numbers: Numbers) -> list[Any]:
        """The samples with these numbers, read together; torch's loader asks for a batch in this way."""
        return self.dataset.samples(numbers)

    def set_epoch(self, epoch: int) -> None:
        """What is random in decoding is that of this epoch from now on, in worker processes too."""
        self.dataset.set_epoch(epoch)

    def close(self) -> None:
        """Disconnect from the cache; it can still be used, and connects again."""
        self.dataset.close()


def _is_list(number: Any) -> bool:
    """An array or tensor of one dimension has `__index__` too."""
    return getattr(number, "ndim", 0) > 0
