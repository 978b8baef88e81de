"""When which job may run, and how fast: decisions of a daemon, as functions of the time that is passed in.

Two clocks are passed in. What people write by the clock on the wall (`when`, `bandwidth`) is looked up by the minute of
the week, in local time, at the moment when it is asked for: a clock that is set back, or a night in which it is put
forward, changes what holds from then on and nothing else. How long something waits (retries, `watch`) is counted by a
clock that only goes forward.

A text such as "08:00 200MB/s, 20:00 off, Sat-Sun off" is a list of entries. An entry holds from its time (00:00 where
none is written) to the next one of its day. Entries that name days replace those that name none on these days. Before
the first entry of a day, what the last entry without days says goes on from the evening before.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastload.config import parse_rate
from fastload.errors import ConfigError

DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES

# Jobs that run at a time. The order in which the cache serves them is the service's; the second one is for a store that
# answers slowly, so that it does not hold up all others.
RUNNING_MAX = 2
# And beside these, of jobs that have failed before, or only look up what is held: they may fail again, or warm nothing,
# and should neither displace others nor wait for them to be done.
SPARE_MAX = 1
_PAUSE_S, _PAUSE_MAX_S = 5.0, 1800.0

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAYS_TEXT = re.compile(r"([a-z]{3})(?:\s*-\s*([a-z]{3}))?", re.IGNORECASE)
_TIME_TEXT = re.compile(r"(\d{1,2}):(\d{2})")


def minute_of_week(wall: float) -> int:
    """The minute of the week, from Monday at 00:00 in local time, at a moment in seconds since 1970."""
    local = time.localtime(wall)
    return local.tm_wday * DAY_MINUTES + local.tm_hour * 60 + local.tm_min


@dataclass(frozen=True, slots=True)
class Windows:
    """When a job may run: spans of minutes of the week, from the first to before the second, which may lie beyond the
    end of the week. None at all: always.
    """

    spans: tuple[tuple[int, int], ...] = ()

    def is_open(self, minute: int) -> bool:
        """Whether a job may run in this minute of the week."""
        return not self.spans or any(
            start <= minute < end or start <= minute + WEEK_MINUTES < end for start, end in self.spans
        )


def parse_when(text: str, name: str = "when") -> Windows:
    """`"22:00-06:00"`, `"Mon-Fri 22:00-06:00, Sat-Sun"`, `"always"` or `"once"`; ConfigError for what is none. A window
    past midnight belongs to the day on which it begins.
    """
    if text in ("always", "once"):
        return Windows()
    spans: list[tuple[int, int]] = []
    for part in text.split(","):
        days, rest = _split_days(part.strip())
        first, dash, last = rest.partition("-")
        start, end = _minute(first), _minute(last)
        if not rest and days:
            start, end = 0, DAY_MINUTES
        elif not dash or start is None or end is None or start in (end, DAY_MINUTES):
            raise ConfigError(
                f'{name}={text!r} is not a time of day; write "22:00-06:00", "Mon-Fri 22:00-06:00, Sat-Sun", "always" '
                'or "once"'
            )
        assert start is not None
        assert end is not None
        length = end - start if end > start else end - start + DAY_MINUTES
        spans += [(day * DAY_MINUTES + start, day * DAY_MINUTES + start + length) for day in days or range(7)]
    return Windows(tuple(sorted(spans)))


@dataclass(frozen=True, slots=True)
class _Entry:
    minute: int
    rate: int


@dataclass(frozen=True, slots=True)
class Timetable:
    """Bytes a second by the minute of the week; 0: no limit."""

    days: tuple[tuple[_Entry, ...], ...] = ((),) * 7
    evening_before: int = 0

    def rate_at(self, minute: int) -> int:
        """What holds in this minute of the week."""
        day, of_day = divmod(minute % WEEK_MINUTES, DAY_MINUTES)
        begun = [entry.rate for entry in self.days[day] if entry.minute <= of_day]
        return begun[-1] if begun else self.evening_before


def parse_bandwidth(text: str | int, name: str = "bandwidth") -> Timetable:
    """`"200MB/s"`, `"08:00 200MB/s, 20:00 off, Sat-Sun off"`: see the module's text; ConfigError for what is none."""
    of_all: list[_Entry] = []
    of_day: dict[int, list[_Entry]] = {}
    for part in [text] if isinstance(text, int) else text.split(","):
        days, rest = _split_days(str(part).strip())
        at, rate_text = map(str.strip, rest.split(" ", 1) if ":" in rest and " " in rest else ("", rest))
        minute = _minute(at) if at else 0
        rate = 0 if rate_text == "off" else parse_rate(_int_or_text(rate_text), name)
        if minute is None or minute == DAY_MINUTES or (rate == 0 and rate_text != "off"):
            raise ConfigError(
                f'{name}={text!r} is not a timetable of rates; write "200MB/s" or "08:00 200MB/s, 20:00 off, Sat-Sun '
                'off", where "off" is no limit (to stop warming for a time, set `when`)'
            )
        if days:
            for day in days:
                of_day.setdefault(day, []).append(_Entry(minute, rate))
        else:
            of_all.append(_Entry(minute, rate))
    ordered = {day: _ordered(entries) for day, entries in of_day.items()}
    every_day = _ordered(of_all)
    last = every_day[-1].rate if every_day else 0
    return Timetable(tuple(ordered.get(day, every_day) for day in range(7)), last)


def _ordered(entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.minute))


def _int_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _split_days(text: str) -> tuple[tuple[int, ...], str]:
    """The days that a text begins with, none where it names none, and what follows them."""
    match = _DAYS_TEXT.match(text)
    if match is None or match[1].lower() not in _DAYS or (match[2] and match[2].lower() not in _DAYS):
        return (), text
    first = _DAYS.index(match[1].lower())
    last = _DAYS.index(match[2].lower()) if match[2] else first
    return tuple((first + number) % 7 for number in range((last - first) % 7 + 1)), text[match.end() :].strip()


def _minute(text: str) -> int | None:
    """The minute of the day, to 24:00; None for what is none."""
    match = _TIME_TEXT.fullmatch(text.strip())
    if match is None or int(match[2]) > 59:
        return None
    minute = int(match[1]) * 60 + int(match[2])
    return minute if minute <= DAY_MINUTES else None


@dataclass(frozen=True, slots=True)
class Contender:
    """A job as the schedule sees it. `due_at` is of the clock that only goes forward; infinite: nothing to do."""

    id: str
    due_at: float
    windows: Windows
    deadline_at: float = math.inf
    priority: int = 0
    since: float = 0.0
    in_spare_lane: bool = False

    @property
    def rank(self) -> tuple[float, int, float, str]:
        """Which comes first: the earlier deadline, the higher priority, the older one."""
        return self.deadline_at, -self.priority, self.since, self.id


def to_run(contenders: Sequence[Contender], now: float, minute: int) -> list[str]:
    """Which jobs should run now. One that runs and is not among them is to be stopped: its window has closed, or others
    come before it.
    """
    ready = [each for each in contenders if each.due_at <= now and each.windows.is_open(minute)]
    first, spare = ([each for each in ready if each.in_spare_lane == is_spare] for is_spare in (False, True))
    return [each.id for each in (*_first_of(first, RUNNING_MAX), *_first_of(spare, SPARE_MAX))]


def _first_of(contenders: Sequence[Contender], count: int) -> list[Contender]:
    return sorted(contenders, key=lambda each: each.rank)[:count]


def wait_s(contenders: Sequence[Contender], timetable: Timetable, now: float, wall: float) -> float:
    """After how long to look again if nothing happens; infinite: when something does."""
    by_clock = len({entry.rate for day in timetable.days for entry in day}) > 1 or any(
        each.windows.spans and each.due_at < math.inf for each in contenders
    )
    waits = [each.due_at - now for each in contenders if each.due_at > now]
    if by_clock:
        waits.append(60 - wall % 60)
    return min(waits, default=math.inf)


def pause_s(failures: int, chance: float, first_s: float = _PAUSE_S, longest_s: float = _PAUSE_MAX_S) -> float:
    """How long a job waits that has failed so many times in a row; `chance` is a random number from 0 to 1."""
    return min(longest_s, first_s * 2.0 ** min(failures - 1, 20)) * (0.75 + 0.25 * chance)


def jittered(seconds: float, chance: float) -> float:
    """A repeated time, so that nodes that began together do not ask together."""
    return seconds * (0.9 + 0.2 * chance)
