"""Tensors out of a checkpoint, one after the other, in the order in which they are stored, in little memory.

What comes next is requested ahead; small tensors are asked for together, as they lie side by side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future

import numpy as np

from fastload.checkpoint.attempts import Place
from fastload.checkpoint.reading import READ_BYTES, Copies, Wanted, requests
from fastload.checkpoint.records import Contents
from fastload.checkpoint.records import Place as PieceAt
from fastload.checkpoint.segments import DTYPES

_GROUP_BYTES = 8 * READ_BYTES

# A tensor's bytes: its shape, and behind that those of an element.
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def size_of(there: Contents, name: str) -> int:
    """In bytes."""
    dtype, shape = there.tensors[name]
    return math.prod(shape) * DTYPES[dtype]


def stored_order(there: Contents, names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: min((each.object.name, each.offset) for each in there.places(name)))


def wanted(piece: PieceAt, array: Bytes, *, is_shared: bool = False) -> Wanted:
    """A piece of a tensor: straight to its place, where that is contiguous; else there by way of memory of its own.
    `is_shared` as in `Wanted`.
    """
    view = array[
        tuple(slice(start, start + size) for start, size in zip(piece.box.offsets, piece.box.sizes, strict=True))
    ]
    if view.flags.c_contiguous:
        out = memoryview(view.reshape(-1))  # type: ignore[arg-type]
        return Wanted(piece.object, piece.offset, out, lambda: None, is_shared)
    apart = np.empty(view.shape, np.uint8)

    def arrived() -> None:
        view[...] = apart

    return Wanted(piece.object, piece.offset, memoryview(apart.reshape(-1)), arrived)  # type: ignore[arg-type]


def gather(
    place: Place,
    there: Contents,
    names: list[str],
    into: Callable[[str], Bytes],
    ahead_bytes: int,
    copies: Copies | None = None,
) -> Iterator[str]:
    """Fill what `into` gives for each tensor, and say its name when it is whole, in the order of `names`. Of what was
    not taken yet, in flight or whole, there are at most `ahead_bytes`, or one tensor.
    """
    waiting: deque[tuple[list[str], list[Future[None]], int]] = deque()
    groups = _groups(there, names, min(_GROUP_BYTES, ahead_bytes // 4))
    held, group = 0, next(groups, None)
    with requests(place.store, place.folder, copies, sum(size_of(there, name) for name in names)) as begin:
        while group is not None or waiting:
            while group is not None and (not waiting or held + group[1] <= ahead_bytes):
                tensors, size = group
                pieces = [
                    wanted(piece, array)
                    for name, array in [(name, into(name)) for name in tensors]
                    for piece in there.places(name)
                ]
                waiting.append((tensors, begin(pieces), size))
                held, group = held + size, next(groups, None)
            tensors, futures, size = waiting.popleft()
            for future in futures:
                future.result()
            yield from tensors
            held -= size


def _groups(there: Contents, names: list[str], bytes_max: int) -> Iterator[tuple[list[str], int]]:
    group: list[str] = []
    held = 0
    for name in names:
        size = size_of(there, name)
        if group and held + size > bytes_max:
            yield group, held
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group, held
