"""What costs how much more: the exponent, what is called worse than linear, and the quickest of the questions."""

from __future__ import annotations

import pytest

from bench import growth
from bench.growth import exponent, grown, worse


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([10.0, 20.0, 40.0, 80.0], 1.0),
        ([7.0, 7.0, 7.0, 7.0], 0.0),
        ([10.0, 40.0, 160.0, 640.0], 2.0),
        ([500.0, 20.0, 40.0, 80.0], 1.0),  # the smallest is not fitted
        ([0.0, 0.001, 0.5, 0.9], 0.0),  # below one is noise
    ],
)
def test_the_exponent_is_that_of_the_largest_sizes(costs: list[float], expected: float) -> None:
    assert exponent([1, 2, 4, 8], costs) == pytest.approx(expected)


def test_what_is_worse_than_linear_is_named() -> None:
    table = grown("an epoch", "shards", ["ms", "MB"], [(1, [10, 5]), (2, [40, 5]), (4, [160, 5])])
    assert [label for label, _, _ in table.rows] == ["1", "2", "4", "exponent"]
    assert worse(table) == ["ms with shards (exponent 2.00)"]
    assert table.misses == 1
    assert growth.summary(table) == f"{'1 to 4 shards':40}ms 2.00, MB 0.00"
    assert worse(grown("an epoch", "shards", ["ms"], [(1, [10]), (2, [20]), (4, [40])])) == []


@pytest.mark.thorough
@pytest.mark.parametrize("question", growth.QUESTIONS, ids=lambda question: question.__name__)
def test_every_question_has_an_answer(question: growth.Question) -> None:
    table = question(True)
    assert len(table.rows) >= 4
    assert all(value >= 0 for _, values, _ in table.rows[:-1] for value in values)
    assert all(values[0] > 0 for _, values, _ in table.rows[:-1])
