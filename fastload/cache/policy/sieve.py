"""SIEVE (Zhang et al., NSDI 2024): what is held stays in the order in which it came, and a hand goes along it.

The hand moves from the oldest to the newest and around. What was used since the hand last passed it stays, and loses
that mark; the first without a mark goes. New ones come in at the newest end, so one that is never used again is met by
the hand soon after it came, while what was used has a whole round to be used again. A use costs one bit, and needs no
order to be changed.

`Sieve` is for keys, each step in constant time; `SieveSlots` for a few thousand numbered places, of which only some may
go at a time, and whose order is wanted as an array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic

import numpy as np
import numpy.typing as npt

from fastload.cache.policy.keyed import Key

__all__ = ["Sieve", "SieveSlots"]

Int64 = npt.NDArray[np.int64]

# More than all comings.
_ROUND = 1 << 60


@dataclass(slots=True, eq=False)
class _Node(Generic[Key]):
    key: Key
    used: bool = False
    held: bool = True


class Sieve(Generic[Key]):
    """See `Keyed`, and the module's text."""

    def __init__(self) -> None:
        self._nodes: dict[Key, _Node[Key]] = {}
        # Both in the order in which they came, all of `_passed` before all of `_ahead`; the hand is between them.
        # Nodes that are held no more lie there until the hand comes by.
        self._passed: list[_Node[Key]] = []
        self._ahead: deque[_Node[Key]] = deque()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def add(self, key: Key) -> None:
        if key not in self._nodes:
            node = self._nodes[key] = _Node(key)
            self._ahead.append(node)

    def use(self, key: Key) -> None:
        node = self._nodes.get(key)
        if node is not None:
            node.used = True

    def discard(self, key: Key) -> None:
        node = self._nodes.pop(key, None)
        if node is not None:
            node.held = False
            self._tidy()

    def evict(self) -> Key:
        if not self._nodes:
            raise KeyError("nothing is held")
        while True:
            if not self._ahead:
                self._ahead, self._passed = deque(self._passed), []
            node = self._ahead.popleft()
            if node.held and not node.used:
                del self._nodes[node.key]
                node.held = False
                return node.key
            if node.held:
                node.used = False
                self._passed.append(node)

    def in_order(self) -> Iterator[Key]:
        nodes = [node for node in chain(self._ahead, self._passed) if node.held]
        return iter([node.key for node in nodes if not node.used] + [node.key for node in nodes if node.used])

    def _tidy(self) -> None:
        """Forget what is held no more, once that is most of it."""
        if len(self._ahead) + len(self._passed) > 2 * len(self._nodes) + 64:
            self._ahead = deque(node for node in self._ahead if node.held)
            self._passed = [node for node in self._passed if node.held]


class SieveSlots:
    """The same for slots 0 ... count-1, each of which holds one thing at a time."""

    def __init__(self, count: int) -> None:
        self._came = np.zeros(count, np.int64)  # the number of its coming
        self._used = np.zeros(count, bool)
        self._hand = 0  # everything that came before this number has been passed in this round
        self._comings = 0

    def came(self, slot: int) -> None:
        """The slot holds something new."""
        self._comings += 1
        self._came[slot], self._used[slot] = self._comings, False

    def use(self, slot: int) -> None:
        """What it holds was read once more."""
        self._used[slot] = True

    def order(self, slots: Int64) -> Int64:
        """Numbers, int64[slots], by which these would go if no others were there, the least first; changes nothing.

        Their places in that order would take a millisecond for 16,000, and only the first few are looked at.
        """
        came = self._came[slots]
        found: Int64 = came + (came < self._hand) * _ROUND + self._used[slots] * (2 * _ROUND)
        return found

    def evicted(self, slot: int) -> None:
        """What it held has gone to make room: the hand has come up to it, and what it passed has lost its mark."""
        came, hand = self._came, self._hand
        upto = came[slot]
        if self._used[slot]:  # a whole round
            self._used[:] = False
        elif upto >= hand:
            self._used[(came >= hand) & (came < upto)] = False
        else:
            self._used[(came >= hand) | (came < upto)] = False
        self._hand = int(upto) + 1
