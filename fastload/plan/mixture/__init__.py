"""Several data sets read as one: which of them each sample of a line is from, and a rank's batches of it.

`options` says when a mixture ends, `blend` how sources stand in its line, and `extent` how long that is; `epochs` and
`rounds` are one source's way through its epochs, `line` is all of them together, `cursor` what an engine drives,
`samples` what it gets, and `position` what is saved.
"""

from fastload.plan.mixture.blend import Schedule, Weights, check_weights
from fastload.plan.mixture.cursor import MixtureCursor
from fastload.plan.mixture.epochs import SourcePlan
from fastload.plan.mixture.extent import sample_count
from fastload.plan.mixture.options import MixtureOptions, Stop, check_stop
from fastload.plan.mixture.position import MixturePosition, SourcePosition
from fastload.plan.mixture.samples import MixtureEntry, MixtureKey, MixturePart

__all__ = [
    "MixtureCursor",
    "MixtureEntry",
    "MixtureKey",
    "MixtureOptions",
    "MixturePart",
    "MixturePosition",
    "Schedule",
    "SourcePlan",
    "SourcePosition",
    "Stop",
    "Weights",
    "check_stop",
    "check_weights",
    "sample_count",
]
