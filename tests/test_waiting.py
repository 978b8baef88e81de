"""Waits end, and long ones are told of."""

import logging
import threading

import pytest

from fastload import waiting
from fastload.errors import WaitTimeoutError
from fastload.waiting import Waits, wait


class Time:
    """Passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Condition(threading.Condition):
    def __init__(self, time: Time) -> None:
        super().__init__()
        self.time = time

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.time.now_s += timeout
        return False


@pytest.fixture
def condition(monkeypatch: pytest.MonkeyPatch) -> Condition:
    time = Time()
    monkeypatch.setattr(waiting, "time", time)
    monkeypatch.setattr(waiting, "_notices", waiting._Notices())
    return Condition(time)


def test_a_long_wait_is_told_of_once_a_minute(condition: Condition, caplog: pytest.LogCaptureFixture) -> None:
    waits = Waits()
    with pytest.raises(WaitTimeoutError, match="gave up after 100 s waiting for godot"), condition:
        wait(condition, lambda: False, "chunk", what="godot", waits=waits, deadline_s=100, more="read the play")
    assert waits.seconds()["chunk"] == 100
    assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
        (logging.WARNING, f"has been waiting for {seconds} s for godot; read the play") for seconds in (10, 70)
    ]


def test_short_waits_and_those_within_this_process_are_not_told_of(
    condition: Condition, caplog: pytest.LogCaptureFixture
) -> None:
    end_s = condition.time.now_s + 9
    with condition:
        wait(condition, lambda: condition.time.now_s >= end_s, "chunk", what="a chunk", more="a log")
        with pytest.raises(WaitTimeoutError):
            wait(condition, lambda: False, "batch", what="the next batch", deadline_s=100)
    assert not caplog.records
