"""What a browser is sent of a snapshot: the same facts, bounded, and rates of the last seconds. Pure.

Names come from buckets, jobs and programs: whatever they hold, the page shows them as text. Here they are cut to a
length, and lists to the first of each kind, so that a view stays small whatever a node serves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fastload.page.ring import is_same_service, rates_between
from fastload.snapshot import Consumer, DataSet, Endpoint, Job, Node, Snapshot, Tier

ROWS_MOST = 200
CHARACTERS_MOST = 300
_CAUSES_MOST = 30
# Rates are over so long: long enough to be read, short enough to be of now.
_RATES_S = 5.0
# Stalls as well, which come in batches.
_STALLS_S = 30.0
# A rank that waits for less of its time is not called the slowest.
_SLOW_SHARE = 0.02


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One consumer; of a loader that reports, how its trainer's time is divided."""

    name: str
    program: str
    pid: int
    rank: int | None
    epoch: int | None
    samples_per_s: float | None
    bytes_per_s: float | None
    work: float | None  # shares of the last half minute: the trainer's own work, and waits by cause
    waits: dict[str, float]
    is_slowest: bool
    verdict: str


class View(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text. Without a service only `why` is there, beside what was seen last."""

    why: str  # not served; "" otherwise
    at: float
    node: Node | None
    tiers: Sequence[Tier]
    rates: dict[str, float] | None  # by tier, "store", and "fetched"
    endpoints: Sequence[Endpoint]
    data_sets: Sequence[DataSet]
    jobs: Sequence[Job]
    ranks: Sequence[Rank]
    troubles: Sequence[str]
    left_out: dict[str, int]  # by list: how many there are more


class Viewer:
    """Makes views, with the snapshots of the last half minute for rates."""

    def __init__(self) -> None:
        self._recent: deque[Snapshot] = deque()

    def unserved(self, why: str, at: float) -> View:
        """Where nothing serves the cache."""
        self._recent.clear()
        return View(
            why=_cut(why),
            at=at,
            node=None,
            tiers=[],
            rates=None,
            endpoints=[],
            data_sets=[],
            jobs=[],
            ranks=[],
            troubles=[],
            left_out={},
        )

    def view(self, snapshot: Snapshot) -> View:
        """Of one that is later than those before."""
        recent = self._recent
        if recent and (not is_same_service(recent[-1], snapshot) or snapshot.at <= recent[-1].at):
            recent.clear()
        while recent and snapshot.at - recent[0].at > _STALLS_S:
            recent.popleft()
        base = next((each for each in recent if snapshot.at - each.at <= _RATES_S), None)
        ranks = _ranks(recent[0] if recent else None, base, snapshot)
        recent.append(snapshot)
        by_size = sorted(snapshot.data_sets, key=lambda each: (-each.ram_bytes - each.disk_bytes, each.name))
        lists: dict[str, Sequence[Any]] = {
            "endpoints": snapshot.endpoints,
            "data_sets": by_size,
            "jobs": snapshot.jobs,
            "ranks": ranks,
            "troubles": snapshot.troubles[::-1],
        }
        return View(
            why="",
            at=snapshot.at,
            node=_bounded(snapshot.node),
            tiers=snapshot.tiers,
            rates=None if base is None else rates_between(base, snapshot)._asdict(),
            left_out={name: len(rows) - ROWS_MOST for name, rows in lists.items() if len(rows) > ROWS_MOST},
            **{name: [_bounded(row) for row in rows[:ROWS_MOST]] for name, rows in lists.items()},
        )


def _ranks(stalls_base: Snapshot | None, rates_base: Snapshot | None, now: Snapshot) -> list[Rank]:
    """Loaders first, by rank. The slowest is the one that waits most: others wait for it in what is their own work."""
    before = {each.number: each for each in stalls_base.consumers} if stalls_base else {}
    lately = {each.number: each for each in rates_base.consumers} if rates_base else {}
    seconds = now.at - rates_base.at if rates_base else 0.0
    made = [_rank(each, before.get(each.number), lately.get(each.number), seconds) for each in now.consumers]
    made.sort(key=lambda each: (each.rank is None, each.rank or 0, each.name, each.pid))
    waited = {index: sum(each.waits.values()) for index, each in enumerate(made) if each.work is not None}
    if len(waited) > 1:
        slowest = max(waited, key=waited.__getitem__)
        if waited[slowest] >= _SLOW_SHARE:
            made[slowest] = msgspec.structs.replace(made[slowest], is_slowest=True)
    return made


def _rank(now: Consumer, before: Consumer | None, lately: Consumer | None, seconds: float) -> Rank:
    report = now.report
    work, waits = _divided(before.report if before else {}, report)
    return Rank(
        name=now.name,
        program=now.program,
        pid=now.pid,
        rank=_whole(report.get("rank")),
        epoch=_whole(report.get("epoch")),
        samples_per_s=_samples_per_s(lately.report, report, seconds) if lately else None,
        bytes_per_s=max(0.0, (_granted(now) - _granted(lately)) / seconds) if lately and seconds > 0 else None,
        work=work,
        waits=waits,
        is_slowest=False,
        verdict=str(report.get("verdict") or ""),
    )


def _granted(consumer: Consumer) -> int:
    return consumer.ram_bytes + consumer.disk_bytes + consumer.remote_bytes


def _divided(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
    """The shares of work and of waits by cause, in what passed between two reports of one epoch, or since it began."""
    elapsed, waits = _number(now.get("elapsed_s")), _numbers(now.get("stalls"))
    if elapsed is None:
        return None, {}
    old_elapsed, old_waits = 0.0, dict[str, float]()
    if before.get("epoch") == now.get("epoch") and (_number(before.get("elapsed_s")) or 0.0) < elapsed:
        old_elapsed, old_waits = _number(before.get("elapsed_s")) or 0.0, _numbers(before.get("stalls"))
    passed = elapsed - old_elapsed
    if passed <= 0:
        return None, {}
    shares = {cause: max(0.0, seconds - old_waits.get(cause, 0.0)) / passed for cause, seconds in waits.items()}
    shares = {cause: share for cause, share in shares.items() if share > 0}
    return max(0.0, 1.0 - sum(shares.values())), shares


def _samples_per_s(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> float | None:
    """Between two reports of one epoch, or since it began."""
    samples, elapsed = _number(now.get("samples")), _number(now.get("elapsed_s"))
    if before.get("epoch") == now.get("epoch"):
        base = _number(before.get("samples"))
        return max(0.0, samples - base) / seconds if samples is not None and base is not None and seconds > 0 else None
    return samples / elapsed if samples is not None and elapsed else None


def _number(value: object) -> float | None:
    """What consumers report is theirs to make up."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    found = {_cut(str(name)): _number(each) for name, each in list(value.items())[:_CAUSES_MOST]}
    return {name: each for name, each in found.items() if each is not None}


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS_MOST else text[: CHARACTERS_MOST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _bounded(row: Any) -> Any:
    """A row whose texts are cut, and without the parts that may be long and are not shown."""
    if isinstance(row, str):
        return _cut(row)
    texts = {name: getattr(row, name) for name in row.__struct_fields__}
    changed: dict[str, Any] = {name: _cut(text) for name, text in texts.items() if isinstance(text, str)}
    match row:
        case Node():
            changed["counters"] = {}
        case Job():
            changed |= {"urls": [], "failed": {}}
    return msgspec.structs.replace(row, **changed)
