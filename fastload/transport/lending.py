"""Memory that is lent out as an array, and is heard of again when the last view of that array is gone.

A finalizer, which may run in any thread at any point, only appends to a deque. It says too whether this process was
forked while the array was there: the child has what its parent held, says nothing when it lets go of it, and would see
whatever is written to that memory. So memory of which a child may still hold a view must not be used again.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fastload.lifecycle import fork_count
from fastload.transport.slots import Owner, address_of

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


class Collected(NamedTuple, Generic[T]):
    """An array is no more."""

    what: T  # that was lent
    was_forked: bool  # while the array was there, so that a child may still look at it


def lent(memory: Bytes, collected: deque[Collected[T]], what: T) -> Bytes:
    """An array over `memory`; when the last view of it is gone, `collected` is told of `what`."""
    return np.asarray(_Lent(memory, collected, what))


class _Lent(Owner, Generic[T]):
    """What such an array is based on. A finalizer of its own costs half of what one of `weakref`'s does."""

    __slots__ = ("_collected", "_forks", "_memory", "_what")

    def __init__(self, memory: Bytes, collected: deque[Collected[T]], what: T) -> None:
        # First, so that it is told of also where a signal's handler raises before there is an array.
        self._memory, self._collected, self._what, self._forks = memory, collected, what, fork_count()
        super().__init__(address_of(memory), memory.size)

    def __del__(self) -> None:
        was_forked = self._forks != fork_count()
        self._collected.append(Collected(self._what, was_forked))  # and only now may the memory be unmapped
