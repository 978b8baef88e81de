"""Where a run stands in a mixture's epoch, as a few integers for each source and partition.

How many samples of each source lie before a position of the line follows from the position (see `blend`). What a source
adds is where in its windows these end, as `Position` has it for a data set alone, and how many samples it has where
that is known, from which follows in which round a lane is. Otherwise all is as there: counted is what was *delivered*,
a run may go on at any size where a global batch of it begins, and a state of another run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from fastload.errors import ConfigError, StateError
from fastload.plan.mixture.blend import Weights, check_weights
from fastload.plan.mixture.options import MixtureOptions, check_stop
from fastload.plan.order import OrderOptions
from fastload.plan.position import OrderState, Place, check_manifest, check_order, check_same, check_version
from fastload.plan.tail import Tail, check_tail

MIXTURE_STATE_VERSION = 1


class _SourceState(msgspec.Struct):
    order: OrderState
    places: list[tuple[int, int]]
    total: int | None = None
    taken: list[int] | None = None


class _State(msgspec.Struct):
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
        state = _State(
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
            return _from_wire(msgspec.convert(dict(state), _State))
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


def _from_wire(read: _State) -> MixturePosition:
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
