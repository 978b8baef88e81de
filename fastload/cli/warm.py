"""`fastload warm`: fill a cache for exactly one job, in its order of first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastload.config import format_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload import service
    from fastload.service.handle import Cache

# Exit code where the cache is too small for the job: not an error, and not what was asked for.
EXIT_PARTIAL = 3


def warm(
    urls: Annotated[
        list[str] | None, typer.Argument(help="Brace patterns, prefixes that end in '/', or single shards.")
    ] = None,
    from_history: Annotated[
        str | None, typer.Option(help="Instead: what this run read, in its order; `latest`, or see `fastload history`.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload.")
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="The job shuffles.")] = True,
    seed: Annotated[int, typer.Option(help="The job's seed.")] = 0,
    epoch: Annotated[int, typer.Option(help="The epoch that the job begins with.")] = 0,
    node: Annotated[int, typer.Option(help="This node's number in the job, from 0.")] = 0,
    nodes: Annotated[int, typer.Option(help="The job's number of nodes.")] = 1,
    partitions: Annotated[int | None, typer.Option(help="The job's partitions, if it names them.")] = None,
    index: Annotated[str | None, typer.Option(help="The job's file of indexes, if it names one.")] = None,
    manifest: Annotated[str | None, typer.Option(help="The job's file with the list of shards, if it has one.")] = None,
    shuffle_window: Annotated[str, typer.Option(help="The job's shuffle window, such as 1GiB.")] = "auto",
    ram_bytes: Annotated[str | None, typer.Option(help="Size of the RAM tier, such as 8GiB.")] = None,
    disk_bytes: Annotated[str | None, typer.Option(help="Size of the disk tier, such as 500GiB.")] = None,
    chunk_bytes: Annotated[str | None, typer.Option(help="Size of a chunk, such as 8MiB.")] = None,
) -> None:
    """Fill the cache for a job, so that it fetches nothing: same URLs, seed and shuffle as the job.

    Or with --from-history, for one that reads what an earlier run read, whatever its order.
    """
    from fastload import warm as warming
    from fastload.config import parse_bytes
    from fastload.plan import OrderWish, Ranks
    from fastload.service.handle import Cache

    if bool(urls) == bool(from_history):
        raise ConfigError("name either URLs or --from-history=RUN, and not both")
    console = Console(stderr=True)
    if from_history:
        with Cache(cache, ram_bytes=ram_bytes, disk_bytes=disk_bytes, chunk_bytes=chunk_bytes) as opened:
            _warm_run(from_history, opened, console)
        return
    with (
        Cache(cache, ram_bytes=ram_bytes, disk_bytes=disk_bytes, chunk_bytes=chunk_bytes) as opened,
        _bar(console) as bar,
    ):
        window_bytes = None if shuffle_window == "auto" else parse_bytes(shuffle_window, "shuffle_window")
        order = OrderWish(seed, "window" if shuffle else "none", window_bytes, partitions)
        task = bar.add_task("listing", total=None)

        def show(progress: service.protocol.Progress) -> None:
            bar.update(task, description="warming", total=progress.total_bytes, completed=progress.done_bytes)

        warmed = warming.warm(
            urls or [],
            opened,
            order,
            epoch=epoch,
            ranks=Ranks(node, nodes, 0, 1),  # how many ranks share a node's partitions does not matter
            index=index,
            manifest_file=manifest,
            on_progress=show,
        )
    console.print(
        f"{warmed.shard_count} shards, {warmed.sample_count} samples: "
        f"{format_bytes(warmed.held_bytes)} of {format_bytes(warmed.total_bytes)} cached, "
        f"{format_bytes(warmed.fetched_bytes)} fetched"
    )
    _end(console, is_complete=warmed.is_complete)


def _warm_run(name: str, cache: Cache, console: Console) -> None:
    """Warm what an earlier run read."""
    from fastload import warm as warming
    from fastload.history.archive import Archive

    archive = Archive(cache.directory)
    run = archive.read(archive.find(name))
    urls = [url for rows in run.objects.rows() for url, *_ in rows]
    with _bar(console) as bar:
        task = bar.add_task("listing", total=None)

        def show(progress: service.protocol.Progress) -> None:
            bar.update(task, description="warming", total=progress.total_bytes, completed=progress.done_bytes)

        warmed = warming.warm_run(urls, cache, on_progress=show)
    gone = f", {warmed.missing_count} are gone" if warmed.missing_count else ""
    console.print(
        f"{run.name}: {warmed.object_count} objects{gone}: {format_bytes(warmed.held_bytes)} of "
        f"{format_bytes(warmed.total_bytes)} cached, {format_bytes(warmed.fetched_bytes)} fetched"
    )
    _end(console, is_complete=warmed.is_complete)


def _end(console: Console, *, is_complete: bool) -> None:
    if not is_complete:
        console.print("The cache is full: raise disk_bytes, or expect the job to fetch the rest itself.")
        raise typer.Exit(EXIT_PARTIAL)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
