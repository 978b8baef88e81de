"""One batch from several: the rows of parts, put in the order that a plan gives.

Sample i of the whole is the next one of part `part_of[i]`. A column has to be of one kind in all parts; arrays and
`Ragged` are copied once, lists are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.errors import ConfigError
from fastload.kernels.interleave import interleave_offsets, interleave_rows, interleave_values
from fastload.ragged import Ragged, presence, unchecked
from fastload.transport.slots import Slots

Ints = npt.NDArray[np.int64]
PartOf = npt.NDArray[np.int32]


def rows_of_parts(part_of: PartOf, part_count: int) -> list[Ints]:
    """Where the samples of each part go, rising."""
    by_part = np.argsort(part_of, kind="stable")
    bounds = np.searchsorted(part_of[by_part], np.arange(part_count + 1))
    return [by_part[first:stop] for first, stop in pairwise(bounds)]


def interleave(name: str, parts: Sequence[Any], part_of: PartOf, slots: Slots) -> Any:
    """The values of column `name`. Raises `ConfigError` where parts are not alike."""
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        described = " and ".join(sorted(kinds))
        raise ConfigError(f"column {name!r} is {described} in the sources of a mixture; decode it alike in all of them")
    assert sum(map(len, parts)) == len(part_of), f"{len(part_of)} samples of parts of {list(map(len, parts))}"
    if len(parts) == 1:
        return parts[0]
    part_of = np.ascontiguousarray(part_of)
    if isinstance(parts[0], np.ndarray):
        return _rows(list(map(np.ascontiguousarray, parts)), part_of, slots)
    if isinstance(parts[0], Ragged):
        return _ragged(parts, part_of, slots)
    return _list(parts, part_of)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a tensor of {value.dtype}{list(value.shape[1:])}"
    if isinstance(value, Ragged):
        return f"a Ragged of {value.kind} {value.values.dtype}"
    return "a list"


def _rows(parts: Sequence[npt.NDArray[Any]], part_of: PartOf, slots: Slots) -> npt.NDArray[Any]:
    out = slots.take_array((len(part_of), *parts[0].shape[1:]), parts[0].dtype)
    if out.nbytes:
        row_bytes = out.nbytes // len(out)
        wrong = interleave_rows(part_of, *_places(parts), row_bytes, _scratch(parts), out.reshape(-1).view(np.uint8))
        assert wrong < 0, f"sample {wrong} is not there"
    return out


def _ragged(parts: Sequence[Ragged], part_of: PartOf, slots: Slots) -> Ragged:
    part_offsets, values = [part.offsets for part in parts], [part.values for part in parts]
    offsets = np.empty(len(part_of) + 1, np.int64)
    addresses, counts = _places(part_offsets)[0], np.array([len(part) for part in parts], np.int64)
    wrong = interleave_offsets(part_of, addresses, counts, _scratch(parts), offsets)
    assert wrong < 0, f"sample {wrong} is not there"
    dtype = values[0].dtype
    out = slots.take(int(offsets[-1]) * dtype.itemsize)
    wrong = interleave_values(part_of, *_places(values), offsets, dtype.itemsize, _scratch(parts), out)
    assert wrong < 0, f"sample {wrong} is not there"
    shapes = None
    if any(part.shapes is not None for part in parts):
        shapes = _list([part.shapes or [(length,) for length in part.lengths.tolist()] for part in parts], part_of)
    present = None
    if any(part.present is not None for part in parts):
        present = _rows(list(map(presence, parts)), part_of, slots)
    return unchecked(out.view(dtype), offsets, shapes, parts[0].kind, present)


def _places(arrays: Sequence[npt.NDArray[Any]]) -> tuple[Ints, Ints]:
    """Where arrays, which lie in one piece each, begin, and how many bytes each has."""
    assert all(array.flags.c_contiguous for array in arrays), "arrays with gaps"
    return (
        np.array([array.ctypes.data for array in arrays], np.int64),
        np.array([array.nbytes for array in arrays], np.int64),
    )


def _scratch(parts: Sequence[Any]) -> Ints:
    return np.zeros(len(parts), np.int64)


def _list(parts: Sequence[Sequence[Any]], part_of: PartOf) -> list[Any]:
    items = [iter(part) for part in parts]
    return list(map(next, map(items.__getitem__, part_of.tolist())))
