"""How often a consumer may ask for a batch: the least time a batch at which an accelerator is busy enough. Pure.

Its use falls where it takes batches faster than they come, so the least time is found by bisection, from around the
time that a batch takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from fastload.bench.schema import Figure, Phase, Series
from fastload.bench.verdict import Demand

_BISECTIONS = 5

Tried = list[tuple[float, float]]
"""Times a batch, and the accelerator's use at each."""


def search(use_at: Callable[[float], float], alone_s: float, busy: float) -> Tried:
    """What was tried. `alone_s` is the time a batch at which the loader gives them by itself."""
    tried: Tried = []
    low, high = 0.8 * alone_s, 1.2 * alone_s
    step_s = high
    for _ in range(_BISECTIONS + 1):
        use = use_at(step_s)
        tried.append((step_s, use))
        if use >= busy:
            high = step_s
        else:
            low, high = step_s, max(high, 1.3 * step_s)
        step_s = (low + high) / 2
    return sorted(tried)


def found(state: str, tried: Tried, busy: float, *, is_given: bool) -> Demand:
    """What was tried comes to: the least time that is enough. Where there was none, or one time was given, the last."""
    enough = [pair for pair in tried if pair[1] >= busy]
    step_s, use = tried[-1] if is_given or not enough else enough[0]
    return Demand(state, step_s, use, is_given=is_given or not enough)


def add(phase: Phase, demand: Demand, tried: Tried, *, is_given: bool) -> None:
    """Its figures, and the curve."""
    state = demand.state.lower()
    better = "" if is_given else "less"
    phase.figures += [
        Figure(name=f"{state}: time a batch", unit="s", values=[demand.step_s], better=better),  # type: ignore[arg-type]
        Figure(name=f"{state}: accelerator use", unit="", values=[demand.utilisation], better="more"),
    ]
    phase.series.append(
        Series(
            name=f"accelerator use, {state}",
            x_unit="batches/s",
            y_unit="share",
            xs=[1 / step for step, _ in reversed(tried)],
            ys=[use for _, use in reversed(tried)],
        )
    )
