"""What to load next: chunks that are wanted, that plans will need, and that warm plans ask for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from fastload.service.deciding import scheduler
from fastload.service.deciding.eviction import prefetch_distance
from fastload.service.deciding.scheduler import Candidate, Need
from fastload.service.fetching.request_limit import Endpoints
from fastload.service.fetching.warming import Warming
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk


class Candidates:
    """What should be in RAM and is not, over all consumers, in order of need: for one decision of the scheduler."""

    def __init__(self, shared: SharedState, warming: Warming, endpoints: Endpoints) -> None:
        self._shared, self._warming, self._endpoints = shared, warming, endpoints

    def by_need(self) -> Iterator[Candidate]:
        """Lazy: how many are looked at is for the scheduler to say."""
        leases, plans, on_disk = self._shared.leases, self._shared.plans, self._shared.on_disk
        ahead = prefetch_distance(self._shared.table.count, self._endpoints.limit)
        return chain(
            (self._candidate(chunk, Need.DEMANDED) for chunk in leases.demanded if self._warming.admits_want(chunk)),
            (self._candidate(chunk, Need.WANTED) for chunk in leases.wanted if self._warming.admits_want(chunk)),
            scheduler.upcoming(plans.to_read(), ahead, on_disk),
            self._warming.candidates(),
        )

    def _candidate(self, chunk: Chunk, need: Need) -> Candidate:
        distance = 0
        consumer, _ = next(iter(chunk.wanters))
        if consumer.plan is not None:
            distance = max(0, consumer.plan.position(chunk.entry, chunk.index) - consumer.plan.cursor)
        on_disk = self._shared.on_disk(chunk.entry, chunk.index)
        return Candidate(chunk.entry, chunk.index, need, distance, on_disk, consumer.plan)
