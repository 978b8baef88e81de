"""One batch from several: the rows of parts, put in the order that a plan gives.

Sample i of the whole is the next one of part `part_of[i]`. A column has to be of one kind in all parts; tensors and
`Ragged` are copied once, lists are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload.errors import ConfigError
from fastload.kernels.gather import gather
from fastload.ragged import Ragged
from fastload.transport.slots import Slots

Ints = npt.NDArray[np.int64]


def rows_of_parts(part_of: npt.NDArray[np.int32], part_count: int) -> list[Ints]:
    """Where the samples of each part go, rising."""
    by_part = np.argsort(part_of, kind="stable")
    bounds = np.searchsorted(part_of[by_part], np.arange(part_count + 1))
    return [by_part[first:stop] for first, stop in pairwise(bounds)]


def interleave(name: str, parts: Sequence[Any], rows: Sequence[Ints], slots: Slots) -> Any:
    """The values of column `name`. Raises `ConfigError` where parts are not alike."""
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        described = " and ".join(sorted(kinds))
        raise ConfigError(f"column {name!r} is {described} in the sources of a mixture; decode it alike in all of them")
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return _tensors([part.numpy() for part in parts], rows, slots)
    if isinstance(parts[0], Ragged):
        return _ragged(parts, rows, slots)
    return _list(parts, rows)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}{list(value.shape[1:])}"
    if isinstance(value, Ragged):
        return f"a Ragged of {value.kind} {value.values.dtype}"
    return "a list"


def _tensors(parts: Sequence[npt.NDArray[Any]], rows: Sequence[Ints], slots: Slots) -> torch.Tensor:
    out = slots.take_array((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for part, places in zip(parts, rows, strict=True):
        out[places] = part
    return torch.from_numpy(out)


def _ragged(parts: Sequence[Ragged], rows: Sequence[Ints], slots: Slots) -> Ragged:
    lengths = np.empty(sum(map(len, parts)), np.int64)
    for part, places in zip(parts, rows, strict=True):
        lengths[places] = part.lengths
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    dtype = parts[0].values.dtype
    out = slots.take(int(offsets[-1]) * dtype.itemsize)
    for part, places in zip(parts, rows, strict=True):
        _copy(part, offsets[places] * dtype.itemsize, out)
    shapes = None
    if any(part.shapes is not None for part in parts):
        shapes = _list([part.shapes or [(length,) for length in part.lengths.tolist()] for part in parts], rows)
    return Ragged(out.view(dtype), offsets, shapes, parts[0].kind)


def _copy(part: Ragged, out_offsets: Ints, out: npt.NDArray[np.uint8]) -> None:
    """Its items to where they go in `out`: a batch that lies in one place is one chunk to the kernel."""
    size = part.values.dtype.itemsize
    values = np.ascontiguousarray(part.values).view(np.uint8)
    chunk_bytes, first_chunk = max(1, len(values)), np.zeros(len(part), np.int64)
    starts, sizes = part.offsets[:-1] * size, part.lengths * size
    copied = gather(values, np.zeros(1, np.int64), chunk_bytes, first_chunk, starts, sizes, out_offsets, out)
    assert copied == sizes.sum(), f"copied {copied} of {sizes.sum()} bytes"


def _list(parts: Sequence[Sequence[Any]], rows: Sequence[Ints]) -> list[Any]:
    out: list[Any] = [None] * sum(map(len, parts))
    for part, places in zip(parts, rows, strict=True):
        for place, item in zip(places.tolist(), part, strict=True):
            out[place] = item
    return out
