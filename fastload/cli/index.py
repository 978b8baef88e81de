"""`fastload index`: index all shards of a data set, into the cache and, where wanted, into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastload.config import format_bytes

if TYPE_CHECKING:
    from fastload import indexing


def index(
    urls: Annotated[
        list[str],
        typer.Argument(help="Brace patterns, prefixes that end in '/', single shards, or lists (.json)."),
    ],
    output: Annotated[
        str | None, typer.Option(help="Write the indexes to this local file too, for index=... of a data set.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload.")
    ] = None,
    ram_bytes: Annotated[str | None, typer.Option(help="Size of the RAM tier, such as 8GiB.")] = None,
    disk_bytes: Annotated[str | None, typer.Option(help="Size of the disk tier, such as 500GiB.")] = None,
    chunk_bytes: Annotated[str | None, typer.Option(help="Size of a chunk, such as 8MiB.")] = None,
) -> None:
    """Index all shards, so that a job knows how many samples there are and parses none."""
    from fastload import indexing
    from fastload.service.handle import Cache

    console = Console(stderr=True)
    with (
        Cache(cache, ram_bytes=ram_bytes, disk_bytes=disk_bytes, chunk_bytes=chunk_bytes) as opened,
        _bar(console) as bar,
    ):
        task = bar.add_task("listing", total=None)

        def show(progress: indexing.Progress) -> None:
            bar.update(task, description="indexing", total=progress.shard_count, completed=progress.done_count)

        indexed = indexing.index(urls, opened, output=output, on_progress=show)
    console.print(
        f"{indexed.shard_count} shards, {indexed.sample_count} samples, {format_bytes(indexed.total_bytes)}: "
        f"indexed, {format_bytes(indexed.fetched_bytes)} fetched" + (f", written to {output}" if output else "")
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeRemainingColumn(),
        console=console,
    )
