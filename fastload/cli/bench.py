"""`fastload bench`: how fast can this data be fed here, and what limits it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from fastload.cli import exits
from fastload.cli.cache_options import CachePath, FormatOption, SplitOption
from fastload.cli.printing import examples, plain
from fastload.config import format_bytes, parse_bytes, parse_seconds
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.bench.plan import Plan
    from fastload.bench.schema import Result

_QUICK_BYTES = "512MiB"
_PHASES = ("store", "disk", "memory", "decode", "ram", "disk epoch", "shares", "equality", "prediction", "demand")


class _Verbs(TyperGroup):
    """`run` may be left out: what is no other verb is a URL."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="How fast can this data be fed here, and what limits it? `fastload bench URL` measures, and "
    "`fastload bench compare` says whether two results differ; `fastload bench make` makes data to measure.",
)


def _grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` for typer, which makes an option of each parameter: one that is a dataclass stands for its fields."""
    hints: dict[str, type] = get_type_hints(verb, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        found = inspect.signature(groups[name], eval_str=True).parameters if name in groups else {name: parameter}
        parameters |= {name: each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in found.items()}

    @functools.wraps(verb)
    def flat(**given: Any) -> None:
        made = {
            name: kind(**{each: given.pop(each) for each in inspect.signature(kind).parameters})
            for name, kind in groups.items()
        }
        verb(**given, **made)

    flat.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    flat.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return flat


@dataclass(frozen=True, slots=True)
class _Job:
    """What is read, as a training job reads it."""

    format_name: FormatOption = "auto"
    split: SplitOption = None
    shuffle: Annotated[str, typer.Option(help="window, shards, global or none.")] = "window"
    seed: Annotated[int, typer.Option(help="The job's seed.")] = 0
    columns: Annotated[str, typer.Option(help="The columns that the job reads, separated by commas; else all.")] = ""
    decode: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=image:SIZE, or integer, number, text, json, array; may be given several times."),
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a batch; else 256, or the profile's.")] = None
    workers: Annotated[int, typer.Option(min=0, help="The loader's num_workers.")] = 2
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of this node, which share the epoch.")] = 1
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="MODULE:FUNCTION for dataset.map(); may be given several times.")
    ] = None
    shuffle_window: Annotated[str, typer.Option(help="The job's shuffle window, such as 1GiB.")] = "auto"
    ram_bytes: Annotated[str, typer.Option(help="The job's RAM tier; else what each phase needs.")] = ""

    def options(self) -> dict[str, Any]:
        """Those of the benchmark that it settles; what is none is an error now."""
        from fastload.bench import runs
        from fastload.bench.process import check_target
        from fastload.formats import checked_format

        checked_format(self.format_name)
        specs = _specs(self.decode or [])
        runs.decoders(specs)
        for target in self.map_ or []:
            check_target("--map", target)
        window, ram_bytes = self.shuffle_window, self.ram_bytes
        return {
            "format": self.format_name,
            "split": self.split,
            "shuffle": _one_of("--shuffle", self.shuffle, ("window", "shards", "global", "none")),
            "seed": self.seed,
            "columns": [each for each in self.columns.split(",") if each],
            "decode": specs,
            "workers": self.workers,
            "functions": self.map_ or [],
            "shuffle_window": window if window == "auto" else parse_bytes(window, "--shuffle-window"),
            "ram_bytes": parse_bytes(ram_bytes, "--ram-bytes") if ram_bytes else 0,
        }


@dataclass(frozen=True, slots=True)
class _Others:
    """What is measured beside fastload."""

    against: Annotated[
        str, typer.Option(help="MODULE:FUNCTION that returns your own loader, an iterable of batches, to run beside.")
    ] = ""
    ideal: Annotated[
        bool, typer.Option("--ideal", help="Its batches replayed from memory too: what no loader can beat.")
    ] = False
    peers: Annotated[
        str, typer.Option(help="Other loaders to measure beside, such as webdataset,streaming, or all.")
    ] = ""

    def options(self) -> dict[str, Any]:
        """Those of the benchmark that it settles."""
        from fastload.bench.process import check_target

        if self.against:
            check_target("--against", self.against)
        return {"against": self.against, "ideal": self.ideal, "peers": _peers(self.peers)}


@dataclass(frozen=True, slots=True)
class _Effort:
    """How much is measured."""

    cache_share: Annotated[str, typer.Option(help="Disk caches to try, as parts of the data, such as 0.25,0.5.")] = ""
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each epoch; `compare` needs several.")] = 1
    for_s: Annotated[str, typer.Option("--for", help="The longest that an epoch should take, such as 2m.")] = "30s"
    max_bytes: Annotated[str, typer.Option(help="What may be read from the store, all phases together.")] = "4GiB"
    yes: Annotated[bool, typer.Option("--yes", help="Read more than that where one shard alone takes it.")] = False
    quick: Annotated[bool, typer.Option("--quick", help="A look: 512 MiB, and only the most telling phases.")] = False
    skip: Annotated[str, typer.Option(help=f"Phases to leave out: {', '.join(_PHASES)}.")] = ""

    def options(self, *, has_step: bool) -> dict[str, Any]:
        """Those of the benchmark that it settles."""
        left_out = _names(self.skip)
        if self.quick:
            left_out |= {"memory"} if has_step else {"memory", "demand"}
        most = parse_bytes(self.max_bytes, "--max-bytes")
        return {
            "cache_shares": [] if "shares" in left_out else _shares(self.cache_share),
            "repeats": self.repeats,
            "for_s": parse_seconds(self.for_s, "--for"),
            "max_bytes": min(most, parse_bytes(_QUICK_BYTES, "")) if self.quick else most,
            "skip": frozenset(left_out),
        }


@dataclass(frozen=True, slots=True)
class _Consumer:
    """What takes the batches."""

    step_ms: Annotated[float, typer.Option(min=0.0, help="An accelerator's time a batch; else the least is found.")] = (
        0.0
    )
    profile: Annotated[
        str, typer.Option(help="unet3d, resnet50 or cosmoflow: batch and step of a workload of MLPerf Storage.")
    ] = ""
    accelerators: Annotated[int, typer.Option(min=1, help="How many of the profile's, a rank each.")] = 1

    def options(self, batch_size: int | None, ranks: int) -> dict[str, Any]:
        """Those of the benchmark that it settles, where the job has this batch size and so many ranks."""
        from fastload.bench import workloads

        if not self.profile:
            if self.accelerators > 1:
                raise ConfigError("--accelerators are those of a --profile; of another job, give --ranks")
            return {"batch_size": batch_size or 256, "ranks": ranks, "step_s": self.step_ms / 1e3}
        if ranks > 1:
            raise ConfigError("--ranks and --profile: each of --accelerators is a rank; leave out --ranks")
        workload = workloads.find(self.profile)
        return {
            "batch_size": batch_size or workload.batch_size,
            "ranks": self.accelerators,
            "step_s": self.step_ms / 1e3 or workload.step_s,
            "profile": self.profile,
            "busy": workload.busy,
        }


@dataclass(frozen=True, slots=True)
class _Prices:
    """What reading costs."""

    price_per_gb: Annotated[float, typer.Option(help="What a GB from the store costs.")] = 0.0
    price_per_1000_requests: Annotated[float, typer.Option(help="What a thousand requests cost.")] = 0.0
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a run, for what it costs.")] = 1

    def options(self) -> dict[str, Any]:
        """Those of the benchmark that it settles."""
        return {
            "price_per_gb": self.price_per_gb,
            "price_per_1000": self.price_per_1000_requests,
            "epochs": self.epochs,
        }


@dataclass(frozen=True, slots=True)
class _Output:
    """What is written down."""

    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure there.")] = None
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report there, to read in a browser.")] = None
    show_endpoints: Annotated[bool, typer.Option("--show-endpoints", help="Hosts may be in what is written.")] = False

    def check(self) -> None:
        """ConfigError where it could not be written."""
        for name, path in (("--json", self.json_file), ("--html", self.html_file)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{name} {path}: there is no folder {path.absolute().parent}")

    def write(self, result: Result) -> None:
        """Print and write it."""
        from fastload.bench import report, schema

        for line in report.lines(result):
            print(plain(line))
        if self.json_file is not None:
            schema.write(result, self.json_file)
        if self.html_file is not None:
            try:
                self.html_file.write_text(report.html(result), encoding="utf-8")
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"--html {self.html_file}: {reason}; name a file in a folder") from error


@app.command(
    epilog=examples(
        "fastload bench s3://bucket/train/ --decode jpg=image:224 --decode cls=integer",
        "fastload bench s3://bucket/train/ --quick --json=today.json --html=today.html",
        "fastload bench s3://bucket/train/ --cache-share=25%,50% --step-ms=180",
        "fastload bench s3://bucket/train/ --against=my_train:make_loader --ideal --repeats=3",
        "fastload bench /data/unet3d/ --profile=unet3d --accelerators=2",
    )
)
@_grouped
def run(
    urls: Annotated[list[str], typer.Argument(help="Brace patterns, prefixes that end in '/', or single shards.")],
    job: _Job,
    others: _Others,
    effort: _Effort,
    consumer: _Consumer,
    prices: _Prices,
    output: _Output,
    cache: CachePath = None,
) -> None:
    """Measure how fast this data can be fed on this node, and say what limits it.

    Reads a part of the data from the store, into a folder of its own beside the cache, and writes nothing else.
    """
    from fastload.bench.plan import Options
    from fastload.bench.session import Session

    options = Options(
        urls=urls,
        cache=cache,
        show_endpoints=output.show_endpoints,
        **job.options(),
        **others.options(),
        **effort.options(has_step=bool(consumer.step_ms or consumer.profile)),
        **consumer.options(job.batch_size, job.ranks),
        **prices.options(),
    )
    output.check()
    signal.signal(signal.SIGTERM, _interrupt)
    progress = _Progress()
    with Session(options, ["fastload", *sys.argv[1:]], progress.say) as session:
        planned = session.plan()
        progress.end()
        _say_plan(planned, options.max_bytes, effort.yes)
        result = session.run()
        progress.end()
    output.write(result)
    if result.interrupted:
        raise typer.Exit(exits.INTERRUPTED)
    if any(phase.error for phase in result.phases):
        raise typer.Exit(exits.PARTIAL)


@app.command(
    epilog=examples(
        "fastload bench make unet3d /data/unet3d/ --scale=0.1",
    )
)
def make(
    profile: Annotated[str, typer.Argument(help="unet3d, resnet50 or cosmoflow.")],
    url: Annotated[str, typer.Argument(help="A local folder or a prefix of a store, with nothing in it.")],
    scale: Annotated[float, typer.Option(help="How large a part of the workload's data.")] = 0.01,
) -> None:
    """Make data with the sizes of a workload of MLPerf Storage, in tar shards; the same each time.

    It is no data of MLPerf Storage, and what is measured with it no result of theirs.
    """
    from fastload.bench import workloads
    from fastload.store import StoreOptions

    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: must be a part between 0 and 1, such as 0.01")
    workload, progress = workloads.find(profile), _Progress()
    made = workloads.make(workload, url, scale, StoreOptions.from_environment(None), progress.say)
    progress.end()
    print(plain(f"{len(made)} shard{'s' * (len(made) > 1)} in {url}: {workloads.described(workload, scale)}"))


@app.command(epilog=examples("fastload bench compare before.json after.json --fail-above=5%"))
def compare(
    before: Annotated[Path, typer.Argument(help="A file that `fastload bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also if they did other work, or on another machine.")
    ] = False,
    other_machine: Annotated[bool, typer.Option("--other-machine", help="Also if they ran on other machines.")] = False,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit 5 where a figure that does not depend on neighbours is worse by more, such as 5%; "
            "memory=20% is for figures whose names begin so. May be given several times."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what did not change.")] = False,
) -> None:
    """Whether two results differ: the ratio of each figure with its interval."""
    from fastload.bench import report, schema
    from fastload.bench.compare import compare as compared
    from fastload.bench.compare import lost, too_bad

    bounds = dict(_bound(each) for each in fail_above or ())
    first, second = schema.read(before), schema.read(after)
    changes = compared(first, second, anyway=anyway, other_machine=other_machine)
    not_compared = lost(first, second)
    for line in report.change_lines(each for each in changes if every or each.word != "no change"):
        print(plain(line))
    counts = {
        word: sum(each.word == word for each in changes) for word in ("better", "worse", "no change", "too few runs")
    }
    print(", ".join(f"{word}: {count}" for word, count in counts.items()))
    for line in not_compared:
        print(plain(line))
    if worse := too_bad(changes, bounds):
        print(f"worse by more than may be: {', '.join(f'{each.phase}: {each.name}' for each in worse)}")
        raise typer.Exit(exits.WORSE)
    if not_compared:
        raise typer.Exit(exits.PARTIAL)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Progress:
    """What is being done: on a terminal one line that changes, in a pipe a line each ten seconds."""

    def __init__(self) -> None:
        self._is_terminal, self._said_at, self._dirty = sys.stderr.isatty(), -math.inf, False

    def say(self, words: str) -> None:
        words = plain(words)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{words[:width]}")
            self._dirty = True
        elif time.monotonic() - self._said_at > 10:
            self._said_at = time.monotonic()
            sys.stderr.write(f"{words} ...\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._dirty:
            sys.stderr.write("\r\x1b[K")
            self._dirty = False


def _say_plan(plan: Plan, max_bytes: int, yes: bool) -> None:
    whole = (
        "" if plan.whole_count == len(plan.objects) else f" of {plan.whole_count} ({format_bytes(plan.whole_bytes)})"
    )
    packed = "" if all(not each.packing for each in plan.objects) else f" (packed {format_bytes(plan.stored_bytes)})"
    sys.stderr.write(
        f"reading {len(plan.objects)} shards{whole}, {format_bytes(plan.byte_count)}{packed}, {plan.passes:.3g} times: "
        f"{format_bytes(plan.store_bytes)} in {plan.requests:,} requests from the store, and what measuring it takes\n"
    )
    if plan.store_bytes > max_bytes and not yes:
        raise ConfigError(
            f"that is more than --max-bytes={format_bytes(max_bytes)}, and a shard is the least that can be read; "
            "give a larger --max-bytes, or --yes"
        )


def _specs(words: list[str]) -> dict[str, str]:
    specs = {}
    for word in words:
        column, is_there, decoder = word.partition("=")
        if not (column and is_there and decoder):
            raise ConfigError(f"--decode {word} names no column and decoder, such as jpg=image:224")
        specs[column] = decoder
    return specs


def _names(text: str) -> set[str]:
    names = {each.strip() for each in text.split(",") if each.strip()}
    for name in names:
        _one_of("--skip", name, _PHASES)
    return names


def _peers(text: str) -> list[str]:
    from fastload.bench.peers import NAMES

    if text.strip() == "all":
        return list(NAMES)
    return [_one_of("--peers", each.strip(), NAMES) for each in text.split(",") if each.strip()]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"{option} {value}: must be one of {', '.join(allowed)}")
    return value


def _shares(text: str) -> list[float]:
    return sorted({_share("--cache-share", each) for each in text.split(",") if each.strip()})


def _bound(text: str) -> tuple[str, float]:
    """A bound, and the figures that it is for by the beginning of their names; "" where it is for all."""
    name, _, share = text.rpartition("=")
    return name.strip(), _share("--fail-above", share)


def _share(option: str, text: str) -> float:
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"{option} {text}: must be a part between 0 and 1, such as 0.25 or 25%")
    return value
