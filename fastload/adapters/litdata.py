"""Lightning's litdata over fastload: `from fastload.adapters.litdata import StreamingDataset, StreamingDataLoader`.

Classes and arguments are called as there. What an argument asks for is done where fastload has it; where it does so by
itself, or not at all, a warning says so. Samples and batches are the trees that were written: dicts, lists, tuples.

What differs: the order is fastload's (the same at every number of ranks, nodes and workers), data is cached in
fastload's cache rather than in `cache_dir`, and a batch of values of differing lengths is a `fastload.Ragged` or a
list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastload import callers
from fastload.adapters.columnar import Changed, ColumnarDataset, ColumnarLoader
from fastload.client.cache import AnyCache
from fastload.dataset import StreamingDataset as _Streamed
from fastload.errors import ConfigError
from fastload.files import open as open_file
from fastload.formats import tokens
from fastload.formats.litdata import serializers, tree
from fastload.mixture import Mixture

__all__ = ["CombinedStreamingDataset", "StreamingDataLoader", "StreamingDataset"]

_BY_ITSELF = "fastload does that by itself"
# Arguments that have no part in fastload, and why.
_IGNORED = {
    "max_cache_size": "fastload's cache has limits of its own: fastload.Cache(disk_bytes=...)",
    "max_pre_download": f"{_BY_ITSELF}, as far ahead as the cache has room",
    "session_options": "fastload's storage_options= say endpoint and credentials",
    "force_override_state_dict": "a state that does not fit is an error that says why",
    "num_canonical_nodes": "fastload's order does not depend on it",
    "batch_decode": _BY_ITSELF,
    "item_shuffle_window": "fastload shuffles in windows of its own; shuffle_window= of fastload.StreamingDataset",
    "window_direct_io": "fastload reads local files by itself",
    "profile_batches": "FASTLOAD_TRACE=file.json traces a loader",
    "profile_skip_batches": "FASTLOAD_TRACE=file.json traces a loader",
    "profile_dir": "FASTLOAD_TRACE=file.json traces a loader",
    "profile_cprofile": "FASTLOAD_TRACE=file.json traces a loader",
}

_OF_TENSORS = ("tensor", "no_header_tensor", "jpeg", "image", "jpeg_array")
_OF_PYTHON = ("int", "float", "bool", "json")


class StreamingDataset(ColumnarDataset):
    """Samples of LitData's chunks, as litdata's class of that name gives them.

    Subclasses may override `__getitem__`; it is called for each sample, in iteration too, with a number that
    `super().__getitem__` takes. In iteration that number counts the samples as they come.

    Beside litdata's arguments, `cache`, `columns` (leaves by their path; others are left out of samples) and
    `allow_pickle` are those of `fastload.StreamingDataset`, and `storage_options` are fastload's.
    """

    def __init__(
        self,
        input_dir: Any,
        cache_dir: str | os.PathLike[str] | None = None,
        item_loader: Any = None,
        shuffle: bool = False,
        drop_last: bool | None = None,
        seed: int = 42,
        serializers: Mapping[str, Any] | None = None,
        subsample: float = 1.0,
        encryption: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        index_path: str | None = None,
        transform: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None = None,
        *,
        cache: AnyCache = None,
        columns: Sequence[str] | None = None,
        allow_pickle: bool = False,
        **others: Any,
    ) -> None:
        """ConfigError for what fastload cannot read, with what to write instead."""
        # litdata's own class, which need not be installed where there are no tokens.
        block_size = getattr(item_loader, "_block_size", None) if type(item_loader).__name__ == "TokensLoader" else None
        refused = {
            "item_loader": (
                item_loader if block_size is None else None,
                "TokensLoader(block_size=...) is known, and what litdata needs no item_loader to write",
            ),
            "serializers": (serializers, "change samples by transform="),
            "encryption": (encryption, "write the chunks without"),
            "index_path": (index_path, "index.json lies beside the chunks"),
            "subsample": (None if subsample == 1 else subsample, "choose samples with fastload's dataset.filter()"),
        }
        for name, (value, cure) in refused.items():
            if value is not None:
                raise ConfigError(f"{name}={value!r}: fastload does not have that; {cure}")
        if cache_dir is not None:
            callers.warn(
                f"cache_dir={cache_dir!r} is not used: fastload keeps what it fetches in its own cache; cache="
            )
        _ignore("StreamingDataset", others)
        named = getattr(input_dir, "url", None) or getattr(input_dir, "path", None) or input_dir  # litdata's Dir
        url = os.fspath(named).rstrip("/") + "/"
        self._options: dict[str, Any] = {
            "cache": cache,
            "shuffle": shuffle,
            "seed": seed,
            "tail": _tail(drop_last),
            "format": "litdata" if block_size is None else tokens(block_size, overlap=0),
            "storage_options": storage_options,
            "columns": columns,
            "allow_pickle": allow_pickle,
        }
        super().__init__(_Streamed(url, **self._options))
        self._url, self._is_flat = url, False
        self._tree: Any = None if block_size is None else "tokens"  # a sample is all that it has
        self._serializers = {"tokens": "tensor"}  # by column
        self.transform: list[Callable[[Any], Any]] = (
            [] if transform is None else [transform] if callable(transform) else list(transform)
        )

    def with_options(self, **options: Any) -> None:
        """Read with other options of `fastload.StreamingDataset` from now on."""
        self._options |= options
        self._data.close()
        self._data = _Streamed(self._url, **self._options)

    def prepare(self) -> None:
        """Read how samples are made of columns; in a worker process, that it has not to be read again."""
        if self._tree is None:
            url = f"{self._url}index.json"
            with open_file(url, self._options["cache"], storage_options=self._options["storage_options"]) as file:
                data = file.read()
            self._tree, self._serializers = tree(data, url), serializers(data, url)
            self._is_flat = isinstance(self._tree, dict) and all(name == path for name, path in self._tree.items())

    def _made(self, columns: dict[str, Any]) -> Any:
        return columns if self._is_flat else _filled(self._tree, columns)

    def _sample(self, columns: dict[str, Any]) -> Any:
        if self._tree is None:
            self.prepare()
        return super()._sample(columns)

    def _value(self, column: str, value: Any) -> Any:
        kind = self._serializers[column]
        if kind in _OF_TENSORS:
            return [torch.from_numpy(each) for each in value] if kind == "jpeg_array" else torch.from_numpy(value)
        if kind in _OF_PYTHON and isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        return value

    def _is_stacked(self, column: str) -> bool:
        return self._serializers[column] not in _OF_PYTHON

    def _finished(self, sample: Any) -> Any:
        for function in self.transform:
            sample = function(sample)
        return sample

    @property
    def _is_changed(self) -> bool:
        return bool(self.transform) or super()._is_changed


class CombinedStreamingDataset(ColumnarDataset):
    """Samples of several `StreamingDataset`s, each as often as its weight says; by default as often as it has samples.

    A data set that ends sooner than another begins again, in another order, where `iterate_over_all`; the epoch is over
    when each has ended. Without, it is over when the first would begin again.
    """

    def __init__(
        self,
        datasets: Sequence[StreamingDataset],
        seed: int = 42,
        weights: Sequence[float] | None = None,
        iterate_over_all: bool = True,
        batching_method: str = "stratified",
        **others: Any,
    ) -> None:
        """ConfigError for data sets that cannot be mixed."""
        if batching_method != "stratified":
            raise ConfigError(
                f"batching_method={batching_method!r}: fastload draws a batch from all data sets; leave it out"
            )
        _ignore("CombinedStreamingDataset", others)
        if weights is None:
            weights = [float(dataset._data.sample_count) for dataset in datasets]
            iterate_over_all = False  # they end together
        for dataset in datasets:
            dataset.prepare()
        sources: list[Any] = [
            (dataset._data.map(Changed(dataset)), weight) for dataset, weight in zip(datasets, weights, strict=True)
        ]
        super().__init__(Mixture(sources, seed=seed, stop="all" if iterate_over_all else "first"))

    @property
    def _is_changed(self) -> bool:
        return False  # the sources' samples are what they are to be

    def _made(self, columns: Any) -> Any:
        return columns


class StreamingDataLoader(ColumnarLoader):
    """A `fastload.DataLoader` over the data sets of this module: batches of the trees that were written, and a
    `state_dict()` that is exact to the sample.
    """

    def __init__(
        self,
        dataset: Any,
        *args: Any,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        profile_batches: Any = None,
        profile_skip_batches: Any = None,
        profile_dir: Any = None,
        profile_cprofile: Any = None,
        **options: Any,
    ) -> None:
        """torch's arguments. `shuffle` and `drop_last` count more than the data set's."""
        profiling = {
            "profile_batches": profile_batches or None,
            "profile_skip_batches": profile_skip_batches or None,
            "profile_dir": profile_dir,
            "profile_cprofile": profile_cprofile or None,
        }
        _ignore("StreamingDataLoader", profiling)
        if isinstance(dataset, StreamingDataset):
            changed = {} if shuffle is None else {"shuffle": shuffle}
            if drop_last is not None:
                changed["tail"] = _tail(drop_last)  # type: ignore[assignment]
            if changed:
                dataset.with_options(**changed)
            dataset.prepare()
        elif shuffle is not None:
            options["shuffle"] = shuffle
        super().__init__(dataset, *args, **options)


def _filled(node: Any, columns: Mapping[str, Any]) -> Any:
    if isinstance(node, str):
        return columns[node]
    if isinstance(node, dict):
        return {key: _filled(child, columns) for key, child in node.items() if _has_any(child, columns)}
    return type(node)(_filled(child, columns) for child in node if _has_any(child, columns))


def _has_any(node: Any, columns: Mapping[str, Any]) -> bool:
    """Whether a leaf of it is read, or it is empty as it was written."""
    if isinstance(node, str):
        return node in columns
    children = node.values() if isinstance(node, dict) else node
    return not node or any(_has_any(child, columns) for child in children)


def _tail(drop_last: bool | None) -> str:
    """litdata drops what ranks cannot share unless it is told otherwise."""
    return "drop" if drop_last is None or drop_last else "uneven"


def _ignore(where: str, others: Mapping[str, Any]) -> None:
    """Warn of arguments that are not used; TypeError for those that there are none."""
    unknown = sorted(set(others) - set(_IGNORED))
    if unknown:
        raise TypeError(f"{where}() got an unexpected keyword argument {unknown[0]!r}")
    for name, value in others.items():
        if value is not None:
            callers.warn(f"{name}={value!r} is not used: {_IGNORED[name]}")
