"""What to load next, into which buffer, and what has to go for it: decisions, nothing else.

`decide` looks at the candidates in order of need and at the buffers, and returns actions for the core to carry out. It
changes nothing itself (beyond the memory of plans for where they were looking), so it runs the same in a test.

Order of need: chunks that a consumer waits for, oldest wait first; then chunks that one wants; then all plans'
chunks by their distance ahead of the plan's cursor; then warming.

Whose room a chunk may take depends on how much it is needed:

    demanded    free, any idle buffer (the least useful first), where the disk is slow one whose write has not begun;
                failing those, leases are recalled
    wanted      free, idle ones without a use ahead, and idle ones whose use is farther off than this one; where the
                disk is slow and too many wait to be written, ones without a use ahead whose write has not begun
    prefetched  the same, within the prefetch distance; beyond it only free ones and, where it has to be fetched
                from afar, ones without a use ahead
    warming     free ones and ones without a use ahead

What a consumer wants first of its plan comes before all else, also on the link: until it is there, only a few requests
are for what is fetched ahead (`Capacity.reserved_at`), since those would share the link with it and hold up the first
batch.

A candidate that has room but no free connection still keeps its room: what is behind it may not take that, unless
a consumer waits for it too.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fastload.service.deciding import buffers
from fastload.service.deciding.buffers import BufferTable
from fastload.service.deciding.eviction import LATER
from fastload.service.state import NEVER, ObjectEntry, Plan

# Whether the disk tier holds a chunk (an object and an index in it); answers at once.
OnDisk = Callable[[ObjectEntry, int], bool]

# Candidates passed over in one decision because their tier has no free thread: enough to find work for the other tier,
# little enough to cost nothing. Of what consumers wait for all are looked at, so that a store that hangs holds up no
# other; this many of each keep their room.
_PASSED_OVER_MAX = 32
# Buffers to look for beyond those that can be filled now: for what is passed over.
_LOOKED_FOR = 4 * _PASSED_OVER_MAX


class Need(enum.IntEnum):
    """How much a chunk is needed."""

    DEMANDED = 0
    WANTED = 1
    PREFETCHED = 2
    WARMING = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk that should be in RAM and is not. `distance` counts chunks ahead of the cursor of the plan it is of."""

    entry: ObjectEntry
    index: int
    need: Need
    distance: int
    on_disk: bool
    plan: Plan | None = None
    may_displace: bool = True  # chunks that have a later use

    @property
    def tier(self) -> str:
        """Where it has to come from: the endpoint of a store, or "" for the disk."""
        return "" if self.on_disk else self.entry.origin

    @property
    def needs_free_buffer(self) -> bool:
        """Whether only a free one will do: it is far ahead, and on disk, and what is dropped for it might not be."""
        return self.on_disk and self.need is Need.PREFETCHED and not self.may_displace


@dataclass(frozen=True, slots=True)
class Load:
    """Fill `buffer` (free by now) with the candidate."""

    candidate: Candidate
    buffer: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Empty a buffer; a write of its chunk that has not begun is given up."""

    buffer: int


@dataclass(frozen=True, slots=True)
class RecallChunk:
    """Ask for the leases of a buffer's chunk."""

    buffer: int


Action = Load | Drop | RecallChunk


@dataclass(slots=True)
class Capacity:
    """Threads free to read from either tier. `free_at(endpoint)` is how many requests that may be sent now,
    `reserved_at(endpoint)` how many of these not for what is fetched ahead, and `warming_at(endpoint)` how many of
    those in flight are for warming, which takes no place from jobs.
    """

    disk: int
    remote: int
    free_at: Callable[[str], int] = lambda endpoint: 1 << 30
    reserved_at: Callable[[str], int] = lambda endpoint: 0
    warming_at: Callable[[str], int] = lambda endpoint: 0
    _taken: Counter[str] = field(default_factory=Counter)

    def has(self, candidate: Candidate) -> bool:
        """Whether there is one for the candidate."""
        if candidate.on_disk:
            return self.disk > 0
        endpoint = candidate.entry.origin
        free = self.free_at(endpoint)
        if candidate.need >= Need.PREFETCHED:
            free -= self.reserved_at(endpoint)
        if candidate.need < Need.WARMING:
            free += self.warming_at(endpoint)
        return self.remote > 0 and self._taken[endpoint] < free

    def take(self, candidate: Candidate) -> bool:
        """Use one, if there is one."""
        if not self.has(candidate):
            return False
        if candidate.on_disk:
            self.disk -= 1
        else:
            self._taken[candidate.entry.origin] += 1
            self.remote -= 1
        return True

    @property
    def none(self) -> bool:
        return self.disk <= 0 and self.remote <= 0


@dataclass(slots=True)
class _Supply:
    """The buffers that can be had in this decision. The orders of usefulness are only made when something is full."""

    table: BufferTable
    free: list[int]  # the next to use last
    at_most: int  # as many as can be looked for
    idle: list[tuple[int, int]] | None = None  # (buffer, next use), the least useful last
    unwritten: list[tuple[int, int]] | None = None
    disk_is_quick: bool = False  # so that a write is waited for rather than given up
    writes_excess: int = 0  # that may be given up for chunks that no consumer waits for, if any may be
    dropped: list[Drop] = field(default_factory=list)

    def take(self, candidate: Candidate) -> int | None:
        """A buffer for the candidate, empty once what is in `dropped` is."""
        if self.free:
            return self.free.pop()
        buffer = self._take_idle(candidate)
        if buffer is None and not self.disk_is_quick:
            buffer = self._take_unwritten(candidate)
        if buffer is not None:
            self.dropped.append(Drop(buffer))
        return buffer

    def _take_idle(self, candidate: Candidate) -> int | None:
        if candidate.needs_free_buffer:
            return None
        if self.idle is None:
            self.idle = self._least_useful_last(buffers.IDLE)
        if not self.idle:
            return None
        buffer, next_use_of = self.idle[-1]
        is_warming = candidate.need is Need.WARMING
        spent = next_use_of == NEVER or (is_warming and next_use_of == LATER)
        farther = candidate.may_displace and next_use_of > candidate.distance
        if candidate.need is Need.DEMANDED or spent or (farther and not is_warming):
            self.idle.pop()
            return buffer
        return None

    def _take_unwritten(self, candidate: Candidate) -> int | None:
        is_demanded = candidate.need is Need.DEMANDED
        if not is_demanded and not (self.writes_excess and candidate.may_displace):
            return None
        if self.unwritten is None:
            self.unwritten = self._least_useful_last(buffers.QUEUED)
        if not self.unwritten or not (is_demanded or self.unwritten[-1][1] == NEVER):
            return None
        self.writes_excess = max(0, self.writes_excess - 1)
        return self.unwritten.pop()[0]

    def _least_useful_last(self, status: int) -> list[tuple[int, int]]:
        return list(zip(*self.table.by_usefulness([status], self.at_most), strict=True))[::-1]


def decide(
    candidates: Iterable[Candidate],
    table: BufferTable,
    capacity: Capacity,
    *,
    coming: int = 0,
    disk_is_quick: bool = False,
    writes_excess: int = 0,
) -> list[Action]:
    """The actions to take now, in order.

    `coming` buffers will be idle without any recall. Where the disk is not quick, `writes_excess` queued writes are too
    many.
    """
    at_most = capacity.disk + capacity.remote + _LOOKED_FOR + 2
    supply = _Supply(table, table.free(), at_most, disk_is_quick=disk_is_quick, writes_excess=writes_excess)
    actions: list[Action] = []
    starved = passed_over = 0
    considered: set[tuple[ObjectEntry, int]] = set()  # a wanted chunk is usually a plan's as well
    passed_over_at: Counter[str] = Counter()
    kept: list[tuple[int, list[Drop]]] = []  # the room of those that were passed over
    for candidate in _if_any_can_start(candidates, capacity):
        if capacity.none or (passed_over > _PASSED_OVER_MAX and candidate.need >= Need.PREFETCHED):
            break
        if passed_over_at[candidate.tier] > _PASSED_OVER_MAX:
            continue
        if (candidate.entry, candidate.index) in considered:
            continue
        considered.add((candidate.entry, candidate.index))
        buffer = supply.take(candidate)
        if buffer is None and candidate.need is Need.DEMANDED:
            if kept and capacity.take(candidate):
                buffer, drops = kept.pop()
                actions += [*drops, Load(candidate, buffer)]
            else:
                starved += 1
        elif buffer is None and candidate.needs_free_buffer:
            passed_over += 1
        elif buffer is None and candidate.need >= Need.PREFETCHED:
            break  # what follows is needed even less
        elif buffer is not None and capacity.take(candidate):
            actions += supply.dropped
            actions.append(Load(candidate, buffer))
        elif buffer is not None:
            passed_over += 1
            passed_over_at[candidate.tier] += 1
            kept.append((buffer, supply.dropped.copy()))
        supply.dropped.clear()
    return actions + _recalls(table, starved - coming)


def _if_any_can_start(candidates: Iterable[Candidate], capacity: Capacity) -> Iterator[Candidate]:
    """The candidates; none where those that would be looked at are fetched ahead and find no free thread, so that no
    order of usefulness need be made. That takes half a millisecond over 16,384 buffers, and with a busy store most
    ticks are so.
    """
    candidates = iter(candidates)
    passed: dict[tuple[ObjectEntry, int], Candidate] = {}
    for candidate in candidates:
        passed.setdefault((candidate.entry, candidate.index), candidate)
        if candidate.need < Need.PREFETCHED or capacity.has(candidate):
            yield from passed.values()
            yield from candidates
            return
        if len(passed) > _PASSED_OVER_MAX:
            return


def _recalls(table: BufferTable, count: int) -> list[Action]:
    """Recall so many buffers, the least useful first."""
    if count <= 0:
        return []
    leased, _ = table.by_usefulness([buffers.LEASED])
    return [RecallChunk(buffer) for buffer in leased[:count]]


def upcoming(plans: Iterable[Plan], prefetch_distance: int, on_disk: OnDisk) -> Iterator[Candidate]:
    """The chunks that plans will need, nearest first over all of them."""
    each = [_of_plan(plan, prefetch_distance, on_disk, up_to) for plan, up_to in _apart(list(plans))]
    return heapq.merge(*each, key=_distance)


def _apart(plans: list[Plan]) -> list[tuple[Plan, int]]:
    """Each plan, and up to where it has something to add: of plans that are alike, as those of a node's ranks are, the
    one that is farthest on names what lies ahead of it, at the least distance, and one behind it what lies between.
    """
    up_to: dict[Plan, int] = {}
    nearest: dict[object, int] = {}
    for plan in sorted(plans, key=lambda plan: -plan.cursor):
        likeness = plan if plan.is_blind else plan.likeness
        up_to[plan] = nearest.get(likeness, plan.chunk_count)
        nearest[likeness] = plan.cursor
    return [(plan, up_to[plan]) for plan in plans]


def _of_plan(plan: Plan, prefetch_distance: int, on_disk: OnDisk, up_to: int) -> Iterator[Candidate]:
    end = max(plan.delivered_to, plan.cursor) + min(prefetch_distance, plan.depth)
    plan.prefetched_to = max(plan.prefetched_to, end)
    for position, entry, index in plan.missing():
        within = position < end
        if position >= up_to or (plan.is_blind and not within):
            return
        distance = position - plan.cursor
        held = on_disk(entry, index)
        yield Candidate(entry, index, Need.PREFETCHED, distance, held, plan, may_displace=within)


def _distance(candidate: Candidate) -> int:
    return candidate.distance
