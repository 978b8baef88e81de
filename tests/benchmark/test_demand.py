"""The search for the least time a batch: of consumers whose use is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.bench import demand
from fastload.bench.schema import Phase


def use_of(batch_s: float, step_s: float) -> float:
    """An accelerator that takes batches of a loader which needs `batch_s` for each."""
    return min(1.0, step_s / max(step_s, batch_s))


@given(st.floats(1e-4, 10.0), st.floats(0.5, 2.0), st.sampled_from([0.7, 0.9]))
def test_the_least_time_is_found_even_from_a_wrong_guess(batch_s: float, guess: float, busy: float) -> None:
    tried = demand.search(lambda step_s: use_of(batch_s, step_s), batch_s * guess, busy)
    found = demand.found("Cached", tried, busy, is_given=False)
    assert not found.is_given
    assert found.utilisation >= busy
    least = busy * batch_s
    assert least <= found.step_s <= max(1.1 * least, 0.85 * guess * batch_s)  # it does not look far below the guess


def test_what_never_suffices_is_said_as_a_given_time_is() -> None:
    tried = demand.search(lambda step_s: 0.3, 0.1, 0.9)
    found = demand.found("Cached", tried, 0.9, is_given=False)
    assert (found.is_given, found.utilisation) == (True, 0.3)
    assert found.step_s == max(step_s for step_s, _ in tried)


@pytest.mark.parametrize("is_given", [False, True])
def test_figures_are_those_of_what_was_found(is_given: bool) -> None:
    tried = [(0.1, 0.5), (0.2, 0.95)]
    phase = Phase(name="demand", seconds=0.0)
    demand.add(phase, demand.found("Cached", tried, 0.9, is_given=is_given), tried, is_given=is_given)
    assert (phase.value("cached: time a batch"), phase.value("cached: accelerator use")) == (0.2, 0.95)
    assert phase.figures[0].better == ("" if is_given else "less")
    assert (phase.series[0].xs, phase.series[0].ys) == ([5.0, 10.0], [0.95, 0.5])
