"""`fastload history`: the runs that a cache remembers, what they read, and what they learnt of stores."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from fastload.cache import limits
from fastload.config import default_cache_dir, format_bytes
from fastload.errors import CacheError, ConfigError
from fastload.history.archive import Archive, RunFile
from fastload.history.runfile import Run, RunSummary

app = typer.Typer(help="Runs that a cache remembers: what they read, and what they learnt of stores.")

CacheOption = Annotated[Path | None, typer.Option(help="Cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]

# What does not fit a narrow terminal is wrapped by it: figures that are cut say nothing.
_WIDTH_MIN = 110


@app.command("ls")
def list_runs(cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """The runs, the newest first."""
    archive = _archive(cache)
    runs = [(run, archive.summary(run)) for run in archive.runs()]
    if as_json:
        _print_json([_as_dict(run, summary) for run, summary in runs])
        return
    console = _console()
    if not runs:
        console.print(f"No runs are remembered in {archive.folder}.", soft_wrap=True)
        return
    table = _table("run", "program", "took", "reads", "objects", "read", "file")
    for run, summary in runs:
        table.add_row(run.name, *_row(summary), format_bytes(run.size))
    console.print(table)


@app.command("show")
def show_run(
    name: Annotated[str, typer.Argument(help="A run, the beginning of its name, or `latest`.")],
    cache: CacheOption = None,
    reads: Annotated[int, typer.Option(min=0, help="Show its first so many reads as well.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """One run: its figures, its readers, and the stores that it met."""
    archive = _archive(cache)
    file = archive.find(name)
    run = archive.read(file)
    if archive.summary(file) is None:
        raise CacheError(
            f"the history of a run in {file.path} is damaged; `fastload history rm {file.name}` removes it"
        )
    if as_json:
        first = {"reads": [list(each) for each in _reads(run, reads)]} if reads else {}
        _print_json(_as_dict(file, run.summary) | first)
        return
    console = _console()
    _show(console, run)
    for seconds, reader, chunk, url in _reads(run, reads):
        console.print(f"  after {seconds:.1f} s reader {reader}: chunk {chunk} of {_plain(url)}", soft_wrap=True)


@app.command("rm")
def remove_runs(
    names: Annotated[list[str] | None, typer.Argument(help="Runs, or the beginnings of their names.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    cache: CacheOption = None,
) -> None:
    """Forget runs."""
    if bool(names) == everything:
        raise ConfigError("name the runs to forget, or --all, and not both")
    archive = _archive(cache)
    found = archive.runs() if everything else [archive.find(name) for name in names or ()]
    runs = list(dict.fromkeys(found))
    for run in runs:
        archive.remove(run)
    Console(stderr=True).print(f"{len(runs)} runs forgotten, {format_bytes(sum(run.size for run in runs))}")


def _console() -> Console:
    """Takes what it prints as it is: names and URLs may hold brackets."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _WIDTH_MIN)
    return console


def _table(*columns: str) -> Table:
    return Table(*(Column(name, no_wrap=True) for name in columns), box=None)


def _plain(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _archive(cache: Path | None) -> Archive:
    path = (default_cache_dir() if cache is None else cache).expanduser().absolute()
    is_there = limits.path_of(path).exists() or Archive(path).folder.exists()
    if (cache is not None or os.environ.get("FASTLOAD_CACHE")) and not is_there:
        said = f"--cache={cache}" if cache is not None else f"FASTLOAD_CACHE={os.environ['FASTLOAD_CACHE']}"
        raise ConfigError(f"{said}: there is no cache at {path}; give the directory that the job was given")
    return Archive(path)


def _row(summary: RunSummary | None) -> list[str]:
    if summary is None:
        return ["(damaged)", *[""] * 4]
    return [
        _plain(summary.program),
        _took(summary.seconds),
        f"{summary.read_count + summary.left_out:,}",
        f"{summary.object_count:,}",
        format_bytes(summary.read_bytes),
    ]


def _show(console: Console, run: Run) -> None:
    summary = run.summary
    rate = summary.read_bytes / summary.seconds if summary.seconds else 0.0
    readers = ", ".join(f"{count} of {_plain(name) or '(no name)'}" for name, count in summary.traces.items())
    console.print(f"{run.name}: {_plain(summary.program) or '(unknown program)'}, {_when(summary.began)}")
    console.print(f"  {summary.read_count:,} reads of {summary.object_count:,} objects")
    if summary.left_out:
        console.print(f"  {summary.left_out:,} more were counted only")
    console.print(
        f"  {format_bytes(summary.read_bytes)} in {_took(summary.seconds)}, {format_bytes(rate)}/s on average; "
        f"the objects are {format_bytes(summary.object_bytes)}"
    )
    console.print(f"  readers: {readers or 'none'}", soft_wrap=True)
    table = _table("store", "requests", "at a time", "goodput", "a connection", "first byte", "throttled at")
    for name, each in summary.endpoints.items():
        table.add_row(
            _plain(name),
            f"{each.request_count:,}",
            str(each.limit),
            f"{format_bytes(each.bytes_per_s)}/s" if each.bytes_per_s else "(too few requests)",
            f"{format_bytes(each.connection_bytes_per_s)}/s" if each.bytes_per_s else "",
            f"{each.first_byte_s * 1000:.0f} ms" if each.first_byte_s >= 0 and each.bytes_per_s else "",
            str(each.throttled_at or "never"),
        )
    if summary.endpoints:
        console.print(table)


def _reads(run: Run, count: int) -> list[tuple[float, int, int, str]]:
    """The first reads: seconds since the run began, reader, chunk, URL."""
    reads = run.reads
    return [
        (
            int(reads.ticks[at]) / 10,
            int(reads.traces[at]),
            int(reads.chunks[at]),
            run.objects[int(reads.objects[at])].url,
        )
        for at in range(min(count, len(reads)))
    ]


def _as_dict(run: RunFile, summary: RunSummary | None) -> dict[str, Any]:
    figures = msgspec.to_builtins(summary) if summary is not None else {"damaged": True}
    return {"run": run.name, "file_bytes": run.size, **figures}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _when(began: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))


def _took(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
