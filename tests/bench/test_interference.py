"""What `bench.interference` makes of what it measured; the processes that measure take minutes and are not started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.interference import report
from bench.interference.cases import CASES
from bench.interference.counts import SERVED, WARM, Counts, role
from bench.interference.gaps import Gaps
from bench.interference.options import Options

Asked = list[tuple[Mapping[str, str], tuple[str, ...]]]


def measured(found: dict[str, Any], asked: Asked | None = None) -> Options:
    """Options whose processes have measured already: each prints what is `found` of its kind, and is noted."""

    class Measured(Options):
        def process(self, environment: Mapping[str, str], *arguments: str) -> Any:
            if asked is not None:
                asked.append((environment, arguments))
            return found[arguments[0]]

    return Measured(["records", "fallback"], [1], Path())


def test_threads_are_told_apart_by_their_names() -> None:
    names = ["MainThread", "fastload-feed", "fastload-decode-1", "fastload-consumer-x", "fastload-slots", "Thread-3"]
    assert [role(name) for name in names] == ["trainer", "feed", "decode", "reader", "others", "others"]


def test_batches_are_counted_in_runs() -> None:
    assert report.runs([8] * 8 + [16]) == [8, 9]
    assert report.runs([1] * (report.RUN - 1)) == []


@pytest.mark.parametrize(("taken", "is_met"), [(report.TAKEN_MAX, True), (report.TAKEN_MAX + 1, False)])
def test_what_the_trainer_takes_is_not_ours(capsys, taken: int, is_met: bool) -> None:
    batches = [{"decode": taken - 5, "feed": 5, "trainer": 100}] * 20
    counted = asdict(Counts(batches, 0.5, ["a place"]))
    asked: Asked = []
    options = measured({"count": {SERVED: counted, WARM: counted}}, asked)
    assert report.counts_met(options, {"A": "1"}) is is_met
    printed = capsys.readouterr().out
    assert ("missed" in printed) is not is_met
    assert "a place" in printed
    assert asked == [
        ({"A": "1"}, ("count", "records", "1")),
        ({"A": "1", **CASES["fallback"].environment}, ("count", "fallback", "1")),
    ]


@pytest.mark.parametrize(("later_ms", "is_met"), [(report.LATER_MS_MAX, True), (report.LATER_MS_MAX + 0.1, False)])
def test_gaps_are_judged_and_peers_are_not(capsys, later_ms: float, is_met: bool) -> None:
    found = Gaps([0.5, 0.6, 0.7], [0.5, 0.7, 1.7], later_ms, None, 30.0)
    asked: Asked = []
    assert report.gaps_met(measured({"gaps": asdict(found)}, asked), {}) is is_met
    lines = capsys.readouterr().out.splitlines()
    # As fast as they are trained on, which is judged, and as fast as they come, which is not.
    verdict = "met" if is_met else "missed"
    of_records = [line for line in lines if line.startswith(CASES["records"].what)]
    assert [line.endswith(verdict) for line in of_records] == [True, False] * 2
    assert [arguments[-1] for _, arguments in asked if "records" in arguments] == ["200", "inf"] * 2
    assert not any(line.endswith(("met", "missed")) for line in lines if line.startswith("Pillow"))


def test_without_a_compiler_nothing_is_counted(capsys) -> None:
    assert report.counts_met(measured({}), None)
    assert "no C compiler" in capsys.readouterr().out
