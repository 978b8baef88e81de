"""Batches are nested: what holds their parts, and the same with other parts in it.

The containers are those that torch's `pin_memory` goes into (mappings, tuples, named tuples and other sequences, each
made again as its own type), and dataclasses. The parts are tensors and objects that can be moved or pinned as a whole
(`to`, `pin_memory`), even if they are containers too: they know best how. All else stays as it is. Lists of numbers or
text, the keys of a batch for example, are told by the set of their types, without a step of Python for each item.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch

_INERT = frozenset({str, bytes, bytearray, memoryview, int, float, complex, bool, type(None)})


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change(part)` in the place of each part. Its containers are copied, and stay what they are."""
    if type(value) in _INERT or isinstance(value, (str, bytes, type)):
        return value
    if isinstance(value, torch.Tensor) or has_method(value, "to") or has_method(value, "pin_memory"):
        return change(value)
    if isinstance(value, Mapping):
        if _are_inert(value.values()):
            return value
        return _mapping_like(value, {key: changed(item, change) for key, item in value.items()})
    if isinstance(value, Sequence):
        return value if _are_inert(value) else _sequence_like(value, [changed(item, change) for item in value])
    if dataclasses.is_dataclass(value):
        return _dataclass_like(value, change)
    return value


def has_method(value: Any, name: str) -> bool:
    """Whether it can be called; a field of that name is something else."""
    return callable(getattr(value, name, None))


def _are_inert(items: Iterable[Any]) -> bool:
    return _INERT.issuperset(map(type, items))


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """As torch makes it: a copy has what a mapping has beside its items; what can be neither is a dict."""
    try:
        if isinstance(value, MutableMapping):
            clone = copy.copy(value)
            clone.update(items)
            return clone
        return type(value)(items)  # type: ignore[call-arg]  # as most are made
    except TypeError:
        return items


def _sequence_like(value: Sequence[Any], items: list[Any]) -> Any:
    """The same for sequences; what cannot be made again, as a range cannot, is a list."""
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        if isinstance(value, MutableSequence):
            clone = copy.copy(value)
            for number, item in enumerate(items):
                clone[number] = item
            return clone
        return type(value)(items)  # type: ignore[call-arg]  # as most are made
    except TypeError:
        return items


def _dataclass_like(value: Any, change: Callable[[Any], Any]) -> Any:
    clone = copy.copy(value)
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            # Frozen ones too: this one is new, and nobody else has seen it.
            object.__setattr__(clone, field.name, changed(getattr(value, field.name), change))
    return clone
