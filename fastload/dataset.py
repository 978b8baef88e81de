"""StreamingDataset: sharded data in object storage, as a torch `IterableDataset`.

The data set is what the user said, the manifest once it is listed, and the count of epochs. It opens sessions with
the cache service when somebody iterates, never before, so that it can be made in one process and used in another:
it pickles, and survives a fork.

Two ways to iterate share everything below: `iter(dataset)` gives samples, one by one (in torch's own DataLoader, in
each of its workers); `fastload.DataLoader` asks for whole batches through `begin`.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.utils.data

from fastload.config import parse_bytes
from fastload.decode import Decoder
from fastload.engine.columns import ColumnSet
from fastload.engine.epochs import EpochCounter
from fastload.engine.iteration import Iteration
from fastload.engine.job import Job
from fastload.engine.passes import OnePass, PassOptions, begin_pass
from fastload.engine.resume import Delivery, IterationState
from fastload.engine.run import InlineRun
from fastload.engine.session import Source
from fastload.errors import ConfigError
from fastload.plan import (
    OrderWish,
    Position,
    Ranks,
    Shuffle,
    Split,
    Tail,
    sample_count_of_rank,
)
from fastload.plan.tail import check_tail
from fastload.service.handle import Cache

# Samples that are gathered together when they are asked for one by one: enough to share the cost of a gather, few
# enough that the first comes at once.
_SAMPLES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the user said, checked."""

    urls: tuple[str, ...]
    storage_options: Mapping[str, Any] | None
    batch_size: int | None
    passes: PassOptions


class StreamingDataset(torch.utils.data.IterableDataset[Any]):
    """Samples from shards in object storage, through the node's cache.

    `urls`: brace patterns (`s3://bucket/train-{000000..001023}.tar`), prefixes that end in "/", plain URLs or local
    paths; one or a list. `cache`: a `fastload.Cache`; without one, `$FASTLOAD_CACHE` or the user's cache directory.

    `shuffle`: False; True or "window", which shuffles shards and then the samples of several shards together;
    "shards", which shuffles shards only; "global", which takes every sample from anywhere, and needs a cache that holds
    the data and its index (see docs/shuffling.md). `shuffle_window` is the size of such a window; "auto" is 512 MiB, or
    less where the cache's arena is below 2 GiB, and what a state says where one is loaded. The order is a function of
    the data, `seed`, the window and the epoch, on every machine.

    `columns`: the columns of a sample, by name (the part of a member's name after the first dot). `decode`: a decoder
    of `fastload.decode` a column; columns without one are raw bytes, and where `decode` is given and `columns` is not,
    only its columns are read. `as_tuple`: tuples in that order, not dicts.

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

    `storage_options`: endpoint and credentials, where the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...)
    does not say them.

    A sample is a dict of column -> value with `__key__` and `__url__`. Raises `ConfigError` here, and when iterated
    the errors of `fastload.errors`.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        cache: Cache | None = None,
        shuffle: bool | Literal["window", "shards", "global"] = False,
        seed: int = 0,
        shuffle_window: int | str = "auto",
        columns: Sequence[str] | None = None,
        decode: Mapping[str, Decoder] | None = None,
        as_tuple: bool = False,
        tail: Tail = "pad",
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        replicas: int = 1,
        partitions: int | None = None,
        batch_size: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError(f"batch_size={batch_size!r} must be an integer of at least 1, or None")
        cache = cache if cache is not None else Cache()
        if not isinstance(cache, Cache):
            raise ConfigError(f"cache={cache!r} must be a fastload.Cache, such as fastload.Cache({str(cache)!r})")
        self._settings = _Settings(
            _checked_urls(urls),
            storage_options,
            batch_size,
            PassOptions(
                cache, ColumnSet.of(columns, decode, as_tuple), check_tail(tail), _checked_on_error(on_error) == "skip"
            ),
        )
        wish = _order_wish(shuffle, seed, shuffle_window, partitions)
        self._job = Job((rank, world_size), _checked_count(replicas, "replicas"), wish, cache.ram_bytes)
        self._epochs = EpochCounter()
        self._resumed: IterationState | None = None  # where the next iteration over samples begins
        self._delivery: Delivery | None = None  # how far the last of them is
        self._source_here = self._new_source(None)

    @property
    def batch_size(self) -> int | None:
        """The batch size that was given."""
        return self._settings.batch_size

    @property
    def tail(self) -> Tail:
        """What is done where ranks do not divide the samples."""
        return self._settings.passes.tail

    @property
    def sample_count(self) -> int:
        """Samples in all shards, over all ranks and without repeats. TypeError while it is not known: see `len`."""
        counts = self._source.sample_counts()
        if counts is None:
            raise TypeError(
                "the number of samples is not known before every shard has been read once; iterate one epoch, or run "
                "`fastload warm` on the same URLs and cache, which indexes them"
            )
        return int(counts.sum())

    def __len__(self) -> int:
        """Samples of this rank, repeats included. TypeError, with the cure, while shards are not indexed."""
        return sample_count_of_rank(self.sample_count, self.ranks, self._settings.passes.tail, self.partitions)

    @property
    def ranks(self) -> Ranks:
        """Which share of the samples is this process's; settled at the first iteration."""
        return self._job.ranks

    @property
    def partitions(self) -> int:
        """Into how many partitions the data is dealt."""
        return self._job.partition_count

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`, from its beginning, also in worker processes that exist already."""
        if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or epoch < 0:
            raise ConfigError(f"epoch={epoch!r} must be an integer from 0 on")
        self._resumed = None
        self._epochs.set(operator.index(epoch))

    def __iter__(self) -> Iterator[Any]:
        """The samples of this rank (in a torch worker: that worker's part of them), and the next epoch each time."""
        info = torch.utils.data.get_worker_info()
        worker = (0, 1) if info is None else (info.id, info.num_workers)
        batch_size = self._settings.batch_size
        split: Split = "batches" if batch_size else "samples"
        resumed = self._resumed
        if resumed is None:
            # With workers they agree on the epoch; without, it is only taken once the pass has begun.
            epoch = self.next_epoch() if info is None else self._epochs.begin(info.seed - info.id, info.num_workers)
            resumed = IterationState(epoch, worker)
        resumed.check_worker(worker)
        start = resumed.position
        current = self.begin(resumed.epoch, batch_size or _SAMPLES_AT_ONCE, start=start, worker=worker, split=split)
        if info is None or self._resumed is not None:
            self._epochs.go_on_after(resumed.epoch)
        self._resumed = None
        run = InlineRun(current.feed, lambda entry: list(current.samples(entry)), current.waits)
        entries = Iteration(run, current.interrupted, current.end)
        self._delivery = Delivery(current.cursor, resumed, worker[1])
        return itertools.chain.from_iterable(self._delivery.iterators(entries))

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration over samples that began last stands; JSON's own types.

        In a worker of torch's loader, where that worker stands: torchdata's `StatefulDataLoader` calls this there. A
        `fastload.DataLoader` has a state of its own, which is the one to save.
        """
        if self._resumed is not None:
            return self._resumed.to_state()
        if self._delivery is not None:
            return self._delivery.state().to_state()
        return IterationState(self.next_epoch()).to_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration over samples where `state` was taken. Raises `StateError` for what is no such state.

        It goes on as the same worker of as many.
        """
        resumed = IterationState.from_state(state)
        if resumed.position is not None:
            self.adopt(resumed.position)
        self._resumed = resumed

    def begin(
        self,
        epoch: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        start: Position | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> OnePass:
        """Prepare one pass over `epoch`, from `start` on; its `end` must follow. For loaders.

        Raises `StateError` where `start` belongs to another run.
        """
        settings, source = self._settings, self._source
        self._job.settle(
            source,
            {"tail": settings.passes.tail, "batch_size": batch_size},
            in_worker=torch.utils.data.get_worker_info() is not None,
        )
        session = source.open()
        try:
            return begin_pass(
                session,
                source,
                self._job,
                settings.passes,
                epoch,
                batch_size,
                drop_last=drop_last,
                start=start,
                worker=worker,
                split=split,
            )
        except BaseException:
            source.give_back(session)
            raise

    def adopt(self, position: Position) -> None:
        """Go on in the order of a saved position, where it was left to us."""
        self._job.adopt(position)

    def begin_epoch(self) -> int:
        """The epoch of an iteration that begins now, for loaders."""
        return self._epochs.begin()

    def next_epoch(self) -> int:
        """The epoch that the next iteration will be."""
        return self._epochs.next()

    def close(self) -> None:
        """Disconnect from the cache. The data set can still be used, and connects again."""
        self._job.close()
        self._source.close()

    @property
    def _source(self) -> Source:
        """The data as this process sees it; after a fork the child makes its own."""
        if self._source_here.is_foreign:
            self._source_here = self._new_source(self._source_here.manifest)
        return self._source_here

    def _new_source(self, manifest: Any) -> Source:
        settings = self._settings
        kernels = settings.passes.columns.kernel_modules()
        return Source(settings.urls, settings.passes.cache, settings.storage_options, kernels, manifest)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs."""
        return {**self.__dict__, "_source_here": self._source_here.manifest, "_delivery": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._source_here = self._new_source(state["_source_here"])


def _checked_urls(urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(urls, str | os.PathLike):
        urls = [urls]
    try:
        found = tuple(os.fspath(url) for url in urls)
    except TypeError as error:
        raise ConfigError(f"urls={urls!r} must be a URL, a path, or a list of these") from error
    if not found or not all(isinstance(url, str) and url for url in found):
        raise ConfigError(f"urls={urls!r} names no shard; give at least one URL, pattern or prefix")
    return found


def _order_wish(shuffle: bool | str, seed: int, shuffle_window: int | str, partitions: int | None) -> OrderWish:
    ways: dict[bool | str, Shuffle] = {
        False: "none",
        True: "window",
        "window": "window",
        "shards": "shards",
        "global": "global",
    }
    if not isinstance(shuffle, bool | str) or shuffle not in ways:
        raise ConfigError(f'shuffle={shuffle!r} must be False, True, "window", "shards" or "global"')
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ConfigError(f"seed={seed!r} must be an integer")
    if partitions is not None:
        partitions = _checked_count(partitions, "partitions")
    window_bytes = None if shuffle_window == "auto" else parse_bytes(shuffle_window, "shuffle_window")
    if window_bytes is not None and window_bytes < 1:
        raise ConfigError(f'shuffle_window={shuffle_window!r} must be at least 1 byte, or "auto"')
    return OrderWish(operator.index(seed), ways[shuffle], window_bytes, partitions)


def _checked_on_error(on_error: str) -> str:
    if on_error not in ("raise", "skip"):
        raise ConfigError(f'on_error={on_error!r} must be "raise" or "skip"')
    return on_error


def _checked_count(value: int, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
    return operator.index(value)
