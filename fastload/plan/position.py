"""Where a run stands in its epoch, as a few integers that outlive the process.

A position says which sample comes next: per source and partition the window and the offset in that window's order,
counted over all ranks, so that it means the same to every rank and needs no shard to be indexed before it can be
loaded. It counts what was *delivered*, whatever else was in flight. With it goes what it belongs to, so that a state
that would continue another order is refused rather than quietly repeating or skipping samples.

A data set that is read alone is one source. Of a mixture's sources it also says how many samples each has, where that
is known, from which follows in which round a lane is (see `rounds`); how many samples of each source are delivered
follows from the position in the whole (see `blend`).

A run may continue with another batch size or world size where a global batch (batch size × world size) of the new run
begins exactly there; any other change is an error. Today's states stay loadable: the version grows with every change of
form, and all that were written before are read. The two forms, of one data set and of a mixture, are distinguished
by `sources`; unknown fields are refused nowhere, so that a field can be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec

from fastload.errors import ConfigError, StateError
from fastload.plan.order import OrderOptions, check_shuffle
from fastload.plan.ranks import Ranks, Tail, check_tail
from fastload.plan.weights import MixtureOptions, check_stop, check_weights

STATE_VERSION = 1
MIXTURE_STATE_VERSION = 1


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
        return cls(fingerprint, options.seed, options.shuffle, options.window_bytes, options.partitions)

    def options(self) -> OrderOptions:
        """What `of` was given. Raises `ConfigError`."""
        return OrderOptions(self.seed, check_shuffle(self.shuffle), self.window_bytes, self.partitions)


class _PositionJson(msgspec.Struct):
    """The JSON form of a position in one data set, version 1."""

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


class _SourceState(msgspec.Struct):
    order: OrderState
    places: list[tuple[int, int]]
    total: int | None = None
    taken: list[int] | None = None


class _MixtureState(msgspec.Struct):
    """The JSON form of a position in a mixture, version 1."""

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
    """Where a source stands: how many samples it has (None: not known, or read alone), for each partition the place in
    its lane's epoch, and how many samples of the partition lie before that; empty where it follows from the position.

    With several partitions an offset may reach beyond its window, into those that follow: the process that saved it did
    not know how many samples the other nodes' windows hold.
    """

    total: int | None
    places: tuple[Place, ...]
    taken: tuple[int, ...] = ()

    @classmethod
    def start(cls, partitions: int, total: int | None = None) -> SourcePosition:
        """Before the first sample."""
        return cls(total, (Place(0, 0),) * partitions)


@dataclass(frozen=True, slots=True)
class Position:
    """A position and what it belongs to.

    `batches` global batches are delivered, so that is also the number of the next; `samples` is how many samples they
    cover, over all ranks and without repeats. `mixture` is None where one data set is read alone. `orders` and
    `fingerprints` are those of the sources.
    """

    epoch: int
    batches: int
    samples: int
    sources: tuple[SourcePosition, ...]
    mixture: MixtureOptions | None
    orders: tuple[OrderOptions, ...]
    fingerprints: tuple[str, ...]
    world_size: int
    batch_size: int
    tail: Tail

    @classmethod
    def start(
        cls,
        epoch: int,
        mixture: MixtureOptions | None,
        sources: Sequence[tuple[OrderOptions, str]],
        ranks: Ranks,
        batch_size: int,
        tail: Tail,
    ) -> Position:
        """The beginning of `epoch`; of each source given are the order and the manifest's fingerprint."""
        return cls(
            epoch,
            0,
            0,
            tuple(SourcePosition.start(order.partitions) for order, _ in sources),
            mixture,
            tuple(order for order, _ in sources),
            tuple(fingerprint for _, fingerprint in sources),
            ranks.world_size,
            batch_size,
            tail,
        )

    def at_epoch(self, epoch: int) -> Position:
        """The beginning of `epoch` in the same run: what to save when an epoch has ended."""
        sources = tuple(SourcePosition.start(len(source.places)) for source in self.sources)
        return replace(self, epoch=epoch, batches=0, samples=0, sources=sources)

    def to_state(self) -> dict[str, Any]:
        """The position in JSON's own types; `from_state` or `from_mixture_state` reads it back."""
        state = self._state() if self.mixture is None else self._mixture_state(self.mixture)
        built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(state))
        for source in [built] if self.mixture is None else built["sources"]:
            if not source["taken"]:  # the form of states from before there were partitions
                del source["taken"]
        return built

    def _state(self) -> _PositionJson:
        (source,), (order,), (fingerprint,) = self.sources, self.orders, self.fingerprints
        return _PositionJson(
            version=STATE_VERSION,
            epoch=self.epoch,
            batches=self.batches,
            samples=self.samples,
            places=list(source.places),
            order=OrderState.of(order, fingerprint),
            world_size=self.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
            taken=list(source.taken),
        )

    def _mixture_state(self, mixture: MixtureOptions) -> _MixtureState:
        parts = zip(self.sources, self.orders, self.fingerprints, strict=True)
        return _MixtureState(
            version=MIXTURE_STATE_VERSION,
            epoch=self.epoch,
            batches=self.batches,
            samples=self.samples,
            seed=mixture.seed,
            stop=mixture.stop,
            weights=[list(schedule) for schedule in mixture.weights],
            sources=[
                _SourceState(OrderState.of(order, fingerprint), list(source.places), source.total, list(source.taken))
                for source, order, fingerprint in parts
            ],
            world_size=self.world_size,
            batch_size=self.batch_size,
            tail=self.tail,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Position:
        """Reads what `to_state` wrote for one data set, also after a way through JSON. Raises `StateError`."""
        check_version(state, STATE_VERSION)
        if "sources" in state:
            raise StateError("the state is that of a mixture; load it into one of the same sources")
        try:
            read = msgspec.convert(dict(state), _PositionJson)
            return _position(read, None, [_SourceState(read.order, read.places, None, read.taken)])
        except (msgspec.ValidationError, ConfigError) as error:
            raise StateError(f"the state is damaged: {error}; load another one") from error

    @classmethod
    def from_mixture_state(cls, state: Mapping[str, Any]) -> Position:
        """Reads what `to_state` wrote for a mixture, also after a way through JSON. Raises `StateError`."""
        check_version(state, MIXTURE_STATE_VERSION)
        if "sources" not in state:
            raise StateError("the state is that of one data set; load it into a loader of that, not of a mixture")
        try:
            read = msgspec.convert(dict(state), _MixtureState)
            weights = check_weights(read.weights)
            partitions = {source.order.partitions for source in read.sources}
            if len(weights) != len(read.sources) or len(partitions) != 1:
                raise msgspec.ValidationError(
                    f"it has {len(weights)} weights for {len(read.sources)} sources, or they do not match"
                )
            return _position(read, MixtureOptions(weights, read.seed, check_stop(read.stop)), read.sources)
        except (msgspec.ValidationError, ConfigError) as error:
            raise StateError(f"the state is damaged: {error}; load another one") from error

    def check(self, now: Position) -> None:
        """Raises `StateError`, naming both values, unless the run that begins with `now` can continue from here."""
        check_same("epoch", self.epoch, now.epoch, "call set_epoch with the epoch of the state")
        check_same("tail", self.tail, now.tail, "pass the tail that the run began with")
        saved, options = self.mixture, now.mixture
        if saved is not None and options is not None:
            check_same("stop", saved.stop, options.stop, "pass the stop that the run began with")
            check_same("seed", saved.seed, options.seed, "pass the seed that the mixture began with", " of the mixture")
            cure = "mix the sources that the run began with, in the same order"
            check_same("sources", len(self.sources), len(now.sources), cure, " in number")
            check_same("weights", saved.weights, options.weights, "pass the weights that the run began with")
        for number, (order, fingerprint) in enumerate(zip(self.orders, self.fingerprints, strict=True)):
            of = "" if options is None else f" of source {number}"
            check_order(order, now.orders[number], of)
            if self.samples:  # an epoch may begin with another list of shards
                check_manifest(fingerprint, now.fingerprints[number], of)

    def check_boundary(self, now: Position) -> None:
        """Raises `StateError` unless a global batch of the run that begins with `now` begins here."""
        global_batch = now.batch_size * now.world_size
        if self.samples % global_batch:
            raise StateError(
                f"the state was saved after {self.samples} samples with batch_size={self.batch_size} × "
                f"world_size={self.world_size}, where no global batch of batch_size={now.batch_size} × "
                f"world_size={now.world_size} begins; resume with {self.batch_size} × {self.world_size}, "
                f"or from a state saved at a multiple of {global_batch} samples"
            )


def _position(
    read: _PositionJson | _MixtureState, mixture: MixtureOptions | None, sources: Sequence[_SourceState]
) -> Position:
    """A position from the fields of a state, each of the right type. Raises `ConfigError` and `ValidationError`."""
    orders = tuple(source.order.options() for source in sources)
    integers = [read.epoch, read.batches, read.samples, read.world_size - 1, read.batch_size - 1]
    for source in sources:
        integers += [source.total or 0, *(source.taken or ()), *(number for place in source.places for number in place)]
    if min(integers) < 0:
        raise msgspec.ValidationError("it holds a negative count")
    for source in sources:
        partitions = source.order.partitions
        if len(source.places) != partitions:
            raise msgspec.ValidationError(f"it has {len(source.places)} places for {partitions} partitions")
        if source.taken and len(source.taken) != partitions:
            raise msgspec.ValidationError(f"it has taken {len(source.taken)} counts for {partitions} partitions")
    return Position(
        read.epoch,
        read.batches,
        read.samples,
        tuple(
            SourcePosition(source.total, tuple(Place(*place) for place in source.places), tuple(source.taken or ()))
            for source in sources
        ),
        mixture,
        orders,
        tuple(source.order.manifest for source in sources),
        read.world_size,
        read.batch_size,
        check_tail(read.tail),
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
