"""From passes over the data to the figures of a phase, and to the rates that the verdict speaks of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastload.bench import runs
from fastload.bench.passes import Pass
from fastload.bench.schema import Figure, Phase, Series
from fastload.bench.verdict import Rate


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
