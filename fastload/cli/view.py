"""A snapshot as lines of text: what `fastload status` and `fastload top` show, made by functions without I/O.

With the snapshot before it, totals are joined by rates: what has grown from one to the other. There are none between
two services.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastload.cli.printing import as_table, plain
from fastload.config import format_bytes
from fastload.snapshot import Consumer, DataSet, Endpoint, Job, Snapshot

# A screenful: so many of each kind, and how many more there are.
_ROWS_MAX = 8
_NAME_CHARACTERS_MAX = 200
_SENTENCE_CHARACTERS_MAX = 500
_BAR_CHARACTERS = 20
_STALLS_MAX = 3


@dataclass(frozen=True, slots=True)
class Rates:
    """A second, from one snapshot of a service to the next; empty where there was none before."""

    served_bytes: dict[str, float] = field(default_factory=dict)  # by tier, and "store"
    consumers: dict[int, dict[str, float]] = field(default_factory=dict)  # by number: "ram", "disk", "store", "samples"
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)  # what each consumer had reported before


def rates_between(before: Snapshot | None, now: Snapshot) -> Rates:
    """What has grown, a second. The clock of the machine may have been set back: that is no time to divide by."""
    if before is None or (before.node.pid, before.node.started_at) != (now.node.pid, now.node.started_at):
        return Rates()
    seconds = now.at - before.at
    if seconds <= 0:
        return Rates()
    old = {consumer.number: consumer for consumer in before.consumers}
    stayed = {each.number: (old[each.number], each) for each in now.consumers if each.number in old}
    return Rates(
        _growth(_served(before), _served(now), seconds),
        {number: _growth(_amounts(first), _amounts(last), seconds) for number, (first, last) in stayed.items()},
        {number: first.report for number, (first, _) in stayed.items()},
    )


def _growth(before: dict[str, float], now: dict[str, float], seconds: float) -> dict[str, float]:
    return {name: max(0.0, value - before[name]) / seconds for name, value in now.items() if name in before}


def _served(snapshot: Snapshot) -> dict[str, float]:
    return {**{tier.name: tier.served_bytes for tier in snapshot.tiers}, "store": snapshot.node.remote_bytes}


def _amounts(consumer: Consumer) -> dict[str, float]:
    amounts = {"ram": consumer.ram_bytes, "disk": consumer.disk_bytes, "store": consumer.remote_bytes}
    samples = consumer.report.get("samples")
    return {**amounts, "samples": samples} if isinstance(samples, int) else {**amounts}


def as_lines(now: Snapshot, before: Snapshot | None = None, width: int = 0) -> list[str]:
    """All that is in a snapshot. Sentences are wrapped to `width`, if that is not 0."""
    rates = rates_between(before, now)
    parts = [
        _node(now),
        _tiers(now, rates),
        _endpoints(now.endpoints),
        _data_sets(now.data_sets, now.at),
        _jobs(now.jobs),
        _consumers(now.consumers, rates),
        _wrapped(_verdicts(now.consumers), width),
        _wrapped([f"trouble: {_short(message, _SENTENCE_CHARACTERS_MAX)}" for message in now.troubles], width),
    ]
    return [line for part in parts if part for line in ("", *part)][1:]


def as_line(now: Snapshot, before: Snapshot | None) -> str:
    """The same in a line of a log."""
    rates = rates_between(before, now)
    served = [f"{name} {_rate(rates.served_bytes.get(name)) or '-'}" for name in _served(now)]
    under_way = sum(job.state in ("listing", "warming") for job in now.jobs)
    stalled = [f"rank {_rank(each) or '-'} waits: {waits}" for each in now.consumers if (waits := _waits(each, rates))]
    parts = [
        ", ".join(served),
        f"{_count(len(now.consumers), 'consumer')}, {_count(under_way, 'job')}",
        *stalled,
        *(f"trouble: {_short(message, _SENTENCE_CHARACTERS_MAX)}" for message in now.troubles[-1:]),
    ]
    return plain("; ".join(parts))


def _node(now: Snapshot) -> list[str]:
    node = now.node
    kind = "daemon" if node.is_daemon else "service on demand"
    return [
        f"{_short(node.host)}: {kind}, process {node.pid} of user {node.uid}, fastload {_short(node.fastload)}, "
        f"up {duration(now.at - node.started_at)}",
        f"{_short(node.directory)}: {format_bytes(node.memory_bytes)} of memory beside the arena, "
        f"{node.cpu_s:.1f} CPU-seconds",
    ]


def _tiers(now: Snapshot, rates: Rates) -> list[str]:
    rows = [
        (
            tier.name,
            bar(tier.used_bytes, tier.limit_bytes),
            format_bytes(tier.used_bytes),
            format_bytes(tier.limit_bytes),
            format_bytes(tier.pinned_bytes),
            format_bytes(tier.served_bytes),
            _rate(rates.served_bytes.get(tier.name)),
            "" if tier.is_writable else ("off" if not tier.limit_bytes else "not writable"),
        )
        for tier in now.tiers
    ]
    rows.append(
        ("store", "", "", "", "", format_bytes(now.node.remote_bytes), _rate(rates.served_bytes.get("store")), "")
    )
    return _table(("tier", "", ">used", ">of", ">pinned", ">served", ">a second", ""), rows)


def _endpoints(endpoints: Sequence[Endpoint]) -> list[str]:
    rows = [
        (
            _short(each.name) or "(the provider's own)",
            f"{each.requests_in_flight} of {each.requests_allowed}",
            f"{each.requests:,}",
            f"{format_bytes(each.bytes_per_s)}/s" if each.bytes_per_s else "",
            f"{each.first_byte_s * 1000:.0f} ms" if each.first_byte_s >= 0 else "",
            f"{each.throttled_at:.0f}" if each.throttled_at else "never",
        )
        for each in endpoints
    ]
    return _table(("endpoint", ">in flight", ">requests", ">goodput", ">first byte", ">throttled at"), rows)


def _data_sets(data_sets: Sequence[DataSet], at: float) -> list[str]:
    largest = sorted(data_sets, key=lambda each: (-each.ram_bytes - each.disk_bytes, each.name))
    rows = [
        (
            _short(each.name),
            f"{each.object_count:,}",
            format_bytes(each.byte_count),
            format_bytes(each.ram_bytes),
            format_bytes(each.disk_bytes),
            format_bytes(each.pinned_bytes),
            f"{duration(at - each.last_use_at)} ago" if each.last_use_at else "",
        )
        for each in largest
    ]
    return _table(("data set", ">objects", ">size", ">in RAM", ">on disk", ">pinned", ">used"), rows)


def _jobs(jobs: Sequence[Job]) -> list[str]:
    order = ("warming", "listing", "waiting", "failed", "cancelled", "done")
    first = sorted(jobs, key=lambda each: order.index(each.state) if each.state in order else len(order))
    rows = [
        (
            _short(each.id),
            _short(each.name),
            _short(each.state),
            bar(each.done_bytes, each.total_bytes),
            format_bytes(each.held_bytes),
            format_bytes(each.total_bytes),
            f"{format_bytes(each.bytes_per_s)}/s" if each.bytes_per_s else "",
            duration(each.eta_s) if each.eta_s >= 0 and each.state == "warming" else "",
            _short(each.error),
        )
        for each in first
    ]
    return _table(("job", "data set", "state", "", ">held", ">of", ">a second", ">left", ""), rows)


def _consumers(consumers: Sequence[Consumer], rates: Rates) -> list[str]:
    rows = []
    for each in consumers:
        amounts, each_rates = _amounts(each), rates.consumers.get(each.number)
        shown = [
            format_bytes(amounts[name]) if each_rates is None else f"{format_bytes(each_rates[name])}/s"
            for name in ("ram", "disk", "store")
        ]
        samples = amounts.get("samples")
        rows.append(
            (
                _rank(each),
                _short(each.name),
                _short(each.program),
                str(each.pid),
                *shown,
                ""
                if samples is None
                else f"{samples:,}"
                if each_rates is None
                else f"{each_rates.get('samples', 0):,.0f}/s",
                _waits(each, rates),
            )
        )
    return _table((">rank", "consumer", "program", ">pid", ">RAM", ">disk", ">store", ">samples", "waits"), rows)


def _rank(consumer: Consumer) -> str:
    rank = consumer.report.get("rank")
    return str(rank) if isinstance(rank, int) else ""


def _waits(consumer: Consumer, rates: Rates) -> str:
    """What the trainer waits for, the most first, in shares of its time: since the snapshot before, where that was of
    the same epoch, or else of the epoch.
    """
    now, before = consumer.report, rates.reports.get(consumer.number, {})
    is_same = before.get("epoch") == now.get("epoch") and _number(before, "elapsed_s") < _number(now, "elapsed_s")
    since = before if is_same else {}
    elapsed = _number(now, "elapsed_s") - _number(since, "elapsed_s")
    stalls, old = _mapping(now, "stalls"), _mapping(since, "stalls")
    waits = {cause: _number(stalls, cause) - _number(old, cause) for cause in stalls}
    longest = sorted(waits, key=lambda cause: -waits[cause])[:_STALLS_MAX]
    shares = {cause: min(1.0, waits[cause] / elapsed) for cause in longest} if elapsed > 0 else {}
    return ", ".join(f"{_short(cause)} {100 * share:.0f} %" for cause, share in shares.items() if share >= 0.01)


def _verdicts(consumers: Sequence[Consumer]) -> list[str]:
    """Of those that are held up by something; ranks of which the same is said share a line."""
    ranks: dict[str, list[str]] = {}
    for each in consumers:
        says, bound_by = each.report.get("verdict"), each.report.get("bound_by")
        if isinstance(says, str) and bound_by not in ("consumer", "unknown"):
            ranks.setdefault(says, []).append(_rank(each) or "-")
    lines = [f"rank {', '.join(of)}: {_short(says, _SENTENCE_CHARACTERS_MAX)}" for says, of in ranks.items()]
    return lines[:_ROWS_MAX]


def _wrapped(sentences: Sequence[str], width: int) -> list[str]:
    if not width:
        return list(sentences)
    return [line for each in sentences for line in textwrap.wrap(each, width, subsequent_indent="    ")]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(values: Mapping[str, Any], name: str) -> float:
    """One of a report, which is the consumer's to make."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Without the columns in which there is nothing."""
    if not rows:
        return []
    filled = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    columns, rows = [columns[at] for at in filled], [[row[at] for at in filled] for row in rows]
    more = [f"... and {len(rows) - _ROWS_MAX} more; --json has all"] if len(rows) > _ROWS_MAX else []
    return as_table(columns, rows[:_ROWS_MAX]) + more


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{format_bytes(rate)}/s"


def bar(part: float, whole: float) -> str:
    """How much of it, in ASCII."""
    filled = round(_BAR_CHARACTERS * min(1.0, max(0.0, part / whole))) if whole > 0 else 0
    return f"[{'#' * filled}{'.' * (_BAR_CHARACTERS - filled)}]"


def duration(seconds: float) -> str:
    """For people: `"2 d 5 h"`, `"3 min 20 s"`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _short(text: str, characters_max: int = _NAME_CHARACTERS_MAX) -> str:
    """A name in a table, which may be of any length and hold anything."""
    shown = plain(text[: characters_max + 1])
    return shown if len(shown) <= characters_max else shown[: characters_max - 1] + "\N{HORIZONTAL ELLIPSIS}"
