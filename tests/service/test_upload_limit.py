"""How many segments are sent at a time, in virtual time: over links and stores of several kinds, and beside loaders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.service.saving.upload_limit import AT_FIRST, UPLOADS_MAX, WAITED_S, UploadLimit
from fastload.store.watch import Attempt, Outcome

SEGMENT = 256 << 20


@dataclass
class Uploads:
    """A save of many segments, over a link that all share and connections of a limited rate, to a store that refuses
    what comes beside `taken_max` others.
    """

    link: float = math.inf
    connection: float = math.inf
    taken_max: int = UPLOADS_MAX
    limit: UploadLimit = field(default_factory=UploadLimit)
    now: float = 0.0
    sent: int = 0
    refused: int = 0
    begun: list[tuple[float, float]] = field(default_factory=list)  # when, and what is left of it
    limits: list[int] = field(default_factory=list)

    def run(self, segments: int) -> float:
        """Bytes a second for as many of them."""
        began, until = self.now, self.sent + segments
        while self.sent < until:
            while self.limit.has_room(self.now, is_waited_for=False):
                self.limit.began()
                if len(self.begun) >= self.taken_max:
                    self.refused += 1
                    self.now += 0.01
                    self.limit.ended([Attempt(self.now - 0.01, self.now, outcome=Outcome.THROTTLED)], self.now)
                    break
                self.begun.append((self.now, SEGMENT))
            self.limit.settle(self.now)
            rate = min(self.connection, self.link / len(self.begun))
            took = min(left for _, left in self.begun) / rate
            self.now += took
            left = [(at, left - took * rate) for at, left in self.begun]
            self.begun = [each for each in left if each[1] > 1]
            for at, _ in (each for each in left if each[1] <= 1):
                self.sent += 1
                self.limit.ended([Attempt(at, self.now, SEGMENT)], self.now)
                self.limits.append(self.limit.limit)
        return segments * SEGMENT / (self.now - began)


@pytest.mark.parametrize(("link", "connection"), [(2e9, 1e8), (1e9, 1e8), (2e8, 1e8), (2e8, 2e9), (5e7, 1e8)])
def test_as_many_as_the_link_can_use(link: float, connection: float) -> None:
    uploads = Uploads(link, connection)
    uploads.run(300)
    assert uploads.run(200) >= 0.9 * min(link, UPLOADS_MAX * connection)
    needed = link / connection
    assert max(uploads.limits[-200:]) <= max(AT_FIRST + 1, 1.5 * needed + 4)


def test_a_store_that_refuses_is_sent_less() -> None:
    uploads = Uploads(2e9, 1e8, taken_max=6)
    rate = uploads.run(300)
    assert rate >= 0.6 * 6e8
    assert uploads.refused <= 30
    assert max(uploads.limits[-100:]) <= 8


def test_no_answer_is_a_reason_to_send_less() -> None:
    limit = UploadLimit()
    limit.began()
    limit.ended([Attempt(0.0, 60.0, outcome=Outcome.TIMED_OUT)], 60.0)
    assert limit.limit < AT_FIRST


def test_what_was_found_stays_for_the_next_save() -> None:
    uploads = Uploads(2e9, 1e8)
    uploads.run(300)
    before = uploads.limit.limit
    uploads.now += 3600
    uploads.limit.settle(uploads.now)
    assert uploads.limit.limit == before > AT_FIRST


def test_a_loader_that_waits_goes_first_and_no_save_starves() -> None:
    limit = UploadLimit()
    limit.loader_waits(10.0)
    assert limit.has_room(10.1, is_waited_for=False)
    limit.began()
    assert not limit.has_room(10.1, is_waited_for=False)
    assert limit.has_room(10.1, is_waited_for=True)
    assert limit.has_room(10.0 + WAITED_S, is_waited_for=False)
    limit.ended([], 10.2)
    assert limit.has_room(10.2, is_waited_for=False)


@given(
    st.lists(
        st.tuples(st.sampled_from([*Outcome, None]), st.floats(0.001, 100), st.integers(0, SEGMENT), st.booleans()),
        max_size=60,
    )
)
def test_whatever_happens(happens: list[tuple[Outcome | None, float, int, bool]]) -> None:
    """Nothing in flight has room, and no more than the most are."""
    limit, now = UploadLimit(), 0.0
    for outcome, seconds, byte_count, waits in happens:
        now += seconds
        if waits:
            limit.loader_waits(now)
        assert limit.in_flight or limit.has_room(now, is_waited_for=False)
        assert 1 <= limit.limit <= UPLOADS_MAX
        assert limit.has_room(now, is_waited_for=True) == (limit.in_flight < limit.limit)
        if outcome is None:
            limit.settle(now)
        elif limit.has_room(now, is_waited_for=False):
            limit.began()
        elif limit.in_flight:
            good = outcome is Outcome.GOOD
            limit.ended([Attempt(now - seconds, now, byte_count if good else 0, outcome=outcome)], now)
