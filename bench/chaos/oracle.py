"""What every rank of every job must get, and whether it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bench.chaos.jobs import GLOBAL_BATCH, WINDOW_BYTES, Got
from fastload.plan import Manifest, OrderOptions, Ranks, epoch_cursor, epoch_orders
from fastload.store.types import ObjectInfo


class WrongError(AssertionError):
    """A rank got something else than it had to."""


class DamagedError(WrongError):
    """The samples are those that were due, but for their bytes."""


@dataclass(frozen=True)
class Place:
    """Where a rank is: `step` batches of `epoch` have been delivered."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Data:
    """What lies in the store: its shards in their order, the keys of each one's samples, every sample's digest."""

    objects: tuple[ObjectInfo, ...]
    keys: tuple[tuple[str, ...], ...]
    digests: Mapping[str, bytes]

    def __hash__(self) -> int:
        return id(self)

    @property
    def sample_count(self) -> int:
        """Of an epoch, without repeats."""
        return len(self.digests)


class Oracle:
    """For one job: the plan at every world size, worked out with all counts known and nothing in the way."""

    def __init__(self, data: Data, seed: int) -> None:
        self._data, self._seed = data, seed
        self.batches = lru_cache(maxsize=64)(self._batches)

    def steps(self, epoch: int, world_size: int) -> int:
        """How many batches each rank has."""
        return len(self.batches(epoch, world_size)[0])

    def next(self, place: Place, world_size: int) -> Place:
        """Where a rank is after one batch more."""
        step = place.step + 1
        return Place(place.epoch, step) if step < self.steps(place.epoch, world_size) else Place(place.epoch + 1)

    def check(self, place: Place, rank: int, world_size: int, got: Got) -> None:
        """WrongError unless `got` is the batch that comes at `place`, DamagedError where only its bytes are not."""
        due = self.batches(place.epoch, world_size)[rank][place.step]
        where = f"epoch {place.epoch}, step {place.step}, rank {rank} of {world_size}"
        if got.epoch not in (place.epoch, None):
            raise WrongError(f"{where}: it says that this is epoch {got.epoch}")
        if tuple(got.keys) != due:
            raise WrongError(f"{where}: got {got.keys}, due is {list(due)}")
        damaged = [key for key, digest in zip(got.keys, got.digests, strict=True) if digest != self._data.digests[key]]
        if damaged:
            raise DamagedError(f"{where}: the bytes of {damaged} are not theirs")

    def _batches(self, epoch: int, world_size: int) -> list[list[tuple[str, ...]]]:
        manifest = Manifest(self._data.objects)
        orders = epoch_orders(manifest, OrderOptions(self._seed, "window", WINDOW_BYTES, 1), epoch)
        counts = np.array(list(map(len, self._data.keys)), np.int64)
        found = []
        for rank in range(world_size):
            cursor = epoch_cursor(orders, Ranks(rank, world_size, rank, world_size), GLOBAL_BATCH // world_size)
            entries = cursor.add_counts(0, np.arange(len(counts), dtype=np.int32), counts)
            while (key := cursor.next_window) is not None:
                entries += cursor.add(key, counts[cursor.objects_of(key)])
            entries += cursor.finish()
            pairs = (zip(entry.object_no.tolist(), entry.sample_no.tolist(), strict=True) for entry in entries)
            found.append([tuple(self._data.keys[shard][sample] for shard, sample in batch) for batch in pairs])
        self._check_plan(found)
        return found

    def _check_plan(self, ranks: list[list[tuple[str, ...]]]) -> None:
        """Every sample once, but for what makes ranks equal."""
        given = Counter(key for batches in ranks for batch in batches for key in batch)
        assert len({len(batches) for batches in ranks}) == 1
        assert set(given) == set(self._data.digests)
        assert given.total() - len(given) < len(ranks)
