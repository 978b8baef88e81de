"""`fastload index`: index all shards of a data set, into the cache and, where wanted, into a file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.cli import exits
from fastload.cli.cache_options import (
    CacheOptions,
    CachePath,
    ChunkBytes,
    DiskBytes,
    FormatOption,
    RamBytes,
    SplitOption,
    shown,
)
from fastload.cli.printing import JsonOption, plain, print_json
from fastload.config import format_bytes

if TYPE_CHECKING:
    from fastload.prepare import Indexed


def index(
    urls: Annotated[
        list[str],
        typer.Argument(help="Brace patterns, prefixes that end in '/', single shards, or lists (.json)."),
    ],
    output: Annotated[
        str | None,
        typer.Option(help="Write the indexes to this local file or object too, for index=... of a data set."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Say what is wrong with bad shards, and go on. Exit code 3 with any.")
    ] = False,
    format_name: FormatOption = "auto",
    split: SplitOption = None,
    cache: CachePath = None,
    ram_bytes: RamBytes = None,
    disk_bytes: DiskBytes = None,
    chunk_bytes: ChunkBytes = None,
    as_json: JsonOption = False,
) -> None:
    """Index all shards, so that a job knows how many samples there are and parses none."""
    from fastload import prepare
    from fastload.formats import checked_format

    options, console = CacheOptions(cache, ram_bytes, disk_bytes, chunk_bytes), Console(stderr=True)
    with (
        options.open() as opened,
        shown(console, "indexing", "shards") as bar,
    ):
        indexed = prepare.index(
            urls,
            opened,
            output=output,
            how=checked_format(format_name),
            split=split,
            skips_bad=skip_bad,
            on_progress=lambda progress: bar.show(progress.done_count, progress.shard_count),
        )
    if as_json:
        print_json(asdict(indexed))
    else:
        _say(console, indexed, output)
    if indexed.bad:
        raise typer.Exit(exits.PARTIAL)


def _say(console: Console, indexed: Indexed, output: str | None) -> None:
    for error in indexed.bad:
        console.print(plain(error), soft_wrap=True, markup=False, highlight=False)
    bad = f"{len(indexed.bad)} bad shards; " if indexed.bad else ""
    console.print(
        f"{bad}{indexed.shard_count} shards, {indexed.sample_count} samples, {format_bytes(indexed.total_bytes)}: "
        f"indexed, {format_bytes(indexed.fetched_bytes)} fetched" + (f", written to {output}" if output else ""),
        soft_wrap=True,
    )
