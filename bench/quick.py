"""The guard: a small benchmark that is always the same, held against a result that is committed beside it.

    python -m bench.quick               # or make bench-quick; status 5 where something is worse
    python -m bench.quick --update      # what is measured is the baseline of later ones: commit bench/baseline.json

It reads photographs and small records from a real S3 server (SeaweedFS, on this machine) by `fastload bench`: from the
store, out of RAM and from the disk tier, three times each. `fastload bench compare` judges, by figures that do not
depend on what else the machine does, or not much, each with the bound below. Rates are shown, and judge nothing.

CPU-seconds depend on the processor, and somewhat on the neighbours. So a yardstick is measured before and after, a
fixed piece of work, and CPU-seconds are given in yardsticks; the bound is a loose one all the same. Where others want
the cores, they take the caches as well, and the same work can take twice the CPU-seconds: then these are shown and not
judged, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import data
from fastload.bench import schema
from fastload.bench.compare import compare, lost, too_bad
from fastload.bench.plan import Options
from fastload.bench.report import change_lines
from fastload.bench.schema import Figure, Phase, Result
from fastload.bench.session import Session
from fastload.bench.workloads import Workload, shards, write_shard
from fastload.cli import exits
from fastload.demo.weed import WeedServer

BASELINE = Path(__file__).parent / "baseline.json"
BUCKET = "bench"
REPEATS = 3
SKIP = frozenset({"store", "disk", "memory", "decode", "shares", "prediction", "demand"})
# By how much a figure may be worse, by the beginning of its name. What is not named here may be by the first if it is
# steady: bytes, requests and samples are the same in every run.
BOUNDS: Mapping[str, float] = {
    "": 0.05,
    "yardsticks": 0.3,
    "CPU": float("inf"),  # of another processor, perhaps
    "memory": 0.2,
    "calls": 0.15,
    "wake-ups": 1.0,
    "page faults": 0.5,
}
_WAITS_FOR_CORES = "seconds over CPU-seconds"
_CROWDED = 1.5
RECORDS = Workload("records", 600, 300, 40_000, 256, 0.0, 0.0)
_RECORDS_BYTES = 12 << 20  # of values, a shard


@dataclass(frozen=True, slots=True)
class Case:
    """What is read, and how."""

    name: str
    paths: Sequence[Path]
    decode: Mapping[str, str]
    batch_size: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and judge or keep it."""
    parser = argparse.ArgumentParser(prog="bench.quick", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="what is measured now is the baseline from now on")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--json", type=Path, default=Path("bench/results/quick.json"), help="what is measured now")
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="of the photographs, kept")
    parser.add_argument("--shards", type=int, default=4, help="of photographs; another number is other work")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    result = measured(options.folder, options.shards)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    schema.write(result, options.json)
    print(f"took {time.monotonic() - began:.0f} s; all figures are in {options.json}")
    failed = [phase.name for phase in result.phases if phase.error]
    for phase in result.phases:
        if phase.error:
            print(f"{phase.name} failed: {phase.error}")
    if failed:
        return exits.PARTIAL
    if options.update and crowded(result):
        print("others want the cores: CPU-seconds of this baseline will be too many; make it again on a quiet machine")
    if options.update:
        schema.write(result, options.baseline)
        print(f"{options.baseline} is the baseline from now on; commit it")
        return 0
    return judge(schema.read(options.baseline), result)


def judge(baseline: Result, result: Result) -> int:
    """Print what changed, and what is worse by more than may be; the status."""
    changes = compare(baseline, result, other_machine=True)
    for line in change_lines(each for each in changes if each.word != "no change"):
        print(line)
    for line in lost(baseline, result):
        print(line)
    bounds = dict(BOUNDS)
    if crowded(result):
        print("others want the cores: CPU-seconds are not judged; run it again on a machine that does little else")
        bounds["yardsticks"] = float("inf")
    worse = too_bad(changes, bounds)
    print(f"{len(changes)} figures, {len(worse)} of them worse by more than may be{':' if worse else ''}")
    for line in change_lines(worse):
        print(line)
    if worse:
        print("mend it, or, where it is meant to be so: python -m bench.quick --update")
        return exits.WORSE
    return exits.PARTIAL if lost(baseline, result) else 0


def crowded(result: Result) -> bool:
    """Whether the fixed piece of work got its core for less than two thirds of the time, before or after a case."""
    return any(
        max(figure.values) > _CROWDED
        for phase in result.phases
        for figure in phase.figures
        if figure.name == _WAITS_FOR_CORES
    )


def measured(folder: Path, shard_count: int) -> Result:
    """One result of all cases, whose phases are called by them."""
    photographs = data.prepare(folder, shard_count=shard_count)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quick-", dir=folder)))
        cases = (
            Case("photographs", photographs.paths, {"jpg": "image:224", "cls": "integer"}, 64),
            Case("records", list(_records(scratch)), {"cls": "integer"}, 256),
        )
        server = stack.enter_context(WeedServer(scratch / "store"))
        server.make_bucket(BUCKET)
        os.environ |= {**server.environment(), "FASTLOAD_IDLE_S": "0"}
        found = []
        for case in cases:
            for path in case.paths:
                server.upload(path, f"s3://{BUCKET}/{case.name}/{path.name}")
            found.append(_of_case(case, scratch))
        return joint(found, [case.name for case in cases])


def _records(folder: Path) -> Iterator[Path]:
    for number, numbers in enumerate(shards(RECORDS, RECORDS.samples, _RECORDS_BYTES)):
        path = folder / f"records-{number:03d}.tar"
        write_shard(path, RECORDS, numbers)
        yield path


def _of_case(case: Case, scratch: Path) -> Result:
    options = Options(
        urls=[f"s3://{BUCKET}/{case.name}/"],
        decode=dict(case.decode),
        batch_size=case.batch_size,
        cache=scratch / "cache",
        ram_bytes=512 << 20,
        max_bytes=1 << 40,
        repeats=REPEATS,
        skip=SKIP,
    )
    yardsticks = [yardstick()]
    with Session(options, ["bench.quick"], lambda words: print(f"{case.name}: {words}", flush=True)) as session:
        plan = session.plan()
        result = session.run()
    yardsticks.append(yardstick())
    least_s = min(cpu_s for cpu_s, _ in yardsticks)
    for phase in result.phases:
        cpu_s = next((each.values for each in phase.figures if each.name == "CPU a 1,000 samples"), [])
        in_yardsticks = [value / least_s for value in cpu_s]
        phase.figures.append(
            Figure(name="yardsticks a 1,000 samples", unit="", values=in_yardsticks, better="less", steady=True)
        )
    figures = [
        Figure(name="one yardstick", unit="s", values=[cpu_s for cpu_s, _ in yardsticks]),
        Figure(name=_WAITS_FOR_CORES, unit="", values=[waits for _, waits in yardsticks]),
    ]
    result.phases.append(Phase(name="yardstick", seconds=0.0, figures=figures))
    result.phases.append(_calls([each.url for each in plan.objects], case, scratch))
    return result


def _calls(urls: Sequence[str], case: Case, scratch: Path) -> Phase:
    began = time.monotonic()
    values = []
    for number in range(REPEATS):
        settings = {"urls": urls, "decode": case.decode, "batch_size": case.batch_size}
        settings |= {"folder": str(scratch / f"calls-{case.name}-{number}")}
        command = [sys.executable, "-m", "bench.calls", json.dumps(settings)]
        values.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    figure = Figure(name="calls a batch", unit="", values=values, better="less", steady=True)
    return Phase(name="calls", seconds=time.monotonic() - began, figures=[figure])


def yardstick() -> tuple[float, float]:
    """CPU-seconds of a fixed piece of work, Python and memory: the least of several, since what runs beside it can only
    make it longer. And how many seconds they all took for each CPU-second.
    """
    source, target = np.ones(32 << 20, np.uint8), np.zeros(32 << 20, np.uint8)
    took = []
    began = time.monotonic()
    for _ in range(10):
        before = time.process_time()
        count = 0
        for number in range(2_000_000):
            count += number & 1
        for _ in range(20):
            np.copyto(target, source)
        took.append(time.process_time() - before)
    return min(took), (time.monotonic() - began) / sum(took)


def joint(results: Sequence[Result], names: Sequence[str]) -> Result:
    """Several results as one, whose phases are called by name and phase."""
    first = results[0]
    for name, result in zip(names, results, strict=True):
        for phase in result.phases:
            phase.name = f"{name}, {phase.name}"
    first.phases = [phase for result in results for phase in result.phases]
    first.verdict = [f"{name}: {line}" for name, result in zip(names, results, strict=True) for line in result.verdict]
    work = first.work
    work.urls = [url for result in results for url in result.work.urls]
    work.shards = sum(result.work.shards for result in results)
    work.samples = sum(result.work.samples for result in results)
    work.byte_count = sum(result.work.byte_count for result in results)
    work.digest = hashlib.sha256(" ".join(result.work.digest for result in results).encode()).hexdigest()[:16]
    return first


if __name__ == "__main__":
    sys.exit(main())
