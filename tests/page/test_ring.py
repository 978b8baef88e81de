"""The last hour, against what was counted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.page.ring import SPAN_S, STEP_S, Point, Rates, Ring
from tests.page.snapshots import snap

STEPS = st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(0, 1 << 40)), min_size=1, max_size=60)


@given(STEPS)
def test_points_hold_all_bytes_that_passed(steps: list[tuple[float, int]]) -> None:
    ring = Ring()
    served = list(itertools.accumulate((count for _, count in steps), initial=0))
    times = list(itertools.accumulate((seconds for seconds, _ in steps), initial=100.0))
    for at, count in zip(times, served, strict=True):
        ring.add(snap(at, ram=count, fetched=count))
    points = ring.since(0.0)
    assert [point.at for point in points] == sorted({point.at for point in points})
    ends = [times[0], *(point.at for point in points)]
    counts = dict(zip(times, served, strict=True))
    for begin, point in zip(ends, points, strict=False):
        assert point.rates is not None
        assert point.rates.ram * (point.at - begin) == pytest.approx(counts[point.at] - counts[begin])
        assert point.rates.fetched == point.rates.ram
    assert times[-1] - ends[-1] < STEP_S


def test_it_is_bounded() -> None:
    ring = Ring()
    for second in range(3 * int(SPAN_S)):
        ring.add(snap(100.0 + second, disk=second))
    points = ring.since(0.0)
    assert len(points) == SPAN_S / STEP_S
    assert points[-1].at - points[0].at == SPAN_S - STEP_S
    assert ring.since(points[-2].at) == points[-1:]
    assert {point.rates for point in points} == {Rates(0.0, 1.0, 0.0, 0.0)}


def test_another_service_and_a_pause_are_gaps() -> None:
    ring = Ring()
    ring.add(snap(100.0, store=10))
    ring.add(snap(105.0, store=15))
    ring.add(snap(106.0, store=3, started_at=2.0))
    ring.add(snap(111.0, store=8, started_at=2.0))
    ring.add(snap(211.0, store=9, started_at=2.0))
    ring.add(snap(216.0, store=14, started_at=2.0))
    one = Rates(0.0, 0.0, 1.0, 0.0)
    assert ring.since(0.0) == [
        Point(105.0, one),
        Point(106.0, None),
        Point(111.0, one),
        Point(211.0, None),
        Point(216.0, one),
    ]


def test_a_clock_that_is_set_back_begins_the_hour_anew() -> None:
    ring = Ring()
    for at in (100.0, 105.0, 50.0, 55.0):
        ring.add(snap(at))
    assert [point.at for point in ring.since(0.0)] == [55.0]


def test_a_grant_that_was_not_taken_gives_no_negative_rate() -> None:
    ring = Ring()
    ring.add(snap(100.0, ram=10))
    ring.add(snap(105.0, ram=5))
    assert ring.since(0.0)[0].rates == Rates(0.0, 0.0, 0.0, 0.0)
