"""Giving way: a kernel that takes its time lets others have the processor first. `fastload.turns` says why.

It has to be done in here, once the GIL is let go of: that is when whoever has waited for it is woken, on this very
processor more often than not. As it costs the rest of the turn (on Linux since 6.17), a process that has got the
processor back late does not do it again for a while: with two other threads at work on two processors, as many batches
are gathered as without (170 of 23 MB a second), where giving way each time left 150.
"""

from __future__ import annotations

import os
import time

import numpy as np

from fastload.kernels.copying import array_at
from fastload.kernels.jit import generated, helper, int64, void

__all__ = ["LATE_NS", "NEVER", "PAUSE_NS", "give_way", "not_before_ns", "start_giving_way"]

# Nobody who only wakes up for a step keeps a processor for so long; and so long who does is not given way to again.
LATE_NS, PAUSE_NS = 1_000_000, 100_000_000
NEVER = np.iinfo(np.int64).max

not_before_ns = np.array([NEVER])
"""int64[1]: when this process may give way again, on the clock of `time.monotonic_ns`. Threads write it as they please:
what one has found out is news to all."""


def start_giving_way() -> None:
    """From now on kernels of this process give way: it has threads for which others should not have to wait."""
    if not_before_ns[0] == NEVER:
        not_before_ns[0] = 0


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
    """Let others run, unless it is too early for that: `not_before_ns` is at `address`."""
    not_before = array_at(address, 1, np.int64)
    began_ns = monotonic_ns()
    if began_ns < not_before[0]:
        return
    yield_processor()
    ended_ns = monotonic_ns()
    if ended_ns - began_ns > LATE_NS:
        not_before[0] = ended_ns + PAUSE_NS
