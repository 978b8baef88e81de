"""What the adapters of streaming and of LitData share: data sets of columns whose subclasses may override
`__getitem__`, and the loader over them.

There, `__getitem__` is called for each sample, in iteration too. Here samples come out of fastload's data set in its
order, and a subclass's `__getitem__` is called with a number that `super().__getitem__` exchanges for the sample that
has just come. Where nothing is overridden, batches are made column by column, without Python for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data

from fastload.dataset import StreamingDataset
from fastload.errors import ConfigError
from fastload.loader import DataLoader
from fastload.mixture import Mixture
from fastload.ragged import Ragged

_NAMES = ("__key__", "__url__", "__source__")


class ColumnarDataset(torch.utils.data.IterableDataset[Any]):
    """A data set of another library's over one of fastload's."""

    def __init__(self, data: StreamingDataset[Any] | Mixture[Any]) -> None:
        super().__init__()
        self._data = data
        self.batch_size: int | None = None

    def _made(self, columns: dict[str, Any]) -> Any:
        """What the library gives of a sample, or of a batch, with these columns."""
        return columns

    def _value(self, column: str, value: Any) -> Any:
        """A value of a sample as the library's own reader gives it."""
        return value

    def _is_stacked(self, column: str) -> bool:
        """Whether a batch of arrays of this column is a tensor where they have one shape."""
        return True

    def _sample(self, columns: Any) -> Any:
        found = _columns_of(columns)
        if isinstance(found, dict):
            found = {name: self._value(name, value) for name, value in found.items()}
        return self._made(found)

    def _batch(self, columns: Any) -> Any:
        found = _columns_of(columns)
        if isinstance(found, dict):
            found = {name: _stacked(value) if self._is_stacked(name) else value for name, value in found.items()}
        return self._made(found)

    def _finished(self, sample: Any) -> Any:
        """A sample as `__getitem__` gives it, which is not called where nothing is overridden."""
        return sample

    @property
    def shuffle(self) -> bool:
        """Whether it shuffles."""
        sources = self._data.sources if isinstance(self._data, Mixture) else [self._data]
        return any(bool(source.shuffle) for source in sources)

    @property
    def _is_changed(self) -> bool:
        """Whether samples go through Python of the user's."""
        return type(self).__getitem__ is not ColumnarDataset.__getitem__

    def __len__(self) -> int:
        """How many samples an epoch has for this rank."""
        return len(self._data)

    def __getitem__(self, at: Any) -> Any:
        """The sample of that number, over all shards; or those of a slice or list."""
        if isinstance(at, _Here):
            return self._finished(at.sample)
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(self._data.sample_count))]
        if isinstance(self._data, Mixture):
            raise ConfigError("a data set that mixes several has no samples by number")
        if isinstance(at, Sequence) and not isinstance(at, str | bytes):
            return [self[number] for number in at]
        return self._finished(self._sample(self._data[at]))

    def __iter__(self) -> Iterator[Any]:
        """An epoch of this rank, or worker."""
        for number, sample in enumerate(self._data):
            yield self[_Here(number, self._sample(sample))]

    def state_dict(self, *position: Any, **more: Any) -> dict[str, Any]:
        """Use the loader's: `StreamingDataLoader.state_dict()`, which knows what was delivered."""
        raise ConfigError(
            "a data set does not know what its loader has delivered; call state_dict() of the StreamingDataLoader"
        )

    def close(self) -> None:
        """Disconnect from the cache; it can still be used, and connects again."""
        self._data.close()


class ColumnarLoader(DataLoader[Any]):
    """A `fastload.DataLoader` over a `ColumnarDataset`: batches as the library has them, and a `state_dict()` that is
    exact to the sample. Over any other data set it is `fastload.DataLoader`.
    """

    def __init__(self, dataset: Any, *args: Any, **options: Any) -> None:
        """The arguments of torch's `DataLoader`; `batch_size` is the data set's where none is given."""
        self._source = dataset if isinstance(dataset, ColumnarDataset) else None
        if self._source is None:
            super().__init__(dataset, *args, **options)
            return
        if not args and "batch_size" not in options:
            options["batch_size"] = self._source.batch_size or 1
        shuffle = options.pop("shuffle", None)
        if shuffle is not None and bool(shuffle) != self._source.shuffle:
            raise ConfigError(
                f"shuffle={shuffle!r} of the loader: the data set shuffles, or not; give shuffle={shuffle!r} to "
                f"{type(self._source).__name__}"
            )
        self._maps = self._source._is_changed or options.get("collate_fn") is not None
        read: Any = self._source._data
        super().__init__(read.map(Changed(self._source)) if self._maps else read, *args, **options)

    def __iter__(self) -> Any:
        batches, source = super().__iter__(), self._source
        if source is None or self._maps:
            return batches
        return (source._batch(batch) for batch in batches)


class _Here(int):
    """The number of a sample that has just been read."""

    sample: Any

    def __new__(cls, number: int, sample: Any) -> _Here:
        made = super().__new__(cls, number)
        made.sample = sample
        return made


class Changed:
    """A function on samples: what `__getitem__` of the data set, which may be the user's, makes of them."""

    def __init__(self, dataset: ColumnarDataset) -> None:
        self._dataset = dataset
        self._count = -1

    def __call__(self, sample: Any) -> Any:
        self._count += 1
        return self._dataset[_Here(self._count, self._dataset._sample(sample))]


def _stacked(values: Any) -> Any:
    """Arrays of one shape and dtype as the tensor that torch's default_collate makes of them; all else as it is."""
    if isinstance(values, Ragged) and values.kind == "array":
        shapes = set(values.lengths.tolist() if values.shapes is None else values.shapes)
        return torch.from_numpy(np.asarray(values)) if len(shapes) == 1 and values.present is None else values
    if isinstance(values, list) and all(isinstance(value, np.ndarray) for value in values):
        alike = {(value.shape, value.dtype) for value in values}
        return torch.from_numpy(np.stack(values)) if len(alike) == 1 else values
    return values


def _columns_of(sample: Any) -> Any:
    if not isinstance(sample, dict):
        return sample
    return {name: value for name, value in sample.items() if name not in _NAMES}
