"""Giving way: a kernel that takes its time lets others have the processor first. `fastload.cpu_priority` says why.

It has to be done in here, once the GIL is let go of: that is when whoever has waited for it is woken, on this very
processor more often than not. As it costs the rest of the turn (on Linux since 6.17), a process that has got the
processor back late does not do it again for a while, the longer the more often in a row: with two other threads at work
on two processors, as many batches are gathered as without (170 of 23 MB a second), where giving way each time left 150.
"""

from __future__ import annotations

import os
import time

import numpy as np

from fastload.kernels.copying import array_at
from fastload.kernels.jit import generated, helper, int64, void

__all__ = ["LATE_NS", "NEVER", "PAUSE_MAX_NS", "PAUSE_MIN_NS", "give_way", "start_giving_way", "state"]

# Seldom does who only wakes up for a step keep a processor for so long; who computes does.
LATE_NS = 2_000_000
PAUSE_MIN_NS, PAUSE_MAX_NS = 10_000_000, 160_000_000
NEVER = np.iinfo(np.int64).max

state = np.array([NEVER, PAUSE_MIN_NS])
"""int64[2]: when this process may give way again, on the clock of `time.monotonic_ns`, and how long a pause follows
where it gets the processor back late then. Threads write it as they please: what one has found out is news to all."""


def start_giving_way() -> None:
    """From now on kernels of this process give way: it has threads for which others should not have to wait."""
    if state[0] == NEVER:
        state[0] = 0


@generated
def monotonic_ns() -> int:
    """The time of `time.monotonic_ns`."""
    return time.monotonic_ns()


@generated
def yield_processor() -> None:
    """sched_yield(2)."""
    os.sched_yield()


@helper(void(int64))
def give_way(address: int) -> None:
    """Let others run, unless it is too early for that: `state` is at `address`."""
    process = array_at(address, 2, np.int64)
    began_ns = monotonic_ns()
    if began_ns < process[0]:
        return
    yield_processor()
    ended_ns = monotonic_ns()
    if ended_ns - began_ns <= LATE_NS:
        process[1] = PAUSE_MIN_NS
        return
    process[0] = ended_ns + process[1]
    process[1] = min(2 * process[1], PAUSE_MAX_NS)
