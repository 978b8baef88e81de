"""The guard: what it counts, and how it judges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from bench import quick
from bench.calls import Calls
from fastload.bench import schema
from fastload.bench.schema import Figure, Phase, Result
from fastload.cli import exits
from tests.benchmark.test_pure import result


def of(**values: list[float]) -> Result:
    found = result([1.0, 1.0, 1.0])
    figures = [
        Figure(name=name.replace("_", " "), unit="", values=each, better="less", steady=name != "samples")
        for name, each in values.items()
    ]
    found.phases = [Phase(name="cold", seconds=1.0, figures=figures)]
    return found


@pytest.mark.parametrize(
    ("now", "status"),
    [
        (of(requests=[100.0, 100.0, 100.0]), 0),
        (of(requests=[90.0, 90.0, 90.0]), 0),
        (of(requests=[110.0, 110.0, 110.0]), exits.WORSE),
        (of(memory=[115.0, 116.0, 117.0]), 0),
        (of(memory=[130.0, 131.0, 132.0]), exits.WORSE),
        (of(CPU_a_GB=[900.0, 910.0, 920.0]), 0),
        (of(yardsticks=[200.0, 210.0, 220.0]), exits.WORSE),
        (of(samples=[200.0, 210.0, 220.0]), 0),
    ],
)
def test_what_is_worse_by_more_than_its_bound_is_an_error(
    now: Result, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = deepcopy(now)
    before.machine.cpu = "another"
    before.phases[0].figures[0].values = [100.0, 100.0, 100.0]
    assert quick.judge(before, now) == status
    assert ("--update" in capsys.readouterr().out) == (status == exits.WORSE)


def test_cpu_seconds_are_not_judged_where_others_want_the_cores(capsys: pytest.CaptureFixture[str]) -> None:
    before, now = of(yardsticks=[100.0, 100.0, 100.0]), of(yardsticks=[200.0, 210.0, 220.0])
    for waits, status in (([1.0, 1.4], exits.WORSE), ([1.0, 1.6], 0)):
        figures = [Figure(name="seconds over CPU-seconds", unit="", values=waits)]
        now.phases[1:] = [Phase(name="photographs, yardstick", seconds=0.0, figures=figures)]
        assert quick.judge(before, now) == status
        assert ("not judged" in capsys.readouterr().out) == (status == 0)


def test_a_phase_that_is_lacking_is_an_error_too() -> None:
    now = of(requests=[1.0])
    now.phases[0].figures, now.phases[0].error = [], "it failed"
    assert quick.judge(of(requests=[1.0]), now) == exits.PARTIAL


def test_results_are_joined_by_name() -> None:
    found = quick.joint([result([1.0], digest="a"), result([2.0], digest="b")], ["photographs", "records"])
    assert [phase.name for phase in found.phases] == ["photographs, cold", "records, cold"]
    assert found.work.samples == 2
    other = quick.joint([result([1.0], digest="a"), result([2.0], digest="c")], ["photographs", "records"])
    assert found.work.digest != other.work.digest


def calls_of(work: Callable[[], object]) -> int:
    calls = Calls()
    calls.install()
    try:
        before = calls.so_far()
        work()
        return calls.so_far() - before
    finally:
        calls.remove()


def test_calls_are_counted_in_all_threads() -> None:
    def work() -> None:
        for _ in range(1000):
            os.getpid()

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert 1000 <= calls_of(work) <= 1010
    assert 1000 <= calls_of(in_a_thread) <= 1100


@pytest.mark.thorough
def test_a_guard_passes_what_it_has_measured_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "REPEATS", 1)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "FASTLOAD_IDLE_S"):
        monkeypatch.setenv(name, "0")  # so that it is as before afterwards
    baseline = tmp_path / "baseline.json"
    common = [f"--baseline={baseline}", f"--json={tmp_path}/now.json", f"--folder={tmp_path}/data", "--shards=1"]
    assert quick.main([*common, "--update"]) == 0
    measured = schema.read(baseline)
    names = {phase.name: {figure.name for figure in phase.figures} for phase in measured.phases}
    assert {"yardsticks a 1,000 samples", "wake-ups a batch", "requests"} <= names["photographs, cold"]
    assert names["records, calls"] == {"calls a batch"}
    for phase in measured.phases:
        for figure in phase.figures:
            figure.values = [value / 2 for value in figure.values]
    assert quick.judge(measured, schema.read(tmp_path / "now.json")) == exits.WORSE
