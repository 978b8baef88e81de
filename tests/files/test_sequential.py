"""Streams of accesses are found, and what is none is left alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.files.readahead import Streams


def ahead_after(accesses: list[int | tuple[int, int]], unit_count: int = 1000, count_max: int = 16) -> list[int]:
    streams = Streams(unit_count)
    for access in accesses:
        first, last = access if isinstance(access, tuple) else (access, access)
        streams.saw(first, last)
    return streams.ahead(count_max)


def test_nothing_is_expected_of_one_access() -> None:
    assert ahead_after([]) == ahead_after([0]) == ahead_after([(0, 9)]) == []


def test_forward() -> None:
    assert ahead_after([0, 1]) == [2, 3]
    assert ahead_after([5, 6, 7]) == [8, 9, 10]
    assert ahead_after(list(range(40)), count_max=4) == [40, 41, 42, 43]


def test_small_reads_within_one_unit_say_nothing() -> None:
    assert ahead_after([3] * 20) == []
    assert ahead_after([3, 3, 3, 4, 4, 4]) == ahead_after([3, 4])


def test_large_reads_expect_as_much_again() -> None:
    assert ahead_after([(0, 3), (4, 7)]) == list(range(8, 16))
    # One read, as a buffer splits it.
    assert ahead_after([(0, 0), (0, 3), (3, 7)])[:4] == [8, 9, 10, 11]


def test_backward() -> None:
    assert ahead_after([100, 99]) == [98, 97]
    assert ahead_after([(90, 99), (80, 89)], count_max=5) == [79, 78, 77, 76, 75]


def test_gaps() -> None:
    assert ahead_after([0, 1, 2, 4, 5, 8]) == [9, 10, 11, 12, 13, 14]
    assert ahead_after([100, 99, 97, 96]) == [95, 94, 93, 92]


def test_steps() -> None:
    assert ahead_after([0, 10, 20]) == []
    assert ahead_after([0, 10, 20, 30], count_max=3) == [40, 50, 60]
    assert ahead_after([90, 80, 70, 60], count_max=2) == [50, 40]
    assert ahead_after([0, 10, 20, 30, 50], count_max=2) == [60, 70]
    assert ahead_after([(0, 1), (10, 11), (20, 21), (30, 31)], count_max=4) == [40, 41, 50, 51]


@pytest.mark.parametrize("apart", [6, 40, 500])
def test_two_streams_that_come_mixed(apart: int) -> None:
    forward = [place for step in range(4) for place in (step, apart + step)]
    assert set(ahead_after(forward, count_max=2)) == {4, 5, apart + 4, apart + 5}
    one_backward = [place for step in range(4) for place in (step, apart + 20 - step)]
    assert set(ahead_after(one_backward, count_max=1)) == {4, apart + 16}


def test_two_streams_of_steps() -> None:
    mixed = [place for step in range(5) for place in (20 * step, 403 + 30 * step)]
    assert set(ahead_after(mixed, count_max=1)) == {100, 553}


def test_a_stream_goes_on_after_a_look_elsewhere() -> None:
    assert ahead_after([0, 1, 2, 900, 3])[:2] == [4, 5]


def test_a_stream_that_another_has_reached_has_ended() -> None:
    assert ahead_after([4, 5, (0, 3), (4, 99)], count_max=2) == [100, 101]


def test_a_stream_that_is_not_followed_is_forgotten() -> None:
    streams = Streams(10_000)
    for place in (0, 1, 2):
        streams.saw(place, place)
    for place in range(5000, 5100):
        streams.saw(place, place)
    assert streams.ahead(1) == [5100]


def test_nothing_beyond_the_ends() -> None:
    assert ahead_after([7, 8, 9], unit_count=10) == []
    assert ahead_after([2, 1, 0], unit_count=10) == []


def test_reading_anywhere_in_a_large_object_expects_little() -> None:
    rng = random.Random(0)
    streams = Streams(100_000)
    expected = 0
    for _ in range(1000):
        place = rng.randrange(100_000)
        streams.saw(place, place)
        expected += len(streams.ahead(16))
    assert expected < 50


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 49), st.integers(0, 5))), st.integers(0, 20))
def test_what_is_expected_lies_in_the_object(unit_count: int, accesses: list[tuple[int, int]], count_max: int) -> None:
    streams = Streams(unit_count)
    for first, more in accesses:
        streams.saw(first % unit_count, min(unit_count - 1, first % unit_count + more))
        found = streams.ahead(count_max)
        assert len(found) == len(set(found)) <= 8 * max(count_max, 1 + more + 5)
        assert all(0 <= unit < unit_count for unit in found)
