"""A batch of values of differing length, in two arrays.

A list of a thousand `bytes` is a thousand objects to make, to pin, to pass between processes and to free.
`Ragged` holds the same in one array of all values, end to end, and one of offsets, and still reads as a
sequence: `batch[3]` is item 3. Two kinds:

- `"bytes"`: `values` is uint8, and an item is a `bytes` object (a copy);
- `"array"`: `values` is of any number type, and an item is an array: a view, so writing into it writes into
  the batch. `shapes` gives the items' shapes where they are not one-dimensional.

Where samples may lack a value, `present` says which are there; the others are empty: `b""`, or an array without
elements.

Other libraries get the same memory, not a copy: numpy (`values`, `to_numpy`, `np.asarray` where all items are of one
shape), torch (`to_nested`) and pyarrow (`to_arrow`). What is written through one of them shows in all.

It is deliberately not registered as a `collections.abc.Sequence`: torch and Lightning take any such sequence
apart, item by item, to move it to a device and then rebuild it; what has a `pin_memory` method or is of an
unknown type they keep whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from fastload.errors import ConfigError, DecodeError

__all__ = ["Ragged"]

Item: TypeAlias = "bytes | npt.NDArray[Any]"
Present: TypeAlias = "npt.NDArray[np.bool_] | None"
Kind: TypeAlias = Literal["bytes", "array"]


class Ragged:
    """A sequence of `bytes` or of arrays, held in one array; see the module.

    `values`: 1-D, C-contiguous; `offsets`: int64[n + 1], from 0, never falling, ending at `len(values)`:
    item i is `values[offsets[i]:offsets[i + 1]]`. `present`: bool[n], False for items that are missing, which must be
    empty; None: none can be. Nothing is copied. Raises `ConfigError` where they do not fit together.
    """

    __slots__ = ("_kind", "_offsets", "_present", "_shapes", "_values")

    def __init__(
        self,
        values: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        shapes: Sequence[tuple[int, ...]] | None = None,
        kind: Kind = "bytes",
        present: Present = None,
    ) -> None:
        self._values = values
        self._offsets = np.asarray(offsets, dtype=np.int64)
        self._shapes = None if shapes is None else [tuple(shape) for shape in shapes]
        self._kind = kind
        self._present = None if present is None else np.asarray(present)
        _check(self._values, self._offsets, self._shapes, kind)
        _check_present(self._present, self._offsets)

    @classmethod
    def from_items(cls, items: Sequence[bytes | None] | Sequence[npt.NDArray[Any] | None]) -> Ragged:
        """One batch of these items: all `bytes`, or all arrays of one dtype; None: one that is missing. Copies. No
        items: kind `"bytes"`.
        """
        there: list[Any] = [item for item in items if item is not None]
        text = next((item for item in there if isinstance(item, str)), None)
        if text is not None:
            raise ConfigError(f"item {text!r:.100} is text; encode it: {text[:20]!r}.encode()")
        if len(there) < len(items):
            return cls.from_items(there).spread(np.array([item is not None for item in items], np.bool_))
        if all(isinstance(item, bytes | bytearray | memoryview) for item in there):
            arrays = [np.frombuffer(item, np.uint8) for item in there]
            return cls(_joined(arrays, np.uint8), _offsets_of(arrays))
        arrays = [np.asarray(item) for item in there]
        if len({array.dtype for array in arrays}) > 1:
            raise ConfigError(f"items of dtypes {sorted({str(array.dtype) for array in arrays})}; give one dtype")
        shapes = None if all(array.ndim == 1 for array in arrays) else [array.shape for array in arrays]
        flat = [array.reshape(-1) for array in arrays]
        return cls(_joined(flat, arrays[0].dtype), _offsets_of(flat), shapes, "array")

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The items of all `parts` (at least one; of one kind and dtype) as one batch. Copies."""
        kinds = {(part.kind, str(part.values.dtype)) for part in parts}
        if len(kinds) != 1:
            raise ConfigError(f"cannot join batches of {sorted(kinds)}; they must be of one kind and dtype")
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        shapes = None
        if any(part.shapes is not None for part in parts):
            shapes = [shape for part in parts for shape in part._item_shapes()]
        present = None
        if any(part.present is not None for part in parts):
            present = np.concatenate([presence(part) for part in parts])
        return cls(np.concatenate([part.values for part in parts]), offsets, shapes, parts[0].kind, present)

    def spread(self, present: npt.NDArray[np.bool_]) -> Ragged:
        """The same items, in order, where `present` (bool[n]) is True, and missing ones where it is not. Shares
        `values`. ConfigError where the number of items differs.
        """
        if present.dtype != np.bool_ or np.count_nonzero(present) != len(self):
            raise ConfigError(f"present={present!r} does not say where {len(self)} items go, with as many times True")
        there = present if self._present is None else np.zeros(len(present), np.bool_)
        offsets, shapes = np.zeros(len(present) + 1, np.int64), None
        offsets[1:][present] = self.lengths
        np.cumsum(offsets, out=offsets)
        if self._present is not None:
            there[present] = self._present
        if self._shapes is not None:
            # As the others but for the first length, so that they may still be a nested tensor.
            shapes = [(0, *next(iter(self._shapes), ())[1:])] * len(present)
            for number, shape in zip(np.flatnonzero(present).tolist(), self._shapes, strict=True):
                shapes[number] = shape
        return Ragged(self._values, offsets, shapes, self._kind, there)

    def _item_shapes(self) -> list[tuple[int, ...]]:
        return self._shapes if self._shapes is not None else [(length,) for length in self.lengths.tolist()]

    @property
    def values(self) -> npt.NDArray[Any]:
        """All items end to end, 1-D; the array itself, not a copy."""
        return self._values

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where items start and the last one ends, int64[n + 1], counted in elements of `values`."""
        return self._offsets

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Elements of each item, int64[n]."""
        return np.diff(self._offsets)

    @property
    def shapes(self) -> list[tuple[int, ...]] | None:
        """The items' shapes; None where items are bytes or one-dimensional."""
        return self._shapes

    @property
    def present(self) -> Present:
        """Which items there are, bool[n]: the others are missing, and empty. None where none can be missing."""
        return self._present

    @property
    def kind(self) -> Kind:
        """`"bytes"` or `"array"`."""
        return self._kind

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> Item | Ragged:
        """Item `index`; or, for a slice, a `Ragged`, which shares `values` where the step is 1."""
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        try:
            number = operator.index(index)
        except TypeError as error:
            raise TypeError(
                f"ragged[{index!r:.100}]: give one number or a slice; for several items, [ragged[i] for i in numbers]"
            ) from error
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of a Ragged of {len(self)} items")
        number %= len(self)
        part = self._part(number)
        if self._kind == "bytes":
            return part.tobytes()
        return part if self._shapes is None else part.reshape(self._shapes[number])

    def _part(self, number: int) -> npt.NDArray[Any]:
        return self._values[self._offsets[number] : self._offsets[number + 1]]

    def _slice(self, numbers: range) -> Ragged:
        shapes = None if self._shapes is None else [self._shapes[number] for number in numbers]
        present = None if self._present is None else self._present[list(numbers)]
        if numbers.step == 1:
            stop = max(numbers.start, numbers.stop)
            offsets = self._offsets[numbers.start : stop + 1]
            values = self._values[offsets[0] : offsets[-1]]
            return Ragged(values, offsets - offsets[0], shapes, self._kind, present)
        parts = [self._part(number) for number in numbers]
        return Ragged(_joined(parts, self._values.dtype), _offsets_of(parts), shapes, self._kind, present)

    def __iter__(self) -> Iterator[Item]:
        return (self[number] for number in range(len(self)))

    def __reversed__(self) -> Iterator[Item]:
        return (self[number] for number in range(len(self) - 1, -1, -1))

    def __contains__(self, item: object) -> bool:
        return any(_same(mine, item, there) for mine, there in zip(self, presence(self).tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        """True where `other` (a `Ragged`, list or tuple) has equal items in the same order. In another `Ragged` the
        same must be missing; in a list, what is missing here may be None, or empty as the item is.
        """
        if not isinstance(other, Ragged | list | tuple):
            return NotImplemented
        there = presence(self)
        if isinstance(other, Ragged) and not np.array_equal(there, presence(other)):
            return False
        return len(self) == len(other) and all(map(_same, self, other, there.tolist()))

    __hash__ = None  # type: ignore[assignment]  # mutable, as a list is

    def __repr__(self) -> str:
        what = f"{self._kind}, {self._values.dtype}" if self._kind == "array" else self._kind
        lacking = 0 if self._present is None else len(self) - np.count_nonzero(self._present)
        missing = f", {lacking} missing" if lacking else ""
        return f"Ragged({len(self)} items{missing}, {what}, {self._values.nbytes} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Ragged, (self._values, self._offsets, self._shapes, self._kind, self._present)

    def tolist(self) -> list[Item | None]:
        """The items, as a list; None where one is missing."""
        if self._present is None:
            return list(self)
        return [item if there else None for item, there in zip(self, self._present.tolist(), strict=True)]

    def to_numpy(self) -> list[npt.NDArray[Any]]:
        """An array for each item, over the same memory; of uint8 where items are bytes."""
        shapes = self._item_shapes()
        return [self._part(number).reshape(shape) for number, shape in enumerate(shapes)]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """What `np.asarray` gives: one array (n, *shape) over the same memory. ConfigError where shapes differ."""
        shapes = set(self._item_shapes())
        if len(shapes) > 1:
            raise ConfigError(
                f"items of {len(shapes)} shapes are no one array; use .values and .offsets, to_numpy() or to_nested()"
            )
        whole = self._values.reshape(len(self), *(shapes.pop() if shapes else (0,)))
        return np.array(whole, dtype, copy=copy)

    def to_nested(self) -> Any:
        """A nested tensor of torch (layout `torch.jagged`) over the same memory; of uint8 where items are bytes. What
        is missing is empty there; `present` says where.

        Of several dimensions, items may differ in the first. ConfigError where they do in others, and for a torch that
        is too old to have such tensors.
        """
        import torch

        make = getattr(torch.nested, "nested_tensor_from_jagged", None)
        if make is None:
            raise ConfigError(f"torch {torch.__version__} has no jagged nested tensors; install a later one")
        rest = self._rest()
        rows = self._offsets // max(1, _product(rest)) if rest else self._offsets
        values = self._values.reshape(rows[-1], *rest)
        return make(torch.from_numpy(values), torch.from_numpy(rows))

    def _rest(self) -> tuple[int, ...]:
        """All but the first length of the items' shapes, which must be the same."""
        rests = {shape[1:] for shape in self._shapes or () if shape}
        if len(rests) > 1 or () in (self._shapes or ()) or any(0 in rest for rest in rests):
            raise ConfigError(
                f"items of shapes such as {list(dict.fromkeys(self._shapes or ()))[:3]} are no nested tensor: they may "
                "differ in the first dimension only; use to_numpy()"
            )
        return rests.pop() if rests else ()

    def to_arrow(self, *, text: bool = False) -> Any:
        """A pyarrow array over the same memory: `large_binary`; with `text`, `large_string`, where the items are UTF-8
        (DecodeError where one is not); or a `large_list` of numbers, which must be 1-D. What is missing is null. Only
        booleans, and which items are missing, are copied, since arrow packs them.
        """
        import pyarrow as pa

        if text and self._kind != "bytes":
            raise ConfigError(f"text=True is for items that are bytes, and these are arrays of {self._values.dtype}")
        if self._shapes is not None or self._values.dtype.kind not in "biuf":
            raise ConfigError(
                "items of several dimensions, and of complex numbers, have no arrow type here; use .values, .offsets "
                "and .shapes"
            )
        offsets = pa.py_buffer(self._offsets)
        valid = None
        if self._present is not None:
            valid = pa.py_buffer(np.packbits(self._present, bitorder="little"))
        if self._kind == "array":
            elements = pa.array(self._values)
            kind = pa.large_list(elements.type)
            return pa.Array.from_buffers(kind, len(self), [valid, offsets], children=[elements])
        kind = pa.large_string() if text else pa.large_binary()
        made = pa.Array.from_buffers(kind, len(self), [valid, offsets, pa.py_buffer(self._values)])
        if text:
            try:
                made.validate(full=True)
            except pa.ArrowInvalid as error:
                raise DecodeError(f"{error}; to_arrow() gives the bytes") from error
        return made

    def pin_memory(self, device: Any = None) -> Ragged:
        """A copy in page-locked memory; torch calls this where a loader has `pin_memory=True`."""
        import torch

        def pinned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            tensor = torch.from_numpy(array)
            held: npt.NDArray[Any] = (tensor.pin_memory(device) if device else tensor.pin_memory()).numpy()
            return held

        return Ragged(pinned(self._values), pinned(self._offsets), self._shapes, self._kind, self._present)


def unchecked(
    values: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    shapes: list[tuple[int, ...]] | None = None,
    kind: Kind = "bytes",
    present: Present = None,
) -> Ragged:
    """A `Ragged` of what is known to fit, since we made it: nothing is looked at, and what is given is kept."""
    made = Ragged.__new__(Ragged)
    made._values, made._offsets, made._shapes, made._kind, made._present = values, offsets, shapes, kind, present
    return made


def presence(ragged: Ragged) -> npt.NDArray[np.bool_]:
    """Which items there are, bool[n], also where none can be missing."""
    return np.ones(len(ragged), np.bool_) if ragged.present is None else ragged.present


def _check(
    values: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    shapes: list[tuple[int, ...]] | None,
    kind: str,
) -> None:
    if kind not in ("bytes", "array"):
        raise ConfigError(f'kind={kind!r} is neither "bytes" nor "array"')
    if not isinstance(values, np.ndarray) or values.ndim != 1 or not values.flags.c_contiguous:
        raise ConfigError(f"values must be a contiguous 1-D numpy array, not {_describe(values)}")
    if kind == "bytes" and values.dtype != np.uint8:
        raise ConfigError(f'values of kind "bytes" must be uint8, not {values.dtype}; give kind="array"')
    if offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(values):
        raise ConfigError(
            f"offsets must be 1-D, start at 0 and end at len(values) = {len(values)}, not {_ends(offsets)}"
        )
    if (np.diff(offsets) < 0).any():
        raise ConfigError("offsets must never fall")
    if shapes is not None and (kind == "bytes" or [_product(s) for s in shapes] != np.diff(offsets).tolist()):
        raise ConfigError('shapes must have one shape an item, as large as the item, and kind="array"')


def _check_present(present: Present, offsets: npt.NDArray[np.int64]) -> None:
    if present is None:
        return
    if present.dtype != np.bool_ or present.shape != (len(offsets) - 1,):
        raise ConfigError(
            f"present must be bool[{len(offsets) - 1}], one for each item, not {present.dtype}{list(present.shape)}"
        )
    if np.diff(offsets)[~present].any():
        raise ConfigError("an item that is missing (present is False) must be empty")


def _describe(values: object) -> str:
    if isinstance(values, np.ndarray):
        return f"an array of shape {values.shape} and strides {values.strides}"
    return f"a {type(values).__name__}"


def _ends(offsets: npt.NDArray[np.int64]) -> str:
    if offsets.ndim != 1 or len(offsets) == 0:
        return f"shape {offsets.shape}"
    return f"{offsets[0]} ... {offsets[-1]}"


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _offsets_of(parts: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return offsets


def _same(mine: Item, other: object, there: bool) -> bool:
    if other is None:
        return not there
    if isinstance(mine, bytes):
        return isinstance(other, bytes | bytearray | memoryview) and mine == other
    return isinstance(other, np.ndarray | list | tuple) and np.array_equal(mine, other)
