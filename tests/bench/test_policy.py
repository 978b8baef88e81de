"""The measures of bench.policy, on orders whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from bench.policy import _unevenness, evenness, foreseen_hits, offline_hits


def test_belady_on_an_order_done_by_hand() -> None:
    # Two places: 0 and 1 come in, 2 takes the place of 1 (needed last), 0 hits, 2 hits, 1 comes in again.
    order = [np.array([unit]) for unit in (0, 1, 2, 0, 2, 1)]
    assert offline_hits(order, 3, 2, 0) == pytest.approx(2 / 6)
    assert offline_hits(order, 3, 2, 3) == pytest.approx(2 / 3)
    assert foreseen_hits([order], 3, 2) == pytest.approx(2 / 6)
    assert offline_hits(order, 3, 3, 0) == foreseen_hits([order], 3, 3) == pytest.approx(3 / 6)


def test_a_batch_keeps_all_that_it_reads() -> None:
    order = [np.array([0, 1]), np.array([1, 2]), np.array([0, 1])]
    assert offline_hits(order, 3, 2, 0) == foreseen_hits([order], 3, 2) == pytest.approx(2 / 6)


def test_how_uneven_misses_are() -> None:
    missed = np.tile([True, False], 50)
    assert _unevenness(missed) == (1.0, 1.0)
    missed = np.arange(100) < 20
    assert _unevenness(missed) == (5.0, 20.0)


def test_pins_are_even_and_whole_shards_are_not() -> None:
    table = evenness(quick=True)
    assert table.misses == 0
    longest = {label: values[1] for label, values, _ in table.rows}
    assert longest["50%, a part of each shard"] * 5 < longest["50%, shards that came first"]
