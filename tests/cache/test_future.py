"""Next uses, against looking them up in the order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastload.cache.policy.known_order import FAR, NextUses, lookahead
from fastload.cache.policy.unknown_order import least


@dataclass
class Model:
    """All that was told, and how far it was passed."""

    units: list[int] = field(default_factory=list)
    first: int = 0
    cursor: int = 0

    def next_use(self, unit: int) -> int:
        places = (place for place in range(self.cursor, self.first + len(self.units)))
        return next((place for place in places if self.units[place - self.first] == unit), int(FAR))


UNITS = st.lists(st.integers(0, 6), max_size=20)


@given(st.lists(st.one_of(UNITS, st.integers(0, 30), st.just("gap")), max_size=25))
def test_next_uses_are_those_of_the_order(steps: list[list[int] | int | str]) -> None:
    uses, model = NextUses(7), Model()
    for step in steps:
        if step == "gap":
            model = Model([], uses.end + 5, uses.end + 5)
            uses.add(model.first, np.empty(0, np.int32))
        elif isinstance(step, list):
            uses.add(uses.end, np.array(step, np.int32))
            model.units += step
        elif isinstance(step, int):
            uses.advance(uses.cursor + step)
            model.cursor = min(model.cursor + step, model.first + len(model.units))
        assert uses.of(np.arange(-1, 7)).tolist() == [FAR, *map(model.next_use, range(7))]


def test_a_long_order_in_many_pieces() -> None:
    random = np.random.default_rng(1)
    order = random.integers(0, 500, 50_000).astype(np.int32)
    uses, model = NextUses(500), Model(order.tolist())
    told = passed = 0
    while passed < len(order):
        piece = int(random.integers(1, 3000))
        uses.add(told, order[told : told + piece])
        told = min(told + piece, len(order))
        passed = max(passed, told - 5000) if told < len(order) else passed + 1000
        uses.advance(passed)
        model.cursor = min(passed, len(order))
        asked = random.integers(0, 500, 5)
        known = [place if (place := model.next_use(unit)) < told else FAR for unit in asked.tolist()]
        assert uses.of(asked).tolist() == known


@given(
    values=st.lists(st.integers(-5, 2000), max_size=600),
    count=st.integers(0, 40),
    times=st.sampled_from([1, 7]),
)
def test_the_few_least_of_many(values: list[int], count: int, times: int) -> None:
    array = np.array(values * times, np.int64)
    found = least(array, count)
    assert len(set(found.tolist())) == len(found) == min(count, len(array))
    assert sorted(array[found].tolist()) == sorted(array.tolist())[:count]


def test_how_far_ahead() -> None:
    assert lookahead(10) == 40
    assert lookahead(10**7) == 1 << 20
