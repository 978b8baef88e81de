"""What a mixture is: how its sources are weighted, when it ends, and which epochs of them it reads.

- `stop="first"`: the sequence ends before the first position that would need a second epoch of any source. No sample
  comes twice; of the source that ends it, lanes leave a few.
- `stop="all"`: the sequence ends with the position at which the last of the sources has been gone through once. Every
  sample of every source comes at least once; of the source that ends it, lanes repeat a few.
- `stop="never"`: there is no end.

With "first", epoch E of a mixture reads epoch E of each source. Otherwise, the rounds that a source goes through in
epoch E of the mixture are its epochs E·2²⁰, E·2²⁰ + 1, and so on: no two rounds of a source have the same order, how
often it may be repeated in an epoch, and which these are is known without knowing how long earlier epochs were. In the
first epoch, the only one of "never", round k is epoch k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fastload.errors import ConfigError

# A source's weights: (global sample count, weight), the first from 0 on.
Schedule = tuple[tuple[int, float], ...]
Weights = tuple[Schedule, ...]
# Below this share of all, a source has hardly a sample in any epoch that there will ever be.
_SHARE_MIN = 1e-9


def check_weights(weights: Sequence[float | Sequence[tuple[int, float]]]) -> Weights:
    """The weights of sources, each a number or a list of (global sample count, weight), in one form. Raises
    `ConfigError`.
    """
    if not weights:
        raise ConfigError("a mixture of no sources; give at least one")
    checked = tuple(_checked(f"of source {number}", weight) for number, weight in enumerate(weights))
    for first, shares in weight_steps(checked):
        if not any(shares):
            raise ConfigError(f"from sample {first} on the weights of all sources are 0; give one of them another")
        for number, share in enumerate(shares):
            if 0 < share < _SHARE_MIN:
                raise ConfigError(
                    f"the weight of source {number} from sample {first} on is {share:.3g} of all, below {_SHARE_MIN}; "
                    "raise it, or make it 0"
                )
    return checked


def _checked(whose: str, weight: Any) -> Schedule:
    steps = weight if isinstance(weight, list | tuple) else [(0, weight)]
    try:
        schedule = tuple((int(first), float(value)) for first, value in steps)
        is_whole = all(int(first) == first for first, _ in steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the weight {whose}, {weight!r}, must be a number or a list of (sample count, number)"
        ) from error
    firsts = [first for first, _ in schedule]
    if not is_whole or firsts[:1] != [0] or sorted(set(firsts)) != firsts:
        raise ConfigError(f"the steps of the weight {whose} begin at {firsts}; they must be rising integers from 0 on")
    wrong = [value for _, value in schedule if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ConfigError(f"the weight {whose} must be a finite number of at least 0, not {wrong[0]!r}")
    return schedule


def weight_steps(weights: Weights) -> list[tuple[int, list[float]]]:
    """Where weights change, and the share of each source from there on."""
    steps = []
    for first in sorted({first for schedule in weights for first, _ in schedule}):
        now = [max(step for step in schedule if step[0] <= first)[1] for schedule in weights]
        total = sum(now)
        steps.append((first, [weight / total if total else 0.0 for weight in now]))
    return steps


Stop = Literal["first", "all", "never"]
# More than a source is repeated in an epoch, and few enough for 2**40 epochs in what numpy has for integers.
_ROUNDS_OF_EPOCH = 1 << 20


def check_stop(stop: str) -> Stop:
    """`stop` if it is one of the three ways. Raises `ConfigError`."""
    if stop not in get_args(Stop):
        raise ConfigError(f"stop={stop!r} must be 'first', 'all' or 'never'")
    return cast(Stop, stop)


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """What, beside the sources and the epoch, settles the order of a mixture; see `check_weights` for where `weights`
    come from. Raises `ConfigError`.
    """

    weights: Weights
    seed: int = 0
    stop: Stop = "first"

    def __post_init__(self) -> None:
        check_weights(self.weights)
        check_stop(self.stop)

    def source_epoch(self, epoch: int) -> int:
        """The epoch of each source with which `epoch` of the mixture begins."""
        return epoch if self.stop == "first" else epoch * _ROUNDS_OF_EPOCH
