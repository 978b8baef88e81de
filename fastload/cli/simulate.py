"""`fastload simulate`: how large a cache to buy, found out in virtual time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.config import parse_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastload.simulate import Job, Run, StoreProfile

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


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
    from fastload.arguments import checked_cache_policy
    from fastload.plan.order import check_shuffle
    from fastload.simulate import Job, Node, sweep
    from fastload.simulate.report import as_json, as_svg
    from fastload.simulate.run import CHUNKS_MAX

    _check_above_zero({"--nodes": nodes, "--ranks": ranks, "--batch-size": batch_size, "--epochs": epochs})
    _check_above_zero({"--rate": rate, "--simulated-nodes": simulated_nodes})
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        _check_file(option, file)
    job = Job(
        data_bytes=_size(data_bytes, "--data-bytes"),
        sample_bytes=_size(sample_bytes, "--sample-bytes"),
        shard_bytes=_size(shard_bytes, "--shard-bytes"),
        nodes=nodes,
        ranks_per_node=ranks,
        batch_size=batch_size,
        samples_per_s=rate,
        epochs=epochs,
        shuffle=check_shuffle(shuffle),
        policy=checked_cache_policy(policy),
        in_step=in_step,
        is_indexed=indexed,
        hedging=hedging,
    )
    profile = _store(store, first_byte_ms, connection_rate, store_rate, throttles_above, (slow_share, slow_times))
    caches = [
        Node(
            ram_bytes=parse_bytes(ram_bytes, "--ram-bytes"),
            disk_bytes=size,
            chunk_bytes=parse_bytes(chunk_bytes, "--chunk-bytes"),
            link_bytes_per_s=_size(link_rate, "--link-rate"),
            disk_read_bytes_per_s=_size(disk_read_rate, "--disk-read-rate"),
            disk_write_bytes_per_s=_size(disk_write_rate, "--disk-write-rate"),
        )
        for size in _sizes(cache_bytes, job.data_bytes / job.nodes)
    ]
    chunks_max = None if whole else CHUNKS_MAX
    runs = sweep(job, caches, profile, seed=seed, simulated_nodes=simulated_nodes, chunks_max=chunks_max)
    _print(job, runs)
    if json_file is not None:
        _write("--json", json_file, json.dumps(as_json(job, profile, seed, runs), indent=1) + "\n")
    if plot_file is not None and any(not run.refused for run in runs):
        _write("--plot", plot_file, as_svg(job, runs))


def _print(job: Job, runs: Sequence[Run]) -> None:
    from fastload.simulate.report import about, advice, as_table, refusals

    console = Console()
    if any(not run.refused for run in runs):
        console.print(as_table(job, runs))
    for line in [*refusals(runs), *advice(job, runs), about(job, runs)]:
        console.print(line, highlight=False)


def _check_above_zero(options: dict[str, float | None]) -> None:
    for option, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}={value} must be above 0, and not infinite")


def _size(text: str, option: str) -> int:
    """More than no bytes."""
    size = parse_bytes(text, option)
    _check_above_zero({option: size})
    return size


def _check_file(option: str, file: Path | None) -> None:
    """Said before a simulation that may take minutes."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "is a directory" if file.is_dir() else f"lies in {file.parent}, which is no directory"
        raise ConfigError(f"{option}={file} {why}; give the path of a file")


def _write(option: str, file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{option}={file} cannot be written: {error}; give the path of another file") from error


def _sizes(text: str, node_bytes: float) -> list[int]:
    """The caches, in bytes, the smallest first."""
    sizes = []
    for part in text.split(","):
        percent = _PERCENT.fullmatch(part)
        sizes.append(
            int(float(percent[1]) / 100 * node_bytes) if percent else parse_bytes(part.strip(), "--cache-bytes")
        )
    return sorted(set(sizes))


def _store(
    name: str,
    first_byte_ms: float | None,
    connection_rate: str | None,
    store_rate: str | None,
    throttles_above: float | None,
    slow: tuple[float, float],
) -> StoreProfile:
    from fastload.simulate.options import STORES, StoreProfile

    if name not in STORES:
        raise ConfigError(f"--store={name} is none of {', '.join(STORES)}; or name one and change it with the options")
    _check_above_zero({"--throttles-above": throttles_above, "--slow-times": slow[1]})
    if first_byte_ms is not None and not 0 <= first_byte_ms < math.inf:
        raise ConfigError(f"--first-byte-ms={first_byte_ms} must be 0 or more, and not infinite")
    if not 0 <= slow[0] <= 1:
        raise ConfigError(f"--slow-share={slow[0]} must be between 0 and 1; 0.01 is one request in a hundred")
    known = STORES[name]
    return StoreProfile(
        first_byte_s=known.first_byte_s if first_byte_ms is None else first_byte_ms / 1000,
        connection_bytes_per_s=(
            known.connection_bytes_per_s if connection_rate is None else _size(connection_rate, "--connection-rate")
        ),
        total_bytes_per_s=math.inf if store_rate is None else _size(store_rate, "--store-rate"),
        throttles_above=math.inf if throttles_above is None else throttles_above,
        slow_share=slow[0],
        slow_times=slow[1],
    )
