"""Random access to a `StreamingDataset`, as a map-style data set: for samplers.

torch takes samplers for map-style data sets only, and a `StreamingDataset` is an iterable one. `IndexedDataset` is the
same data behind `__getitem__`; it pickles, survives a fork, and may be read by threads.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch.utils.data

if TYPE_CHECKING:
    from fastload.dataset import StreamingDataset

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


def checked_number(number: Any, count: int) -> int:
    """A sample's number, counted from 0. TypeError for what is no number, IndexError outside of the data."""
    try:
        at = operator.index(number)
    except TypeError:
        raise TypeError(f"dataset[{number!r}]: give one number; for several samples use dataset.take([...])") from None
    return int(checked_numbers([at], count)[0])


def checked_numbers(numbers: Any, count: int) -> npt.NDArray[np.int64]:
    """Numbers of samples, int64[n], counted from 0; negative ones count from the end."""
    found = np.asarray(numbers)
    if found.size == 0:
        found = found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TypeError(
            f"samples are taken by a list of whole numbers, not by {type(numbers).__name__} {numbers!r:.80}"
        )
    wrong = np.flatnonzero((found < -count) | (found >= count))
    if len(wrong):
        raise IndexError(f"sample {found[wrong[0]]} of a data set of {count} samples")
    found = found.astype(np.int64)
    return np.where(found < 0, found + count, found)


def _is_list(number: Any) -> bool:
    """An array or tensor of one dimension has `__index__` too."""
    return getattr(number, "ndim", 0) > 0
