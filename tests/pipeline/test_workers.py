"""Worker processes end: with their trainer, whatever they are doing, and for whoever gives up on them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from fastload.errors import WorkerError
from fastload.pipeline.workers import WorkerOptions, Workers
from tests.patience import PATIENCE_S
from tests.processes import is_running, until


def sleeping(gathered: Any, slots: Any, reseed: Any) -> Any:
    time.sleep(600)


def started(make: Callable[..., Any], processes: int = 1, channels: int = 1) -> Workers:
    return Workers(WorkerOptions(make, processes, channels))  # type: ignore[arg-type]  # it is called as a Finish is


def call(workers: Workers) -> Any:
    with workers.lend() as channel:
        (made,) = channel.call(["gathered"])  # type: ignore[list-item]  # of which nothing is read
        return made


def calls(workers: Workers, count: int) -> list[threading.Thread]:
    """So many at a time, which will fail."""

    def run() -> None:
        with pytest.raises(WorkerError):
            call(workers)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _train(told: int) -> None:
    """A trainer: idle workers of one loader, and later ones, which hold their ends open, in the midst of a batch."""
    idle, busy = started(sleeping), started(sleeping, processes=2)
    calls(busy, 2)
    pids = [process.pid for workers in (idle, busy) for process in workers._processes]
    os.write(told, " ".join(map(str, pids)).encode())
    time.sleep(600)


def test_workers_end_with_a_trainer_that_is_killed_whatever_they_are_doing(monkeypatch):
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 0.1)
    here, told = os.pipe()
    trainer = os.fork()
    if not trainer:
        try:
            _train(told)
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(here, 1000).split()]
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert len(pids) == 3
    until(lambda: not any(map(is_running, pids)))
    os.close(here)
    os.close(told)


def test_whoever_gives_up_is_not_held_up_by_others_who_did_so_sooner(monkeypatch):
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 0.2)
    workers = started(sleeping, channels=2)
    threads = calls(workers, 2)
    until(workers._idle.empty)
    with ExitStack() as still_waiting:
        still_waiting.enter_context(workers.interrupted())
        with workers.interrupted():
            pass
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    workers.close()


def test_after_an_interruption_batches_have_their_time_again(monkeypatch):
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 0.1)
    monkeypatch.setattr("fastload.pipeline.workers._LOOK_UP_MS", 10)
    workers = started(lambda gathered, slots, reseed: time.sleep(0.5))
    with workers.interrupted(), workers.interrupted():
        pass
    assert call(workers) is None
    assert workers.is_usable
    workers.close()


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return _unreadable, ()


def _unreadable() -> Any:
    raise ValueError("cannot be read")


def test_a_connection_that_broke_off_is_not_used_again():
    workers = started(lambda gathered, slots, reseed: Unreadable())
    with pytest.raises(ValueError, match="cannot be read"):
        call(workers)
    with pytest.raises(WorkerError, match="failed before"):
        call(workers)
    assert not workers.is_usable
    workers.close()


def test_a_batch_whose_workers_are_let_go_says_so(monkeypatch):
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 0.1)
    workers = started(sleeping)
    told: list[WorkerError] = []

    def run() -> None:
        try:
            call(workers)
        except WorkerError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(workers._idle.empty)
    workers.close()
    thread.join(PATIENCE_S)
    assert "was let go while it made a batch" in str(told[0])
