"""`fastload warm`: fill a cache for exactly one job, in its order of first use."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.cli import exits
from fastload.cli.cache_options import CacheOptions, CachePath, ChunkBytes, DiskBytes, RamBytes, shown
from fastload.config import format_bytes, parse_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastload.prepare import Warmed, WarmJob
    from fastload.protocol import Progress


def warm(
    urls: Annotated[
        list[str] | None, typer.Argument(help="Brace patterns, prefixes that end in '/', or single shards.")
    ] = None,
    from_history: Annotated[
        str | None, typer.Option(help="Instead: what this run read, in its order; `latest`, or see `fastload history`.")
    ] = None,
    cache: CachePath = None,
    shuffle: Annotated[bool, typer.Option(help="The job shuffles.")] = True,
    seed: Annotated[int, typer.Option(help="The job's seed.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="The epoch that the job begins with.")] = 0,
    node: Annotated[int, typer.Option(min=0, help="This node's number in the job, from 0.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="The job's number of nodes.")] = 1,
    partitions: Annotated[int | None, typer.Option(help="The job's partitions, if it names them.")] = None,
    index: Annotated[str | None, typer.Option(help="The job's file of indexes, if it names one.")] = None,
    manifest: Annotated[str | None, typer.Option(help="The job's file with the list of shards, if it has one.")] = None,
    shuffle_window: Annotated[str, typer.Option(help="The job's shuffle window, such as 1GiB.")] = "auto",
    ram_bytes: RamBytes = None,
    disk_bytes: DiskBytes = None,
    chunk_bytes: ChunkBytes = None,
) -> None:
    """Fill the cache for a job, so that it fetches nothing: same URLs, seed and shuffle as the job.

    Or with --from-history, for one that reads what an earlier run read, whatever its order.
    """
    from fastload.plan import Ranks, RequestedOrder
    from fastload.prepare import WarmJob

    if bool(urls) == bool(from_history):
        raise ConfigError("name either URLs or --from-history=RUN, and not both")
    if node >= nodes:
        raise ConfigError(f"--node={node} must be from 0 to {nodes - 1}, since --nodes={nodes}")
    options, console = CacheOptions(cache, ram_bytes, disk_bytes, chunk_bytes), Console(stderr=True)
    if from_history:
        what, warmed = _warm_run(from_history, options, console)
    else:
        window_bytes = None if shuffle_window == "auto" else parse_bytes(shuffle_window, "shuffle_window")
        order = RequestedOrder(seed, "window" if shuffle else "none", window_bytes, partitions)
        ranks = Ranks(node, nodes, 0, 1)  # how many ranks share a node's partitions does not matter
        what, warmed = _warm_job(WarmJob(urls or [], order, epoch, ranks, index, manifest), options, console)
    console.print(
        f"{what}: {format_bytes(warmed.held_bytes)} of {format_bytes(warmed.total_bytes)} cached, "
        f"{format_bytes(warmed.fetched_bytes)} fetched"
    )
    if not warmed.is_complete:
        console.print("The cache is full: raise disk_bytes, or expect the job to fetch the rest itself.")
        raise typer.Exit(exits.PARTIAL)


def _warm_job(job: WarmJob, options: CacheOptions, console: Console) -> tuple[str, Warmed]:
    """Warm what a job will read: that in words, and what came of it."""
    from fastload import prepare as warming

    with options.open() as cache, _progress(console) as on_progress:
        warmed = warming.warm(job, cache, on_progress=on_progress)
    return f"{warmed.object_count} shards, {warmed.sample_count} samples", warmed


def _warm_run(name: str, options: CacheOptions, console: Console) -> tuple[str, Warmed]:
    """Warm what an earlier run read: that in words, and what came of it."""
    from fastload import prepare as warming
    from fastload.history.archive import Archive

    with options.open() as cache:
        archive = Archive(cache.directory)
        run = archive.read(archive.find(name))
        urls = [url for rows in run.objects.rows() for url, *_ in rows]
        with _progress(console) as on_progress:
            warmed = warming.warm_run(urls, cache, on_progress=on_progress)
    gone = f", {warmed.missing_count} are gone" if warmed.missing_count else ""
    return f"{run.name}: {warmed.object_count} objects{gone}", warmed


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """What the service says of its progress is shown while the block runs."""
    with shown(console, "warming") as bar:
        yield lambda progress: bar.show(progress.done_bytes, progress.total_bytes)
