"""What is measured, and what is asked of it: each scenario takes a stage and gives rows of a table.

Systems alternate within a round and rounds repeat, so that a disturbance hits all of them alike; a row keeps every
value and shows the median.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.proxy import Profile
from bench.stage import Measured, Run, RunFailedError, Stage
from fastload.bench import measure

CAP_BYTES_PER_S = 200e6
FAR = Profile(delay_s=0.02)
FAR_AND_CAPPED = Profile(delay_s=0.02, total_bytes_per_s=CAP_BYTES_PER_S)
SMALL_ARENA_BYTES = 256 << 20
SPINNING = 4

RANK_COUNTS = (1, 2, 4, 8)
# What `bench.ranks` splits the CPU-seconds of ranks into.
_OF_RANKS = {
    "list": "listing, connecting",
    "index": "indexing",
    "plan": "planning",
    "gather": "gathering",
    "messages": "messages of the service",
    "consumer": "hashing",
    "other": "other",
}

_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(slots=True)
class Row:
    """One figure: its values by system, in the order in which they were taken, and the target for the median of the
    one that is `judged`.
    """

    what: str
    unit: str
    target: tuple[str, float] | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    judged: str = "fastload"

    def add(self, system: str, value: float) -> None:
        """One more run."""
        self.values.setdefault(system, []).append(value)

    @property
    def met(self) -> bool | None:
        """Whether that median meets the target; None without one, or without a run of that."""
        if self.target is None or self.judged not in self.values:
            return None
        comparison, limit = self.target
        return _COMPARE[comparison](measure.median(self.values[self.judged]), limit)


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario's rows, and every run behind them."""

    name: str
    rows: list[Row]
    runs: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure: `systems` beside the raw requests, `rounds` of each."""

    systems: tuple[str, ...] = ("fastload", "webdataset")
    rounds: int = 3


def capped(stage: Stage, plan: Plan) -> Result:
    """A store that gives 200 MB/s: how much of that a cold epoch makes use of, and how it begins."""
    share = Row("cold epoch, share of the cap", "", (">=", 0.95))
    rate = Row("cold epoch", "MB/s")
    remote = Row("bytes from the store, of the data", "", ("<=", 1.02))
    first = Row("first batch after", "s")
    shards = Row("shards that came before the first batch", "", ("<=", 2.0))
    lag = Row("first batch after the first whole shard", "s", ("<=", 0.5))
    memory = Row("peak memory, anonymous and shared", "MB")
    runs = _rounds(stage, plan, ("raw", *plan.systems), FAR_AND_CAPPED)
    for run in runs:
        epoch = run.epochs[0]
        rate.add(run.system, epoch.mb_per_s)
        share.add(run.system, epoch.mb_per_s * 1e6 / CAP_BYTES_PER_S)
        remote.add(run.system, epoch.remote_bytes / epoch.data_bytes)
        memory.add(run.system, epoch.peak_memory_bytes / 1e6)
        if run.system != "raw":
            began = epoch.shards_before_first_batch()
            first.add(run.system, epoch.epoch.first_batch_s)
            shards.add(run.system, began[0])
            lag.add(run.system, began[1])
    return _result("capped", [rate, share, remote, first, shards, lag, memory], runs)


def busy(stage: Stage, plan: Plan) -> Result:
    """The same store on a node whose cores four other processes want all the time, at the same priority."""
    rate = Row("cold epoch", "MB/s")
    share = Row("cold epoch, of plain range requests", "", (">=", 0.95))
    ahead = Row("cold epoch, times the best of the others", "", (">=", 1.0))
    first = Row("first batch after", "s")
    client = Row("client and cache service", "CPU-s/GB")
    with measure.spinning(SPINNING):
        runs = _rounds(stage, plan, ("raw", *plan.systems), FAR_AND_CAPPED)
    for run in runs:
        epoch = run.epochs[0]
        rate.add(run.system, epoch.mb_per_s)
        client.add(run.system, epoch.cpu_s_per_gb("client"))
        if run.system != "raw":
            first.add(run.system, epoch.epoch.first_batch_s)
    for row, other in ((share, measure.median(rate.values["raw"])), (ahead, _best_of_others(rate, "raw"))):
        if other:
            row.values.update({system: [value / other for value in values] for system, values in rate.values.items()})
    return _result("busy", [rate, share, ahead, first, client], runs)


def uncapped(stage: Stage, plan: Plan) -> Result:
    """A store without a cap: what a cold epoch costs, and how fast a second one comes from an arena that holds it."""
    rate = Row("cold epoch", "MB/s")
    client = Row("cold epoch, client and cache service", "CPU-s/GB")
    start = Row("start of the cache service", "CPU-s")
    whole = Row("start and cold epoch, client and cache service", "CPU-s/GB", ("<=", 2.0))
    server = Row("cold epoch, server", "CPU-s/GB")
    proxy = Row("cold epoch, proxy", "CPU-s/GB")
    warm = Row("second epoch", "MB/s")
    warm_client = Row("second epoch, client and cache service", "CPU-s/GB")
    warm_remote = Row("second epoch, bytes from the store", "", ("<=", 0.0))
    faster = Row("second epoch, times the best of the others", "", (">=", 3.0))
    memory = Row("peak memory, anonymous and shared", "MB")
    beyond = Row("peak memory beyond data in the arena and slots", "MB", ("<=", 400.0))
    runs = _rounds(stage, plan, ("raw",), FAR) + _rounds(stage, plan, plan.systems, FAR, epochs=2)
    for run in runs:
        cold = run.epochs[0]
        rate.add(run.system, cold.mb_per_s)
        for row, process in ((client, "client"), (server, "server"), (proxy, "proxy")):
            row.add(run.system, cold.cpu_s_per_gb(process))
        memory.add(run.system, cold.peak_memory_bytes / 1e6)
        if run.system == "fastload":
            start.add(run.system, cold.epoch.service_cpu_s_before)
            before = cold.epoch.service_cpu_s_before / (cold.data_bytes / 1e9)
            whole.add(run.system, cold.cpu_s_per_gb("client") + before)
            held = min(cold.ram_bytes, cold.data_bytes) + max(each.epoch.slots_bytes for each in run.epochs)
            beyond.add(run.system, (cold.peak_memory_bytes - held) / 1e6)
        for second in run.epochs[1:]:
            warm.add(run.system, second.mb_per_s)
            warm_client.add(run.system, second.cpu_s_per_gb("client"))
            warm_remote.add(run.system, second.remote_bytes)
    if best := _best_of_others(warm):
        for system, values in warm.values.items():
            faster.values[system] = [value / best for value in values]
    rows = [rate, client, start, whole, server, proxy, warm, faster, warm_remote, warm_client, memory, beyond]
    return _result("uncapped", rows, runs)


def disk(stage: Stage, plan: Plan) -> Result:
    """The disk alone: filled by one run, then read by another (fastload: with a small arena), the page cache dropped.

    What is asked is 0.9 of the disk's own rate, or twice the best of the others where that is less.
    """
    rate = Row("epoch from the disk", "MB/s")
    asked = Row("epoch from the disk, of what is asked", "", (">=", 1.0))
    raw = Row("the disk's own rate, O_DIRECT, 4 threads", "MB/s")
    remote = Row("bytes from the store, of the data", "", ("<=", 0.0))
    client = Row("client and cache service", "CPU-s/GB")
    memory = Row("peak memory, anonymous and shared", "MB")
    runs: list[Run] = []
    for system in plan.systems * plan.rounds:
        folder = stage.empty_folder()
        try:
            stage.run(system, FAR, folder=folder)
            measure.drop_page_cache([folder])
            if system == "fastload":
                raw.add("disk", measure.disk_bytes_per_s(folder) / 1e6)
            runs.append(stage.run(system, FAR, folder=folder, ram_bytes=SMALL_ARENA_BYTES))
        except RunFailedError:
            if system == "fastload":
                raise
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        epoch = runs[-1].epochs[0]
        rate.add(system, epoch.mb_per_s)
        remote.add(system, epoch.remote_bytes / epoch.data_bytes)
        client.add(system, epoch.cpu_s_per_gb("client"))
        memory.add(system, epoch.peak_memory_bytes / 1e6)
    if "fastload" in plan.systems:
        limit = 0.9 * measure.median(raw.values["disk"])
        if best := _best_of_others(rate):
            limit = min(limit, 2 * best)
        asked.values["fastload"] = [value / limit for value in rate.values["fastload"]]
    return _result("disk", [rate, raw, asked, remote, client, memory], runs)


def together(stage: Stage, plan: Plan) -> Result:
    """Two processes of one node that read the same shards at once."""
    remote = Row("bytes from the store, of the data", "", ("<=", 1.02))
    rate = Row("both together", "MB/s")
    memory = Row("peak memory of both, anonymous and shared", "MB")
    runs = [stage.run("fastload", FAR, count=2) for _ in range(plan.rounds)]
    for run in runs:
        epochs = [epochs[0] for epochs in run.runners]
        remote.add("fastload", run.remote_bytes / epochs[0].data_bytes)
        rate.add("fastload", _rate_of_both(epochs))
        memory.add("fastload", epochs[0].peak_memory_bytes / 1e6)
    return _result("together", [remote, rate, memory], runs)


def ranks(stage: Stage, plan: Plan) -> Result:
    """Ranks of one node that share a cold epoch: what each does for itself, imports aside, shows in the CPU-seconds."""
    first = Row("first batch of the last rank after", "s", ("<=", 2.0))
    times = Row("CPU-seconds, times those of one rank", "", ("<=", 1.5))
    seconds, requests = Row("cold epoch", "s"), Row("requests", "")
    whole, service = Row("ranks and cache service", "CPU-s"), Row("cache service", "CPU-s")
    kinds = {kind: Row(f"ranks: {what}", "CPU-s") for kind, what in _OF_RANKS.items()}
    runs: list[Run] = []
    for count in RANK_COUNTS * plan.rounds:
        runs.append(stage.run("fastload", FAR, ranks=count))
        (epoch,), system = runs[-1].epochs, _ranks(count)
        cpu_s = epoch.epoch.cpu_s
        first.add(system, epoch.epoch.first_batch_s)
        seconds.add(system, epoch.epoch.seconds)
        requests.add(system, len(epoch.requests))
        whole.add(system, cpu_s["client"])
        service.add(system, cpu_s["service"])
        for kind, row in kinds.items():
            row.add(system, cpu_s[kind])
    for system, values in whole.values.items():
        times.add(system, measure.median(values) / measure.median(whole.values[_ranks(RANK_COUNTS[0])]))
    first.judged = times.judged = _ranks(RANK_COUNTS[-1])
    return _result("ranks", [first, seconds, whole, times, service, *kinds.values(), requests], runs)


SCENARIOS: dict[str, Callable[[Stage, Plan], Result]] = {
    "capped": capped,
    "busy": busy,
    "uncapped": uncapped,
    "disk": disk,
    "together": together,
    "ranks": ranks,
}


def _rounds(stage: Stage, plan: Plan, systems: tuple[str, ...], profile: Profile, **settings: Any) -> list[Run]:
    """Every system in turn, `plan.rounds` times. A run of another loader that fails is left out, after its error."""
    runs = []
    for system in systems * plan.rounds:
        try:
            runs.append(stage.run(system, profile, **settings))
        except RunFailedError:
            if system in ("raw", "fastload"):
                raise
    return runs


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _best_of_others(row: Row, *besides: str) -> float:
    """The best median of another loader; 0 where none was measured."""
    others = [values for system, values in row.values.items() if system not in ("fastload", *besides)]
    return max(map(measure.median, others), default=0.0)


def _rate_of_both(epochs: list[Measured]) -> float:
    begins = min(epoch.epoch.began for epoch in epochs)
    ends = max(epoch.epoch.began + epoch.epoch.seconds for epoch in epochs)
    return sum(epoch.data_bytes for epoch in epochs) / (ends - begins) / 1e6


def _result(name: str, rows: list[Row], runs: list[Run]) -> Result:
    return Result(name, rows, [epoch.as_dict() for run in runs for epochs in run.runners for epoch in epochs])
