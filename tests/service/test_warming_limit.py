"""How much warming may ask of a store: its limits and its manners, as properties, with time passed in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.service.fetching.rate_budget import RateBudget
from fastload.service.fetching.warming_limit import InFlight, LinkMeter, Links, WarmingLimit, warming_budget

MB = 1_000_000
HERE, THERE = "s3://here", "s3://there"
CHUNKS = st.integers(1, 16 * MB)
RATES = st.integers(100_000, 500 * MB)


def links(bytes_per_s: float) -> Links:
    """All that was measured gives the same."""
    return Links(bytes_per_s, lambda endpoint: bytes_per_s)


def in_flight(count: int, chunk_bytes: int) -> dict[str, InFlight]:
    """So many requests of warming, here."""
    return {HERE: InFlight(count, count * chunk_bytes)} if count else {}


class Store:
    """Warming that begins all that is admitted, at an endpoint whose requests share the link."""

    def __init__(self, link: float, chunk_bytes: int, budget: RateBudget | None = None) -> None:
        self.link, self.chunk_bytes = link, chunk_bytes
        self.limit, self.now = WarmingLimit(0.0), 0.0
        self.budget = budget or warming_budget(0, 0.0)
        self.begun_bytes = self.most_in_flight = 0
        self.left: list[float] = []  # bytes of the requests in flight

    def run(self, seconds: float, *, used: bool = False, waits_for: str = "", step_s: float = 0.005) -> int:
        """Let so much time pass, while a job uses stores or waits for one; how many bytes were begun."""
        before = self.begun_bytes
        for _ in range(round(seconds / step_s)):
            self.limit.observe(used, [waits_for] if waits_for else [], self.now)
            turn = self.limit.turn(in_flight(len(self.left), self.chunk_bytes), links(self.link), self.now)
            while len(self.left) < 32 and turn.admits(HERE, self.chunk_bytes, self.budget):
                self.limit.began(HERE, self.chunk_bytes, self.budget, links(self.link), self.now)
                self.begun_bytes += self.chunk_bytes
                self.left.append(self.chunk_bytes)
            self.most_in_flight = max(self.most_in_flight, len(self.left))
            self.now += step_s
            share = self.link * step_s / max(1, len(self.left))
            self.left = [left - share for left in self.left if left > share]
        return self.begun_bytes - before


# Limits


@pytest.mark.parametrize("bytes_per_s", [1 * MB, 20 * MB, 150 * MB])
@pytest.mark.parametrize("is_of_all", [True, False])
def test_a_limit_in_bytes_is_held_and_used(bytes_per_s: int, is_of_all: bool) -> None:
    store = Store(200 * MB, MB // 2, None if is_of_all else warming_budget(bytes_per_s, 0.0))
    if is_of_all:
        store.limit.change(bytes_per_s, 0, 0.0)
    begun = store.run(30.0)
    assert 0.95 * 30 * bytes_per_s <= begun <= 1.05 * 30 * bytes_per_s


def test_of_two_limits_the_lower_one_holds_and_each_plan_has_its_own() -> None:
    limit, slow, fast = WarmingLimit(0.0), warming_budget(10 * MB, 0.0), warming_budget(60 * MB, 0.0)
    limit.change(50 * MB, 0, 0.0)
    begun = {slow: 0, fast: 0}
    for step in range(1, 4001):
        turn = limit.turn({}, Links(), step / 200)
        for budget in begun:
            while turn.admits(HERE, MB // 10, budget):
                limit.began(HERE, MB // 10, budget, Links(), step / 200)
                begun[budget] += MB // 10
    assert begun[slow] == pytest.approx(20 * 10 * MB, rel=0.05)
    assert sum(begun.values()) == pytest.approx(20 * 50 * MB, rel=0.05)


@given(RATES, st.lists(st.tuples(st.floats(0, 5), CHUNKS), max_size=50))
def test_whatever_comes_no_more_is_begun_than_the_limit_says(rate: int, asked: list[tuple[float, int]]) -> None:
    limit, budget, now, begun, largest = WarmingLimit(0.0), warming_budget(0, 0.0), 0.0, 0, 0
    limit.change(rate, 0, 0.0)
    for pause_s, byte_count in asked:
        now += pause_s
        turn = limit.turn({}, Links(), now)
        if turn.admits(HERE, byte_count, budget):
            assert turn.wait_s == math.inf
            limit.began(HERE, byte_count, budget, Links(), now)
            begun, largest = begun + byte_count, max(largest, byte_count)
        else:  # and it says when
            assert 0 < turn.wait_s < math.inf
            later = limit.turn({}, Links(), now + turn.wait_s + 1e-6)
            assert later.admits(HERE, byte_count, budget)
    assert begun <= rate * (now + 0.1) + largest


@given(st.integers(1, 20), st.integers(0, 30))
def test_no_more_requests_than_may_be_over_all_endpoints(requests_max: int, before: int) -> None:
    limit, budget = WarmingLimit(0.0), warming_budget(0, 0.0)
    limit.change(0, requests_max, 0.0)
    turn = limit.turn(in_flight(before, MB), Links(), 0.0)
    admitted = [turn.admits(HERE if number % 2 else THERE, MB, budget) for number in range(40)]
    assert sum(admitted) == max(0, requests_max - before)
    assert turn.wait_s == math.inf  # the end of a request opens it, and no time


def test_what_was_admitted_and_not_begun_counts_for_its_turn_alone() -> None:
    limit, budget = WarmingLimit(0.0), warming_budget(0, 0.0)
    limit.change(0, 1, 0.0)
    for _ in range(3):
        turn = limit.turn({}, Links(), 0.0)
        assert turn.admits(HERE, MB, budget)
        assert not turn.admits(HERE, MB, budget)


# Manners


def test_alone_it_may_begin_whatever_the_endpoint_takes() -> None:
    store = Store(200 * MB, 8 * MB)
    store.run(10.0)
    assert store.most_in_flight == 32


@given(link=st.floats(MB, 2000 * MB), chunk=CHUNKS, before=st.integers(0, 5))
def test_beside_a_job_it_has_a_quarter_of_a_second_in_flight(link: float, chunk: int, before: int) -> None:
    """Over all endpoints."""
    limit, budget = WarmingLimit(0.0), warming_budget(0, 0.0)
    limit.observe(True, [], 100.0)
    turn, count = limit.turn(in_flight(before, chunk), links(link), 100.0), before
    while count < 10_000 and turn.admits(HERE if count % 2 else THERE, chunk, budget):
        count += 1
    assert count >= 1, "one request at least"
    assert count in (before, 1) or count * chunk <= 0.25 * link
    assert count == 10_000 or (count + 1) * chunk > 0.25 * link


def test_beside_a_job_the_link_is_used_all_the_same() -> None:
    store = Store(200 * MB, 8 * MB)
    assert store.run(20.0, used=True) >= 0.9 * 20 * 200 * MB


@pytest.mark.parametrize("link", [10 * MB, 200 * MB])
def test_while_a_job_waits_it_trickles_and_never_starves(link: int) -> None:
    store = Store(link, 8 * MB)
    begun = store.run(200.0, waits_for=HERE)
    assert store.most_in_flight == 1
    assert 0.8 * 0.05 * link * 200 <= begun <= 0.05 * link * 200 + store.chunk_bytes


@pytest.mark.parametrize("link", [10 * MB, 200 * MB])
def test_while_a_job_waits_elsewhere_it_has_one_request_half_of_the_time(link: int) -> None:
    store = Store(link, 8 * MB)
    begun = store.run(200.0, waits_for=THERE)
    assert store.most_in_flight == 1
    assert begun == pytest.approx(0.5 * link * 200, rel=0.1)


def test_what_was_in_flight_when_a_job_began_to_wait_ends_before_anything_is_begun() -> None:
    for endpoint in (HERE, THERE):
        store = Store(100 * MB, 8 * MB)
        store.run(1.0)
        assert len(store.left) == 32
        assert store.run(1.0, waits_for=endpoint) == 0


def test_it_goes_on_when_jobs_have_gone() -> None:
    limit, budget = WarmingLimit(0.0), warming_budget(0, 0.0)

    def turn(now: float, count: int) -> bool:
        last = limit.turn(in_flight(count, 8 * MB), links(100 * MB), now)
        admitted = last.admits(HERE, 8 * MB, budget)
        assert admitted or count == 4 or last.wait_s == pytest.approx(0.5 - now), "it says when"
        return admitted

    limit.observe(False, [HERE], 0.0)
    assert not turn(0.1, 1)
    assert turn(0.6, 1)
    assert not turn(9.9, 4)
    assert turn(10.1, 4)


def test_of_endpoints_that_are_over_nothing_is_kept() -> None:
    limit, budget = WarmingLimit(0.0), warming_budget(0, 0.0)
    for number in range(1000):
        limit.observe(True, [f"https://{number}"], float(number))
        limit.began(f"https://{number}", MB, budget, links(100 * MB), float(number))
        limit.turn({f"https://{number}": InFlight(1, MB)}, links(100 * MB), float(number))
    assert len(limit._endpoints) <= 3


# The link


@given(RATES, st.integers(1, 8 * MB))
def test_a_steady_link_is_measured(rate: int, chunk: int) -> None:
    meter, now = LinkMeter(), 5.0
    meter.began(now)
    while now < 5.0 + max(2.0, 10 * chunk / rate):
        now += max(0.01, chunk / rate)
        meter.came(int(max(0.01 * rate, chunk)), now)
    assert meter.bytes_per_s == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("rate", [10 * MB, 200 * MB])
def test_requests_that_end_together_are_measured_together(rate: int) -> None:
    """Eight that began together share the link, and end at the same time."""
    meter, now = LinkMeter(), 0.0
    meter.began(now)
    for _ in range(10):
        now += 8 * 8 * MB / rate
        for _ in range(8):
            meter.came(8 * MB, now)
    assert meter.bytes_per_s == pytest.approx(rate, rel=0.15)


def test_what_came_when_most_came_counts_for_a_while() -> None:
    meter, now = LinkMeter(), 0.0

    def second(chunk_mb: int) -> None:
        nonlocal now
        for _ in range(10):
            now += 0.1
            meter.came(chunk_mb * MB // 10, now)

    meter.began(now)
    second(50)
    now = 100.0
    meter.began(now)  # nothing was in flight meanwhile
    second(5)
    assert meter.bytes_per_s == pytest.approx(5 * MB, rel=0.01), "not the link of a minute ago"
    second(30)
    second(30)
    for _ in range(25):
        second(10)
    assert meter.bytes_per_s == pytest.approx(30 * MB, rel=0.01)
    for _ in range(10):
        second(10)
    assert meter.bytes_per_s == pytest.approx(10 * MB, rel=0.01)


def test_a_request_now_and_then_is_measured_without_the_pauses() -> None:
    meter = LinkMeter()
    for begin in (0.0, 100.0, 200.0):
        meter.began(begin)
        meter.came(8 * MB, begin + 1.0)
    assert meter.bytes_per_s == 8 * MB


def test_nothing_is_known_before_anything_came() -> None:
    meter = LinkMeter()
    assert meter.bytes_per_s == 0
    meter.began(0.0)
    meter.came(MB, 0.1)
    assert meter.bytes_per_s == 0


# What is in flight when a job comes


@given(st.floats(MB, 2000 * MB), st.lists(st.floats(0, 20), min_size=1, max_size=32), st.booleans(), st.booleans())
def test_what_is_given_up_leaves_a_quarter_of_a_second(
    link: float, began: list[float], waits: bool, is_measured: bool
) -> None:
    limit, now = WarmingLimit(0.0), 20.0
    requests = [(at, 8 * MB) for at in sorted(began)]
    limit.observe(True, [THERE] if waits else [], now)
    count = limit.excess(requests, links(link) if is_measured else Links(), now)
    left = len(requests) - count
    assert left >= 1
    if not waits:
        assert count == 0
    elif is_measured:
        assert (count > 0) == (len(requests) > 1 and len(requests) * 8 * MB > 0.5 * link)
        assert count == 0 or left == 1 or left * 8 * MB <= 0.25 * link
    else:  # what has not come in half a second will not come in the next
        assert (count > 0) == (len(requests) > 1 and now - requests[0][0] > 0.5)
