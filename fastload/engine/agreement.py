"""What all ranks of a job have to agree on before the first batch, settled through torch.distributed.

Rank 0 lists the shards, and the others take its list: a listing of each rank's own may differ where objects come and
go, and then samples would be lost or doubled without a sign. Then every rank says what its order depends on, and they
fail together, naming both values, where two differ. What differs by nature is brought to one: windows have to fit the
smallest arena, and what one node knows of sample counts, all know. All of it happens once, when a data set is first
iterated, which all ranks do. Without torch.distributed each rank lists for itself.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import errors
from fastload.errors import ConfigError, FastloadError
from fastload.plan import Manifest, Ranks

Counts = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


def is_initialised() -> bool:
    """Whether this process has a default process group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_collective(processes: Ranks) -> bool:
    """Whether `processes` are those of torch's default process group, so that all of them can be asked."""
    if processes.world_size == 1 or not is_initialised():
        return False
    distributed = sys.modules["torch.distributed"]
    return (distributed.get_rank(), distributed.get_world_size()) == (processes.rank, processes.world_size)


def share_manifest(processes: Ranks, list_shards: Callable[[], Manifest]) -> tuple[Manifest, str]:
    """Rank 0's manifest, on every rank, and a name for this agreement that no other has; or rank 0's error.

    All ranks call this.
    """
    import torch.distributed as distributed

    message: list[Any] = [None]
    if processes.rank == 0:
        try:
            message = [("manifest", (list_shards().to_json(), uuid.uuid4().hex))]
        except FastloadError as error:
            message = [("error", errors.to_wire(error))]
    distributed.broadcast_object_list(message, src=0)
    kind, (value, name) = message[0]
    if kind == "error":
        raise errors.from_wire(value, name)
    return Manifest.from_json(value, "the manifest from rank 0"), name


def compare(settings: Mapping[str, Any], least: Mapping[str, int]) -> dict[str, int]:
    """The smallest of each of `least` over all ranks. All ranks call this.

    Raises `ConfigError` on every rank where one of `settings` is not the same on all.
    """
    import torch.distributed as distributed

    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, (dict(settings), dict(least)))
    first = of_ranks[0][0]
    for rank, (theirs, _) in enumerate(of_ranks):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"ranks differ in {name}: {value!r} on rank 0 and {theirs.get(name)!r} on rank {rank}; "
                    "all ranks must be given the same"
                )
    return {name: min(values[name] for _, values in of_ranks) for name in least}


def share_counts(counts: Counts) -> Counts:
    """The sample counts that any rank knows, on every rank. All ranks call this."""
    import torch.distributed as distributed

    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, counts)
    return np.concatenate([numbers for numbers, _ in of_ranks]), np.concatenate([each for _, each in of_ranks])


def store(name: str) -> Any:
    """The part of the default process group's key-value store that belongs to the agreement of this name."""
    import torch.distributed as distributed

    # There is no public way to it; launchers and torch's own packages take it from here too.
    default = distributed.distributed_c10d._get_default_store()
    return distributed.distributed_c10d.PrefixStore(f"fastload/{name}", default)
