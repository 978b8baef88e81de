"""From passes over the data to the figures of a phase, and from those of all phases to what the verdict speaks of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastload.bench import runs
from fastload.bench.passes import Pass
from fastload.bench.plan import Options, Plan
from fastload.bench.prediction import Predicted
from fastload.bench.schema import Figure, Phase, Result, Series
from fastload.bench.verdict import Beside, Demand, Findings, Rate


def phase_of(name: str, passes: Sequence[Pass], seconds: float) -> Phase:
    """The figures of an epoch, with the values of each repeat; of fastload's own there are more."""

    def figure(title: str, unit: str, values: list[float], better: str = "", *, steady: bool = False) -> Figure:
        return Figure(name=title, unit=unit, values=values, better=better, steady=steady)  # type: ignore[arg-type]

    epochs = [each for each in passes if isinstance(each, runs.Epoch)]
    per_gb = [each.cpu_s / max(1e-9, sum(each.source_bytes.values()) / 1e9) for each in epochs]
    memory = [float(each.peak_memory_bytes) for each in passes]
    figures = [
        figure("samples", "samples/s", [each.samples / each.seconds for each in passes], "more"),
        figure("bytes", "B/s", [sum(each.source_bytes.values()) / each.seconds for each in epochs], "more"),
        figure("seconds", "s", [each.seconds for each in passes], "less"),
        figure("first batch", "s", [each.first_batch_s for each in passes], "less"),
        figure("batch wait, p50", "s", [each.wait_p50_s for each in passes], "less"),
        figure("batch wait, p99", "s", [each.wait_p99_s for each in passes], "less"),
        figure("batch wait, longest", "s", [each.wait_max_s for each in passes], "less"),
        figure("CPU", "CPU-s", [each.cpu_s for each in passes], "less", steady=True),
        figure("CPU a GB", "CPU-s/GB", per_gb, "less", steady=True),
        figure(
            "CPU a 1,000 samples",
            "CPU-s",
            [each.cpu_s / max(1, each.samples) * 1e3 for each in passes],
            "less",
            steady=True,
        ),
        figure("wake-ups a batch", "", [each.wakeups / max(1, each.batches) for each in epochs], "less"),
        figure("page faults a batch", "", [each.page_faults / max(1, each.batches) for each in epochs], "less"),
        figure("memory at the peak", "B", memory if any(memory) else [], "less", steady=True),
        figure("bytes from the store", "B", [float(each.fetched_bytes) for each in epochs], "less", steady=True),
        figure("requests", "", [float(each.requests) for each in epochs], "less", steady=True),
        figure("requests refused", "", [float(each.refused) for each in epochs if each.refused], "less"),
        figure("samples of an epoch", "", [each.samples / _readings(each) for each in passes], steady=True),
        figure("repeated samples", "", [each.repeats / each.readings for each in epochs], steady=True),
    ]
    spread = [max(each.ranks_per_s) / max(1e-9, min(each.ranks_per_s)) for each in epochs if each.ranks_per_s]
    figures.append(figure("fastest rank over slowest", "", spread, "less"))
    for cause in epochs[0].stalls_s if epochs else ():
        figures.append(figure(f"waited for {cause}", "s", [each.stalls_s[cause] for each in epochs], "less"))
    phase = Phase(name=name, seconds=seconds, figures=[each for each in figures if each.values])
    if spread:
        ranks = epochs[-1].ranks_per_s
        xs = [float(rank) for rank in range(len(ranks))]
        phase.series = [Series(name="each rank", x_unit="rank", y_unit="samples/s", xs=xs, ys=ranks)]
    if statistics.median(each.seconds for each in passes) < 2.0 and name != "ideal":
        phase.notes.append("too short to say much: give more data")
    said = [each.verdict for each in epochs] + [each.note for each in passes if name != "ideal"]
    phase.notes += list(dict.fromkeys(each for each in said if each))
    return phase


def _readings(one: Pass) -> int:
    return one.readings if isinstance(one, runs.Epoch) else 1


def rate_of(epoch: runs.Epoch) -> Rate:
    byte_count = sum(epoch.source_bytes.values())
    return Rate(
        samples_per_s=epoch.samples / epoch.seconds,
        bytes_per_s=byte_count / epoch.seconds,
        seconds=epoch.seconds,
        cpu_s=epoch.cpu_s,
        fetched_bytes=epoch.fetched_bytes,
    )


@dataclass(slots=True)
class Conclusions:
    """What phases found that no figure holds."""

    bound_by: dict[str, tuple[str, str]] = field(default_factory=dict)  # what fastload said of itself, by phase
    demands: list[Demand] = field(default_factory=list)
    shares: list[tuple[float, Rate]] = field(default_factory=list)
    predicted: Predicted | None = None
    equality: str = ""
    peers: list[Beside] = field(default_factory=list)


def findings(result: Result, plan: Plan, options: Options, found: Conclusions, load_before: float) -> Findings:
    """What the verdict is about."""
    threads = max(1, options.workers)
    plural = "s" * (threads > 1)
    decoded = [_value(result, "decode", f"decode {column}, {threads} thread{plural}") for column in options.decode]
    rates = [value for value in decoded if value]
    bend = _value(result, "store", "requests at the bend")
    predicted = found.predicted
    beside = (("first", "yours", "cold"), ("later", "yours later", "ram"))
    return Findings(
        samples=result.work.samples,
        byte_count=plan.byte_count,
        stored_bytes=plan.stored_bytes,
        whole_bytes=plan.whole_bytes,
        batch_size=options.batch_size,
        workers=threads,
        shards=len(plan.objects),
        store_bytes_per_s=_value(result, "store", "goodput"),
        requests_at_bend=None if bend is None else int(bend),
        first_byte_s=_value(result, "store", "first byte, p50"),
        request_bytes=_value(result, "store", "bytes a request at the bend"),
        retries=int(_value(result, "store", "requests tried again") or 0),
        ranks=options.ranks,
        disk_bytes_per_s=_value(result, "disk", "read"),
        decode_per_s=1 / sum(1 / value for value in rates) if rates else None,
        cold=_rate(result, found, "cold"),
        refused=int(_value(result, "cold", "requests refused") or 0),
        from_disk=_rate(result, found, "disk epoch"),
        from_ram=_rate(result, found, "ram"),
        shares=tuple(found.shares),
        predicted=None if predicted is None else (predicted.enough, predicted.later_per_s[predicted.enough]),
        demands=tuple(found.demands),
        busy=options.busy,
        profile=options.profile,
        against=options.against,
        yours=tuple(
            (word, yours, _rate(result, found, ours))
            for word, phase, ours in beside
            if (yours := _rate(result, found, phase)) is not None
        ),
        equality=found.equality,
        ideal_per_s=_value(result, "ideal", "samples"),
        peers=tuple(found.peers),
        load_before=load_before,
        cores=result.machine.cores,
        price_per_gb=options.price_per_gb,
        price_per_1000=options.price_per_1000,
        requests=int(_value(result, "cold", "requests") or 0),
        epochs=options.epochs,
    )


def _value(result: Result, phase: str, name: str) -> float | None:
    there = result.phase(phase)
    return None if there is None else there.value(name)


def _rate(result: Result, found: Conclusions, phase: str) -> Rate | None:
    there = result.phase(phase)
    if there is None:
        return None
    bound_by, said = found.bound_by.get(phase, ("", ""))
    return Rate(
        samples_per_s=there.value("samples") or 0.0,
        bytes_per_s=there.value("bytes") or 0.0,
        seconds=there.value("seconds") or 0.0,
        cpu_s=there.value("CPU") or 0.0,
        cores=result.machine.cores,
        fetched_bytes=int(there.value("bytes from the store") or 0),
        bound_by=bound_by,
        said=said,
    )
