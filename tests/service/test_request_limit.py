"""How many requests at once a controller comes to allow, against stores in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.service.fetching.request_limit import AT_FIRST, Controller, Learnt
from fastload.store.watch import Attempt, Outcome
from tests.service.virtual import CHUNK_BYTES, Profile, Store

CAPPED = Profile(connection_bytes_per_s=1e9, total_bytes_per_s=200e6, noise=0.3)
NEAR, MIDDLE, FAR = (Profile(first_byte_s=first_byte_s, noise=0.3) for first_byte_s in (0.02, 0.1, 0.2))


def run(profile: Profile, seconds: float = 20.0, seed: int = 0) -> Store:
    """A store with a controller, after so much time."""
    store = Store(profile, Controller(), seed=seed)
    store.run(seconds)
    return store


def best(profile: Profile) -> float:
    """What the best fixed setting gets in MB/s."""
    found = []
    for fixed in (4, 6, 8, 12, 16, 24, 32):
        store = Store(profile, fixed=fixed)
        store.run(6.0)
        found.append(store.mb_per_s(1.0, 6.0))
    return max(found)


@pytest.mark.parametrize("profile", [NEAR, MIDDLE, FAR], ids=["20ms", "100ms", "200ms"])
@pytest.mark.parametrize("seed", range(3))
def test_most_of_what_the_best_setting_gets_without_far_too_many(profile: Profile, seed: int) -> None:
    store = run(profile, 25.0, seed)
    assert store.mb_per_s(5.0, 25.0) >= 0.9 * best(profile)
    assert store.most_in_flight(0.0, 25.0) <= 2 * profile.needed


@pytest.mark.parametrize("seed", range(3))
def test_cuts_that_seem_to_lose_nothing_do_not_lose_much_together(seed: int) -> None:
    """A store near by, whose link two connections nearly fill: what is missing is the time between their requests."""
    profile = Profile(connection_bytes_per_s=500e6, total_bytes_per_s=200e6, noise=0.05)
    store = run(profile, 60.0, seed)
    assert store.mb_per_s(0.0, 60.0) >= 0.97 * best(profile)
    assert store.most_in_flight(30.0, 60.0) <= AT_FIRST + 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NEAR, FAR),
        (FAR, NEAR),
        (MIDDLE, replace(MIDDLE, total_bytes_per_s=1200e6)),
        (MIDDLE, replace(MIDDLE, total_bytes_per_s=150e6)),
    ],
    ids=["farther", "nearer", "wider", "narrower"],
)
def test_it_follows_a_store_that_changes(before: Profile, after: Profile) -> None:
    store = run(before, 12.0)
    store.profile = after
    store.run(30.0)
    attainable = min(after.total_bytes_per_s / 1e6, best(after) if after.total_bytes_per_s <= 400e6 else 1200.0)
    assert store.mb_per_s(22.0, 42.0) >= 0.9 * attainable


@pytest.mark.parametrize(
    ("profile", "is_saturated"),
    [
        (CAPPED, True),
        (replace(MIDDLE, total_bytes_per_s=150e6), True),
        # Each connection has its own limit, and the link takes more of them than may be asked.
        (Profile(first_byte_s=0.1, connection_bytes_per_s=1e6, total_bytes_per_s=1e9, noise=0.05), False),
    ],
    ids=["near", "farther", "slow connections"],
)
def test_it_knows_whether_more_would_bring_more(profile: Profile, is_saturated: bool) -> None:
    store = Store(profile, Controller(requests_max=16))
    assert store.controller.saturated_at == 0
    store.run(60.0)
    assert (store.controller.saturated_at > 0) == is_saturated
    store.profile = replace(profile, throttles_above=1)
    store.run(20.0)
    assert store.controller.saturated_at == 0


@pytest.mark.parametrize("above", [3, 6, 10])
def test_a_store_that_throttles_is_asked_less_than_it_minds(above: int) -> None:
    store = run(replace(MIDDLE, throttles_above=above), 90.0)
    assert store.most_in_flight(60.0, 90.0) <= 1.5 * above  # it asks now and then whether that has changed
    assert len([at for at in store.refused_s if at > 60.0]) <= 5
    alone = Store(MIDDLE, fixed=above)
    alone.run(10.0)
    assert store.mb_per_s(60.0, 90.0) >= 0.75 * alone.mb_per_s(1.0, 10.0)


@pytest.mark.parametrize("profile", [NEAR, MIDDLE, FAR], ids=["20ms", "100ms", "200ms"])
def test_a_store_that_is_known_is_asked_enough_from_the_first_second(profile: Profile) -> None:
    first = run(profile, 25.0)
    assert first.controller is not None
    known = first.controller.learnt()
    again = Store(profile, Controller(known=known), seed=1)
    again.run(20.0)
    assert again.limits[0][1] == known.limit
    # What is needed begins all at once, and takes some seconds to spread out.
    assert again.mb_per_s(5.0, 20.0) >= 0.9 * best(profile)
    assert again.mb_per_s(0.0, 2.0) >= 0.95 * first.mb_per_s(0.0, 2.0)
    assert again.most_in_flight(0.0, 20.0) <= 2 * profile.needed


@pytest.mark.parametrize(("before", "after"), [(NEAR, FAR), (FAR, NEAR)], ids=["farther", "nearer"])
def test_a_store_that_is_not_as_it_was_known_is_learnt_anew(before: Profile, after: Profile) -> None:
    first = run(before, 25.0)
    assert first.controller is not None
    store = Store(after, Controller(known=first.controller.learnt()))
    store.run(25.0)
    assert store.mb_per_s(10.0, 25.0) >= 0.9 * best(after)
    assert store.most_in_flight(10.0, 25.0) <= 2.2 * after.needed


@given(
    limit=st.integers(-5, 10**9),
    rates=st.tuples(st.floats(), st.floats()),
    first_byte_s=st.none() | st.floats(),
    throttled_at=st.integers(-5, 10**9),
)
def test_what_is_known_may_be_nonsense(
    limit: int, rates: tuple[float, float], first_byte_s: float | None, throttled_at: int
) -> None:
    controller = Controller(64, known=Learnt(limit, rates[0], first_byte_s, rates[1], throttled_at))
    assert 1 <= controller.limit <= 64
    for number in range(40):
        controller.ended(Attempt(number, number + 0.5, 1000, 0.1), number + 0.5)
        assert 1 <= controller.limit <= 64


def test_a_store_that_throttled_is_asked_less_at_first() -> None:
    known = Learnt(40, 4e8, 0.02, 8e7, throttled_at=20)
    assert Controller(known=known).limit == 18
    assert Controller(known=known, fixed=5).limit == 5


def test_a_store_that_throttled_once_is_not_asked_less_for_ever() -> None:
    """A run that began as it had throttled, long after, took a minute for what it could have had at once."""
    store = run(replace(MIDDLE, throttles_above=2), 20.0)
    assert 0 < store.controller.learnt().throttled_at < AT_FIRST
    store.profile = MIDDLE
    store.run(150.0)
    learnt = store.controller.learnt()
    assert learnt.throttled_at == 0
    assert learnt.limit_to_start == learnt.limit > AT_FIRST


@pytest.mark.parametrize("seed", range(3))
def test_far_too_many_are_given_back_although_rounds_take_long(seed: int) -> None:
    """A raise was due again after each of them, and no cut was ever tried; then all cuts were undone at the first that
    lost something.
    """
    slow = replace(MIDDLE, connection_bytes_per_s=5e6)
    store = run(slow, 60.0, seed)
    store.profile = MIDDLE
    store.run(200.0)
    assert store.most_in_flight(160.0, 260.0) <= 4 * MIDDLE.needed
    assert store.mb_per_s(160.0, 260.0) >= 0.97 * best(MIDDLE)


@pytest.mark.parametrize(
    ("profile", "core_wait_s"),
    [(NEAR, 0.03), (NEAR, 0.1), (CAPPED, 0.1), (CAPPED, 0.3), (FAR, 0.1)],
    ids=["20ms-30ms", "20ms-100ms", "capped-100ms", "capped-300ms", "200ms-100ms"],
)
def test_a_service_that_waits_for_cores_keeps_the_link_full(profile: Profile, core_wait_s: float) -> None:
    """Answers that it saw late were taken for a slow store and for too many requests: beside other work a link of 200
    MB/s was used to 0.7 to 0.9, with three requests at times.
    """
    store = run(replace(profile, core_wait_s=core_wait_s), 40.0)
    assert store.mb_per_s(15.0, 40.0) >= 0.97 * profile.total_bytes_per_s / 1e6
    assert min(limit for _, limit in store.limits) >= AT_FIRST


def test_waits_for_cores_that_end_leave_no_more_requests_than_before() -> None:
    store = run(replace(CAPPED, core_wait_s=0.1), 15.0)
    assert store.most_in_flight(5.0, 15.0) > 2 * AT_FIRST
    store.profile = CAPPED
    store.run(45.0)
    assert store.mb_per_s(15.0, 60.0) >= 0.97 * best(CAPPED)
    assert store.most_in_flight(50.0, 60.0) <= AT_FIRST + 2


def test_a_timeout_of_a_thread_without_a_core_is_no_refusal() -> None:
    controller = Controller(start=20)
    controller.ended(Attempt(0.0, 30.0, outcome=Outcome.TIMED_OUT, waited_s=25.0), 30.0)
    assert controller.limit == 20
    assert controller.timed_out_count == 1
    controller.ended(Attempt(0.0, 30.0, outcome=Outcome.TIMED_OUT, waited_s=1.0), 30.0)
    assert controller.limit == 14


def test_a_store_that_throttles_is_asked_no_more_for_want_of_cores() -> None:
    store = run(replace(MIDDLE, throttles_above=10, core_wait_s=0.1), 60.0)
    assert store.most_in_flight(30.0, 60.0) <= 2 * 10


def test_a_few_answers_that_hang_are_no_news() -> None:
    profile = replace(MIDDLE, slow_share=0.01, slow_times=20.0)
    store = run(profile, 40.0)
    assert store.most_in_flight(0.0, 40.0) <= 2.5 * profile.needed
    assert store.mb_per_s(5.0, 40.0) >= 0.8 * best(MIDDLE)


def test_nothing_changes_while_there_is_slack() -> None:
    controller = Controller()
    store = Store(MIDDLE, controller, wanted_max=AT_FIRST - 1)
    store.run(20.0)
    assert {limit for _, limit in store.limits} == {AT_FIRST}


def test_a_fixed_limit_stays() -> None:
    store = Store(replace(MIDDLE, throttles_above=10), Controller(fixed=32))
    store.run(5.0)
    assert {limit for _, limit in store.limits} == {32}
    assert store.controller is not None
    assert store.controller.throttled_count == len(store.refused_s) > 0


def test_a_burst_of_refusals_counts_once_and_a_timeout_too() -> None:
    controller = Controller(start=20)
    for _ in range(10):
        controller.ended(Attempt(0.0, 1.0, outcome=Outcome.THROTTLED), 1.0)
    assert controller.limit == 14
    assert controller.throttling(1.0)
    assert not controller.throttling(10.0)
    controller.ended(Attempt(2.0, 32.0, outcome=Outcome.TIMED_OUT), 32.0)
    assert controller.limit == 9
    controller.ended(Attempt(33.0, 34.0, outcome=Outcome.FAILED), 34.0)
    assert controller.limit == 9


@pytest.mark.parametrize("profile", [NEAR, MIDDLE, FAR], ids=["20ms", "100ms", "200ms"])
def test_what_was_had_before_a_timeout_brings_the_limit_back_no_sooner(profile: Profile) -> None:
    """Fewer requests get less, but not because something was lost by cutting too much."""
    store = run(profile, 30.0)
    controller = store.controller
    assert controller is not None
    controller.ended(Attempt(store.now_s, store.now_s, outcome=Outcome.TIMED_OUT), store.now_s)
    refused = controller.limit
    store.run(2.5)
    assert controller.limit <= refused


@given(
    limit_max=st.integers(1, 300),
    ends=st.lists(
        st.tuples(st.floats(0.001, 5.0), st.floats(0.0, 1.0), st.integers(0, CHUNK_BYTES), st.sampled_from(Outcome)),
        max_size=300,
    ),
    slack=st.sets(st.integers(0, 300)),
)
def test_the_limit_is_always_within_its_bounds(
    limit_max: int, ends: list[tuple[float, float, int, Outcome]], slack: set[int]
) -> None:
    controller = Controller(limit_max)
    now = 0.0
    for number, (seconds, first_byte, byte_count, outcome) in enumerate(ends):
        if number in slack:
            controller.slack(now)
        now += 0.1 * seconds
        good = outcome is Outcome.GOOD
        attempt = Attempt(now - seconds, now, byte_count if good else 0, first_byte * seconds, outcome)
        controller.ended(attempt, now)
        assert 1 <= controller.limit <= limit_max
    assert controller.learnt().limit <= limit_max
