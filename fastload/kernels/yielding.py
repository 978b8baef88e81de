"""Giving way: a kernel that computes for long lets others have the processor first. `fastload.turns` says why.

It has to be done in here, once the GIL is let go of: that is when whoever has waited for it is woken, on this very
processor more often than not. As it costs the rest of the turn (on Linux since 6.17), who has got the processor back
late does not do it again for a while: with two other threads at work on two processors, as many batches are gathered as
without (170 of 23 MB a second), where giving way each time left 150.
"""

from __future__ import annotations

import os
import time

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.jit import array_out, generated, helper, int64, void

__all__ = ["LATE_NS", "NEVER", "PAUSE_NS", "give_way"]

# Nobody who only wakes up for a step keeps a processor for so long; and so long who does is not given way to again.
LATE_NS, PAUSE_NS = 1_000_000, 100_000_000
NEVER = np.iinfo(np.int64).max


@generated
def monotonic_ns() -> int:
    """The time of `time.monotonic_ns`."""
    return time.monotonic_ns()


@generated
def yield_processor() -> None:
    """sched_yield(2)."""
    os.sched_yield()


@helper(void(array_out(int64)))
def give_way(not_before_ns: NDArray[np.int64]) -> None:
    """Let others run, unless it is before `not_before_ns[0]`, which is written where they have run for long."""
    began_ns = monotonic_ns()
    if began_ns < not_before_ns[0]:
        return
    yield_processor()
    ended_ns = monotonic_ns()
    if ended_ns - began_ns > LATE_NS:
        not_before_ns[0] = ended_ns + PAUSE_NS
