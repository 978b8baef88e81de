"""`fastload history`: the runs that a cache remembers, what they read, and what they learnt of stores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from fastload.cli.cache_options import CachePath, existing_cache
from fastload.cli.printing import JsonOption, examples, plain, print_json, print_table
from fastload.config import format_bytes
from fastload.errors import CacheError, ConfigError
from fastload.history.archive import Archive, RunFile
from fastload.history.runfile import Run, RunSummary

app = typer.Typer(help="Runs that a cache remembers: what they read, and what they learnt of stores.")


@app.command("ls", epilog=examples("fastload history ls", "fastload history ls --json"))
def list_runs(cache: CachePath = None, as_json: JsonOption = False) -> None:
    """The runs, the newest first."""
    archive = _archive(cache)
    runs = [(run, archive.summary(run)) for run in archive.runs()]
    if as_json:
        print_json([_as_dict(run, summary) for run, summary in runs])
        return
    if not runs:
        print(f"No runs are remembered in {archive.folder}.")
        return
    columns = "run", "program", ">took", ">reads", ">objects", ">read", ">file"
    print_table(columns, ([run.name, *_row(summary), format_bytes(run.size)] for run, summary in runs))


@app.command("show", epilog=examples("fastload history show latest", "fastload history show latest --reads=20"))
def show_run(
    name: Annotated[str, typer.Argument(help="A run, the beginning of its name, or `latest`.")],
    cache: CachePath = None,
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
        print_json(_as_dict(file, run.summary) | first)
        return
    _show(run)
    for seconds, reader, chunk, url in _reads(run, reads):
        print(f"  after {seconds:.1f} s reader {reader}: chunk {chunk} of {plain(url)}")


@app.command("rm", epilog=examples("fastload history rm latest", "fastload history rm --all"))
def remove_runs(
    names: Annotated[list[str] | None, typer.Argument(help="Runs, or the beginnings of their names.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    cache: CachePath = None,
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


def _archive(cache: Path | None) -> Archive:
    return Archive(existing_cache(cache))


def _row(summary: RunSummary | None) -> list[str]:
    if summary is None:
        return ["(damaged)", *[""] * 4]
    return [
        summary.program,
        _took(summary.seconds),
        f"{summary.read_count + summary.left_out:,}",
        f"{summary.object_count:,}",
        format_bytes(summary.read_bytes),
    ]


def _show(run: Run) -> None:
    summary = run.summary
    rate = summary.read_bytes / summary.seconds if summary.seconds else 0.0
    readers = ", ".join(f"{count} of {plain(name) or '(no name)'}" for name, count in summary.traces.items())
    print(f"{run.name}: {plain(summary.program) or '(unknown program)'}, {_when(summary.began)}")
    print(f"  {summary.read_count:,} reads of {summary.object_count:,} objects")
    if summary.left_out:
        print(f"  {summary.left_out:,} more were counted only")
    print(
        f"  {format_bytes(summary.read_bytes)} in {_took(summary.seconds)}, {format_bytes(rate)}/s on average; "
        f"the objects are {format_bytes(summary.object_bytes)}"
    )
    print(f"  readers: {readers or 'none'}")
    stores = [
        (
            name,
            f"{each.request_count:,}",
            str(each.limit),
            f"{format_bytes(each.bytes_per_s)}/s" if each.bytes_per_s else "(too few requests)",
            f"{format_bytes(each.connection_bytes_per_s)}/s" if each.bytes_per_s else "",
            f"{each.first_byte_s * 1000:.0f} ms" if each.first_byte_s >= 0 and each.bytes_per_s else "",
            str(each.throttled_at or "never"),
        )
        for name, each in summary.endpoints.items()
    ]
    if stores:
        columns = "store", ">requests", ">at a time", ">goodput", ">a connection", ">first byte", ">throttled at"
        print_table(columns, stores)


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


def _when(began: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))


def _took(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
