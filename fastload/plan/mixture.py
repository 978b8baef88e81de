"""Several data sets read as one sequence, as far as it is known; one data set is mixed in the same way.

It has the lanes of any sequence. Which source stands at a number of a lane, and which sample of the source that is,
follows from `Blend`, and where that lies in the source's epochs from `Rounds`. A position is settled once that is known
of all positions before it, whichever rank reads them, and that the sequence does not end before: what a node saves then
means the same to every other. Sample counts need not be known for a run to begin: while a source's are not, it
continues as far as all that it needs is certain to lie in the source's first epoch.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.kernels.mixing import NEVER
from fastload.plan.assignment import Assignment, LaneSpan
from fastload.plan.blend import Blend, extent_of
from fastload.plan.cursor import Batching, Cursor, Split
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.order import SourcePlan, WindowKey
from fastload.plan.position import Position, SourcePosition
from fastload.plan.ranks import Ranks, Tail
from fastload.plan.rounds import Rounds, SourceEpochs
from fastload.plan.samples import MixedSamples, MixtureEntry
from fastload.plan.weights import MixtureOptions, Stop


class MixtureSequence:
    """A `SampleSequence`, which says what its methods do. `sources` begin with the epoch `first_epoch` of each; `lanes`
    are those that this node may need.
    """

    def __init__(
        self, blend: Blend, sources: Sequence[Rounds], lanes: Sequence[int], stop: Stop, first_epoch: int
    ) -> None:
        self._blend, self._sources, self._stop, self._first_epoch = blend, sources, stop, first_epoch
        self._partitions = len(blend.lanes)
        self.known = 0
        self.total: int | None = None
        self._limits: tuple[int, ...] = ()  # of each source: the first position that is not settled
        self.is_measured = False  # whether nothing more can become known of that
        self._row = {lane: row for row, lane in enumerate(lanes)}
        self._reached = np.zeros((len(lanes), len(sources)), np.int64)  # up to which sample windows are open
        self._reaches: dict[int, int] = {}
        self._measure()

    @property
    def open_windows(self) -> Collection[WindowKey]:
        return {key for source in self._sources for key in source.open_windows()}

    def objects_of(self, key: WindowKey) -> NDArray[np.int32]:
        return self._sources[key.source].objects_of(key)

    def add_counts(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        self._sources[source].add_counts(object_nos, counts)
        self._measure()

    def add(self, key: WindowKey, counts: NDArray[np.int64]) -> None:
        self._sources[key.source].add(key, counts)
        self._measure()

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        lanes, starts, _ = _columns(spans)
        for lane, samples in zip(lanes.tolist(), self._blend.shares(lanes, starts).tolist(), strict=True):
            for source, sample in zip(self._sources, samples, strict=True):
                source.skip_to(lane, sample)

    def extend(self) -> None:
        lanes, is_changed = list(self._row), False
        for number, source in enumerate(self._sources):
            if source.extend():
                self._reached[:, number] = [source.reach(lane) for lane in lanes]
                is_changed = True
        if is_changed:
            reaches = self._blend.numbers(np.array(lanes, np.int64), self._reached).min(axis=1)
            self._reaches = dict(zip(lanes, reaches.tolist(), strict=True))

    def reaches(self) -> Mapping[int, int]:
        return self._reaches

    def due_in(self, spans: Sequence[LaneSpan]) -> list[tuple[int, WindowKey]]:
        lanes, _, ends = _columns(spans)
        samples = self._blend.shares(lanes, ends)
        missing = np.argwhere(samples > self._reached[[self._row[lane] for lane in lanes.tolist()]])
        found = [
            (lane, number, sample, key)
            for lane, number, end in zip(
                lanes[missing[:, 0]].tolist(), missing[:, 1].tolist(), samples[tuple(missing.T)].tolist(), strict=True
            )
            for sample, key in self._sources[number].due(lane, end)
        ]
        places = np.array([place[:3] for place in found], np.int64).reshape(-1, 3)
        numbers = self._blend.numbers_of(*np.ascontiguousarray(places.T))
        positions = self._blend.positions_at(places[:, 0], numbers).tolist()
        return [(position, key) for position, (*_, key) in zip(positions, found, strict=True)]

    def counts_wanted(
        self,
        spans: Sequence[LaneSpan],
        end: int,
        others: Sequence[int],
        home: Sequence[int],
        last: tuple[int, int] | None,
    ) -> dict[int, NDArray[np.int32]]:
        """Objects whose counts are needed next, by source; see `SampleSequence`."""
        if last is not None:
            source, sample = self._at(*last)
            wanted = {source: self._sources[source].wanted_to_find(last[0], sample)}
        else:
            wanted = self._wanted_to_reach(spans)
            if not any(map(len, wanted.values())) and self.total is None and end > self.known:
                wanted = self._wanted_to_settle(end, others, home)
        return {source: objects for source, objects in wanted.items() if len(objects)}

    def _wanted_to_reach(self, spans: Sequence[LaneSpan]) -> dict[int, NDArray[np.int32]]:
        """Objects whose counts are needed before lanes can continue to the ends of their `spans`."""
        lanes, _, ends = _columns(spans)
        samples = self._blend.shares(lanes, ends)
        return {
            number: source.wanted(lanes.tolist(), samples[:, number].tolist())
            for number, source in enumerate(self._sources)
        }

    def _wanted_to_settle(self, end: int, others: Sequence[int], home: Sequence[int]) -> dict[int, NDArray[np.int32]]:
        """Objects whose counts help to settle the sequence up to `end`: those of the next windows of `others`, or of
        `home` where these have none.
        """
        open_ended = [number for number, source in enumerate(self._sources) if source.epochs.total is None]
        short = [number for number in open_ended if self._limits[number] < end] or open_ended
        wanted = {}
        for number in short:
            found = self._sources[number].next_uncounted(others)
            wanted[number] = found if len(found) else self._sources[number].next_uncounted(home)
        return wanted

    def forget(self, position: int) -> None:
        lanes = np.array(list(self._row), np.int64)
        shares = self._blend.shares(lanes, lane_lengths(position, self._partitions)[lanes])
        for lane, samples in zip(lanes.tolist(), shares.tolist(), strict=True):
            for source, sample in zip(self._sources, samples, strict=True):
                source.forget_before(lane, sample)

    def close_all_but(self, kept: WindowKey | None) -> None:
        for source in self._sources:
            source.close_all_but(kept)

    def samples(self, positions: NDArray[np.int64]) -> MixedSamples:
        lanes = (positions % self._partitions).astype(np.min_scalar_type(self._partitions))
        by_lane = np.argsort(lanes, kind="stable")
        numbers = positions[by_lane] // self._partitions
        ends = np.cumsum(np.bincount(lanes, minlength=self._partitions)).tolist()
        parts, places = [], []
        for lane, (start, end) in enumerate(pairwise((0, *ends))):
            if start == end:
                continue
            source_of, sample_of = self._blend.sources(lane, numbers[start:end])
            for number in np.flatnonzero(np.bincount(source_of)).tolist():
                mine = np.flatnonzero(source_of == number)
                for round_no, which, samples in self._sources[number].samples_of(lane, sample_of[mine]):
                    parts.append(((number, self._first_epoch + round_no), samples))
                    places.append(by_lane[start:end][mine[which]])
        return MixedSamples.joined(parts, places)

    def find(self, lane: int, number: int) -> tuple[WindowKey, int, int] | None:
        source, sample = self._at(lane, number)
        return self._sources[source].find(lane, sample)

    def sample_at(self, key: WindowKey, offset: int) -> MixedSamples:
        samples = self._sources[key.source].sample_at(key, offset)
        return MixedSamples(samples, np.zeros(1, np.int64), (key[:2],))

    def position(self, samples: int) -> tuple[SourcePosition, ...]:
        shares = self._blend.shares(self._blend.lanes, lane_lengths(samples, self._partitions))
        return tuple(source.position(shares[:, number].tolist()) for number, source in enumerate(self._sources))

    def windows_ahead(self, position: int, lanes: Sequence[int]) -> Iterator[WindowKey]:
        densities = [source.epochs.samples_a_byte() for source in self._sources]
        usual = float(np.mean([density for density in densities if density] or [1.0]))
        windows = []
        for number, source in enumerate(self._sources):
            for lane in lanes:
                start = lane_length(lane, position, self._partitions)
                sample = int(self._blend.shares(np.array([lane]), np.array([start]))[0, number])
                rounds = source.windows_from(lane, sample, densities[number] or usual)
                windows.append(self._in_positions(lane, number, rounds))
        seen = set()
        for _, key in heapq.merge(*windows):
            if key not in seen:
                seen.add(key)
                yield key

    def _in_positions(
        self, lane: int, source: int, rounds: Iterable[list[tuple[int, WindowKey]]]
    ) -> Iterator[tuple[int, WindowKey]]:
        """Windows with the samples where a lane comes to them, with positions instead; as far as the sequence goes, and
        the last of them where that is a guess.
        """
        is_guess = self._sources[source].epochs.total is None
        end = NEVER if self.total is None else self.total
        for windows in rounds:
            samples = np.array([sample for sample, _ in windows], np.int64)
            numbers = self._blend.numbers_of(np.full(len(samples), lane), np.full(len(samples), source), samples)
            positions = self._blend.positions_at(lane, numbers).tolist()
            for position, (_, key) in zip(positions, windows, strict=True):
                if position < end or is_guess:
                    yield position, key
            # A lane without a partition of its own has no windows to guess.
            if not windows or positions[-1] >= end:
                return

    def _measure(self) -> None:
        """How far the sequence is settled, and where it ends, by what is known of the sources."""
        if self.is_measured:
            return
        quotas = np.stack([source.epochs.quotas() for source in self._sources], axis=1)
        is_counted = np.array([source.epochs.total is not None for source in self._sources])
        self.known, self._limits, self.total = extent_of(self._blend, quotas, is_counted, self._stop)
        self.is_measured = bool(is_counted.all())

    def _at(self, lane: int, number: int) -> tuple[int, int]:
        """Source and sample at a number of a lane."""
        source_of, sample_of = self._blend.sources(lane, np.array([number]))
        return int(source_of[0]), int(sample_of[0])


def _columns(spans: Sequence[LaneSpan]) -> NDArray[np.int64]:
    """Lanes, starts and ends, each of them contiguous."""
    return np.ascontiguousarray(np.array(spans, np.int64).reshape(-1, 3).T)


def sample_count(options: MixtureOptions, epoch: int, counts: Sequence[int], partitions: int) -> int | None:
    """The samples of an epoch of a mixture, over all ranks and without repeats, by those of its sources; None where it
    has no end. Raises `ConfigError`.
    """
    blend = Blend.of(options.weights, options.seed, epoch, partitions)
    quotas = np.stack([lane_lengths(count, partitions) for count in counts], axis=1)
    return extent_of(blend, quotas, np.ones(len(counts), np.bool_), options.stop).total


def mixture_cursor(
    sources: Sequence[SourcePlan],
    options: MixtureOptions,
    epoch: int,
    ranks: Ranks,
    batch_size: int,
    *,
    drop_last: bool = False,
    tail: Tail = "pad",
    start: Position | None = None,
    worker: tuple[int, int] = (0, 1),
    split: Split = "batches",
) -> Cursor[MixtureEntry]:
    """The cursor over one epoch of a mixture.

    Raises `ConfigError` for arguments that do not fit and `StateError` where `start` belongs to another run.
    """
    batching = Batching(ranks, batch_size, drop_last, tail, worker, split)
    partitions = _partitions(sources, options)
    belongs_to = [(source.options, source.manifest.fingerprint) for source in sources]
    beginning = Position.start(epoch, options, belongs_to, ranks, batch_size, tail)
    start = beginning if start is None else start
    start.check(beginning)
    assignment = Assignment(ranks, partitions, batching.global_batch)
    blend = Blend.of(options.weights, options.seed, epoch, partitions)
    sequence = _sequence(sources, options, start, assignment, blend)
    if start.samples != sequence.total:
        start.check_boundary(beginning)
    return Cursor(sequence, assignment, batching, beginning, start)


def _sequence(
    sources: Sequence[SourcePlan], options: MixtureOptions, start: Position, assignment: Assignment, blend: Blend
) -> MixtureSequence:
    """The sequence from `start` on."""
    shares = blend.shares(blend.lanes, lane_lengths(start.samples, assignment.partitions))
    first_epoch, is_endless = options.source_epoch(start.epoch), options.stop != "first"
    rounds = []
    for number, source in enumerate(sources):
        samples = shares[:, number].tolist()
        epochs = SourceEpochs(
            number, source, first_epoch, assignment.lanes, samples, start.sources[number], is_endless=is_endless
        )
        rounds.append(Rounds(epochs, samples))
    return MixtureSequence(blend, rounds, assignment.lanes, options.stop, first_epoch)


def _partitions(sources: Sequence[SourcePlan], options: MixtureOptions) -> int:
    if len(sources) != len(options.weights):
        raise ConfigError(f"{len(options.weights)} weights for {len(sources)} sources; give one for each")
    partitions = [source.options.partitions for source in sources]
    if len(set(partitions)) != 1:
        raise ConfigError(f"the sources of a mixture have partitions={partitions}; they must all have the same number")
    return partitions[0]
