"""What all ranks of a job must agree on before the first batch, settled through torch.distributed.

Rank 0 lists the shards, and the others take its list: where objects come and go, listings made by each rank could
differ, and samples would be lost or doubled silently. Then every rank sends the settings that its order depends on, and
all fail together, naming both values, where two differ. Values that differ by nature are reduced: windows have to fit
the smallest arena, and sample counts that one node knows are shared with all. This happens once, when a data set is
first iterated, which all ranks do. On every iteration they meet first, and check that they begin at the same place.

A failure on one rank reaches all of them, so that none waits for a rank that has failed. Without torch.distributed each
rank lists for itself.
"""

from __future__ import annotations

import itertools
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastload import errors
from fastload.errors import ConfigError, FastloadError, ServiceError, WaitTimeoutError
from fastload.plan import Manifest, Ranks
from fastload.waiting import DEADLINE_S

_POLL_FIRST_S, _POLL_MAX_S = 0.005, 0.25

Counts = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
T = TypeVar("T")


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


class Meetings:
    """Names the meetings of one data set's ranks, alike on every rank.

    Data sets are numbered in the order in which they are first iterated, and so are the meetings of each.
    """

    _group: Any = None
    _data_sets = itertools.count()

    def __init__(self) -> None:
        import torch.distributed as distributed

        if distributed.group.WORLD is not Meetings._group:
            Meetings._group, Meetings._data_sets = distributed.group.WORLD, itertools.count()
        self._of, self._number, self._count = Meetings._group, next(Meetings._data_sets), itertools.count()

    @property
    def are_of_this_group(self) -> bool:
        """Whether the process group is still the one in which they were first named."""
        import torch.distributed as distributed

        return distributed.group.WORLD is self._of

    def next_name(self) -> str:
        return f"{self._number}/{next(self._count)}"


def meet(processes: Ranks, meeting: str, place: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until all ranks have come to a meeting, which each names alike; all call this.

    Raises `ConfigError` on every rank where they do not all say the same `place`, `ServiceError` where the store has
    ended, and `WaitTimeoutError`, naming the missing ranks: collective calls would wait for them silently, or until
    the process group times out.
    """
    import torch.distributed as distributed

    try:
        _meet(processes, meeting, place, deadline_s)
    except distributed.DistError as error:
        raise ServiceError(
            f"the store of torch.distributed ended while rank {processes.rank} waited for the others to begin "
            f"({place}): {error}. See why the rank that holds it (rank 0, or torchrun's agent) has ended"
        ) from error


def _meet(processes: Ranks, meeting: str, place: str, deadline_s: float) -> None:
    at = store(f"meetings/{meeting}")
    at.set(f"place/{processes.rank}", place)
    at.add(f"at {place}", 1)
    at.add("all", 1)
    began, pause_s = time.monotonic(), _POLL_FIRST_S
    while at.add("all", 0) < processes.world_size:
        if time.monotonic() - began > deadline_s:
            missing = [rank for rank in range(processes.world_size) if not at.check([f"place/{rank}"])]
            raise WaitTimeoutError(
                f"gave up after {deadline_s:g} s waiting for ranks {_shown(missing)}, which do not begin the iteration "
                f"that rank {processes.rank} has begun ({place}). All ranks must iterate the data set equally often; "
                "one that only some of them read needs rank=0, world_size=1"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_MAX_S)
    if at.add(f"at {place}", 0) != processes.world_size:
        theirs = next(
            (rank, each) for rank in range(processes.world_size) if (each := at.get(f"place/{rank}").decode()) != place
        )
        raise ConfigError(
            f"ranks differ in where they begin: {place!r} on rank {processes.rank} and {theirs[1]!r} on rank "
            f"{theirs[0]}; load the same state on all ranks, and iterate the data set equally often on each"
        )


def share_manifest(processes: Ranks, list_shards: Callable[[], Manifest]) -> tuple[Manifest, str]:
    """Rank 0's manifest, on every rank, and a name for this agreement that no other has; or rank 0's error.

    All ranks call this.
    """
    return _from_rank_0(processes.rank, lambda: (list_shards(), uuid.uuid4().hex))


def compare(gather: Callable[[], tuple[Mapping[str, Any], Mapping[str, int]]]) -> dict[str, int]:
    """`gather` gives settings, and values of which the smallest of all ranks counts: these. All ranks call this.

    Raises `ConfigError` on every rank where one of the settings is not the same on all.
    """
    of_ranks = _from_all(gather)
    first, least = of_ranks[0]
    for rank, (theirs, _) in enumerate(of_ranks):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"ranks differ in {name}: {value!r} on rank 0 and {theirs.get(name)!r} on rank {rank}; "
                    "all ranks must be given the same"
                )
    return {name: min(values[name] for _, values in of_ranks) for name in least}


def share_counts(processes: Ranks, known: Callable[[], Counts], own: npt.NDArray[np.int32]) -> Counts:
    """On every rank, the sample counts that rank 0 knows, and those that another knows of its `own`. All call this.

    Gathering takes, on every rank, as much memory as the largest message times the ranks: so no rank repeats rank 0's.
    """
    of_first = _from_rank_0(processes.rank, known)

    def others() -> Counts:
        numbers, counts = known()
        chosen = np.isin(numbers, own) & ~np.isin(numbers, of_first[0])
        return numbers[chosen], counts[chosen]

    shared = [of_first, *_from_all(others)]
    return np.concatenate([numbers for numbers, _ in shared]), np.concatenate([counts for _, counts in shared])


def store(name: str) -> Any:
    """The part of the default process group's key-value store that belongs to the agreement of this name."""
    import torch.distributed as distributed

    # There is no public way to it; launchers and torch's own packages take it from here too.
    default = distributed.distributed_c10d._get_default_store()
    return distributed.distributed_c10d.PrefixStore(f"fastload/{name}", default)


def _shown(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _from_rank_0(rank: int, make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; or what it raises there. All ranks call this."""
    import torch.distributed as distributed

    message, raised = _message(make) if rank == 0 else (None, None)
    messages: list[Any] = [message]
    distributed.broadcast_object_list(messages, src=0)
    value: T = _value(0, messages[0], raised)
    return value


def _from_all(make: Callable[[], T]) -> list[T]:
    """What `make` returns on each rank, on every rank; or what it raises on one. All ranks call this."""
    import torch.distributed as distributed

    message, raised = _message(make)
    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, message)
    if raised is not None:
        raise raised
    return [_value(rank, each, None) for rank, each in enumerate(of_ranks)]


def _message(make: Callable[[], Any]) -> tuple[tuple[Any, tuple[str, str] | None], Exception | None]:
    """A message that holds what `make` returns, or the error that it raises; and that error itself."""
    try:
        return (make(), None), None
    except FastloadError as error:
        return (None, errors.to_wire(error)), error
    except Exception as error:  # the other ranks must not wait, whatever is wrong here
        return (None, ("FastloadError", f"{type(error).__name__}: {error}")), error


def _value(rank: int, message: tuple[Any, tuple[str, str] | None], raised: Exception | None) -> Any:
    """The value in a rank's message; raises the error in it, or `raised`, that error where the rank is this one."""
    value, failure = message
    if raised is not None:
        raise raised
    if failure is not None:
        name, text = failure
        raise errors.from_wire(name, f"on rank {rank}: {text}")
    return value
