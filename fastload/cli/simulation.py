"""What `fastload simulate` is told, in groups as the simulation has them, and what that makes of them.

A group holds options as they are given and is named as they are: `ram_bytes` is what came with --ram-bytes. What cannot
be is said of the option, before a simulation that may take minutes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastload.config import parse_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastload.simulate import Job, Node, Run, StoreProfile

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
class StoreOptions:
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
class NodeOptions:
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
        from fastload.simulate.run import CHUNKS_MAX

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
