"""Where a run stands in its epoch, as a few integers that outlive the process.

A position says which sample comes next: per partition the window and the offset in that window's order,
counted over all ranks, so that it means the same to every rank and needs no shard to be indexed before it can
be loaded. It counts what was *delivered*, whatever else was in flight. With it goes what it belongs to, so
that a state which would continue another order is refused rather than quietly repeating or skipping samples.

A run may go on with another batch size or world size where a global batch (batch size × world size) of the
new run begins exactly there; any other change is an error. Today's states stay loadable: `STATE_VERSION`
grows with every change of form, and `from_state` reads all that were written before.

Where a run stands in a mixture's epoch, as a few integers for each source and partition.

How many samples of each source lie before a position of the line follows from the position (see `blend`). What a source
adds is where in its windows these end, as `Position` has it for a data set alone, and how many samples it has where
that is known, from which follows in which round a lane is. Otherwise all is as there: counted is what was *delivered*,
a run may go on at any size where a global batch of it begins, and a state of another run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec

from fastload.errors import ConfigError, StateError
from fastload.plan.order import EpochOrder, OrderOptions, check_shuffle
from fastload.plan.ranks import Ranks, Tail, check_tail
from fastload.plan.weights import MixtureOptions, Weights, check_stop, check_weights

STATE_VERSION = 1


class Place(NamedTuple):
    """The next sample of a partition: `offset` in the order of `window`, over all ranks.

    Always offset < samples of the window, if it has any; the end of the epoch is offset 0 of the window after
    the last.
    """

    window: int
    offset: int


class OrderState(msgspec.Struct):
    """The JSON form of an order, and of the manifest that it is one of."""

    manifest: str
    seed: int
    shuffle: str
    window_bytes: int
    partitions: int

    @classmethod
    def of(cls, options: OrderOptions, fingerprint: str) -> OrderState:
        """That of `options`."""
        return cls(fingerprint, options.seed, options.shuffle, options.window_bytes, options.partitions)

    def options(self) -> OrderOptions:
        """What `of` was given. Raises `ConfigError`."""
        return OrderOptions(self.seed, check_shuffle(self.shuffle), self.window_bytes, self.partitions)


class _State(msgspec.Struct):
    """The JSON form of a position, version 1. Unknown fields are refused nowhere, so that a field can be
    added.
    """

    version: int
    epoch: int
    batches: int
    samples: int
    places: list[tuple[int, int]]
    order: OrderState
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
        state = _State(
            version=STATE_VERSION,
            epoch=self.epoch,
            batches=self.batches,
            samples=self.samples,
            places=[(place.window, place.offset) for place in self.places],
            order=OrderState.of(self.options, self.fingerprint),
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
        check_version(state, STATE_VERSION)
        if "sources" in state:
            raise StateError("the state is that of a mixture; load it into one of the same sources")
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
        check_same("epoch", self.epoch, order.epoch, "call set_epoch with the epoch of the state")
        check_same("tail", self.tail, tail, "pass the tail that the run began with")
        check_order(self.options, order.options)
        if self.samples:  # an epoch may begin with another list of shards
            check_manifest(self.fingerprint, order.manifest.fingerprint)
        for each in orders:
            check_place(self.places[each.partition], each.window_count)
        if not self.is_at_end(orders):
            check_boundary(self.samples, (self.batch_size, self.world_size), (batch_size, ranks.world_size))

    def is_at_end(self, orders: Sequence[EpochOrder]) -> bool:
        """Whether all is delivered."""
        return all(place.window >= order.window_count for place, order in zip(self.places, orders, strict=True)) and (
            not self.taken or sum(self.taken) == self.samples
        )


def _from_wire(read: _State) -> Position:
    """A position from the fields of a state, each of the right type. Raises `ConfigError` and
    `ValidationError`.
    """
    options = read.order.options()
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


def check_version(state: object, readable: int) -> None:
    """Raises `StateError` unless `state` is a mapping of the version that can be read."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != readable or isinstance(version, bool):
        raise StateError(
            f"the state's version is {version!r}, and this fastload reads version {readable}; "
            "load it with the fastload that saved it, or one that is newer"
        )


def check_same(name: str, saved: object, now: object, cure: str, of: str = "") -> None:
    """Raises `StateError`, naming both values, where they differ. `of` says whose they are."""
    if saved != now:
        raise StateError(f"the state was saved with {name} {saved!r}{of}, but this run has {now!r}; {cure}")


def check_order(saved: OrderOptions, now: OrderOptions, of: str = "") -> None:
    """Raises `StateError`, naming both values, where the order is another than was saved."""
    check_same("seed", saved.seed, now.seed, "pass the seed that the run began with", of)
    check_same("shuffle", saved.shuffle, now.shuffle, "pass the shuffle that the run began with", of)
    if now.shuffle == "window":  # otherwise the size of windows changes nothing
        cure = "pass the one that the run began with"
        check_same("shuffle_window", saved.window_bytes, now.window_bytes, cure, of)
    check_same("partitions", saved.partitions, now.partitions, "pass the number that the run began with", of)


def check_manifest(saved: str, now: str, of: str = "") -> None:
    """Raises `StateError`, naming both fingerprints, where the data is another than was saved."""
    cure = "the list of shards, or a shard's size or version, has changed; restore it or begin an epoch anew"
    check_same("manifest fingerprint", saved, now, cure, of)


def check_place(place: Place, window_count: int) -> None:
    """Raises `StateError` for a place that an epoch of so many windows does not have."""
    if place.window > window_count or (place.window == window_count and place.offset):
        raise StateError(
            f"the state is at window {place.window}, offset {place.offset}, and this epoch has "
            f"{window_count} windows: it is damaged; load another one"
        )


def check_boundary(samples: int, saved: tuple[int, int], now: tuple[int, int]) -> None:
    """Raises `StateError` unless a global batch begins after so many samples. Batches are given as their size on a
    rank and the number of ranks.
    """
    global_batch = now[0] * now[1]
    if samples % global_batch:
        raise StateError(
            f"the state was saved after {samples} samples with batch_size={saved[0]} × world_size={saved[1]}, where no "
            f"global batch of batch_size={now[0]} × world_size={now[1]} begins; resume with {saved[0]} × {saved[1]}, "
            f"or from a state saved at a multiple of {global_batch} samples"
        )


MIXTURE_STATE_VERSION = 1


class _SourceState(msgspec.Struct):
    order: OrderState
    places: list[tuple[int, int]]
    total: int | None = None
    taken: list[int] | None = None


class _MixtureState(msgspec.Struct):
    """The JSON form, version 1. Unknown fields are refused nowhere, so that a field can be added."""

    version: int
    epoch: int
    batches: int
    samples: int
    seed: int
    stop: str
    weights: list[list[tuple[int, float]]]
    sources: list[_SourceState]
    world_size: int
    batch_size: int
    tail: str


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """Where a source stands: how many samples it has (None: not known), for each partition the place in the round of
    its lane, and how many samples of the partition lie before that; empty where these are all that the lane took.
    """

    total: int | None
    places: tuple[Place, ...]
    taken: tuple[int, ...] = ()

    @classmethod
    def start(cls, partitions: int, total: int | None = None) -> SourcePosition:
        """Before the first sample."""
        return cls(total, (Place(0, 0),) * partitions)


@dataclass(frozen=True, slots=True)
class MixturePosition:
    """A position and what it belongs to; `orders` and `fingerprints` are those of the sources."""

    epoch: int
    batches: int
    samples: int
    sources: tuple[SourcePosition, ...]
    options: MixtureOptions
    orders: tuple[OrderOptions, ...]
    fingerprints: tuple[str, ...]
    world_size: int
    batch_size: int
    tail: Tail

    def at_epoch(self, epoch: int) -> MixturePosition:
        """The beginning of `epoch` in the same run: what to save when an epoch has ended."""
        sources = tuple(SourcePosition.start(len(source.places)) for source in self.sources)
        return replace(self, epoch=epoch, batches=0, samples=0, sources=sources)

    def to_state(self) -> dict[str, Any]:
        """The position in JSON's own types; `from_state` reads it back."""
        parts = zip(self.sources, self.orders, self.fingerprints, strict=True)
        state = _MixtureState(
            version=MIXTURE_STATE_VERSION,
            epoch=self.epoch,
            batches=self.batches,
            samples=self.samples,
            seed=self.options.seed,
            stop=self.options.stop,
            weights=[list(schedule) for schedule in self.options.weights],
            sources=[
                _SourceState(OrderState.of(order, fingerprint), list(source.places), source.total, list(source.taken))
                for source, order, fingerprint in parts
            ],
            world_size=self.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
        )
        built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(state))
        for source in built["sources"]:
            if not source["taken"]:
                del source["taken"]
        return built

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MixturePosition:
        """Reads what `to_state` wrote, also after a way through JSON. Raises `StateError`."""
        check_version(state, MIXTURE_STATE_VERSION)
        if "sources" not in state:
            raise StateError("the state is that of one data set; load it into a loader of that, not of a mixture")
        try:
            return _mixture_from_wire(msgspec.convert(dict(state), _MixtureState))
        except (msgspec.ValidationError, ConfigError) as error:
            raise StateError(f"the state is damaged: {error}; load another one") from error

    def check(self, now: MixturePosition) -> None:
        """Raises `StateError`, naming both values, unless the run that begins with `now` can go on from here."""
        check_same("epoch", self.epoch, now.epoch, "call set_epoch with the epoch of the state")
        check_same("tail", self.tail, now.tail, "pass the tail that the run began with")
        saved, options = self.options, now.options
        check_same("stop", saved.stop, options.stop, "pass the stop that the run began with")
        check_same("seed", saved.seed, options.seed, "pass the seed that the mixture began with", " of the mixture")
        cure = "mix the sources that the run began with, in the same order"
        check_same("sources", len(self.sources), len(now.sources), cure, " in number")
        check_same("weights", saved.weights, options.weights, "pass the weights that the run began with")
        for number, (order, saved_manifest) in enumerate(zip(self.orders, self.fingerprints, strict=True)):
            check_order(order, now.orders[number], f" of source {number}")
            if self.samples:  # an epoch may begin with other lists of shards
                check_manifest(saved_manifest, now.fingerprints[number], f" of source {number}")


def _mixture_from_wire(read: _MixtureState) -> MixturePosition:
    """A position from the fields of a state, each of the right type. Raises `ConfigError` and `ValidationError`."""
    orders = tuple(source.order.options() for source in read.sources)
    integers = [read.epoch, read.batches, read.samples, read.world_size - 1, read.batch_size - 1]
    for source in read.sources:
        integers += [0 if source.total is None else source.total, *(source.taken or ())]
        integers += [number for place in source.places for number in place]
        for name, count in (("places", len(source.places)), ("taken", len(source.taken or source.places))):
            if count != source.order.partitions:
                raise msgspec.ValidationError(f"it has {count} {name} for {source.order.partitions} partitions")
    if min(integers) < 0:
        raise msgspec.ValidationError("it holds a negative count")
    weights: Weights = check_weights(read.weights)
    if len(weights) != len(orders) or len({order.partitions for order in orders}) != 1:
        raise msgspec.ValidationError(f"it has {len(weights)} weights for {len(orders)} sources, or they do not match")
    return MixturePosition(
        read.epoch,
        read.batches,
        read.samples,
        tuple(
            SourcePosition(source.total, tuple(Place(*place) for place in source.places), tuple(source.taken or ()))
            for source in read.sources
        ),
        MixtureOptions(weights, read.seed, check_stop(read.stop)),
        orders,
        tuple(source.order.manifest for source in read.sources),
        read.world_size,
        read.batch_size,
        check_tail(read.tail),
    )
