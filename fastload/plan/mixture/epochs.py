"""What is known of one source of a mixture, and the lines of those of its epochs that are being read.

The epochs that are read are counted in *rounds*, from the one with which the mixture begins. Sample c of a lane lies in
round c div quota, where the lane's *quota* is its length in an epoch of the source (see `lanes`). It follows from how
many samples the source has, so it is the same in every round. While that is not known all samples are taken to lie in
the first, and who asks takes care that none is needed that might not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, StateError
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.line import Line
from fastload.plan.manifest import Manifest
from fastload.plan.mixture.position import SourcePosition
from fastload.plan.order import OrderOptions, epoch_orders
from fastload.plan.position import Place, check_place

# Lines that are not being read are kept for a while: of rounds that are over, since it may be asked where in them a
# batch ended, and of those to come, whose windows are fetched ahead.
_LINES_ASIDE = 4


class SourcePlan(NamedTuple):
    """One source: its data and the order of its samples."""

    manifest: Manifest
    options: OrderOptions


class SourceEpochs:
    """Source number `source` of a mixture, read from the epoch `first_epoch` on; one epoch, unless `is_endless`.

    `samples` says how many of its samples each lane has given before `start`; `lanes` are those that this node may
    need.
    """

    def __init__(
        self,
        source: int,
        plan: SourcePlan,
        first_epoch: int,
        lanes: Sequence[int],
        samples: Sequence[int],
        start: SourcePosition,
        *,
        is_endless: bool,
    ) -> None:
        self._source, self._plan, self._first_epoch, self.lanes = source, plan, first_epoch, lanes
        self._start, self.is_endless = start, is_endless
        self._counts = np.full(len(plan.manifest), -1, np.int64)
        self.lines: dict[int, Line] = {}
        self._aside: dict[int, Line] = {}  # in the order of their last use
        self.total: int | None = None  # its samples, once that is known
        if start.total is not None:
            self._learn_total(start.total)
        self.began = [self.locate(lane, sample) for lane, sample in enumerate(samples)]

    @property
    def known(self) -> int:
        """It has this many samples at least."""
        return self.lines[0].known if self.total is None else self.total

    @property
    def has_rounds(self) -> bool:
        """Whether it is known which samples lie in which round."""
        return self.is_endless and self.total is not None

    def quotas(self) -> NDArray[np.int64]:
        """How many samples each lane has in a round, int64; at least so many, while that is not known."""
        return lane_lengths(self.known, self._plan.options.partitions)

    def quota(self, lane: int) -> int:
        """The same for one lane."""
        return lane_length(lane, self.known, self._plan.options.partitions)

    def locate(self, lane: int, sample: int) -> tuple[int, int]:
        """The round of a sample of a lane, and its number there."""
        return divmod(sample, self.quota(lane)) if self.has_rounds else (0, sample)

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects, which are the same in every round."""
        for line in (*self.lines.values(), *self._aside.values()):
            line.tell(object_nos, counts)
        self._counts[object_nos] = counts
        for line in self.lines.values():
            if line.total is not None:
                self._learn_total(line.total)

    def line(self, round_no: int) -> Line:
        """The line of a round, which is being read from now on."""
        if round_no not in self.lines:
            self.lines[round_no] = self.glimpse(round_no)
            del self._aside[round_no]
        return self.lines[round_no]

    def glimpse(self, round_no: int) -> Line:
        """The line of a round, to look at."""
        if round_no in self.lines:
            return self.lines[round_no]
        line = self._aside.pop(round_no, None)
        if line is None:
            line, is_counted = self._made(round_no), np.flatnonzero(self._counts >= 0).astype(np.int32)
            line.tell(is_counted, self._counts[is_counted])
        self._put_aside(round_no, line)
        return line

    def end_before(self, round_no: int) -> None:
        """Rounds before are over, but for those with open windows."""
        for number in [number for number, line in self.lines.items() if number < round_no and not line.open_windows]:
            self._put_aside(number, self.lines.pop(number))

    def samples_a_byte(self) -> float | None:
        """How many samples a byte holds, where any object is counted."""
        is_counted = self._counts >= 0
        byte_count = int(self._plan.manifest.sizes[is_counted].sum())
        return int(self._counts[is_counted].sum()) / byte_count if byte_count else None

    def _put_aside(self, round_no: int, line: Line) -> None:
        self._aside[round_no] = line
        if len(self._aside) > _LINES_ASIDE:
            del self._aside[next(iter(self._aside))]

    def _made(self, round_no: int) -> Line:
        orders = epoch_orders(self._plan.manifest, self._plan.options, self._first_epoch + round_no)
        taken, places = [0] * len(orders), [Place(0, 0)] * len(orders)
        for lane, (began, number) in enumerate(self.began):
            if began == round_no:
                taken[lane] = self._start.taken[lane] if self._start.taken else number
                places[lane] = self._start.places[lane]
                check_place(places[lane], orders[lane].window_count)
        began_here = {lane: self.began[lane] for lane in self.lanes if self.began[lane][0] <= round_no}
        starts = {lane: number if began == round_no else 0 for lane, (began, number) in began_here.items()}
        return Line(orders, starts, places, taken)

    def _learn_total(self, total: int) -> None:
        if self.total is not None and total != self.total:
            raise StateError(
                f"the state was saved with {self.total} samples in source {self._source}, but there are {total}: the "
                "shards are not those it was saved with; load another state"
            )
        partitions = self._plan.options.partitions
        if total < partitions:
            raise ConfigError(
                f"source {self._source} of the mixture has {total} samples for {partitions} partitions, and needs one "
                "for each; leave it out, or lower partitions"
            )
        self.total = total
