"""Every container that a batch may be made of, with other parts in it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastload
from fastload.device import map_tensors

Pair = namedtuple("Pair", "x y")
Edge = namedtuple("Edge", "to weight")  # a field, and no method


@dataclasses.dataclass
class Sample:
    x: Any
    name: str
    made: Any = dataclasses.field(init=False, default=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


class Named(dict):  # type: ignore[type-arg]
    """A mapping that has something beside its items."""

    name = ""


class Movable:
    def to(self, device: Any) -> Any:
        return device


class Pinnable:
    def pin_memory(self) -> Pinnable:
        return self


class Unknown:
    def __init__(self) -> None:
        self.x = ONE


ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


def numbered(value: Any) -> tuple[Any, list[Any]]:
    """With strings in the place of parts, and the parts."""
    parts: list[Any] = []

    def change(part: Any) -> str:
        parts.append(part)
        return f"part {len(parts)}"

    return map_tensors(value, change), parts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ONE, "part 1"),
        ([ONE, 3, TWO], ["part 1", 3, "part 2"]),
        ((ONE, "a", (TWO,)), ("part 1", "a", ("part 2",))),
        (Pair(ONE, {"a": [TWO]}), Pair("part 1", {"a": ["part 2"]})),
        (Edge(ONE, 0.5), Edge("part 1", 0.5)),
        (OrderedDict(a=ONE, b=None), OrderedDict(a="part 1", b=None)),
        (defaultdict(int, a=ONE), defaultdict(int, a="part 1")),
        (UserDict(a=ONE), UserDict(a="part 1")),
        (MappingProxyType({"a": ONE}), MappingProxyType({"a": "part 1"})),
        (deque([ONE, b"x"]), deque(["part 1", b"x"])),
        (Sample(ONE, "a"), Sample("part 1", "a")),
        (Frozen([ONE]), Frozen(["part 1"])),
        (pack_sequence([ONE]), "part 1"),  # a tuple that knows better
        ([torch.nn.Parameter(ONE)], ["part 1"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_stay_what_they_are(value: Any, expected: Any) -> None:
    found, parts = numbered(value)
    assert found == expected
    assert type(found) is type(expected)
    assert parts
    assert found is not value


@pytest.mark.parametrize(
    "value",
    ["text", b"bytes", 3, 0.5, None, ["a", "b"], {"a": 1}, range(3), torch.Tensor, torch.float32, bytearray(b"a")],
    ids=repr,
)
def test_what_has_no_parts_is_the_same_object(value: Any) -> None:
    assert numbered(value) == (value, [])
    assert map_tensors(value, str) is value


def test_objects_that_can_be_moved_or_pinned_are_parts_and_others_are_not() -> None:
    ragged, movable, pinnable, unknown = fastload.Ragged.from_items([b"a"]), Movable(), Pinnable(), Unknown()
    found, parts = numbered([ragged, movable, pinnable, unknown])
    assert found == ["part 1", "part 2", "part 3", unknown]
    assert parts[1:] == [movable, pinnable]
    assert parts[0] is ragged


def test_what_a_mapping_has_beside_its_items_stays() -> None:
    named = Named(a=ONE)
    named.name = "b"
    found, _ = numbered(named)
    assert (type(found), found.name, found["a"], named["a"]) == (Named, "b", "part 1", ONE)


def test_a_type_error_of_a_part_is_not_taken_for_one_of_its_container() -> None:
    def change(part: Any) -> Any:
        raise TypeError("of the part")

    for value in ([ONE], {"a": ONE}, (ONE,), Sample(ONE, "a")):
        with pytest.raises(TypeError, match="of the part"):
            map_tensors(value, change)
