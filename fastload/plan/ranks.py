"""Which share of the data this process reads.

A rank here is a *data-parallel* rank: processes with the same rank read the same samples. It is settled once,
when an iteration begins, from the first of: what the user said, torch.distributed where it is initialised,
`RANK` and `WORLD_SIZE` as torchrun and others set them, and otherwise one process alone. torch is asked only if
the program has imported it already. Which ranks share a node is what the launcher says (torchrun, Open MPI, Slurm),
if it speaks of the same ranks. Open MPI and Slurm are not asked for the rank itself: what they set is also in
the environment of single processes.

A `Tail` says how an epoch ends whose samples do not divide by the ranks; the number of samples and batches of a rank
follows from it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple, cast, get_args

from fastload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among all (`rank` of `world_size`) and among those of its node (`local_rank`
    of `local_world_size`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        _check("rank", self.rank, "world_size", self.world_size)
        _check("local_rank", self.local_rank, "local_world_size", self.local_world_size)
        if self.local_world_size > self.world_size:
            raise ConfigError(
                f"local_world_size={self.local_world_size} is above world_size={self.world_size}; "
                "a node cannot hold more ranks than there are"
            )

    def with_replicas(self, replicas: int) -> Ranks:
        """The data-parallel ranks, where each `replicas` ranks that follow one another read the same samples: a
        tensor- or context-parallel group.

        A group that spans nodes counts as a node of one rank, on each of its nodes. Raises `ConfigError` where
        groups divide neither the world nor a node.
        """
        if replicas < 1 or self.world_size % replicas:
            raise ConfigError(
                f"replicas={replicas} must divide world_size={self.world_size}: it is how many ranks read the same "
                "samples"
            )
        rank, world_size, local = self.rank // replicas, self.world_size // replicas, self.local_world_size
        if local % replicas == 0:
            return Ranks(rank, world_size, self.local_rank // replicas, local // replicas)
        if replicas % local == 0:
            return Ranks(rank, world_size, 0, 1)
        raise ConfigError(
            f"replicas={replicas} neither divides local_world_size={local} nor is a multiple of it: a group would "
            "have a part of a node; choose one that does"
        )


def resolve_ranks(
    rank: int | None = None,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
    replicas: int = 1,
) -> Ranks:
    """The ranks of this process; `environ` is the process's own environment unless given.

    All that is found, and `rank` and `world_size` too, counts processes; `replicas` of them that follow one
    another read the same samples, and have the same rank in what is returned.

    Where the launcher does not say which ranks share a node, all are taken to be on one. Raises `ConfigError`
    where only one of rank and world size is known, or they do not fit.
    """
    environ = os.environ if environ is None else environ
    launched = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    if rank is not None or world_size is not None:
        found, source = (rank, world_size), ("rank", "world_size")
    elif (distributed := _from_torch()) is not None:
        found, source = distributed, ("torch's rank", "torch's world size")
    else:
        found, source = launched, ("RANK", "WORLD_SIZE")
    if found == (None, None):
        return Ranks().with_replicas(replicas)
    for name, value in zip(source, found, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name}={value!r} must be an integer")
    if found[0] is None or found[1] is None:
        known, missing = source if found[1] is None else source[::-1]
        raise ConfigError(f"{known} is set but {missing} is not; set both, or neither for a single process")
    return _with_node(found[0], found[1], environ).with_replicas(replicas)


def default_partitions(ranks: Ranks) -> int:
    """One partition a node: each then reads shards of its own, one window at a time."""
    return max(1, ranks.world_size // ranks.local_world_size)


def shared_lanes(ranks: Ranks, partitions: int) -> int:
    """gcd(nodes, partitions): two nodes read the same lanes where their numbers are equal modulo this.

    Raises `ConfigError` unless every node has as many ranks, numbered node by node; with one partition nodes
    do not matter.
    """
    local = ranks.local_world_size
    if partitions == 1:
        return 1
    if ranks.world_size % local or ranks.local_rank != ranks.rank % local:
        raise ConfigError(
            f"partitions={partitions} needs ranks that are numbered node by node, as many on each: rank={ranks.rank} "
            f"of world_size={ranks.world_size} cannot be local_rank={ranks.local_rank} of local_world_size={local}; "
            "number them so, or use partitions=1"
        )
    return gcd(ranks.world_size // local, partitions)


def turn_of(ranks: Ranks, partitions: int) -> int:
    """A rank's turn, from 0 to world_size - 1: which samples are its own where ranks take turns. See `assignment`."""
    if partitions == 1:
        return ranks.rank
    shared = shared_lanes(ranks, partitions)
    node, local_rank = divmod(ranks.rank, ranks.local_world_size)
    return node % shared + shared * (node // shared * ranks.local_world_size + local_rank)


class _Launcher(NamedTuple):
    """The names under which a launcher says rank, world size, local rank and local world size."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_TORCHRUN = _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = _Launcher(
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)
_SLURM = _Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def _with_node(rank: int, world_size: int, environ: Mapping[str, str]) -> Ranks:
    """Adds the place on the node, which the launcher's environment gives if it speaks of the same ranks."""
    _check("rank", rank, "world_size", world_size)
    for launcher in (_TORCHRUN, _OPEN_MPI, _SLURM):
        spoken_of = _integer(environ, launcher.rank), _integer(environ, launcher.world_size)
        local_rank = _integer(environ, launcher.local_rank)
        local_world_size = _node_size(environ, launcher)
        if local_rank is None or local_world_size is None:
            continue
        if spoken_of == (rank, world_size) or (launcher is _TORCHRUN and spoken_of == (None, None)):
            return Ranks(rank, world_size, local_rank, local_world_size)
    return Ranks(rank, world_size, rank, world_size)


def _node_size(environ: Mapping[str, str], launcher: _Launcher) -> int | None:
    if launcher is not _SLURM:
        return _integer(environ, launcher.local_world_size)
    text, node = environ.get(launcher.local_world_size), _integer(environ, "SLURM_NODEID")
    if text is None or node is None:
        return None
    # "4(x2),3": two nodes with 4 tasks each, then one with 3.
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    sizes = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if not all(parts) or node >= len(sizes):
        raise ConfigError(
            f"{launcher.local_world_size}={text!r} in the environment does not say how many tasks node {node} has; "
            "correct or unset it"
        )
    return sizes[node]


def _from_torch() -> tuple[int, int] | None:
    """Rank and world size of torch's default process group, if there is one."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} in the environment is not an integer; correct or unset it") from error


def _check(name: str, value: int, count_name: str, count: int) -> None:
    if count < 1:
        raise ConfigError(f"{count_name}={count} must be at least 1")
    if not 0 <= value < count:
        raise ConfigError(f"{name}={value} must be from 0 to {count - 1}, since {count_name}={count}")


Tail = Literal["pad", "drop", "uneven"]


def check_tail(tail: str) -> Tail:
    """`tail` if it is one of the three ways. Raises `ConfigError`."""
    if tail not in get_args(Tail):
        raise ConfigError(f"tail={tail!r} must be 'pad', 'drop' or 'uneven'")
    return cast(Tail, tail)


def sample_count_of_rank(total: int, ranks: Ranks, tail: Tail, partitions: int = 1) -> int:
    """How many samples a rank gets of `total`, repeats included."""
    full, left_over = divmod(total, ranks.world_size)
    if tail == "pad":
        return full + (left_over > 0)
    return full + (tail == "uneven" and turn_of(ranks, partitions) < left_over)


def batch_count_of_rank(
    total: int, ranks: Ranks, tail: Tail, batch_size: int, drop_last: bool, partitions: int = 1
) -> int:
    """How many batches a rank gets of `total` samples."""
    full, rest = divmod(sample_count_of_rank(total, ranks, tail, partitions), batch_size)
    return full + (rest > 0 and not drop_last)
