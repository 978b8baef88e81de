"""The input of a simulation: the store, a node, the job."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastload.cache.policy import PolicyName
from fastload.config import GIB, MIB
from fastload.errors import ConfigError
from fastload.plan import Shuffle


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not value > 0:
            raise ConfigError(f"{name}={value} must be above 0")


def _check_finite(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}={value} must be a number from 0 on, and not infinite")


@dataclass(frozen=True, slots=True)
class StoreProfile:
    """How a store answers.

    `first_byte_s` is the middle of what a request waits for its first byte, give or take `noise` (0 to 1) of it.
    `slow_share` of the requests wait `slow_times` as long. Then a body comes at `connection_bytes_per_s`, or at a fair
    share of `total_bytes_per_s`, which is what the store gives to all nodes together. Of more than `throttles_above`
    requests at a time, over all nodes, the store refuses the rest.
    """

    first_byte_s: float = 0.02
    connection_bytes_per_s: float = 80e6
    total_bytes_per_s: float = math.inf
    noise: float = 0.3
    slow_share: float = 0.0
    slow_times: float = 50.0
    throttles_above: float = math.inf

    def __post_init__(self) -> None:
        _check_positive(self, "connection_bytes_per_s", "total_bytes_per_s", "throttles_above")
        _check_finite(self, "first_byte_s", "connection_bytes_per_s", "slow_times")
        for name in ("noise", "slow_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} of a store must be between 0 and 1")

    def part(self, share: float) -> StoreProfile:
        """What a share of the nodes sees of it."""
        return replace(
            self,
            total_bytes_per_s=self.total_bytes_per_s * share,
            throttles_above=max(1.0, self.throttles_above * share),
        )


STORES = {
    "near": StoreProfile(first_byte_s=0.02),
    "far": StoreProfile(first_byte_s=0.1),
    "slow": StoreProfile(first_byte_s=0.2),
}
"""Stores by name: in the same place, in another region, and slow to answer."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine and its cache. `link_bytes_per_s` is its network, the disk's rates are those of all its threads.

    `core_wait_s` is for how long the service's loop waits for a core when a thread calls it, and up to twice that a
    thread that reads from a store, each time that it wakes up.
    """

    ram_bytes: int = 8 * GIB
    disk_bytes: int = 0
    chunk_bytes: int = 8 * MIB
    link_bytes_per_s: float = 3e9
    core_wait_s: float = 0.0
    disk_read_bytes_per_s: float = 3e9
    disk_write_bytes_per_s: float = 1.5e9
    requests_in_flight: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "link_bytes_per_s", "disk_read_bytes_per_s", "disk_write_bytes_per_s")
        _check_finite(self, "core_wait_s")


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained on, by whom, and how fast.

    `samples_per_s` is what a rank takes when it never waits. That of rank r of each node is `rate_factors[r]` times
    that, where there are some, and the network of node n `link_factors[n]` times what `Node` says. With `in_step`, all
    ranks wait for each other after each batch, as data-parallel training does. `is_indexed`: after `fastload
    index`, so that the first epoch parses nothing. `threads` make batches, and `depth` of them are ahead of the
    trainer, as in `DataLoader`.
    """

    data_bytes: int
    sample_bytes: int = 100_000
    shard_bytes: int = 256_000_000
    nodes: int = 1
    ranks_per_node: int = 1
    batch_size: int = 256
    samples_per_s: float = 1000.0
    rate_factors: tuple[float, ...] = ()
    link_factors: tuple[float, ...] = ()
    epochs: int = 3
    shuffle: Shuffle = "window"
    window_bytes: int | None = None
    policy: Literal["auto"] | PolicyName = "auto"
    in_step: bool = True
    is_indexed: bool = False
    threads: int = 4
    hedging: bool = True

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("data_bytes", "sample_bytes", "shard_bytes", "nodes", "ranks_per_node", "batch_size"),
            *("samples_per_s", "epochs", "threads"),
        )
        _check_finite(self, "samples_per_s")
        if self.rate_factors and (len(self.rate_factors) != self.ranks_per_node or min(self.rate_factors) <= 0):
            raise ConfigError(
                f"rate_factors={self.rate_factors} must hold a positive number for each of {self.ranks_per_node} ranks"
            )
        if self.link_factors and (len(self.link_factors) != self.nodes or min(self.link_factors) <= 0):
            raise ConfigError(
                f"link_factors={self.link_factors} must hold a positive number for each of {self.nodes} nodes"
            )
        if self.sample_bytes > self.shard_bytes:
            raise ConfigError(
                f"sample_bytes={self.sample_bytes} is above shard_bytes={self.shard_bytes}: a shard holds whole samples"
            )

    @property
    def depth(self) -> int:
        """How many batches are made ahead of the trainer, at most."""
        return max(2, 2 * self.threads)

    @property
    def cache_policy(self) -> PolicyName:
        """By which its data is kept."""
        if self.policy != "auto":
            return self.policy
        return "future" if self.shuffle == "global" else "pin"

    def step_s(self, local_rank: int, samples: int) -> float:
        """How long a trainer takes for a batch."""
        factor = self.rate_factors[local_rank] if self.rate_factors else 1.0
        return samples / (self.samples_per_s * factor)
