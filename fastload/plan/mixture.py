"""Several data sets read as one: which of them each sample of a line is from, and a rank's batches of it.

The line of a mixture's epoch, as far as it is known.

It has the lanes of any line; what stands at a number of one, and which sample of its source that is, `Blend` says, and
`Rounds` where in the source's epochs that lies. A position is settled once that is known of all positions before it,
whoever reads them, and that the line does not end before: what a node saves then means the same to every other.

From the orders of several data sets to a rank's batches of their mixture, as sample counts become known.

All is as with one data set (see `plan.cursor` and `plan.walk`), with windows and counts of each source. Sample counts
need not be known for a run to begin: while a source's are not, it goes on as far as all that it needs is certain to lie
in the source's first epoch.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.kernels.mixing import NEVER
from fastload.plan.assignment import Assignment, LaneSpan
from fastload.plan.blend import Blend, extent_of, sample_count
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.order import WindowKey
from fastload.plan.position import MixturePosition, SourcePosition, check_boundary
from fastload.plan.ranks import Ranks, Tail
from fastload.plan.rounds import RoundKey, Rounds, SourceEpochs, SourcePlan
from fastload.plan.samples import MixedSamples, MixtureEntry, MixtureKey, MixturePart
from fastload.plan.walk import Reader, Split, Walk
from fastload.plan.weights import MixtureOptions, Schedule, Stop, Weights, check_stop, check_weights

__all__ = [
    "MixtureCursor",
    "MixtureEntry",
    "MixtureKey",
    "MixtureOptions",
    "MixturePart",
    "MixturePosition",
    "Schedule",
    "SourcePlan",
    "SourcePosition",
    "Stop",
    "Weights",
    "check_stop",
    "check_weights",
    "sample_count",
]


class MixtureSequence:
    """`sources` begin with the epoch `first_epoch` of each; `lanes` are those that this node may need."""

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
    def open_windows(self) -> Collection[MixtureKey]:
        """The windows that are open."""
        return {self._key(number, key) for number, source in enumerate(self._sources) for key in source.open_windows()}

    def objects_of(self, key: MixtureKey) -> NDArray[np.int32]:
        """The object numbers of a window in its source, int32."""
        return self._sources[key.source].objects_of(self._round_key(key))

    def tell(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """The sample counts of some objects of a source."""
        self._sources[source].tell(object_nos, counts)
        self._measure()

    def add(self, key: MixtureKey, counts: NDArray[np.int64]) -> None:
        """A window is open, and these are the counts of its objects."""
        self._sources[key.source].add(self._round_key(key), counts)
        self._measure()

    def skip(self, spans: Sequence[LaneSpan]) -> None:
        """Nobody here needs what lanes hold before their `spans`."""
        lanes, starts, _ = _columns(spans)
        for lane, samples in zip(lanes.tolist(), self._blend.shares(lanes, starts).tolist(), strict=True):
            for source, sample in zip(self._sources, samples, strict=True):
                source.skip_to(lane, sample)

    def extend(self) -> None:
        """Let lanes go on through windows that are open."""
        lanes, is_changed = list(self._row), False
        for number, source in enumerate(self._sources):
            if source.extend():
                self._reached[:, number] = [source.reach(lane) for lane in lanes]
                is_changed = True
        if is_changed:
            reaches = self._blend.numbers(np.array(lanes, np.int64), self._reached).min(axis=1)
            self._reaches = dict(zip(lanes, reaches.tolist(), strict=True))

    def reaches(self) -> Mapping[int, int]:
        """For each lane up to which number its windows are open."""
        return self._reaches

    def due_in(self, spans: Sequence[LaneSpan]) -> list[tuple[int, MixtureKey]]:
        """The windows that have to be opened for lanes to reach the ends of their `spans`, each with the position from
        which it is needed; without those for which a count must be told before.
        """
        lanes, _, ends = _columns(spans)
        samples = self._blend.shares(lanes, ends)
        missing = np.argwhere(samples > self._reached[[self._row[lane] for lane in lanes.tolist()]])
        found = [
            (lane, number, sample, self._key(number, key))
            for lane, number, end in zip(
                lanes[missing[:, 0]].tolist(), missing[:, 1].tolist(), samples[tuple(missing.T)].tolist(), strict=True
            )
            for sample, key in self._sources[number].due(lane, end)
        ]
        places = np.array([place[:3] for place in found], np.int64).reshape(-1, 3)
        numbers = self._blend.numbers_of(*np.ascontiguousarray(places.T))
        positions = self._blend.positions_at(places[:, 0], numbers).tolist()
        return [(position, key) for position, (*_, key) in zip(positions, found, strict=True)]

    def wanted(self, spans: Sequence[LaneSpan]) -> list[NDArray[np.int32]]:
        """For each source, objects whose counts must be told before lanes can go on to the ends of their `spans`."""
        lanes, _, ends = _columns(spans)
        samples = self._blend.shares(lanes, ends)
        return [
            source.wanted(lanes.tolist(), samples[:, number].tolist()) for number, source in enumerate(self._sources)
        ]

    def wanted_to_settle(self, end: int, others: Sequence[int], home: Sequence[int]) -> list[NDArray[np.int32]]:
        """For each source, objects whose counts help to settle the line up to `end`: those of the next windows of
        `others`, or of `home` where these have none.
        """
        open_ended = [number for number, source in enumerate(self._sources) if source.epochs.total is None]
        short = [number for number in open_ended if self._limits[number] < end] or open_ended
        wanted = [np.empty(0, np.int32) for _ in self._sources]
        for number in short:
            source = self._sources[number]
            found = source.next_uncounted(others)
            wanted[number] = found if len(found) else source.next_uncounted(home)
        return wanted

    def wanted_to_find(self, lane: int, number: int) -> list[NDArray[np.int32]]:
        """For each source, objects whose counts must be told before `find` can answer."""
        source, sample = self._at(lane, number)
        wanted = [np.empty(0, np.int32) for _ in self._sources]
        wanted[source] = self._sources[source].wanted_to_find(lane, sample)
        return wanted

    def forget(self, position: int) -> None:
        """What lies before `position` is not needed any more."""
        lanes = np.array(list(self._row), np.int64)
        shares = self._blend.shares(lanes, lane_lengths(position, self._partitions)[lanes])
        for lane, samples in zip(lanes.tolist(), shares.tolist(), strict=True):
            for source, sample in zip(self._sources, samples, strict=True):
                source.forget_before(lane, sample)

    def close_all_but(self, kept: MixtureKey | None) -> None:
        """Close the windows that no lane needs from where it was forgotten on, but for `kept`."""
        for number, source in enumerate(self._sources):
            source.close_all_but(self._round_key(kept) if kept is not None and kept.source == number else None)

    def samples(self, positions: NDArray[np.int64]) -> MixedSamples:
        """The samples at some positions, rising, that lanes have reached."""
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

    def find(self, lane: int, number: int) -> tuple[MixtureKey, int, int] | None:
        """Window, offset and the window's samples, of a number of a lane, whoever reads it; None where counts that are
        still missing could move it.
        """
        source, sample = self._at(lane, number)
        found = self._sources[source].find(lane, sample)
        return None if found is None else (self._key(source, found[0]), found[1], found[2])

    def sample_at(self, key: MixtureKey, offset: int) -> MixedSamples:
        """The one sample at an offset in an open window."""
        samples = self._sources[key.source].sample_at(self._round_key(key), offset)
        return MixedSamples(samples, np.zeros(1, np.int64), ((key.source, key.epoch),))

    def position(self, numbers: NDArray[np.int64]) -> tuple[SourcePosition, ...]:
        """Where each source stands when the first `numbers` of the lanes are delivered."""
        shares = self._blend.shares(self._blend.lanes, numbers)
        return tuple(source.position(shares[:, number].tolist()) for number, source in enumerate(self._sources))

    def windows_ahead(self, starts: Sequence[tuple[int, int]]) -> Iterator[MixtureKey]:
        """The windows that lanes need from some numbers on, in the order in which positions come to them, each once."""
        densities = [source.epochs.samples_a_byte() for source in self._sources]
        usual = float(np.mean([density for density in densities if density] or [1.0]))
        windows = []
        for number, source in enumerate(self._sources):
            for lane, start in starts:
                sample = int(self._blend.shares(np.array([lane]), np.array([start]))[0, number])
                rounds = source.windows_from(lane, sample, densities[number] or usual)
                windows.append(self._in_positions(lane, number, rounds))
        seen = set()
        for _, key in heapq.merge(*windows):
            if key not in seen:
                seen.add(key)
                yield key

    def _in_positions(
        self, lane: int, source: int, rounds: Iterable[list[tuple[int, RoundKey]]]
    ) -> Iterator[tuple[int, MixtureKey]]:
        """Windows with the samples where a lane comes to them, with positions instead; as far as the line goes, and
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
                    yield position, self._key(source, key)
            # A lane without a partition of its own has no windows to guess.
            if not windows or positions[-1] >= end:
                return

    def _measure(self) -> None:
        """How far the line is settled, and where it ends, by what is known of the sources."""
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

    def _key(self, source: int, key: RoundKey) -> MixtureKey:
        return MixtureKey(source, self._first_epoch + key[0], *key[1])

    def _round_key(self, key: MixtureKey) -> RoundKey:
        return key.epoch - self._first_epoch, WindowKey(key.partition, key.window)


def _columns(spans: Sequence[LaneSpan]) -> NDArray[np.int64]:
    """Lanes, starts and ends, each of them contiguous."""
    return np.ascontiguousarray(np.array(spans, np.int64).reshape(-1, 3).T)


class MixtureCursor(Walk[MixtureKey, MixtureEntry]):
    """The batches of one rank in one epoch of a mixture. One user at a time; made anew for each epoch.

    It is driven as an `EpochCursor` is: windows are named with their source and its epoch, counts are wanted and told
    by source, and a batch has a part for each source. With `stop="never"` there is always another window to open, and
    `finish` is never called. What is said of a node's windows and of workers there holds here too.

    Raises `ConfigError` for arguments that do not fit, also once a source turns out to have fewer samples than it must,
    and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        sources: Sequence[SourcePlan],
        options: MixtureOptions,
        epoch: int,
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: MixturePosition | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        reader = Reader(ranks, batch_size, drop_last, tail, worker, split)
        partitions = _partitions(sources, options)
        self.sources, self.options, self.epoch = tuple(sources), options, epoch
        self._beginning = MixturePosition(
            epoch,
            0,
            0,
            (SourcePosition.start(partitions),) * len(sources),
            options,
            tuple(source.options for source in sources),
            tuple(source.manifest.fingerprint for source in sources),
            ranks.world_size,
            batch_size,
            tail,
        )
        self.start = start if start is not None else self._beginning
        self.start.check(self._beginning)
        deal = Assignment(ranks, partitions, reader.global_batch)
        self._mixture = self._line_from(self.start, deal, Blend.of(options.weights, options.seed, epoch, partitions))
        if self.start.samples != self._mixture.total:
            check_boundary(
                self.start.samples, (self.start.batch_size, self.start.world_size), (batch_size, ranks.world_size)
            )
        super().__init__(self._mixture, deal, reader, self.start.samples)

    def _line_from(self, start: MixturePosition, deal: Assignment, blend: Blend) -> MixtureSequence:
        shares = blend.shares(blend.lanes, lane_lengths(start.samples, deal.partitions))
        first_epoch, is_endless = self.options.source_epoch(self.epoch), self.options.stop != "first"
        rounds = []
        for number, source in enumerate(self.sources):
            samples = shares[:, number].tolist()
            epochs = SourceEpochs(
                number, source, first_epoch, deal.lanes, samples, start.sources[number], is_endless=is_endless
            )
            rounds.append(Rounds(epochs, samples))
        return MixtureSequence(blend, rounds, deal.lanes, self.options.stop, first_epoch)

    @property
    def is_counted(self) -> bool:
        """Whether the length of the line is known, or that it has no end."""
        return self._mixture.is_measured

    def objects_of(self, key: MixtureKey) -> NDArray[np.int32]:
        """The object numbers of a window in its source, int32; `add` wants one count for each."""
        return self._mixture.objects_of(key)

    @property
    def counts_wanted(self) -> list[NDArray[np.int32]]:
        """For each source, objects whose counts must be told before anything can go on, int32; all empty where
        `next_window` is not None, where batches are settled that were not given out yet, and at the end.

        As with one data set, they are the next windows of other nodes, or all of a source's where a lane has come to
        the end of its partition.
        """
        nothing = [np.empty(0, np.int32) for _ in self.sources]
        if self.next_window is not None:
            return nothing
        wanted = self._mixture.wanted(self._needs())
        end, total = self._given + self._group, self._mixture.total
        if not any(map(len, wanted)) and total is None and end > self._mixture.known:
            others = [p for p in range(self._partitions) if self._deal.is_cut or p not in self.home]
            wanted = self._mixture.wanted_to_settle(end, others, self.home)
        if (tail := self._tail_position) is not None and self._tail_source is None:
            number, lane = divmod(tail[0], self._partitions)
            wanted = self._mixture.wanted_to_find(lane, number)
        return wanted

    def windows_ahead(self) -> Iterator[MixtureKey]:
        """The windows that this node still needs, in the order in which batches come to them, each once; without end
        where the line has none. Not to be used further once counts were told or a window was added.

        Windows that are open are among them. While a source's counts are not known, its partitions are taken to hold as
        many samples a byte, as many as in what is counted of it, or of the others; and where the line then ends is not
        known either.
        """
        return self._mixture.windows_ahead(
            [(lane, lane_length(lane, self._given, self._partitions)) for lane in self.home]
        )

    def tell(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> list[MixtureEntry]:
        """The batches that are settled by the sample counts, int64, of some objects of a source."""
        self._mixture.tell(source, object_nos, np.asarray(counts, np.int64))
        return self._settle()

    def add(self, key: MixtureKey, counts: NDArray[np.int64]) -> list[MixtureEntry]:
        """A window is open: the batches that are settled by that, and by the counts of its objects, int64."""
        self._mixture.add(key, np.asarray(counts, np.int64))
        return self._settle()

    def position(self, entry: MixtureEntry | None) -> MixturePosition:
        """The position after `entry` was delivered; for None, where the cursor started."""
        return self.start if entry is None else self.position_at(entry.samples_after)

    def position_at(self, samples: int) -> MixturePosition:
        """The position after so many samples of the line: as many as where the cursor started, or a multiple of the
        global batch above that, or all.
        """
        if samples == self.start.samples:
            return self.start
        self._assert_is_boundary(samples)
        return replace(
            self._beginning,
            batches=-(-samples // self._global_batch),
            samples=samples,
            sources=self._mixture.position(lane_lengths(samples, self._partitions)),
        )


def _partitions(sources: Sequence[SourcePlan], options: MixtureOptions) -> int:
    if len(sources) != len(options.weights):
        raise ConfigError(f"{len(options.weights)} weights for {len(sources)} sources; give one for each")
    partitions = [source.options.partitions for source in sources]
    if len(set(partitions)) != 1:
        raise ConfigError(f"the sources of a mixture have partitions={partitions}; they must all have the same number")
    return partitions[0]
