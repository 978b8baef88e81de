"""The policies, each against a model that is too simple to be wrong, in a cache that holds so many keys and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.cache.policy.pin import ROTATION, Arc, place, places
from fastload.cache.policy.unknown_order import Keyed, Lru, Sieve, SieveSlots
from fastload.plan import Manifest, OrderOptions, epoch_order
from fastload.store.types import ObjectInfo

TRACES = st.lists(st.integers(0, 9), max_size=120)
CAPACITIES = st.integers(1, 6)


class Cache(Protocol):
    """Holds at most so many keys."""

    def access(self, key: int) -> int | None:
        """Read a key, which is held afterwards; -1 where it was held before, else what went for it (None: nothing)."""
        ...

    def discard(self, key: int) -> None:
        """It is lost."""
        ...


class KeyedCache:
    """By one of the classes for keys."""

    def __init__(self, policy: Keyed[int], capacity: int) -> None:
        self.policy, self.capacity = policy, capacity

    def access(self, key: int) -> int | None:
        if key in self.policy:
            self.policy.use(key)
            return -1
        gone = None
        if len(self.policy) == self.capacity:
            expected = next(self.policy.in_order())
            gone = self.policy.evict()
            assert gone == expected
        self.policy.add(key)
        assert len(self.policy) <= self.capacity
        return gone

    def discard(self, key: int) -> None:
        self.policy.discard(key)
        assert key not in self.policy


class SlotCache:
    """By the class for slots."""

    def __init__(self, capacity: int) -> None:
        self.policy, self.slots = SieveSlots(capacity), dict[int, int]()
        self.free = list(range(capacity))

    def access(self, key: int) -> int | None:
        if key in self.slots:
            self.policy.use(self.slots[key])
            return -1
        gone = None
        if not self.free:
            keys, slots = list(self.slots), np.array(list(self.slots.values()), np.int64)
            gone = keys[int(self.policy.order(slots).argmin())]
            self.policy.evicted(self.slots[gone])
            self.free.append(self.slots.pop(gone))
        self.slots[key] = self.free.pop()
        self.policy.came(self.slots[key])
        return gone

    def discard(self, key: int) -> None:
        if key in self.slots:
            self.free.append(self.slots.pop(key))


class SieveModel:
    """A list, a set of marks and a hand, as the paper draws it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.queue, self.marked, self.hand = capacity, list[int](), set[int](), 0

    def access(self, key: int) -> int | None:
        if key in self.queue:
            self.marked.add(key)
            return -1
        gone = self._evict() if len(self.queue) == self.capacity else None
        self.queue.append(key)
        return gone

    def _evict(self) -> int:
        while True:
            self.hand %= len(self.queue)
            if self.queue[self.hand] not in self.marked:
                return self.queue.pop(self.hand)
            self.marked.discard(self.queue[self.hand])
            self.hand += 1

    def discard(self, key: int) -> None:
        if key in self.queue:
            at = self.queue.index(key)
            self.hand -= at < self.hand
            self.queue.pop(at)
            self.marked.discard(key)


class LruModel:
    """A list in the order of use."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.queue = capacity, list[int]()

    def access(self, key: int) -> int | None:
        found, gone = key in self.queue, None
        if found:
            self.queue.remove(key)
        elif len(self.queue) == self.capacity:
            gone = self.queue.pop(0)
        self.queue.append(key)
        return -1 if found else gone

    def discard(self, key: int) -> None:
        if key in self.queue:
            self.queue.remove(key)


PAIRS: dict[str, tuple[Callable[[int], Cache], Callable[[int], Cache]]] = {
    "sieve": (lambda capacity: KeyedCache(Sieve(), capacity), SieveModel),
    "sieve of slots": (SlotCache, SieveModel),
    "lru": (lambda capacity: KeyedCache(Lru(), capacity), LruModel),
}


@pytest.mark.parametrize("name", PAIRS)
@given(trace=TRACES, lost=st.sets(st.integers(0, 119), max_size=10), capacity=CAPACITIES)
def test_the_same_keys_go_as_in_the_model(name: str, trace: list[int], lost: set[int], capacity: int) -> None:
    cache, model = (make(capacity) for make in PAIRS[name])
    for number, key in enumerate(trace):
        if number in lost:
            cache.discard(key)
            model.discard(key)
        else:
            assert cache.access(key) == model.access(key), f"access {number} of {trace}"


@pytest.mark.parametrize("policy", [Sieve, Lru])
def test_what_is_not_held_is_nobodys_business(policy: type[Keyed[int]]) -> None:
    held = policy()
    held.use(1)
    held.discard(1)
    assert len(held) == 0
    with pytest.raises(KeyError):
        held.evict()
    held.add(1)
    held.add(1)
    assert list(held.in_order()) == [1]


def test_a_sieve_forgets_what_it_does_not_hold() -> None:
    sieve: Sieve[int] = Sieve()
    for key in range(10_000):
        sieve.add(key)
        sieve.discard(key)
    assert len(sieve._ahead) + len(sieve._passed) < 100


# Pin


def ids(count: int) -> list[bytes]:
    return [hashlib.blake2b(bytes([number % 256, number // 256]), digest_size=16).digest() for number in range(count)]


@given(
    epoch=st.integers(0, 1000),
    share=st.floats(0, 1),
    before=st.floats(0, 1),
    number=st.integers(0, 255),
    index=st.integers(0, 10**6),
)
def test_an_arc_is_what_it_says(epoch: int, share: float, before: float, number: int, index: int) -> None:
    object_id = ids(256)[number]
    at = place(object_id, index)
    assert 0 <= at < 1
    disk, ram = Arc.of_epoch(epoch, before), Arc.of_epoch(epoch, share, before)
    assert not (disk.holds(at) and ram.holds(at))  # the tiers hold different chunks
    together = Arc.of_epoch(epoch, min(1.0, share + before))
    offset = (at - epoch * ROTATION) % 1
    if abs(offset - min(1.0, share + before)) > 1e-9 and abs(offset - before) > 1e-9:
        assert together.holds(at) == (disk.holds(at) or ram.holds(at))
        assert together.holds(at) == (offset < share + before)


def test_places_are_those_of_single_chunks() -> None:
    (object_id,) = ids(1)
    assert places(object_id, 50).tolist() == [place(object_id, index) for index in range(50)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_each_stretch_of_an_object_has_its_share(share: float) -> None:
    """Whole shards would be all or nothing. Here no stretch of n chunks is off by more than two."""
    for object_id in ids(20):
        for epoch in (0, 1, 50):
            arc = Arc.of_epoch(epoch, share)
            held = np.cumsum([arc.holds(at) for at in places(object_id, 300).tolist()])
            for length in (8, 32, 128):
                off = np.abs(held[length:] - held[:-length] - share * length)
                assert off.max() <= 2


def test_an_arc_moves_by_the_rotation_and_comes_around() -> None:
    every = np.concatenate([places(object_id, 40) for object_id in ids(250)]).tolist()
    held = [{number for number, at in enumerate(every) if Arc.of_epoch(epoch, 0.25).holds(at)} for epoch in range(129)]
    for before, after in pairwise(held):
        assert len(after) == pytest.approx(0.25 * len(every), rel=0.02)
        assert len(after - before) == pytest.approx(ROTATION * len(every), rel=0.3)
    assert held[128] == held[0]
    assert set.union(*held) == set(range(len(every)))


def misses(manifest: Manifest, chunk_counts: list[int], epoch: int, is_held: Callable[[int, int], bool]) -> np.ndarray:
    order = epoch_order(manifest, OrderOptions(seed=3), epoch).object_order.tolist()
    return np.array([not is_held(number, index) for number in order for index in range(chunk_counts[number])])


def longest_run(missed: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missed.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


@pytest.mark.parametrize(("share", "run_max"), [(0.1, 60), (0.25, 16), (0.5, 6), (0.75, 4)])
def test_misses_are_even_over_an_epoch_in_any_order(share: float, run_max: int) -> None:
    """Each tenth of an epoch has its part of the misses, and no run of them is long, whatever the order."""
    counts = [8] * 256
    manifest = Manifest(ObjectInfo(f"s3://bucket/{number}", count << 23, "etag") for number, count in enumerate(counts))
    object_ids = ids(256)
    for epoch in range(1, 6):
        arc = Arc.of_epoch(epoch, share)
        missed = misses(manifest, counts, epoch, lambda number, index: arc.holds(place(object_ids[number], index)))  # noqa: B023
        tenths = [part.mean() for part in np.array_split(missed, 10)]
        assert max(tenths) - min(tenths) < 0.06
        assert longest_run(missed) <= run_max
