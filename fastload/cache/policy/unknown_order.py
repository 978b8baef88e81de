"""Policies for an unknown order, LRU and SIEVE, and `least`, the choice of the few least of many.

All hold keys that are used, and given up one by one. LRU: what was read longest ago goes first.

SIEVE (Zhang et al., NSDI 2024): what is held stays in the order in which it came, and a hand goes along it.

The hand moves from the oldest to the newest and around. What was used since the hand last passed it stays, and loses
that mark; the first without a mark goes. New ones come in at the newest end, so one that is never used again is met by
the hand soon after it came, while what was used has a whole round to be used again. A use costs one bit, and needs no
order to be changed.

`Sieve` is for keys, each step in constant time; `SieveSlots` for a few thousand numbered places, of which only some may
go at a time, and whose order is wanted as an array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Lru", "Sieve", "SieveSlots", "least"]

Key = TypeVar("Key", bound=Hashable)


class Keyed(Protocol[Key]):
    """Used by one thread at a time. All but `in_order` take the same time however much is held."""

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def add(self, key: Key) -> None:
        """It is held from now on. One that is held already stays as it is."""
        ...

    def use(self, key: Key) -> None:
        """It was read once more after it came; a key that is not held is ignored."""
        ...

    def discard(self, key: Key) -> None:
        """It is no longer held, for reasons outside the policy."""
        ...

    def evict(self) -> Key:
        """Give up the one that should go first. Raises `KeyError` where nothing is held."""
        ...

    def in_order(self) -> Iterator[Key]:
        """All, as `evict` would give them up one after the other; changes nothing."""
        ...


Int64 = npt.NDArray[np.int64]
_SAMPLED = 16  # every so many-th


def least(values: Int64, count: int) -> Int64:
    """The places of the `count` least of `values`, in no order; all where there are no more.

    A sample tells roughly how small they are, so that only a few have to be put in order: half the time of numpy's
    `argpartition` over 25,000 values.
    """
    if count >= len(values):
        return np.arange(len(values))
    few = np.arange(len(values))
    if count * _SAMPLED < len(values):
        sample = values[::_SAMPLED]
        rank = min(len(sample) - 1, 2 * count // _SAMPLED + 8)
        (found,) = np.nonzero(values <= np.partition(sample, rank)[rank])
        few = found if len(found) >= count else few
    return few[np.argpartition(values[few], count)[:count]] if len(few) > count else few


class Lru(Generic[Key]):
    """See `Keyed`."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}  # the one used last is the last

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: Key) -> None:
        self._keys.setdefault(key)

    def use(self, key: Key) -> None:
        if key in self._keys:
            del self._keys[key]
            self._keys[key] = None

    def discard(self, key: Key) -> None:
        self._keys.pop(key, None)

    def evict(self) -> Key:
        key = next(iter(self._keys), None)
        if key is None:
            raise KeyError("nothing is held")
        del self._keys[key]
        return key

    def in_order(self) -> Iterator[Key]:
        return iter(list(self._keys))


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
        # Nodes that are no longer held stay there until the hand comes by.
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
        """Forget what is no longer held, once that is most of it."""
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
