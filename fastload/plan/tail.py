"""How an epoch ends when its samples do not divide by the ranks, and what follows for counts."""

from __future__ import annotations

from typing import Literal, cast, get_args

from fastload.errors import ConfigError
from fastload.plan.ranks import Ranks, turn_of

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
