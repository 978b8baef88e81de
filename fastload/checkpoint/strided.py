"""Elements of a tensor in an object, and how a box of them comes to where it belongs.

A box is seldom one run of bytes: an eighth of the columns is as many runs as there are rows. What is requested goes
from its first element to its last, but where what lies between two rows costs more than a request of its own; what was
not asked for is left out in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastload.checkpoint.reading import GAP_BYTES, Wanted
from fastload.checkpoint.records import Object
from fastload.checkpoint.values import bytes_of

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Strided:
    """`start`: where the first element lies in the object, in bytes. `strides` are in elements, as torch's are."""

    object: Object
    start: int
    dtype: torch.dtype
    strides: Numbers

    def wanted(self, offsets: Sequence[int], target: torch.Tensor) -> Iterator[Wanted]:
        """What fills `target` with the box of its shape that begins at `offsets`."""
        width = self.dtype.itemsize
        first = sum(offset * stride for offset, stride in zip(offsets, self.strides, strict=True))
        if target.numel() == 0:
            return
        for lead in runs(self.strides, tuple(target.shape), GAP_BYTES // width):
            at = first + sum(index * stride for index, stride in zip(lead, self.strides, strict=False))
            part, strides = target[lead], self.strides[len(lead) :]
            yield _wanted(self.object, self.start + at * width, part, self.dtype, strides)


def runs(strides: Numbers, sizes: Numbers, gap: int) -> list[Numbers]:
    """Indices in the first dimensions, of as many of them as have more than `gap` elements between what one index
    needs and what the next one does: what lies at each is to be requested by itself.
    """
    split = 0
    if not _in_order(strides, sizes):
        return [()]
    for axis, size in enumerate(sizes):
        if size > 1 and strides[axis] - extent(strides[axis + 1 :], sizes[axis + 1 :]) > gap:
            split = axis + 1
    return list(itertools.product(*map(range, sizes[:split])))


def extent(strides: Numbers, sizes: Numbers) -> int:
    """How many elements lie from the first one of a box to its last one."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))


def _wanted(source: Object, start: int, target: torch.Tensor, dtype: torch.dtype, strides: Numbers) -> Wanted:
    """Straight to its place where that is possible; else by way of a buffer."""
    elements = extent(strides, tuple(target.shape))
    is_dense = elements == target.numel() and _in_order(strides, tuple(target.shape))
    is_plain = type(target) is torch.Tensor and target.is_cpu and not target.is_conj() and not target.is_neg()
    if is_dense and is_plain and target.dtype == dtype and target.is_contiguous():
        return Wanted(source, start, bytes_of(target), lambda: None)
    apart = torch.empty(elements, dtype=dtype)

    def arrived() -> None:
        target.copy_(apart.as_strided(target.shape, strides))

    return Wanted(source, start, bytes_of(apart), arrived)


def _in_order(strides: Numbers, sizes: Numbers) -> bool:
    """Whether what comes first by its indices comes first in the object."""
    some = [stride for stride, size in zip(strides, sizes, strict=True) if size > 1]
    return some == sorted(some, reverse=True)


def dense(sizes: Numbers) -> Numbers:
    """The strides of a tensor in C order."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
