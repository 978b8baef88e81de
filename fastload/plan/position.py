"""Where a run stands in its epoch, as a few integers that outlive the process.

A position says which sample comes next: per partition the window and the offset in that window's order,
counted over all ranks, so that it means the same to every rank and needs no shard to be indexed before it can
be loaded. It counts what was *delivered*, whatever else was in flight. With it goes what it belongs to, so
that a state which would continue another order is refused rather than quietly repeating or skipping samples.

A run may go on with another batch size or world size where a global batch (batch size × world size) of the
new run begins exactly there; any other change is an error. Today's states stay loadable: `STATE_VERSION`
grows with every change of form, and `from_state` reads all that were written before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec

from fastload.errors import ConfigError, StateError
from fastload.plan.order import EpochOrder, OrderOptions, check_shuffle
from fastload.plan.ranks import Ranks
from fastload.plan.tail import Tail, check_tail

STATE_VERSION = 1


class Place(NamedTuple):
    """The next sample of a partition: `offset` in the order of `window`, over all ranks.

    Always offset < samples of the window, if it has any; the end of the epoch is offset 0 of the window after
    the last.
    """

    window: int
    offset: int


class _OrderState(msgspec.Struct):
    manifest: str
    seed: int
    shuffle: str
    window_bytes: int
    partitions: int


class _State(msgspec.Struct):
    """The JSON form of a position, version 1. Unknown fields are refused nowhere, so that a field can be
    added.
    """

    version: int
    epoch: int
    batches: int
    samples: int
    places: list[tuple[int, int]]
    order: _OrderState
    world_size: int
    batch_size: int
    tail: str
    taken: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """A position and what it belongs to.

    `batches` global batches are delivered, so that is also the number of the next; `samples` is how many
    samples of the order they cover, over all ranks and without repeats. `places` has one entry a partition, and
    `taken` says how many samples of the partition lie before it; it may be empty, and then follows from `samples`.
    With several partitions an offset may reach beyond its window, into those that follow: whoever saved it did not
    know how many samples the other nodes' windows hold.
    """

    epoch: int
    batches: int
    samples: int
    places: tuple[Place, ...]
    options: OrderOptions
    fingerprint: str
    world_size: int
    batch_size: int
    tail: Tail
    taken: tuple[int, ...] = ()

    @classmethod
    def start(cls, order: EpochOrder, ranks: Ranks, batch_size: int, tail: Tail) -> Position:
        """The beginning of `order.epoch`."""
        places = (Place(0, 0),) * order.options.partitions
        fingerprint = order.manifest.fingerprint
        return cls(order.epoch, 0, 0, places, order.options, fingerprint, ranks.world_size, batch_size, tail)

    def at_epoch(self, epoch: int) -> Position:
        """The beginning of `epoch` in the same run: what to save when an epoch has ended."""
        places = (Place(0, 0),) * len(self.places)
        return replace(self, epoch=epoch, batches=0, samples=0, places=places, taken=())

    def to_state(self) -> dict[str, Any]:
        """The position in JSON's own types; `from_state` reads it back."""
        options = self.options
        order = _OrderState(self.fingerprint, options.seed, options.shuffle, options.window_bytes, options.partitions)
        state = _State(
            version=STATE_VERSION,
            epoch=self.epoch,
            batches=self.batches,
            samples=self.samples,
            places=[(place.window, place.offset) for place in self.places],
            order=order,
            world_size=self.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
            taken=list(self.taken) or None,
        )
        built: dict[str, Any] = msgspec.to_builtins(state)
        built["places"] = [list(place) for place in built["places"]]
        if not self.taken:  # the form of states from before there were partitions
            del built["taken"]
        return built

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Position:
        """Reads what `to_state` wrote, also after a way through JSON. Raises `StateError`."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION or isinstance(version, bool):
            raise StateError(
                f"the state's version is {version!r}, and this fastload reads version {STATE_VERSION}; "
                "load it with the fastload that saved it, or one that is newer"
            )
        try:
            read = msgspec.convert(dict(state), _State)
            return _from_wire(read)
        except (msgspec.ValidationError, ConfigError) as error:
            raise StateError(f"the state is damaged: {error}; load another one") from error

    def check(self, orders: Sequence[EpochOrder], ranks: Ranks, batch_size: int, tail: Tail) -> None:
        """Raises `StateError`, naming both values, unless a run as described by the arguments can go on from
        here. `orders` are those of all partitions.
        """
        order = orders[0]
        saved, now = self.options, order.options
        _same("epoch", self.epoch, order.epoch, "call set_epoch with the epoch of the state")
        _same("seed", saved.seed, now.seed, "pass the seed that the run began with")
        _same("shuffle", saved.shuffle, now.shuffle, "pass the shuffle that the run began with")
        if now.shuffle == "window":  # otherwise the size of windows changes nothing
            _same("shuffle_window", saved.window_bytes, now.window_bytes, "pass the one that the run began with")
        _same("partitions", saved.partitions, now.partitions, "pass the number that the run began with")
        _same("tail", self.tail, tail, "pass the tail that the run began with")
        cure = "the list of shards, or a shard's size or version, has changed; restore it or begin an epoch anew"
        _same("manifest fingerprint", self.fingerprint, order.manifest.fingerprint, cure)
        for each in orders:
            self._check_place(each)
        self._check_boundary(ranks, batch_size, self.is_at_end(orders))

    def is_at_end(self, orders: Sequence[EpochOrder]) -> bool:
        """Whether all is delivered."""
        return all(place.window >= order.window_count for place, order in zip(self.places, orders, strict=True)) and (
            not self.taken or sum(self.taken) == self.samples
        )

    def _check_place(self, order: EpochOrder) -> None:
        place = self.places[order.partition]
        if place.window > order.window_count or (place.window == order.window_count and place.offset):
            raise StateError(
                f"the state is at window {place.window}, offset {place.offset}, and this epoch has "
                f"{order.window_count} windows: it is damaged; load another one"
            )

    def _check_boundary(self, ranks: Ranks, batch_size: int, is_at_end: bool) -> None:
        global_batch = batch_size * ranks.world_size
        if self.samples % global_batch and not is_at_end:
            raise StateError(
                f"the state was saved after {self.samples} samples with batch_size={self.batch_size} × "
                f"world_size={self.world_size}, where no global batch of batch_size={batch_size} × "
                f"world_size={ranks.world_size} begins; resume with {self.batch_size} × {self.world_size}, "
                f"or from a state saved at a multiple of {global_batch} samples"
            )


def _from_wire(read: _State) -> Position:
    """A position from the fields of a state, each of the right type. Raises `ConfigError` and
    `ValidationError`.
    """
    options = OrderOptions(
        read.order.seed, check_shuffle(read.order.shuffle), read.order.window_bytes, read.order.partitions
    )
    places = tuple(Place(*place) for place in read.places)
    taken = tuple(read.taken or ())
    integers = [read.epoch, read.batches, read.samples, read.world_size - 1, read.batch_size - 1, *taken]
    if min(integers) < 0 or any(min(place) < 0 for place in places):
        raise msgspec.ValidationError("it holds a negative count")
    if len(places) != options.partitions:
        raise msgspec.ValidationError(f"it has {len(places)} places for {options.partitions} partitions")
    if taken and len(taken) != options.partitions:
        raise msgspec.ValidationError(f"it has taken {len(taken)} counts for {options.partitions} partitions")
    return Position(
        read.epoch,
        read.batches,
        read.samples,
        places,
        options,
        read.order.manifest,
        read.world_size,
        read.batch_size,
        check_tail(read.tail),
        taken,
    )


def _same(name: str, saved: object, now: object, cure: str) -> None:
    if saved != now:
        raise StateError(f"the state was saved with {name} {saved!r}, but this run has {now!r}; {cure}")
