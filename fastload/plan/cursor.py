"""From the order to a rank's batches, as sample counts become known.

The samples of an epoch stand in one line, in which partitions alternate (see `lanes`), and a rank has every
position of it whose turn is its own (see `deal`). An `EpochCursor` says which window to open next, is told the
counts of one window after the other, and answers with the batches that are settled by then (see `walk`). What is
unknown to one node and known to another (how many samples its windows hold) it asks for, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastload.plan.assignment import Assignment
from fastload.plan.lanes import lane_length
from fastload.plan.order import EpochOrder, WindowKey
from fastload.plan.position import Place, Position
from fastload.plan.ranks import Ranks, Tail
from fastload.plan.samples import BatchEntry
from fastload.plan.sequence import EpochSequence
from fastload.plan.walk import Reader, Split, Walk

__all__ = ["EpochCursor", "Split"]


class EpochCursor(Walk[WindowKey, BatchEntry]):
    """The batches of one rank in one epoch. One user at a time; made anew for each epoch.

    `orders` are those of all partitions. Until `next_window` is None, open that window and `add` it; where
    `counts_wanted` names objects, `tell` their sample counts first (any that are known may be told at any time);
    at last `finish`. With `shuffle="global"`, where a window holds very many samples, each of these gives only the
    first batches; then call `settled` until it gives none, and only then ask for what comes next. Windows that are
    not among `needed` may be closed once the batches given out so far are made; one of them may be asked for again.
    Nodes never wait for one another for ever if each counts the windows that it opens, and those of the partitions
    that it reads which another node wants.

    `worker=(w, n)` is one of n workers that share the rank's samples. With `split="batches"` it gets every
    n-th batch, beginning with its own number, which is the order in which torch's DataLoader asks its
    workers. With `split="samples"` it gets every n-th sample, in batches of its own; together they are the
    rank's samples, each once.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        orders: Sequence[EpochOrder],
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: Position | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        reader = Reader(ranks, batch_size, drop_last, tail, worker, split)
        self.orders, partitions = tuple(orders), len(orders)
        self.start = start if start is not None else Position.start(orders[0], ranks, batch_size, tail)
        self.start.check(self.orders, ranks, batch_size, tail)
        delivered, deal = self.start.samples, Assignment(ranks, partitions, reader.global_batch)
        self._lengths_at_start = _lengths(delivered, partitions)
        self._epoch_line = EpochSequence(
            self.orders,
            {lane: self._lengths_at_start[lane] for lane in deal.lanes},
            self.start.places,
            self.start.taken or self._lengths_at_start,
        )
        super().__init__(self._epoch_line, deal, reader, delivered)

    @property
    def epoch(self) -> int:
        """The epoch that is walked through."""
        return self.orders[0].epoch

    @property
    def is_counted(self) -> bool:
        """Whether all sample counts are known, so that `windows_ahead` is exact and nothing is wanted any more."""
        return self._epoch_line.total is not None

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        """The object numbers of a window, int32; `add` wants one count for each."""
        return self._epoch_line.objects_of(key)

    @property
    def counts_wanted(self) -> NDArray[np.int32]:
        """Objects whose counts must be told before anything can go on, int32; empty where `next_window` is not
        None, and at the end.

        They are the next windows of other nodes, where these may have too few samples for the batch that is due,
        all that has no count where a lane has come to the end of its partition, and windows that lie before the
        first sample that is needed. A count of any other object helps too. Without counts, a node can be sure of
        no more samples in all than are counted, so it needs to hear of the others' windows about as often as it
        opens one of its own; where all counts are told at the start, it never asks.
        """
        if self.is_counted or self.next_window is not None:
            return np.empty(0, np.int32)
        line, deal = self._epoch_line, self._deal
        others = [p for p in range(self._partitions) if deal.is_cut or p not in deal.home]
        choices = (line.wanted(self._needs()), line.next_uncounted(others), line.next_uncounted(deal.home))
        return next(wanted for wanted in choices if len(wanted))

    def windows_ahead(self) -> list[WindowKey]:
        """The windows that this node still needs, in the order in which batches come to them, each once.

        Windows that are open are among them. Before all counts are known, partitions are taken to hold as many
        samples a byte, and windows that other nodes may come to need help with are left in.
        """
        starts = {lane: lane_length(lane, self._given, self._partitions) for lane in self.home}
        return self._epoch_line.windows_ahead(starts, self._places(self._given))

    def tell(self, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> list[BatchEntry]:
        """The batches that are settled by the sample counts, int64, of some objects."""
        self._epoch_line.tell(object_nos, np.asarray(counts, np.int64))
        return self._settle()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> list[BatchEntry]:
        """A window is open: the batches that are settled by that, and by the counts of its objects, int64.

        Raises `StateError` where the start lies beyond the samples that there are, or a count was told
        otherwise.
        """
        self._epoch_line.add(key, np.asarray(counts, np.int64))
        return self._settle()

    def position(self, entry: BatchEntry | None) -> Position:
        """The position after `entry` was delivered; for None, where the cursor started."""
        return self.start if entry is None else self.position_at(entry.samples_after)

    def position_at(self, samples: int) -> Position:
        """The position after so many samples of the line: as many as where the cursor started, or a multiple of the
        global batch above that, or all. What is known of windows by now makes it exact; it is right in any case.
        """
        if samples == self.start.samples:
            return self.start
        self._assert_is_boundary(samples)
        return Position(
            epoch=self.epoch,
            batches=-(-samples // self._global_batch),
            samples=samples,
            places=self._places(samples),
            options=self.orders[0].options,
            fingerprint=self.orders[0].manifest.fingerprint,
            world_size=self.ranks.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
            taken=tuple(self._taken(samples)) if self._partitions > 1 else (),
        )

    def _taken(self, samples: int) -> list[int]:
        """How many of each partition's samples lanes have taken from its front; its length is not exceeded where
        that is known.
        """
        if samples == self._epoch_line.total:
            return self._epoch_line.totals()
        return self._epoch_line.taken(_lengths(samples, self._partitions))

    def _places(self, samples: int) -> tuple[Place, ...]:
        if samples == self._epoch_line.total:
            return tuple(Place(order.window_count, 0) for order in self.orders)
        return self._epoch_line.places(self._taken(samples))


def _lengths(position: int, partitions: int) -> list[int]:
    return [lane_length(lane, position, partitions) for lane in range(partitions)]
