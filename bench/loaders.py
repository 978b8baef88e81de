"""Two loaders that take turns, and the CPU time of a process and of its workers."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.data import DataLoader as TorchLoader

from fastload import DataLoader

T = TypeVar("T")


def in_turn(rounds: int, measure: Callable[[Callable[..., Any]], T]) -> tuple[list[T], list[T]]:
    """What was measured with ours and with torch's; who is first in a round changes."""
    ours: list[T] = []
    theirs: list[T] = []
    for number in range(rounds):
        turns = [(DataLoader, ours), (TorchLoader, theirs)]
        for kind, values in turns if number % 2 == 0 else turns[::-1]:
            values.append(measure(kind))
    return ours, theirs


def cpu_s() -> float:
    """Of this process and of children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
