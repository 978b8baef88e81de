"""`fastload bench`: how fast can this data be fed here, and what limits it."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fastload.cli import exits
from fastload.cli.cache_options import CachePath, FormatOption, checked_format
from fastload.cli.printing import examples, plain
from fastload.config import format_bytes, parse_bytes, parse_seconds
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.bench.plan import Plan

# A figure of the second result is worse than may be.
EXIT_WORSE = 5
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
    "`fastload bench compare` says whether two results differ.",
)


@app.command(
    epilog=examples(
        "fastload bench s3://bucket/train/ --decode jpg=image:224 --decode cls=integer",
        "fastload bench s3://bucket/train/ --quick --json=today.json --html=today.html",
        "fastload bench s3://bucket/train/ --cache-share=25%,50% --step-ms=180",
        "fastload bench s3://bucket/train/ --against=my_train:make_loader --ideal --repeats=3",
    )
)
def run(
    urls: Annotated[list[str], typer.Argument(help="Brace patterns, prefixes that end in '/', or single shards.")],
    format_name: FormatOption = "auto",
    cache: CachePath = None,
    shuffle: Annotated[str, typer.Option(help="window, shards, global or none.")] = "window",
    seed: Annotated[int, typer.Option(help="The job's seed.")] = 0,
    columns: Annotated[str, typer.Option(help="The columns that the job reads, separated by commas; else all.")] = "",
    decode: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=image:SIZE, or integer, text, json, array; may be given several times."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="The loader's num_workers.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of this node, which share the epoch.")] = 1,
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="MODULE:FUNCTION for dataset.map(); may be given several times.")
    ] = None,
    shuffle_window: Annotated[str, typer.Option(help="The job's shuffle window, such as 1GiB.")] = "auto",
    ram_bytes: Annotated[str, typer.Option(help="The job's RAM tier; else what each phase needs.")] = "",
    against: Annotated[
        str, typer.Option(help="MODULE:FUNCTION that returns your own loader, an iterable of batches, to run beside.")
    ] = "",
    ideal: Annotated[
        bool, typer.Option("--ideal", help="Its batches replayed from memory too: what no loader can beat.")
    ] = False,
    cache_share: Annotated[str, typer.Option(help="Disk caches to try, as parts of the data, such as 0.25,0.5.")] = "",
    peers: Annotated[
        str, typer.Option(help="Other loaders to measure beside, such as webdataset,streaming, or all.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each epoch; `compare` needs several.")] = 1,
    for_s: Annotated[str, typer.Option("--for", help="The longest that an epoch should take, such as 2m.")] = "30s",
    max_bytes: Annotated[str, typer.Option(help="What may be read from the store, all phases together.")] = "4GiB",
    yes: Annotated[bool, typer.Option("--yes", help="Read more than that where one shard alone takes it.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A look: 512 MiB, and only the most telling phases.")] = False,
    skip: Annotated[str, typer.Option(help=f"Phases to leave out: {', '.join(_PHASES)}.")] = "",
    step_ms: Annotated[
        float, typer.Option(min=0.0, help="An accelerator's time a batch; else the least is found.")
    ] = 0.0,
    price_per_gb: Annotated[float, typer.Option(help="What a GB from the store costs.")] = 0.0,
    price_per_1000_requests: Annotated[float, typer.Option(help="What a thousand requests cost.")] = 0.0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a run, for what it costs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure there.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report there, to read in a browser.")
    ] = None,
    show_endpoints: Annotated[bool, typer.Option("--show-endpoints", help="Hosts may be in what is written.")] = False,
) -> None:
    """Measure how fast this data can be fed on this node, and say what limits it.

    Reads a part of the data from the store, into a folder of its own beside the cache, and writes nothing else.
    """
    from fastload.bench import report, runs, schema
    from fastload.bench.plan import Options
    from fastload.bench.process import check_target
    from fastload.bench.session import Session

    specs = _specs(decode or [])
    runs.decoders(specs)  # what is none is an error now
    for option, targets in (("--map", map_ or []), ("--against", [against] if against else [])):
        for target in targets:
            check_target(option, target)
    left_out = _names(skip)
    if quick:
        left_out |= {"memory", "demand"} if not step_ms else {"memory"}
    options = Options(
        urls=urls,
        format=checked_format(format_name),
        shuffle=_one_of("--shuffle", shuffle, ("window", "shards", "global", "none")),
        seed=seed,
        columns=[each for each in columns.split(",") if each],
        decode=specs,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        cache_shares=[] if "shares" in left_out else _shares(cache_share),
        for_s=parse_seconds(for_s, "--for"),
        max_bytes=min(parse_bytes(max_bytes, "--max-bytes"), parse_bytes(_QUICK_BYTES, "") if quick else 1 << 62),
        repeats=repeats,
        peers=_peers(peers),
        step_s=step_ms / 1e3,
        skip=frozenset(left_out),
        price_per_gb=price_per_gb,
        price_per_1000=price_per_1000_requests,
        epochs=epochs,
        show_endpoints=show_endpoints,
        ranks=ranks,
        functions=map_ or [],
        shuffle_window=shuffle_window if shuffle_window == "auto" else parse_bytes(shuffle_window, "--shuffle-window"),
        ram_bytes=parse_bytes(ram_bytes, "--ram-bytes") if ram_bytes else 0,
        against=against,
        ideal=ideal,
    )
    for name, path in (("--json", json_file), ("--html", html_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{name} {path}: there is no folder {path.absolute().parent}")
    signal.signal(signal.SIGTERM, _interrupt)
    progress = _Progress()
    with Session(options, ["fastload", *sys.argv[1:]], progress.say) as session:
        planned = session.plan()
        progress.end()
        _say_plan(planned, options.max_bytes, yes)
        result = session.run()
        progress.end()
    for line in report.lines(result):
        print(plain(line))
    if json_file is not None:
        schema.write(result, json_file)
    if html_file is not None:
        try:
            html_file.write_text(report.html(result), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html {html_file}: {error.strerror or error}; name a file in a folder") from error
    if result.interrupted:
        raise typer.Exit(exits.INTERRUPTED)
    if any(phase.error for phase in result.phases):
        raise typer.Exit(exits.PARTIAL)


@app.command(epilog=examples("fastload bench compare before.json after.json --fail-above=5%"))
def compare(
    before: Annotated[Path, typer.Argument(help="A file that `fastload bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also if they did other work, or on another machine.")
    ] = False,
    fail_above: Annotated[
        str, typer.Option(help="Exit 5 where a figure that does not depend on neighbours is worse by more, such as 5%.")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Also what did not change.")] = False,
) -> None:
    """Whether two results differ: the ratio of each figure with its interval."""
    from fastload.bench import report, schema
    from fastload.bench.compare import compare as compared
    from fastload.bench.compare import lost

    worst = _share("--fail-above", fail_above) if fail_above else math.inf
    first, second = schema.read(before), schema.read(after)
    changes, not_compared = compared(first, second, anyway=anyway), lost(first, second)
    for line in report.change_lines(each for each in changes if every or each.word != "no change"):
        print(plain(line))
    counts = {
        word: sum(each.word == word for each in changes) for word in ("better", "worse", "no change", "too few runs")
    }
    print(", ".join(f"{word}: {count}" for word, count in counts.items()))
    for line in not_compared:
        print(plain(line))
    if any(each.steady and each.loss > worst for each in changes):
        raise typer.Exit(EXIT_WORSE)
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
    sys.stderr.write(
        f"reading {len(plan.objects)} shards{whole}, {format_bytes(plan.byte_count)}, {plan.passes:.3g} times: "
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


def _share(option: str, text: str) -> float:
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"{option} {text}: must be a part between 0 and 1, such as 0.25 or 25%")
    return value
