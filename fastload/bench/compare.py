"""Whether two results differ: per figure the ratio of medians with a bootstrap interval, and a word. Pure.

The interval is that of the ratio of medians over resamples of both sides' runs (Efron's percentile bootstrap, 95 %). A
figure of one run a side has no interval: it is judged only where it is steady, and then by a fixed tolerance, since
what does not depend on the neighbours moves by a few percent from run to run.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastload.bench.schema import Figure, Result
from fastload.errors import ConfigError

RESAMPLES = 2000
# Less than that is no change, whatever the interval says: what no user would feel.
LEAST = 0.02
# The same for figures of one run, which have no interval.
_LEAST_OF_ONE = 0.05


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of both: `ratio` is the second's median over the first's, between `low` and `high`."""

    phase: str
    name: str
    unit: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    word: str  # "better", "worse", "no change", "too few runs", "changed" (where neither way is better)
    steady: bool

    @property
    def loss(self) -> float:
        """By how much it is worse, as a share; 0 where it is not."""
        return abs(self.ratio - 1) if self.word == "worse" else 0.0


def compare(
    before: Result, after: Result, *, anyway: bool = False, other_machine: bool = False, seed: int = 0
) -> list[Change]:
    """Every figure that both have. ConfigError where they did other work, unless `anyway`, or ran on another machine,
    unless either.
    """
    if not anyway:
        _check_work(before, after)
    if not (anyway or other_machine):
        _check_machine(before, after)
    changes = []
    for phase in before.phases:
        other = after.phase(phase.name)
        if phase.error or other is None:
            continue
        found = {figure.name: figure for figure in other.figures}
        for figure in phase.figures:
            if figure.name in found and figure.values and found[figure.name].values:
                changes.append(_change(phase.name, figure, found[figure.name], random.Random(seed)))
    return changes


def too_bad(changes: Iterable[Change], bounds: Mapping[str, float]) -> list[Change]:
    """What is worse by more than may be. A bound by the beginning of a figure's name, the longest that fits, holds for
    that figure; the one of "" for all others that are steady.
    """
    found = []
    for each in changes:
        names = [name for name in bounds if each.name.startswith(name) and (name or each.steady)]
        if names and each.loss > bounds[max(names, key=len)]:
            found.append(each)
    return found


def lost(before: Result, after: Result) -> list[str]:
    """Phases of the first result that failed in the second or that it did not come to, a line each."""
    failed = {phase.name: phase.error for phase in after.phases if phase.error}
    there = {phase.name for phase in after.phases} - failed.keys()
    had = [phase.name for phase in before.phases if phase.figures and not phase.error and phase.name not in there]
    return [f"{name}: not compared, the second result was interrupted" for name in had if after.interrupted] or [
        f"{name}: not compared, it failed in the second result: {failed[name]}" for name in had if name in failed
    ]


def _check_work(before: Result, after: Result) -> None:
    if before.work.digest != after.work.digest:
        ours, theirs = _facts(before), _facts(after)
        other = [f"{name}: {ours.get(name, '-')} and {theirs.get(name, '-')}" for name in {**ours, **theirs}]
        differences = "; ".join(
            each for name, each in zip({**ours, **theirs}, other, strict=True) if ours.get(name) != theirs.get(name)
        )
        raise ConfigError(
            f"the two results did other work ({differences or 'other data'}); --anyway compares them all the same"
        )


def _check_machine(before: Result, after: Result) -> None:
    for name in ("cpu", "cores", "kernel", "file_system"):
        one, two = getattr(before.machine, name), getattr(after.machine, name)
        if one != two:
            raise ConfigError(
                f"the two results are of other machines ({name}: {one} and {two}); --other-machine compares what does "
                "not depend on it"
            )


def _facts(result: Result) -> dict[str, str]:
    work = result.work
    return {"data": " ".join(work.urls), "shards": str(work.shards), "bytes": str(work.byte_count), **work.options}


def _change(phase: str, before: Figure, after: Figure, source: random.Random) -> Change:
    one, two = statistics.median(before.values), statistics.median(after.values)
    ratio = _ratio(one, two)
    fewest = min(len(before.values), len(after.values))
    low = high = ratio
    if fewest > 1:
        low, high = interval(before.values, after.values, source)
    word = _word(before, ratio, low, high, fewest)
    return Change(phase, before.name, before.unit, one, two, ratio, low, high, word, before.steady)


def _word(figure: Figure, ratio: float, low: float, high: float, fewest: int) -> str:
    if fewest < 2 and not figure.steady:
        return "too few runs"
    least = LEAST if fewest > 1 else _LEAST_OF_ONE
    if low <= 1.0 <= high and ratio != 1.0 and fewest > 1:
        return "no change"
    if abs(ratio - 1) < least:
        return "no change"
    if not figure.better:
        return "changed"
    return "better" if (ratio > 1) == (figure.better == "more") else "worse"


def interval(before: Sequence[float], after: Sequence[float], source: random.Random) -> tuple[float, float]:
    """The 95 % interval of the ratio of medians."""
    ratios = sorted(
        _ratio(
            statistics.median(source.choices(before, k=len(before))),
            statistics.median(source.choices(after, k=len(after))),
        )
        for _ in range(RESAMPLES)
    )
    edge = int(RESAMPLES * 0.025)
    return ratios[edge], ratios[-edge - 1]


def _ratio(before: float, after: float) -> float:
    if before == 0:
        return 1.0 if after == 0 else float("inf")
    return after / before
