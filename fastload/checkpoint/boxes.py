"""Pieces of tensors as boxes: where one begins in each dimension, and how far it goes.

A rank's piece is one box of its tensor, whatever mesh it comes from. Its elements lie in C order, so that a cut at the
outermost dimension leaves parts that are contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# A table of the cells between all borders of a tensor's pieces: 32 MB. Meshes have as many cells as pieces.
_CELLS_MAX = 1 << 22

Int64s = np.ndarray[tuple[int, int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Box:
    """`offsets` and `sizes` have one number a dimension; a scalar has none of them, and one element."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def __contains__(self, inner: Box) -> bool:
        return all(
            start <= at and at + size <= start + whole
            for at, size, start, whole in zip(inner.offsets, inner.sizes, self.offsets, self.sizes, strict=True)
        )

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it lies in an array that holds `outer`."""
        return tuple(
            slice(start - origin, start - origin + size)
            for start, size, origin in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def overlap(one: Box, other: Box) -> Box | None:
    """What both hold; None where that is no element."""
    starts = tuple(map(max, one.offsets, other.offsets))
    ends = [min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def cut(box: Box, elements_max: int) -> Iterator[Box]:
    """Boxes of at most so many elements that together are `box`, each contiguous in it, one after the other."""
    assert elements_max > 0
    if box.elements <= elements_max:
        yield box
        return
    axis = next(axis for axis, size in enumerate(box.sizes) if size > 1)
    size, row = box.sizes[axis], math.prod(box.sizes[axis + 1 :])
    step = max(1, elements_max // row)
    for start in range(0, size, step):
        offsets = (*box.offsets[:axis], box.offsets[axis] + start, *box.offsets[axis + 1 :])
        sizes = (*box.sizes[:axis], min(step, size - start), *box.sizes[axis + 1 :])
        yield from cut(Box(offsets, sizes), elements_max)


def why_not_tiled(shape: tuple[int, ...], offsets: Int64s, sizes: Int64s) -> str:
    """What keeps boxes (a row each) from covering a tensor of this shape, each element once; "" where they do.

    Boxes without elements are left out. Meant for what was read: any numbers are taken.
    """
    if ((offsets < 0) | (sizes < 0)).any() or (offsets > np.array(shape, np.int64) - sizes).any():
        return "a piece reaches beyond it"
    full = (sizes > 0).all(axis=1)
    offsets, sizes = offsets[full], sizes[full]
    elements = math.prod(shape)
    # Python's integers, since a hostile sum must not wrap around.
    held = sum(map(math.prod, sizes.tolist()))
    if held != elements:
        return f"its pieces hold {held} of its {elements} elements"
    if len(offsets) <= 1:
        return ""
    borders = [
        np.unique(np.concatenate((column, column + size))) for column, size in zip(offsets.T, sizes.T, strict=True)
    ]
    counts = [len(each) for each in borders]
    if math.prod(counts) > _CELLS_MAX:
        return f"its {len(offsets)} pieces lie too irregularly to be checked"
    firsts = [np.searchsorted(each, column) for each, column in zip(borders, offsets.T, strict=True)]
    lasts = [np.searchsorted(each, column) for each, column in zip(borders, (offsets + sizes).T, strict=True)]
    # Each box adds one to its cells: by what begins and what ends at its corners, summed up along each axis.
    table = np.zeros(counts, np.int32)
    for corner in itertools.product((0, 1), repeat=len(shape)):
        at = tuple(last if end else first for end, first, last in zip(corner, firsts, lasts, strict=True))
        np.add.at(table, at, (-1) ** sum(corner))
    for axis in range(len(shape)):
        np.cumsum(table, axis=axis, out=table)
    # They hold as many elements as there are, so that where none is held twice none is left out.
    return "two of its pieces overlap" if (table > 1).any() else ""
