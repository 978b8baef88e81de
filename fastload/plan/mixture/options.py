"""What a mixture is: how its sources are weighted, when it ends, and which epochs of them it reads.

- `stop="first"`: the line ends before the first position that would need a second epoch of any source. No sample comes
  twice; of the source that ends it, lanes leave a few.
- `stop="all"`: the line ends with the position at which the last of the sources has been gone through once. Every
  sample of every source comes at least once; of the source that ends it, lanes repeat a few.
- `stop="never"`: there is no end.

With "first", epoch E of a mixture reads epoch E of each source. Otherwise, the rounds that a source goes through in
epoch E of the mixture are its epochs E·2²⁰, E·2²⁰ + 1, and so on: no two rounds of a source have the same order, how
often it may be repeated in an epoch, and which these are is known without knowing how long earlier epochs were. In the
first epoch, the only one of "never", round k is epoch k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from fastload.errors import ConfigError
from fastload.plan.mixture.blend import Weights, check_weights

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
