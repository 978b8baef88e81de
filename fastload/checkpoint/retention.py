"""Which steps of a run are kept: a decision about what was seen in a store, without I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from fastload.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What a run keeps; a step stays that any of these names.

    The newest `last` steps; those that `every` divides; and the `best` by their metric, of which the lowest, or the
    highest, `best_is` good. 0: none for that reason. The newest step, and the one that was saved last, always stay.
    """

    last: int = 1
    every: int = 0
    best: int = 0
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 0), ("best", 0)):
            count = getattr(self, name)
            if type(count) is not int or count < least:
                why = ", since the newest step always stays" if least else ""
                raise ConfigError(f"Keep({name}={count!r}): give a whole number of {least} or more{why}")
        if self.best_is not in ("lowest", "highest"):
            raise ConfigError(f"Keep(best_is={self.best_is!r}): write lowest or highest")


@dataclass(frozen=True, slots=True)
class Committed:
    """A step that is one: when it was committed, and its metric."""

    step: int
    at_s: float
    metric: float | None = None


def expendable(steps: Iterable[Committed], keep: Keep, under_way: Collection[int] = ()) -> list[int]:
    """The steps that may go, in order. Those `under_way` are being saved anew, or in use, and stay."""
    in_order = sorted(steps, key=lambda each: each.step)
    if not in_order:
        return []
    sign = 1 if keep.best_is == "lowest" else -1
    # Of several that are as good the newest.
    by_metric = sorted(
        (each for each in in_order if each.metric is not None),
        key=lambda each: (sign * each.metric, -each.step),  # type: ignore[operator]
    )
    kept = {each.step for each in (*in_order[-keep.last :], *by_metric[: keep.best])}
    # After a run has gone back to an earlier step, that is not the one with the highest number.
    kept.add(max(in_order, key=lambda each: (each.at_s, each.step)).step)
    return [
        each.step
        for each in in_order
        if each.step not in kept and each.step not in under_way and not (keep.every and each.step % keep.every == 0)
    ]
