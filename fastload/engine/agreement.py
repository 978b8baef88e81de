"""What all ranks of a job have to agree on before the first batch, settled through torch.distributed.

Rank 0 lists the shards, and the others take its list: a listing of each rank's own may differ where objects come and
go, and then samples would be lost or doubled without a sign. Then every rank says what its order depends on, and they
fail together, naming both values, where two differ. Both happen once, when a data set is first iterated, which all
ranks do. Without torch.distributed each rank lists for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from fastload import errors
from fastload.errors import ConfigError, FastloadError
from fastload.plan import Manifest, Ranks


def is_collective(ranks: Ranks) -> bool:
    """Whether `ranks` are those of torch's default process group, so that all of them can be asked."""
    distributed = sys.modules.get("torch.distributed")
    return (
        ranks.world_size > 1
        and distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() == ranks.world_size
        and distributed.get_rank() == ranks.rank
    )


def share_manifest(ranks: Ranks, list_shards: Callable[[], Manifest]) -> Manifest:
    """Rank 0's manifest, on every rank; its error too. All ranks call this."""
    import torch.distributed as distributed

    message: list[Any] = [None]
    if ranks.rank == 0:
        try:
            message = [("manifest", list_shards().to_json())]
        except FastloadError as error:
            message = [("error", errors.to_wire(error))]
    distributed.broadcast_object_list(message, src=0)
    kind, value = message[0]
    if kind == "error":
        raise errors.from_wire(*value)
    return Manifest.from_json(value, "the manifest from rank 0")


def check_same(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` on every rank where one of `settings` is not the same on all. All ranks call this."""
    import torch.distributed as distributed

    of_ranks: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(of_ranks, dict(settings))
    for rank, theirs in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"ranks differ in {name}: {value!r} on rank 0 and {theirs.get(name)!r} on rank {rank}; "
                    "all ranks must be given the same"
                )
