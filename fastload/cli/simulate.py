"""`fastload simulate`: how large a cache to buy, found out in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.cli.simulation import ExtentOptions, JobOptions, NodeOptions, Output, StoreOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastload.simulate import Job, Run


def simulate(
    data_bytes: Annotated[str, typer.Option(help="Size of the data set.")] = "10TB",
    sample_bytes: Annotated[str, typer.Option(help="Size of a sample.")] = "100kB",
    shard_bytes: Annotated[str, typer.Option(help="Size of a shard.")] = "256MB",
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")] = 1000,
    ranks: Annotated[int, typer.Option(help="Ranks of a node.")] = 8,
    cache_bytes: Annotated[
        str,
        typer.Option(help="Disk caches of a node to try: sizes, or percent of the data that a node reads."),
    ] = "10%,25%,50%,100%",
    ram_bytes: Annotated[str, typer.Option(help="RAM tier of a node.")] = "2GiB",
    chunk_bytes: Annotated[str, typer.Option(help="Size of a chunk.")] = "8MiB",
    store: Annotated[str, typer.Option(help="near (20 ms to the first byte), far (100 ms) or slow (200 ms).")] = "near",
    first_byte_ms: Annotated[float | None, typer.Option(help="Instead of the store's.")] = None,
    connection_rate: Annotated[str | None, typer.Option(help="Bytes a second of one connection.")] = None,
    store_rate: Annotated[str | None, typer.Option(help="Bytes a second that the store gives to all nodes.")] = None,
    throttles_above: Annotated[float | None, typer.Option(help="Requests at a time, over all nodes.")] = None,
    slow_share: Annotated[float, typer.Option(help="The part of the requests that take --slow-times as long.")] = 0.0,
    slow_times: Annotated[float, typer.Option(help="See --slow-share.")] = 50.0,
    link_rate: Annotated[str, typer.Option(help="Bytes a second of a node's network.")] = "3GB",
    disk_read_rate: Annotated[str, typer.Option(help="Bytes a second that a node's disk gives.")] = "3GB",
    disk_write_rate: Annotated[str, typer.Option(help="Bytes a second that a node's disk takes.")] = "1.5GB",
    rate: Annotated[float, typer.Option(help="Samples a second that a rank trains on when it never waits.")] = 1000.0,
    batch_size: Annotated[int, typer.Option(help="Samples of a rank's batch.")] = 256,
    epochs: Annotated[int, typer.Option(help="Epochs; the first one fills the cache.")] = 3,
    shuffle: Annotated[str, typer.Option(help="window, shards, global or none.")] = "window",
    policy: Annotated[str, typer.Option(help="auto, pin, future, sieve or lru.")] = "auto",
    in_step: Annotated[bool, typer.Option(help="All ranks wait for each other after each batch.")] = True,
    indexed: Annotated[bool, typer.Option(help="`fastload index` has been run: nothing is parsed.")] = False,
    hedging: Annotated[bool, typer.Option(help="What is late is asked for twice.")] = True,
    simulated_nodes: Annotated[int | None, typer.Option(help="Nodes that stand for all; else two.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="All of a node's data, however long that takes.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed, the same figures.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a plot there, as SVG.")] = None,
) -> None:
    """How much a disk cache of some sizes would hit, and how long a job would wait: the cache service's own decisions,
    against a store and disks in virtual time.
    """
    from fastload.simulate.report import as_json, as_svg

    # What an option cannot be is said before anything is simulated, which may take minutes.
    extent = ExtentOptions(simulated_nodes, whole, seed)
    figures, plot = Output("--json", json_file), Output("--plot", plot_file)
    job = JobOptions(
        data_bytes=data_bytes,
        sample_bytes=sample_bytes,
        shard_bytes=shard_bytes,
        nodes=nodes,
        ranks=ranks,
        rate=rate,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=shuffle,
        policy=policy,
        in_step=in_step,
        indexed=indexed,
        hedging=hedging,
    ).job()
    profile = StoreOptions(
        store=store,
        first_byte_ms=first_byte_ms,
        connection_rate=connection_rate,
        store_rate=store_rate,
        throttles_above=throttles_above,
        slow_share=slow_share,
        slow_times=slow_times,
    ).profile()
    caches = NodeOptions(
        cache_bytes=cache_bytes,
        ram_bytes=ram_bytes,
        chunk_bytes=chunk_bytes,
        link_rate=link_rate,
        disk_read_rate=disk_read_rate,
        disk_write_rate=disk_write_rate,
    ).nodes(job.data_bytes / job.nodes)
    runs = extent.sweep(job, caches, profile)
    _print(job, runs)
    figures.write(json.dumps(as_json(job, profile, seed, runs), indent=1) + "\n")
    if any(not run.refused for run in runs):
        plot.write(as_svg(job, runs))


def _print(job: Job, runs: Sequence[Run]) -> None:
    from fastload.simulate.report import about, advice, as_table, refusals

    console = Console()
    if any(not run.refused for run in runs):
        console.print(as_table(job, runs))
    for line in [*refusals(runs), *advice(job, runs), about(job, runs)]:
        console.print(line, highlight=False)
