"""What should be in RAM and is not, over all consumers, in order of need: the candidates of one decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from fastload.service import scheduler
from fastload.service.ledger import Ledger
from fastload.service.model import Chunk
from fastload.service.planset import PlanSet
from fastload.service.scheduler import Candidate, Need, OnDisk
from fastload.service.warming import Warming

# Also where few requests at a time fill the link, a consumer takes several chunks at once.
_TRANSIT_MIN = 32


class Wishes:
    """Used by the loop's thread only."""

    def __init__(
        self,
        ledger: Ledger,
        plans: PlanSet,
        warming: Warming,
        buffer_count: int,
        on_disk: OnDisk,
        requests_allowed: Callable[[], int],
    ) -> None:
        self._ledger, self._plans, self._warming = ledger, plans, warming
        self._buffer_count, self._on_disk, self._requests_allowed = buffer_count, on_disk, requests_allowed

    @property
    def _transit(self) -> int:
        """How far prefetching may displace what will be used later (see plans): two rounds of requests, or a quarter of
        a large arena, but never most of a small one.
        """
        rounds = max(_TRANSIT_MIN, 2 * self._requests_allowed())
        return min(max(rounds, self._buffer_count // 4), max(1, self._buffer_count // 2))

    def candidates(self) -> Iterator[Candidate]:
        """See the module's text. Lazy: how many are looked at is the scheduler's business."""
        return chain(
            (self._wish(chunk, Need.DEMANDED) for chunk in self._ledger.demanded),
            (self._wish(chunk, Need.WANTED) for chunk in self._ledger.wanted),
            scheduler.upcoming(self._plans.to_read(), self._transit, self._on_disk),
            *(plan.candidates(self._on_disk) for plan in self._plans.warm() if self._warming.may_fetch_for(plan)),
        )

    def _wish(self, chunk: Chunk, need: Need) -> Candidate:
        distance = 0
        consumer, _ = next(iter(chunk.wanters))
        if consumer.plan is not None:
            distance = max(0, consumer.plan.position(chunk.entry, chunk.index) - consumer.plan.cursor)
        on_disk = self._on_disk(chunk.entry, chunk.index)
        return Candidate(chunk.entry, chunk.index, need, distance, on_disk, consumer.plan)
