"""What a sweep found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fastload import shares
from fastload.config import format_bytes
from fastload.plan import ram_bytes_for
from fastload.simulate.scenario import Job, StoreProfile
from fastload.simulate.world import Run
from fastload.svgplot import Axis, Curve, line_plot

# Chunks that come so many times an epoch are read again for want of room.
_AGAIN = 1.1

HIT_COLOUR, STALL_COLOUR = "#1b6ca8", "#c4511b"


def as_table(job: Job, runs: Sequence[Run]) -> Table:
    """A row for each cache: its first epoch, which fills it, and the mean of those after."""
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        if not run.refused:
            table.add_row(*_row(run))
    return table


def refusals(runs: Sequence[Run]) -> list[str]:
    """Why the loader would not run with some caches, a line for each."""
    return [f"disk cache of {format_bytes(run.node.disk_bytes)}: {run.refused}" for run in runs if run.refused]


_HEADINGS = ("cache", "data", "hit", "RAM", "disk", "fetched", "stall", "first", "samples/s", "flights")


_LEGEND = (
    ", in % of a node's data: data is what the disk cache has room for; hit is what was not fetched, from RAM and from "
    "disk. fetched is by a node in an epoch; stall is in % of the time, and first that of the first epoch; flights are "
    "requests in flight from a node."
)


def _row(run: Run) -> list[str]:
    return [
        format_bytes(run.node.disk_bytes),
        f"{run.node.disk_bytes / run.data_bytes_per_node:.0%}",
        _percent(run.mean("hit_share")),
        _percent(run.mean("ram_share")),
        _percent(run.mean("disk_share")),
        format_bytes(run.mean("remote_bytes_per_node")),
        _percent(run.mean("stall_share")),
        _percent(run.epochs[0].stall_share),
        _count(run.mean("samples_per_s")),
        f"{run.mean('requests_in_flight'):.1f}",
    ]


def _count(number: float) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def about(job: Job, runs: Sequence[Run]) -> str:
    """What was simulated of what was asked for."""
    run = next((run for run in runs if not run.refused), None)
    if run is None:
        return "Nothing was simulated."
    text = (
        f"{format_bytes(run.data_bytes_per_node)} of data on each of {job.nodes} nodes of {job.ranks_per_node} ranks. "
        f"{_epochs(job).capitalize()}{_LEGEND}\n"
        f"Simulated: {run.simulated_nodes} of {job.nodes} nodes, with their share of the store"
    )
    if run.scale < 1:
        ram = format_bytes(run.simulated_ram_bytes)
        text += (
            f", and {100 * run.scale:.2g}% of their data and disk caches, with {ram} of RAM{_error_of_part(job, run)}"
        )
    return text + "."


def _error_of_part(job: Job, run: Run) -> str:
    """How what was found of a part differs from what would be found of all."""
    if job.shuffle == "global":
        return (
            ". Of a part, a batch reads fewer chunks than of all, since more of its samples share one: its disk has "
            "less to do, and the job waits less, than they really would. --whole says how long, and takes as long"
        )
    excess = shares.ARC * (run.simulated_ram_bytes / run.scale - run.node.ram_bytes) / run.data_bytes_per_node
    if excess < 0.001:
        return ""
    return f", which may hit {excess:.1%} of the data more than the same part of it would"


def _epochs(job: Job) -> str:
    """Those whose means are shown."""
    return {1: "the first epoch", 2: "epoch 2"}.get(job.epochs, f"epochs 2 to {job.epochs}")


def advice(job: Job, runs: Sequence[Run]) -> list[str]:
    """What explains more than all of the data."""
    found = []
    for run in runs:
        times = max((each.remote_share + each.disk_share for each in run.epochs), default=0.0)
        enough = ram_bytes_for(1, job.shard_bytes)
        if job.shuffle != "global" and times > _AGAIN and run.node.ram_bytes < enough:
            found.append(
                f"disk cache of {format_bytes(run.node.disk_bytes)}: chunks came into RAM {times:.1f} times an epoch, "
                f"since two shards of {format_bytes(job.shard_bytes)} at a time are too much for "
                f"{format_bytes(run.node.ram_bytes)}; give --ram-bytes {format_bytes(enough).replace(' ', '')}, or "
                "smaller shards"
            )
    return found


def as_json(job: Job, store: StoreProfile, seed: int, runs: Sequence[Run]) -> dict[str, Any]:
    """All of it; numbers without an end are null."""
    found: dict[str, Any] = _finite(
        {"job": asdict(job), "store": asdict(store), "seed": seed, "runs": [asdict(run) for run in runs]}
    )
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def as_svg(job: Job, runs: Sequence[Run]) -> str:
    """The plot, of those caches that the loader would run with."""
    good = sorted((run for run in runs if not run.refused), key=lambda run: run.node.disk_bytes)
    data, ram = format_bytes(job.data_bytes / job.nodes), format_bytes(good[0].node.ram_bytes)
    subtitle = f"{_epochs(job)}, {data} of data and {ram} of RAM a node, policy {job.cache_policy}"
    lines = [
        Curve("hit share", HIT_COLOUR, [run.mean("hit_share") for run in good]),
        Curve("stall share", STALL_COLOUR, [run.mean("stall_share") for run in good]),
    ]
    return sweep_svg("What a cache of this size would do", subtitle, [run.node.disk_bytes for run in good], lines)


_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("B", 1.0))  # as in `format_bytes`


def sweep_svg(title: str, subtitle: str, cache_bytes: Sequence[int], lines: Sequence[Curve]) -> str:
    """Shares over the size of a cache. They have one axis, so that the reader compares them at the same place."""
    unit, unit_bytes = next((name, size) for name, size in _UNITS if max(cache_bytes) >= size or size == 1.0)
    sizes = [size / unit_bytes for size in cache_bytes]
    return line_plot(
        title, subtitle, sizes, lines, Axis(f"disk cache of a node, {unit}"), Axis("share, %", end=1.0, scale=100.0)
    )
