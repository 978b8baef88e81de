"""Yielding the processor: a kernel that takes long first lets other threads run. `fastload.cpu_priority` says why.

It has to happen inside the kernel, after the GIL was released: that is when a thread that waited for it is woken, on
this very processor more often than not. As it costs the rest of the time slice (on Linux since 6.17), a process that
got the processor back late pauses before it yields again, the longer the more often in a row: with two other threads at
work on two processors, as many batches are gathered as without (170 of 23 MB a second); yielding every time left 150.
"""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_out, generated, helper, int64, void

__all__ = ["LATE_NS", "NEVER", "PAUSE_MAX_NS", "PAUSE_MIN_NS", "start_yielding", "yield_state", "yield_to_others"]

# A thread that only wakes up for a step seldom keeps a processor for so long; one that computes does.
LATE_NS = 2_000_000
PAUSE_MIN_NS, PAUSE_MAX_NS = 10_000_000, 160_000_000
NEVER = np.iinfo(np.int64).max

yield_state = np.array([NEVER, PAUSE_MIN_NS])
"""int64[2]: when this process may yield again, on the clock of `time.monotonic_ns`, and how long it pauses if it then
gets the processor back late. Threads share it without a lock: a lost update costs one yield."""


def start_yielding() -> None:
    """From now on kernels of this process yield: it has threads that others should not have to wait for."""
    if yield_state[0] == NEVER:
        yield_state[0] = 0


@generated
def monotonic_ns() -> int:
    """The time of `time.monotonic_ns`."""
    return time.monotonic_ns()


@generated
def yield_processor() -> None:
    """sched_yield(2)."""
    os.sched_yield()


@helper(void(array_out(int64)))
def yield_to_others(state: NDArray[np.int64]) -> None:
    """Let other threads run, unless it is too early; `state` is `yield_state`. Kernels call it first of all."""
    began_ns = monotonic_ns()
    if began_ns < state[0]:
        return
    yield_processor()
    ended_ns = monotonic_ns()
    if ended_ns - began_ns <= LATE_NS:
        state[1] = PAUSE_MIN_NS
        return
    state[0] = ended_ns + state[1]
    state[1] = min(2 * state[1], PAUSE_MAX_NS)
