"""`fastload simulate`: how large a cache to buy, found out in virtual time.

Options come in groups, as the simulation has them. A group's fields have the options' names and values: `ram_bytes` is
what was given as --ram-bytes. A value that cannot be is an error that names the option, before a simulation that may
take minutes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastload.config import parse_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastload.simulate import Job, Node, Run, StoreProfile


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
    profile = StoreChoice(
        store=store,
        first_byte_ms=first_byte_ms,
        connection_rate=connection_rate,
        store_rate=store_rate,
        throttles_above=throttles_above,
        slow_share=slow_share,
        slow_times=slow_times,
    ).profile()
    caches = NodeChoices(
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


_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The data, who reads it, and how."""

    data_bytes: str
    sample_bytes: str
    shard_bytes: str
    nodes: int
    ranks: int
    rate: float
    batch_size: int
    epochs: int
    shuffle: str
    policy: str
    in_step: bool
    indexed: bool
    hedging: bool

    def job(self) -> Job:
        """As the simulation takes it."""
        from fastload.arguments import checked_cache_policy
        from fastload.plan import check_shuffle
        from fastload.simulate import Job

        _check_above_zero(self, "nodes", "ranks", "batch_size", "epochs", "rate")
        return Job(
            data_bytes=_size(self, "data_bytes"),
            sample_bytes=_size(self, "sample_bytes"),
            shard_bytes=_size(self, "shard_bytes"),
            nodes=self.nodes,
            ranks_per_node=self.ranks,
            batch_size=self.batch_size,
            samples_per_s=self.rate,
            epochs=self.epochs,
            shuffle=check_shuffle(self.shuffle),
            policy=checked_cache_policy(self.policy),
            in_step=self.in_step,
            is_indexed=self.indexed,
            hedging=self.hedging,
        )


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """A store by its name, and what is otherwise with it."""

    store: str
    first_byte_ms: float | None
    connection_rate: str | None
    store_rate: str | None
    throttles_above: float | None
    slow_share: float
    slow_times: float

    def profile(self) -> StoreProfile:
        """As the simulation takes it."""
        from fastload.simulate import STORES, StoreProfile

        self._check(STORES)
        known = STORES[self.store]
        return StoreProfile(
            first_byte_s=known.first_byte_s if self.first_byte_ms is None else self.first_byte_ms / 1000,
            connection_bytes_per_s=(
                known.connection_bytes_per_s if self.connection_rate is None else _size(self, "connection_rate")
            ),
            total_bytes_per_s=math.inf if self.store_rate is None else _size(self, "store_rate"),
            throttles_above=math.inf if self.throttles_above is None else self.throttles_above,
            slow_share=self.slow_share,
            slow_times=self.slow_times,
        )

    def _check(self, known: dict[str, StoreProfile]) -> None:
        if self.store not in known:
            names = ", ".join(known)
            raise ConfigError(f"--store={self.store} is none of {names}; or name one and change it with the options")
        _check_above_zero(self, "throttles_above", "slow_times")
        if self.first_byte_ms is not None and not 0 <= self.first_byte_ms < math.inf:
            raise ConfigError(f"--first-byte-ms={self.first_byte_ms} must be 0 or more, and not infinite")
        if not 0 <= self.slow_share <= 1:
            raise ConfigError(
                f"--slow-share={self.slow_share} must be between 0 and 1; 0.01 is one request in a hundred"
            )


@dataclass(frozen=True, slots=True)
class NodeChoices:
    """A machine, and the disk caches that are tried on it: sizes, or percent of the data that a node reads."""

    cache_bytes: str
    ram_bytes: str
    chunk_bytes: str
    link_rate: str
    disk_read_rate: str
    disk_write_rate: str

    def nodes(self, data_bytes: float) -> list[Node]:
        """One for each cache, the smallest first; each reads `data_bytes`."""
        from fastload.simulate import Node

        return [
            Node(
                ram_bytes=parse_bytes(self.ram_bytes, "--ram-bytes"),
                disk_bytes=disk_bytes,
                chunk_bytes=parse_bytes(self.chunk_bytes, "--chunk-bytes"),
                link_bytes_per_s=_size(self, "link_rate"),
                disk_read_bytes_per_s=_size(self, "disk_read_rate"),
                disk_write_bytes_per_s=_size(self, "disk_write_rate"),
            )
            for disk_bytes in cache_sizes(self.cache_bytes, data_bytes)
        ]


@dataclass(frozen=True, slots=True)
class ExtentOptions:
    """How much of the job is simulated, and by which draws."""

    simulated_nodes: int | None
    whole: bool
    seed: int

    def __post_init__(self) -> None:
        _check_above_zero(self, "simulated_nodes")

    def sweep(self, job: Job, nodes: Sequence[Node], store: StoreProfile) -> list[Run]:
        """Simulate the job on one node after the other."""
        from fastload.simulate import sweep
        from fastload.simulate.world import CHUNKS_MAX

        chunks_max = None if self.whole else CHUNKS_MAX
        return sweep(job, nodes, store, seed=self.seed, simulated_nodes=self.simulated_nodes, chunks_max=chunks_max)


@dataclass(frozen=True, slots=True)
class Output:
    """A file that is named by an option, or None."""

    option: str
    file: Path | None

    def __post_init__(self) -> None:
        if self.file is not None and (self.file.is_dir() or not self.file.parent.is_dir()):
            why = "is a directory" if self.file.is_dir() else f"lies in {self.file.parent}, which is no directory"
            raise ConfigError(f"{self.option}={self.file} {why}; give the path of a file")

    def write(self, text: str) -> None:
        """Where it is named."""
        if self.file is None:
            return
        try:
            self.file.write_text(text, "utf-8")
        except OSError as error:
            cure = "give the path of another file"
            raise ConfigError(f"{self.option}={self.file} cannot be written: {error}; {cure}") from error


def cache_sizes(text: str, data_bytes: float) -> list[int]:
    """The caches, in bytes, the smallest first."""
    sizes = set()
    for part in text.split(","):
        percent = _PERCENT.fullmatch(part)
        sizes.add(int(float(percent[1]) / 100 * data_bytes) if percent else parse_bytes(part.strip(), "--cache-bytes"))
    return sorted(sizes)


def _check_above_zero(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{_option(name)}={value} must be above 0, and not infinite")


def _size(options: object, name: str) -> int:
    """More than no bytes."""
    size = parse_bytes(getattr(options, name), _option(name))
    if size <= 0:
        raise ConfigError(f"{_option(name)}={size} must be above 0, and not infinite")
    return size


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
