"""When jobs run and how fast, against plain models: tables of all minutes of a week, and lists that are sorted."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.daemon.schedule import (
    WEEK_MINUTES,
    Contender,
    Timetable,
    Windows,
    jittered,
    minute_of_week,
    parse_bandwidth,
    parse_when,
    pause_s,
    to_run,
    wait_s,
)
from fastload.errors import ConfigError

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
DAY = 1440


def at(day: str, clock: str) -> int:
    hours, minutes = clock.split(":")
    return DAYS.index(day) * DAY + int(hours) * 60 + int(minutes)


def written(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


# Windows


@pytest.mark.parametrize(
    ("text", "is_open", "is_closed"),
    [
        ("always", [("Mon", "00:00"), ("Sun", "23:59")], []),
        ("once", [("Mon", "00:00")], []),
        ("22:00-06:00", [("Mon", "22:00"), ("Tue", "05:59"), ("Mon", "00:00"), ("Sun", "23:00")], [("Mon", "06:00")]),
        ("09:00-17:30", [("Wed", "09:00"), ("Wed", "17:29")], [("Wed", "17:30"), ("Wed", "08:59")]),
        ("Sat-Sun", [("Sat", "00:00"), ("Sun", "23:59")], [("Mon", "00:00"), ("Fri", "23:59")]),
        ("fri-mon", [("Sun", "12:00"), ("Mon", "23:59")], [("Tue", "00:00"), ("Thu", "23:59")]),
        # A window past midnight belongs to the day on which it begins, also over the end of the week.
        ("Sun 22:00-06:00", [("Sun", "22:00"), ("Mon", "05:59")], [("Sun", "05:00"), ("Mon", "22:00")]),
        ("Mon 22:00-24:00", [("Mon", "23:59")], [("Tue", "00:00")]),
        ("Mon-Fri 22:00-06:00, Sat-Sun", [("Sat", "05:00"), ("Sun", "12:00")], [("Mon", "03:00"), ("Mon", "12:00")]),
    ],
)
def test_windows(text: str, is_open: list[tuple[str, str]], is_closed: list[tuple[str, str]]) -> None:
    windows = parse_when(text)
    assert [each for each in is_open if not windows.is_open(at(*each))] == []
    assert [each for each in is_closed if windows.is_open(at(*each))] == []


@pytest.mark.parametrize("text", ["", "22:00", "25:00-06:00", "22:00-22:00", "Xyz", "22:60-23:00", "24:00-06:00", "-"])
def test_what_is_no_window_is_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="when="):
        parse_when(text)


@given(st.integers(0, DAY - 1), st.integers(1, DAY - 1), st.sets(st.integers(0, 6)))
def test_a_window_holds_the_minutes_that_it_says(start: int, length: int, days: set[int]) -> None:
    text = f"{written(start)}-{written((start + length) % DAY)}"
    if days:
        text = ", ".join(f"{DAYS[day]} {text}" for day in sorted(days))
    model = {(day * DAY + start + offset) % WEEK_MINUTES for day in (days or range(7)) for offset in range(length)}
    windows = parse_when(text)
    assert {minute for minute in range(WEEK_MINUTES) if windows.is_open(minute)} == model


# Bandwidth


def test_the_timetable_of_the_documentation() -> None:
    table = parse_bandwidth("08:00 200MB/s, 20:00 off, Sat-Sun off")
    assert table.rate_at(at("Mon", "08:00")) == table.rate_at(at("Fri", "19:59")) == 200_000_000
    for moment in [("Mon", "07:59"), ("Mon", "20:00"), ("Sat", "12:00"), ("Sun", "08:00"), ("Mon", "00:00")]:
        assert table.rate_at(at(*moment)) == 0


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("1MiB/s", {("Mon", "00:00"): 1 << 20, ("Sun", "23:59"): 1 << 20}),
        (12345, {("Tue", "12:00"): 12345}),
        ("off", {("Mon", "00:00"): 0}),
        ("200 MB/s", {("Mon", "00:00"): 200_000_000}),
        ("8:00  1 kB/s, Sun 2 kB/s", {("Mon", "09:00"): 1000, ("Sun", "09:00"): 2000}),
        # The night before goes on, and days of their own begin with it.
        ("06:00 1kB/s, 22:00 2kB/s", {("Wed", "05:59"): 2000, ("Wed", "06:00"): 1000, ("Wed", "22:00"): 2000}),
        (
            "06:00 1kB/s, 22:00 2kB/s, Sun 12:00 off",
            {("Sun", "11:59"): 2000, ("Sun", "12:00"): 0, ("Mon", "00:00"): 2000},
        ),
        ("Mon 12:00 1kB/s", {("Mon", "11:59"): 0, ("Mon", "23:59"): 1000, ("Tue", "00:00"): 0}),
        # In any order.
        ("20:00 off, 08:00 1kB/s", {("Mon", "09:00"): 1000, ("Mon", "21:00"): 0}),
    ],
)
def test_timetables(text: str | int, rates: dict[tuple[str, str], int]) -> None:
    table = parse_bandwidth(text)
    assert {moment: table.rate_at(at(*moment)) for moment in rates} == rates


@pytest.mark.parametrize(
    "text", ["", "fast", "08:00", "25:00 1MB/s", "0", "08:00 0MB/s", "08:00 1MB/s,", "24:00 off", -5]
)
def test_what_is_no_timetable_is_quoted(text: str | int) -> None:
    with pytest.raises(ConfigError, match="bandwidth="):
        parse_bandwidth(text)


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 6), st.integers(0, DAY - 1), st.integers(0, 3)),
        min_size=1,
        max_size=6,
        unique_by=lambda each: each[:2],
    )
)
def test_a_timetable_against_a_walk_through_each_day(entries: list[tuple[int | None, int, int]]) -> None:
    text = ", ".join(
        f"{'' if day is None else DAYS[day] + ' '}{written(minute)} {f'{rate}kB/s' if rate else 'off'}"
        for day, minute, rate in entries
    )
    table = parse_bandwidth(text)
    every_day = {minute: rate for day, minute, rate in entries if day is None}
    for day in range(7):
        own = {minute: rate for of_day, minute, rate in entries if of_day == day} or every_day
        rate = every_day[max(every_day)] if every_day else 0
        for minute in range(DAY):
            rate = own.get(minute, rate)
            assert table.rate_at(day * DAY + minute) == rate * 1000


# Order

contenders = st.builds(
    Contender,
    id=st.text("abcdef", min_size=1, max_size=3),
    due_at=st.sampled_from([0.0, 5.0, 10.0, 20.0, math.inf]),
    windows=st.sampled_from([Windows(), parse_when("Mon"), parse_when("12:00-13:00")]),
    deadline_at=st.sampled_from([math.inf, 100.0, 200.0]),
    priority=st.integers(-2, 2),
    since=st.floats(0, 10),
    in_spare_lane=st.booleans(),
)


@given(
    st.lists(contenders, max_size=8, unique_by=lambda each: each.id), st.floats(0, 30), st.integers(0, WEEK_MINUTES - 1)
)
def test_none_that_waits_comes_before_one_that_runs(them: list[Contender], now: float, minute: int) -> None:
    chosen = set(to_run(them, now, minute))
    for in_spare_lane, count in ((False, 2), (True, 1)):
        ready = [
            each
            for each in them
            if each.due_at <= now and each.windows.is_open(minute) and each.in_spare_lane == in_spare_lane
        ]
        runs = [each for each in ready if each.id in chosen]
        assert len(runs) == min(count, len(ready))
        for mine in runs:
            for other in ready:
                if other not in runs:
                    assert mine.deadline_at <= other.deadline_at
                    if mine.deadline_at == other.deadline_at:
                        assert (-mine.priority, mine.since) <= (-other.priority, other.since)
    ready_ids = {each.id for each in them if each.due_at <= now and each.windows.is_open(minute)}
    assert chosen <= ready_ids


@given(st.lists(contenders, max_size=5), st.floats(0, 30))
def test_what_becomes_due_is_not_slept_through(them: list[Contender], now: float) -> None:
    pause = wait_s(them, Timetable(), now, wall=1_000_000_000.0 + now)
    assert pause > 0
    for each in them:
        if now < each.due_at < math.inf:
            assert now + pause <= each.due_at + 1e-9
    if any(each.windows.spans and each.due_at < math.inf for each in them):
        assert pause <= 60


def test_nothing_to_do_is_no_timer() -> None:
    assert wait_s([Contender("a", math.inf, Windows())], Timetable(), 0.0, 0.0) == math.inf
    assert wait_s([], parse_bandwidth("08:00 1MB/s, 20:00 off"), 0.0, 59.0) == 1.0
    assert wait_s([], parse_bandwidth("1MB/s"), 0.0, 59.0) == math.inf


def test_a_clock_that_is_set_back_changes_what_holds_now_and_no_more() -> None:
    """What is written by the wall's clock follows it; what was counted by the other one is not asked."""
    job = Contender("a", due_at=100.0, windows=parse_when("12:00-13:00"))
    noon = next(wall for wall in range(1_000_000_020, 1_000_090_000, 60) if minute_of_week(wall) % DAY == 12 * 60 + 30)
    assert to_run([job], 100.0, minute_of_week(noon)) == ["a"]
    assert to_run([job], 101.0, minute_of_week(noon - 3600)) == []
    assert to_run([job], 99.0, minute_of_week(noon)) == []


def test_the_minute_of_the_week_is_local() -> None:
    local = time.localtime(1_700_000_000)
    assert minute_of_week(1_700_000_000) == local.tm_wday * DAY + local.tm_hour * 60 + local.tm_min


# Pauses


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_pauses_grow_to_a_bound(failures: int, chance: float, other: float) -> None:
    pause, longer = pause_s(failures, chance), pause_s(failures + 1, other)
    assert 3 < pause <= 1800
    assert longer > pause or longer >= 0.75 * 1800


@given(st.floats(1, 1e6), st.floats(0, 1))
def test_jitter_is_a_tenth(seconds: float, chance: float) -> None:
    assert 0.899 * seconds <= jittered(seconds, chance) <= 1.101 * seconds
