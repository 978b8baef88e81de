"""The trainer's time is divided, and always adds up; in time that the tests pass in."""

import math
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.timing import activity
from fastload.timing.activity import CAUSES, Account, Waiting
from fastload.timing.stalls import Stalls


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(activity, "monotonic", clock)
    return clock


def maker_of(stalls: Stalls) -> Account:
    """The account of another thread."""
    made: list[Account] = []
    thread = threading.Thread(target=lambda: made.append(stalls.account()))
    thread.start()
    thread.join()
    # A thread's number is given again once it has ended, and here it is to stay.
    stalls._makers[-len(stalls._makers)] = stalls._makers.pop(thread.ident or 0)
    return made[0]


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    return {cause: round(each, 6) for cause, each in seconds.items() if each}


def test_a_wait_is_divided_by_what_makers_did_meanwhile(clock: Clock) -> None:
    stalls = Stalls(clock)
    one, other = maker_of(stalls), maker_of(stalls)
    one.switch("decode")
    clock.now_s += 10  # before the wait: counts nothing
    assert stalls.begin(has_task=True)
    clock.now_s += 2
    one.switch("fetch")
    other.switch("fetch")
    clock.now_s += 2
    one.switch("decode", was="disk")  # which it turns out to have been
    clock.now_s += 1
    stalls.end()
    # 2 decode; 2 disk beside 2 fetch; 1 decode beside 1 fetch, which goes on: of 8 thread-seconds 3, 2 and 3
    clock.now_s += 1
    assert stalls.delivered() == 16
    assert nonzero(stalls.seconds()) == {"decode": 1.875, "disk": 1.25, "fetch": 1.875}
    assert stalls.waits.count == 1
    assert stalls.waits.max_s == 5


def test_the_feeder_counts_while_nothing_is_with_the_pool(clock: Clock) -> None:
    stalls = Stalls(clock)
    maker = maker_of(stalls)
    stalls.feeder.switch("index")
    stalls.begin(has_task=False)
    clock.now_s += 3
    stalls.feeder.switch("listing")
    clock.now_s += 1
    stalls.tasked()
    stalls.feeder.switch("index")
    maker.switch("map")
    clock.now_s += 5
    stalls.tasked()  # more for the pool changes nothing
    stalls.end()
    stalls.delivered()
    assert nonzero(stalls.seconds()) == {"index": 3, "listing": 1, "map": 5}


def test_a_wait_in_which_no_thread_does_anything(clock: Clock) -> None:
    stalls = Stalls(clock)
    stalls.begin(has_task=True)
    clock.now_s += 1
    stalls.end()
    stalls.delivered()
    assert nonzero(stalls.seconds()) == {"other": 1}


def test_what_was_not_delivered_does_not_count_but_shows_at_once(clock: Clock) -> None:
    stalls = Stalls(clock)
    with stalls.own("startup"):
        clock.now_s += 2
    stalls.delivered()
    stalls.feeder.switch("fetch")
    stalls.begin(has_task=False)
    clock.now_s += 4
    assert not stalls.begin(has_task=True)  # in another thread
    assert nonzero(stalls.seconds()) == {"startup": 2}
    seconds, elapsed_s = stalls.seconds_until_now()
    assert (nonzero(seconds), elapsed_s) == ({"startup": 2, "fetch": 4}, 6)
    stalls.end()
    assert nonzero(stalls.seconds()) == {"startup": 2}
    assert (stalls.waits.count, stalls.settled_s) == (0, 2)


def test_another_process_says_what_the_time_went_for(clock: Clock) -> None:
    waiting = Waiting()
    account = Account(waiting)
    account.switch("map")
    clock.now_s += 4
    waiting.since_s = clock.now_s
    clock.now_s += 4
    account.divide({"decode": 2.0, "map": 4.0}, "transfer")
    assert nonzero(account.seconds) == {"decode": 2, "map": 4, "transfer": 2}
    assert nonzero(account.waited) == {"decode": 1, "map": 2, "transfer": 1}
    clock.now_s += 1
    account.divide({"decode": 50.0, "map": 50.0}, "transfer")  # more than there was: two clocks, or two threads
    assert nonzero(account.seconds) == {"decode": 2.5, "map": 4.5, "transfer": 2}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["switch", "begin", "tasked", "end", "deliver", "own", "divide", "nothing"]),
        st.integers(0, 3),  # which account
        st.sampled_from([*CAUSES, None]),
        st.floats(0.0, 3.0),
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_the_parts_add_up_whatever_happens(steps: list[tuple[str, int, activity.Cause | None, float]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activity, "monotonic", clock)
        for settled, until_now, elapsed_s, stalls in played(steps, clock):
            assert min(*settled.values(), *until_now.values()) >= 0.0
            assert sum(settled.values()) <= stalls.settled_s + 1e-6
            assert sum(until_now.values()) <= elapsed_s + 1e-6
            assert stalls.waits.sum_s <= stalls.settled_s + 1e-6


def played(
    steps: list[tuple[str, int, activity.Cause | None, float]], clock: Clock
) -> Iterator[tuple[dict[str, float], dict[str, float], float, Stalls]]:
    stalls = Stalls(clock)
    accounts = [stalls.feeder, *(maker_of(stalls) for _ in range(3))]
    waited = worked = 0.0  # as a model has it
    is_waiting = False
    for step, number, cause, seconds in steps:
        clock.now_s += seconds
        waited, worked = (waited + seconds, worked) if is_waiting else (waited, worked + seconds)
        account = accounts[number]
        match step:
            case "switch":
                account.switch(cause)
            case "divide" if account.cause is not None:
                account.divide({"decode": seconds, "map": 1.0}, "transfer")
            case "begin":
                stalls.begin(has_task=number > 0)
                is_waiting = True
            case "tasked":
                stalls.tasked()
            case "end":
                stalls.end()
                is_waiting = False
            case "own" if not is_waiting:
                with stalls.own(cause or "startup"):
                    clock.now_s += seconds
                stalls.next(lambda: clock.pass_by(seconds), cause or "map")  # noqa: B023  # it is called now
                waited += 2 * seconds
            case "deliver" if not is_waiting:
                stalls.delivered()
                assert math.isclose(sum(stalls.seconds().values()), waited, abs_tol=1e-6)
                assert math.isclose(stalls.settled_s, waited + worked, abs_tol=1e-6)
        yield stalls.seconds(), *stalls.seconds_until_now(), stalls
