"""How many random cases the properties of the plan are tried on: few with all tests, many with `tests.plan.many`."""

from __future__ import annotations

import os

from hypothesis import settings

SCALE_VARIABLE = "FASTLOAD_PLAN_CASES_SCALE"
_SCALE = float(os.environ.get(SCALE_VARIABLE, "0.25"))

# How many there are at a scale of one, of all test functions that were imported.
counts: list[int] = []


def cases(count: int) -> settings:
    """Settings for a quarter of so many cases of one property, or as many times that as the environment says."""
    counts.append(count)
    return settings(max_examples=max(1, round(count * _SCALE)), deadline=None)
