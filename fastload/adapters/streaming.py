"""MosaicML's streaming, over fastload: `from fastload.adapters.streaming import StreamingDataset, StreamingDataLoader`.

Classes and arguments are called as there. What an argument asks for is done where fastload has it; where it does so by
itself, or not at all, a warning says so once. Samples and batches are dicts of the columns alone, as there.

What differs: the order is fastload's (the same at every number of ranks, nodes and workers, whatever
`num_canonical_nodes` and `shuffle_algo`), data is cached in fastload's cache rather than in `local`, and a batch of
columns of bytes is a `fastload.Ragged`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastload import callers
from fastload.adapters.columnar import ColumnarDataset, ColumnarLoader
from fastload.client.cache import AnyCache
from fastload.dataset import StreamingDataset as _Streamed
from fastload.errors import ConfigError
from fastload.mixture import Mixture

__all__ = ["Stream", "StreamingDataLoader", "StreamingDataset"]

_BY_ITSELF = "fastload does that by itself"
_ORDER = "fastload's order does not depend on it"
# Arguments that have no part in fastload, and why.
_IGNORED = {
    "download_retry": f"{_BY_ITSELF}; storage_options={{'deadline_s': ...}} bounds it",
    "download_timeout": f"{_BY_ITSELF}; storage_options={{'deadline_s': ...}} bounds it",
    "validate_hash": "fastload checks the hashes that index.json has by itself, and what it caches by its own",
    "keep_zip": "fastload keeps what it fetches, as it was fetched",
    "predownload": f"{_BY_ITSELF}, as far ahead as the cache has room",
    "cache_limit": "fastload's cache has limits of its own: fastload.Cache(disk_bytes=...)",
    "partition_algo": _ORDER,
    "num_canonical_nodes": _ORDER,
    "shuffle_algo": "fastload shuffles in windows; give shuffle_window= to fastload.StreamingDataset for others",
    "shuffle_block_size": "fastload shuffles in windows of its own size",
    "sampling_method": "streams are drawn from by weight",
    "sampling_granularity": "streams are drawn from sample by sample",
    "batching_method": "a batch is drawn from all streams",
    "stream_name": "nothing needs it",
    "stream_config": "nothing needs it",
}


@dataclass
class Stream:
    """A part of a data set: `remote` (or, if all is on this machine, `local`) with its `split`, and how much of it is
    read: `proportion`, `repeat` and `choose` exclude each other, as in streaming; of the latter two only 1 and None are
    supported.
    """

    remote: str | None = None
    local: str | None = None
    split: str | None = None
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None

    @property
    def url(self) -> str:
        """The folder with its shards."""
        place = self.remote if self.remote is not None else self.local
        if not place:
            raise ConfigError("a stream needs remote= (or local=, for shards on this machine)")
        return "/".join([os.fspath(place).rstrip("/"), *([self.split] if self.split else [])]) + "/"


class StreamingDataset(ColumnarDataset):
    """Samples of MDS shards, as streaming's class of that name gives them: dicts of the columns.

    Subclasses may override `__getitem__`; it is called for each sample, in iteration too, with a number that
    `super().__getitem__` takes. In iteration that number counts the samples as they come.

    Beside streaming's arguments, `cache` and `storage_options` are those of `fastload.StreamingDataset`.
    """

    def __init__(
        self,
        *,
        streams: Sequence[Stream] | None = None,
        remote: str | None = None,
        local: str | None = None,
        split: str | None = None,
        epoch_size: int | str | None = None,
        shuffle: bool = False,
        shuffle_seed: int = 9176,
        batch_size: int | None = None,
        replication: int | None = None,
        allow_unsafe_types: bool = False,
        cache: AnyCache = None,
        storage_options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """ConfigError for arguments that cannot be used together, and those that fastload has nothing for."""
        if epoch_size is not None:
            raise ConfigError(f"epoch_size={epoch_size!r}: fastload reads each sample once an epoch; leave it out")
        unknown = sorted(set(others) - set(_IGNORED))
        if unknown:
            raise TypeError(f"StreamingDataset() got an unexpected keyword argument {unknown[0]!r}")
        for name, value in others.items():
            if value is not None:
                callers.warn(f"{name}={value!r} is not used: {_IGNORED[name]}")
        if streams is not None and (remote is not None or local is not None):
            raise ConfigError("give streams=, or remote= and local=, and not both")
        parts = list(streams) if streams is not None else [Stream(remote, local, split)]
        if any(part.remote is not None and part.local is not None for part in parts):
            callers.warn(
                "local= is not used: fastload keeps what it fetches in its cache, which all jobs share; cache="
            )
        options: dict[str, Any] = {
            "cache": cache,
            "shuffle": shuffle,
            "seed": shuffle_seed,
            "format": "mds",
            "storage_options": storage_options,
            "allow_pickle": allow_unsafe_types,
            "replicas": replication or 1,
        }
        super().__init__(_read(parts, options))
        self.batch_size = batch_size

    @property
    def size(self) -> int:
        """How many samples an epoch has, over all ranks."""
        return int(self._data.sample_count)

    @property
    def num_samples(self) -> int:
        """The same."""
        return self.size


class StreamingDataLoader(ColumnarLoader):
    """A `fastload.DataLoader` over a `StreamingDataset` of this module: batches of the columns alone, and a
    `state_dict()` that is exact to the sample. Over any other data set it is `fastload.DataLoader`.
    """


def _read(parts: Sequence[Stream], options: dict[str, Any]) -> Any:
    """The data set, or the mixture, that these streams are."""
    if not parts:
        raise ConfigError("streams=[]: name at least one")
    for part in parts:
        if part.repeat not in (None, 1) or part.choose is not None:
            raise ConfigError(
                f"{part}: fastload has no repeat= and choose=; give all streams a proportion=, by which they are drawn"
            )
    proportions = [part.proportion for part in parts]
    if all(proportion is None for proportion in proportions):
        return _Streamed([part.url for part in parts], **options)
    weights = [proportion for proportion in proportions if proportion is not None]
    if len(weights) < len(parts):
        raise ConfigError("give all streams a proportion=, or none of them")
    sources = [(_Streamed(part.url, **options), weight) for part, weight in zip(parts, weights, strict=True)]
    return Mixture(sources, seed=options["seed"])
