"""How late a Python thread wakes up beside a load, and how long it waits for the GIL, in a process of its own."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from bench import gil
from bench.interference.loads import running
from bench.interference.options import Options

QUANTILES = (0.5, 0.99, 0.999)
ROUNDS, SPELL_S = 5, 2.0
NAP_S, STEP = 0.0005, 4000


@dataclass(frozen=True, slots=True)
class Gaps:
    """Between wake-ups: `QUANTILES` alone and beside the load, and how much later one in a thousand comes; how long one
    in a thousand waits for the GIL, where that is counted; and how often the load did its work a second.
    """

    idle_ms: list[float]
    loaded_ms: list[float]
    later_ms: float
    gil_ms: float | None
    per_s: float


def run(options: Options, name: str, threads: int, how: str, per_s: float) -> Gaps:
    """Gaps of the main thread, which `how` says sleeps or computes, by turns alone and beside a load, which does its
    work at most so often a second.
    """
    if options.first:
        come_first(1)  # as will the threads that are started from here on
    counter = gil.Counter() if gil.is_there() else None
    measure = sleeping if how == "sleeps" else computing
    idle, loaded = list[list[float]](), list[list[float]]()
    waits_ms = list[float]()
    with running(options.folder, name, threads, per_s) as load:
        if options.first:
            come_first(2)
        for _ in range(ROUNDS):
            load.pause()
            idle.append(measure(SPELL_S))
            load.go_on()
            with _waits(counter if how == "sleeps" else None) as waits:
                loaded.append(measure(SPELL_S))
            waits_ms += waits
        done = load.done
    worst = [[float(np.quantile(gaps, QUANTILES[-1])) for gaps in spells] for spells in (idle, loaded)]
    return Gaps(
        idle_ms=_quantiles_ms(idle),
        loaded_ms=_quantiles_ms(loaded),
        later_ms=statistics.median(late - soon for soon, late in zip(*worst, strict=True)) * 1e3,
        gil_ms=float(np.quantile(waits_ms, QUANTILES[-1])) if waits_ms else None,
        per_s=done / (ROUNDS * SPELL_S),
    )


def _waits(counter: gil.Counter | None) -> AbstractContextManager[list[float]]:
    """For a thread that wakes up: how long it waits for the GIL each time."""
    return nullcontext([]) if counter is None else counter.waits_ms()


def come_first(priority: int) -> None:
    """Let this thread run before all that has no real-time priority, or a lower one."""
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_RR, os.sched_param(priority))


def _quantiles_ms(spells: Sequence[Sequence[float]]) -> list[float]:
    found: list[float] = (np.quantile(np.concatenate(spells), QUANTILES) * 1e3).tolist()
    return found


def sleeping(seconds: float) -> list[float]:
    """The times between wake-ups of a thread that has next to nothing to do."""
    clock, sleep, gaps = time.perf_counter, time.sleep, []
    before = clock()
    end = before + seconds
    while before < end:
        sleep(NAP_S)
        now = clock()
        gaps.append(now - before)
        before = now
    return gaps


def computing(seconds: float) -> list[float]:
    """How long steps of a thread take that computes in Python."""
    clock, gaps = time.perf_counter, []
    before = clock()
    end = before + seconds
    while before < end:
        for _ in range(STEP):
            pass
        now = clock()
        gaps.append(now - before)
        before = now
    return gaps
