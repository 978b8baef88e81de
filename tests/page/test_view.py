"""What a browser is sent: bounded, whatever names and reports hold; and the slowest rank is the one that waits most."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.page.view import CHARACTERS_MOST, ROWS_MOST, Viewer
from tests.page.snapshots import consumer, data_set, job, snap


def report(rank: int, elapsed_s: float, epoch: int = 0, **stalls: float) -> dict[str, Any]:
    return {"rank": rank, "epoch": epoch, "elapsed_s": elapsed_s, "stalls": stalls, "samples": int(100 * elapsed_s)}


def test_stalls_are_of_the_last_half_minute_and_the_slowest_is_marked() -> None:
    viewer = Viewer()
    for second in range(100):
        waited = max(0.0, second - 60.0)  # rank 1 waits for nothing else from the 60th second on
        ranks = [report(1, second + 1.0, fetch=waited, decode=0.5), report(0, second + 1.0, decode=0.5 + 0.1 * second)]
        view = viewer.view(snap(100.0 + second, consumers=[consumer(n, each) for n, each in enumerate(ranks)]))
    assert [rank.rank for rank in view.ranks] == [0, 1]
    first, second_rank = view.ranks
    assert second_rank.waits == {"fetch": pytest.approx(1.0)}
    assert second_rank.work == pytest.approx(0.0)
    assert first.waits == {"decode": pytest.approx(0.1)}
    assert first.work == pytest.approx(0.9)
    assert [rank.is_slowest for rank in view.ranks] == [False, True]
    assert first.samples_per_s == pytest.approx(100.0)


def test_no_rank_is_called_slow_that_hardly_waits_or_is_alone() -> None:
    for reports in ([report(0, 10.0, fetch=0.1), report(1, 10.0, fetch=0.05)], [report(0, 10.0, fetch=9.0)]):
        view = Viewer().view(snap(100.0, consumers=[consumer(n, each) for n, each in enumerate(reports)]))
        assert not any(rank.is_slowest for rank in view.ranks)


def test_a_new_epoch_counts_from_its_beginning() -> None:
    viewer = Viewer()
    viewer.view(snap(100.0, consumers=[consumer(1, report(0, 500.0, fetch=400.0))]))
    view = viewer.view(snap(101.0, consumers=[consumer(1, report(0, 2.0, epoch=1, fetch=0.5))]))
    assert view.ranks[0].waits == {"fetch": 0.25}
    assert view.ranks[0].samples_per_s == 100.0


def test_rates_are_of_one_service() -> None:
    viewer = Viewer()
    assert viewer.view(snap(100.0, ram=10)).rates is None
    assert viewer.view(snap(101.0, ram=30)).rates == {"ram": 20.0, "disk": 0.0, "store": 0.0, "fetched": 0.0}
    assert viewer.view(snap(102.0, ram=5, started_at=2.0)).rates is None
    assert viewer.view(snap(50.0, ram=5, started_at=2.0)).rates is None  # the clock was set back


def test_names_and_lists_are_bounded() -> None:
    long = "\u202e<img onerror=alert(1)>" * 1000
    view = Viewer().view(
        snap(
            100.0,
            consumers=[
                consumer(number, {"stalls": {long: 1.0}, "elapsed_s": 2.0}, name=long, program=long)
                for number in range(1000)
            ],
            data_sets=[data_set(f"{number:04}{long}", byte_count=number) for number in range(1000)],
            jobs=[job(long)] * 1000,
            troubles=[long] * 1000,
        )
    )
    assert view.left_out == dict.fromkeys(("data_sets", "jobs", "ranks", "troubles"), 1000 - ROWS_MOST)
    assert view.data_sets[0].byte_count == 999
    assert len(msgspec.json.encode(view)) < 4 * ROWS_MOST * 10 * CHARACTERS_MOST
    assert len(view.troubles[0]) == CHARACTERS_MOST


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["rank", "epoch", "elapsed_s", "stalls", "samples", "verdict"])


@given(st.lists(st.dictionaries(KEYS, ANYTHING), min_size=2, max_size=4))
def test_a_report_may_hold_anything(reports: list[dict[str, Any]]) -> None:
    viewer = Viewer()
    for second, each in enumerate(reports):
        view = viewer.view(snap(100.0 + second, consumers=[consumer(1, each), consumer(2, reports[0])]))
        assert len(msgspec.json.decode(msgspec.json.encode(view))["ranks"]) == 2
