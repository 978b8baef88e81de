"""The report under `docs/benchmarks/`: `fastload bench` on five kinds of data, beside all other loaders that install.

    pip install -e '.[bench]'
    nice -n -10 python -m bench.report                    # half an hour on two cores, with nothing else running
    python -m bench.report --workload records --repeats 1 --folder /tmp/look       # a look at one
    python -m bench.report --table                        # only the page, from the results that are there

Each workload is served by `weed mini` behind a proxy that holds requests back by 20 ms, and that caps the rate where
the workload says so. Its result is written as JSON and HTML, and `README.md` beside them is made of these: a table a
workload, and the goals with what was reached.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import data, records
from bench.data import DataSet
from bench.proxy import Profile
from bench.stage import BUCKET, Stage
from fastload.bench import schema
from fastload.bench.peers import OURS
from fastload.bench.peers.race import EPOCHS, PREFIX
from fastload.bench.report import number, title
from fastload.bench.schema import Phase, Result
from fastload.bench.workloads import Workload, find, shards, write_shard

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
DELAY_S = 0.020
# All others take turns over the same shards: what is read from the store is many times the data.
MAX_BYTES = "200GiB"
SKIPPED = "shares,equality,prediction,demand"


@dataclass(frozen=True, slots=True)
class Kind:
    """One workload: how its shards are made, and the options of `fastload bench` beside them."""

    name: str
    about: str
    make: Callable[[Path], DataSet]
    options: tuple[str, ...] = ()
    cap: float | None = None  # bytes a second


def photographs(shard_count: int) -> Callable[[Path], DataSet]:
    """Shards of 64 MB with 690 JPEGs of 91 kB each."""
    return lambda folder: data.prepare(folder, shard_count=shard_count)


def small_records(folder: Path) -> DataSet:
    """Three shards of 40,000 records of 600 bytes."""
    made = records.prepare(folder)
    return _data_set(made, [path.name for path in sorted(made.iterdir())[:3]])


def samples_of(workload: Workload, count: int) -> Callable[[Path], DataSet]:
    """`count` samples of a workload in tar shards."""

    def make(folder: Path) -> DataSet:
        made = folder / f"samples-v1-{workload.name}-{count}"
        names = []
        made.mkdir(exist_ok=True)
        for shard, numbers in enumerate(shards(workload, count)):
            names.append(f"train-{shard:06d}.tar")
            if not (made / names[-1]).exists():
                write_shard(made / ".part", workload, numbers)
                (made / ".part").rename(made / names[-1])
        return _data_set(made, names)

    return make


def _data_set(folder: Path, names: Sequence[str]) -> DataSet:
    return DataSet(str(folder), tuple(names), 0, sum((folder / name).stat().st_size for name in names), 0, 0)


MIDDLE = Workload("middle", 14_660_063, 6_834_181, 168, 7, 0.032, 0.9)  # a tenth of unet3d's

KINDS = (
    Kind("photographs", "JPEGs of 91 kB as bytes, 64 MB a shard", photographs(6)),
    Kind("photographs-200", "the same behind a link of 200 MB/s", photographs(6), cap=200e6),
    Kind(
        "training",
        "the same JPEGs as float32[3, 224, 224] and labels as integers",
        photographs(3),
        ("--decode=jpg=image:224", "--decode=cls=integer"),
    ),
    Kind("records", "records of 600 bytes, 40,000 a shard", small_records, ("--batch-size=1024",)),
    Kind("samples-14mb", "samples of 14.7 MB on average", samples_of(MIDDLE, 50), ("--batch-size=7",)),
    Kind("samples-146mb", "samples of 146.6 MB on average", samples_of(find("unet3d"), 10), ("--batch-size=7",)),
)


def main() -> int:
    """Measure what the arguments ask for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[kind.name for kind in KINDS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results and page are written")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = options.folder.resolve()
    failed = []
    for kind in KINDS:
        if not options.table and kind.name in (options.workload or [each.name for each in KINDS]):
            print(f"\n== {kind.name}", flush=True)
            if measure(kind, options.folder, options.repeats, options.peers) not in (0, 3):
                failed.append(kind.name)
    results = {kind: options.folder / f"{kind.name}.json" for kind in KINDS}
    page = render({kind: schema.read(path) for kind, path in results.items() if path.exists()})
    (options.folder / "README.md").write_text(page)
    return int(bool(failed))


def measure(kind: Kind, folder: Path, repeats: int, peers: str) -> int:
    """Run `fastload bench` on one workload; its status."""
    cache = data.default_folder()
    # The command is in what it writes: options that say where this machine has its files are left out of it.
    os.environ["FASTLOAD_CACHE"] = str(cache / "cache")
    os.chdir(folder)
    with Stage(kind.make(cache), cache) as stage:
        return stage.call(
            [
                *(sys.executable, "-m", "fastload", "bench", f"s3://{BUCKET}/", *kind.options, f"--peers={peers}"),
                *(f"--skip={SKIPPED}", f"--repeats={repeats}", f"--max-bytes={MAX_BYTES}", "--yes"),
                *(f"--json={kind.name}.json", f"--html={kind.name}.html"),
            ],
            Profile(DELAY_S, kind.cap),
        )


# The page. A column a figure of `fastload.bench.peers.race`, of the loader's phase.

COLUMNS = (
    (EPOCHS[0], "first epoch, samples/s"),
    ("CPU a GB, first epoch", "CPU-s a GB"),
    ("first batch", "first batch"),
    (EPOCHS[1], "from RAM, samples/s"),
    ("CPU a GB, later epoch", "CPU-s a GB"),
    (EPOCHS[2], "page cache dropped, samples/s"),
    ("memory at the peak", "memory"),
)


def render(results: dict[Kind, Result]) -> str:
    """The page as Markdown."""
    if not results:
        return "Nothing has been measured yet: `python -m bench.report`.\n"
    said = [
        "# fastload beside other loaders",
        "",
        "Written by `python -m bench.report`, in a checkout with `pip install -e '.[bench]'`. Each workload's link",
        "leads to its page; beside that lies the JSON with every run. How loaders are set up and what epochs are is",
        "said [here](../bench.md#beside-other-loaders). Server, proxy (20 ms a request) and loader share the cores.",
        "",
        "streaming, litdata, torch and datasets read copies or formats of their own on this machine, so their first",
        "epochs say nothing of a store. Data sets are small, so that all loaders can take turns: the start is a good",
        "part of a first epoch. What one of 1.5 GB gives is in the [README](../../README.md#results).",
        "",
    ]
    for kind, result in results.items():
        said += _workload(kind, result)
    said += ["## Goals, and what was reached", "", "| goal | reached | |", "|---|---|---|"]
    said += [
        f"| {what} | {reached:.2f} | {'met' if is_met else '**missed**'} |" for what, reached, is_met in goals(results)
    ]
    return "\n".join(said) + "\n"


def _workload(kind: Kind, result: Result) -> list[str]:
    machine, work = result.machine, result.work
    versions = ", ".join(f"{name} {each}" for name, each in sorted(result.versions.items()))
    said = [
        f"## [{kind.name}]({kind.name}.html): {kind.about}",
        "",
        f"{work.samples:,} samples, {work.byte_count / 1e9:.2f} GB in {work.shards} shards, {result.taken_at[:10]}. "
        f"{machine.cpu}, {machine.cores:g} cores, {machine.file_system}, load {machine.load_before:.1f} before.",
        f"{versions}.",
        "",
        f"    {' '.join(result.command)}",
        "",
        f"| | {' | '.join(heading for _, heading in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for phase in _raced(result):
        name = phase.name.removeprefix(PREFIX)
        if phase.error:
            said.append(f"| {name} | {phase.error.splitlines()[0]} |{' |' * (len(COLUMNS) - 1)}")
        else:
            said.append(f"| {name} | {' | '.join(_cell(phase, figure) for figure, _ in COLUMNS)} |")
    limits = [f"{title(name)}: {line}" for name in ("store", "disk", "decode") if (line := _limit(result, name))]
    return [*said, "", *[f"- {line}" for line in limits], *[f"- {line}" for line in result.verdict], ""]


def _raced(result: Result) -> list[Phase]:
    return [phase for phase in result.phases if phase.name.startswith(PREFIX)]


def _cell(phase: Phase, name: str) -> str:
    for figure in phase.figures:
        if figure.name == name and figure.values:
            said = number(median(figure.values), figure.unit)
            return said.removesuffix(" samples/s").removesuffix(" CPU-s/GB")
    return ""


def _limit(result: Result, name: str) -> str:
    phase = result.phase(name)
    figures = phase.figures if phase else []
    return ", ".join(f"{each.name} {number(median(each.values), each.unit)}" for each in figures if each.values)


# The goals. Each is a ratio of medians within one run.


def goals(results: dict[Kind, Result]) -> list[tuple[str, float, bool]]:
    """What was asked for, what was reached, and whether that is enough; of the workloads that were measured."""
    by_name = {kind.name: result for kind, result in results.items()}
    said: list[tuple[str, float, bool]] = []

    def at_least(workload: str, what: str, least: float, reached: Callable[[Result], float | None]) -> None:
        value = reached(by_name[workload]) if workload in by_name else None
        if value is not None:
            said.append((f"{workload}: {what}, at least {least:g}", value, value >= least))

    def at_most(workload: str, what: str, most: float, reached: Callable[[Result], float | None]) -> None:
        value = reached(by_name[workload]) if workload in by_name else None
        if value is not None:
            said.append((f"{workload}: {what}, at most {most:g}", value, value <= most))

    at_least("photographs-200", "first epoch, of the link", 0.97, lambda r: _of_ours(r, "first epoch, bytes", 200e6))
    at_most(
        "photographs-200",
        "CPU-seconds a GB of the first epoch, of the best other loader's that reads the store",
        0.5,
        lambda r: _to_best(r, "CPU a GB, first epoch", min, of_store=True),
    )
    at_least("photographs", "from RAM, of the best other", 3, lambda r: _to_best(r, EPOCHS[1], max))
    at_least("photographs", "page cache dropped, of the best other", 2, lambda r: _to_best(r, EPOCHS[2], max))
    at_least("training", "from RAM, of the best other", 2.5, lambda r: _to_best(r, EPOCHS[1], max))
    at_least("training", "from RAM, of the decoder alone", 0.9, _of_decoder)
    at_least("records", "from RAM, of webdataset", 20, lambda r: _to_best(r, EPOCHS[1], max, of=("webdataset",)))
    at_least(
        "records",
        "from RAM, of torch over a local Arrow table",
        1,
        lambda r: _to_best(r, EPOCHS[1], max, of=("datasets",)),
    )
    for kind in results:
        first = "first batch, of the best other's that reads the store"
        at_most(kind.name, first, 1, lambda r: _to_best(r, "first batch", min, of_store=True))
    return said


def _of_ours(result: Result, figure: str, limit: float) -> float | None:
    ours = result.phase(f"{PREFIX}{OURS}")
    value = ours.value(figure) if ours else None
    return value / limit if value else None


def _to_best(
    result: Result,
    figure: str,
    best: Callable[[list[float]], float],
    *,
    of: Sequence[str] = (),
    of_store: bool = False,
) -> float | None:
    """Ours, divided by the best of the others (`of` these; `of_store`: those whose first epoch reads the store)."""
    ours = result.phase(f"{PREFIX}{OURS}")
    others = [
        value
        for phase in _raced(result)
        if phase.name != f"{PREFIX}{OURS}" and not phase.error and (value := phase.value(figure))
        if not of or phase.name.removeprefix(PREFIX) in of
        if not (of_store and any("and not the store" in note for note in phase.notes))
    ]
    value = ours.value(figure) if ours else None
    return value / best(others) if value and others else None


def _of_decoder(result: Result) -> float | None:
    """Ours from RAM, of what the decoder of images gives with as many threads."""
    decode, ours = result.phase("decode"), result.phase(f"{PREFIX}{OURS}")
    limits = [value for n in (1, 2) if decode and (value := decode.value(f"decode jpg, {n} thread{'s' * (n > 1)}"))]
    value = ours.value(EPOCHS[1]) if ours else None
    return value / max(limits) if value and limits else None


if __name__ == "__main__":
    sys.exit(main())
