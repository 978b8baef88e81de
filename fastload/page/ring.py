"""The last hour of a node's throughput: what passed from each tier between snapshots, in a ring of fixed size. Pure.

Snapshots hold counts since the service began. A point is the mean of a few seconds of them. Where the service was
replaced, or nothing was seen for a while, there is a point without figures, so that a line has a gap there and not a
slope. Where the clock was set back, the hour begins anew: points must rise.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fastload.snapshot import Snapshot

SPAN_S = 3600.0
STEP_S = 5.0
_GAP_S = 3 * STEP_S


class Rates(NamedTuple):
    """Bytes a second: what consumers were granted from RAM, from disk and straight from stores; and what was fetched,
    for whatever reason.
    """

    ram: float
    disk: float
    store: float
    fetched: float


class Point(NamedTuple):
    """The mean up to a moment; None: not known."""

    at: float
    rates: Rates | None


class Ring:
    """See the module's text."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=int(SPAN_S / STEP_S))
        self._base: Snapshot | None = None  # where the next point begins

    def add(self, snapshot: Snapshot) -> None:
        """Take a snapshot in, later than those before."""
        base = self._base
        if base is None:
            self._base = snapshot
            return
        if snapshot.at < base.at:
            self._points.clear()
            self._base = snapshot
        elif not is_same_service(base, snapshot) or snapshot.at - base.at > _GAP_S:
            self._append(Point(snapshot.at, None))
            self._base = snapshot
        elif snapshot.at - base.at >= STEP_S:
            self._append(Point(snapshot.at, rates_between(base, snapshot)))
            self._base = snapshot

    def _append(self, point: Point) -> None:
        if not self._points or point.at > self._points[-1].at:
            self._points.append(point)

    def since(self, at: float) -> list[Point]:
        """Points after `at`, in order."""
        return [point for point in self._points if point.at > at]


def is_same_service(before: Snapshot, after: Snapshot) -> bool:
    """Whether counts of one are to be subtracted from those of the other."""
    return (before.node.pid, before.node.started_at) == (after.node.pid, after.node.started_at)


def rates_between(before: Snapshot, after: Snapshot) -> Rates:
    """Between two snapshots of one service; no rate is negative, though a grant that was not taken is uncounted."""
    seconds = max(after.at - before.at, 1e-3)
    return Rates(*(max(0.0, (new - old) / seconds) for old, new in zip(_counts(before), _counts(after), strict=True)))


def _counts(snapshot: Snapshot) -> Rates:
    served = {tier.name: float(tier.served_bytes) for tier in snapshot.tiers}
    return Rates(
        served.get("ram", 0.0),
        served.get("disk", 0.0),
        float(snapshot.node.remote_bytes),
        snapshot.node.counters.get("fetched_bytes", 0.0),
    )
