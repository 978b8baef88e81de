"""Mixtures on several nodes: the plan run on each rank, and what the reference makes of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

from hypothesis import strategies as st

from fastload.plan import (
    Cursor,
    MixtureEntry,
    MixtureOptions,
    Position,
    Ranks,
    Schedule,
    SourcePlan,
    Tail,
    check_weights,
)
from fastload.plan.mixture import mixture_cursor
from tests.plan import reference, reference_mixture
from tests.plan.cluster import Cluster, Run, samples_of

# How much of a mixture without an end is looked at.
SAMPLES_MAX = 150


@dataclass(frozen=True)
class World:
    """A mixture (each source as a data set of its own), and `nodes` of `local` ranks that read it."""

    sources: tuple[Cluster, ...]
    weights: tuple[Schedule, ...]
    stop: str = "first"
    partitions: int = 1
    nodes: int = 1
    local: int = 1
    batch_size: int = 1
    seed: int = 0
    epoch: int = 0
    tail: Tail = "pad"
    drop_last: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.local

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def plans(self) -> list[SourcePlan]:
        return [
            SourcePlan(source.manifest, source.with_(partitions=self.partitions).options) for source in self.sources
        ]

    @property
    def options(self) -> MixtureOptions:
        return MixtureOptions(check_weights(self.weights), self.seed, self.stop)

    def with_(self, **changes) -> World:
        return replace(self, **changes)

    def ranks(self, rank: int) -> Ranks:
        return Ranks(rank, self.world_size, rank % self.local, self.local)

    def cursor(self, rank: int = 0, start: Position | None = None, **kwargs) -> Cursor[MixtureEntry]:
        settings = {"drop_last": self.drop_last, "tail": self.tail, "start": start} | kwargs
        return mixture_cursor(self.plans, self.options, self.epoch, self.ranks(rank), self.batch_size, **settings)

    def begun(self, rank: int = 0, start: Position | None = None, **kwargs) -> MixtureRun:
        return MixtureRun(self, self.cursor(rank, start, **kwargs))

    def run(self, rank: int = 0, start: Position | None = None, told: str = "wanted", **kwargs) -> MixtureRun:
        """All of a rank's batches."""
        run = self.begun(rank, start, **kwargs)
        run.tell_early(told)
        return run.to_the_end()

    def reference_line(self):
        """Each (source, epoch, partition, window, offset, object, sample), and all samples of each window."""
        return _reference_line(self.with_(nodes=1, local=1, batch_size=1, tail="pad", drop_last=False))

    @property
    def total(self) -> int:
        return len(self.reference_line()[0])

    def reference_batches(self, rank: int, delivered: int = 0) -> list[list[tuple[int, ...]]]:
        """A rank's batches after so many samples of the line, each a list of (source, epoch, object, sample)."""
        line, by_window = self.reference_line()
        is_endless, total = self.stop == "never", len(line)
        left_over = (total - delivered) % (self.global_batch if is_endless else self.world_size)
        whole = total - left_over * (is_endless or self.tail == "drop")
        positions = reference.rank_positions(
            delivered, whole, rank, self.nodes, self.local, self.partitions, self.global_batch
        )
        mine = [line[position] for position in positions]
        mine_missing = reference.turn(rank, rank // self.local, self.nodes, self.local, self.partitions) - left_over
        if not is_endless and self.tail == "pad" and left_over and mine_missing >= 0:
            windows_of = lambda sample: by_window[sample[:4]]  # noqa: E731
            repeats = reference.repeats(line, windows_of, self.partitions, self.world_size, self.global_batch)
            mine.append(repeats[mine_missing])
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        return [
            [(*sample[:2], *sample[5:]) for sample in batch]
            for batch in batches
            if len(batch) == self.batch_size or not self.drop_last
        ]


@cache
def _reference_line(world: World):
    partitions, by_window = world.partitions, defaultdict(list)

    @cache
    def lanes(source_no, round_no):
        source = world.sources[source_no]
        epoch = reference_mixture.source_epoch(world.stop, world.epoch, round_no)
        lines, by_partition = source.with_(partitions=partitions, epoch=epoch).reference_line()
        for sample in by_partition:
            by_window[source_no, epoch, *sample[:2]].append((source_no, epoch, *sample))
        return [[(source_no, epoch, *sample) for sample in lines[lane::partitions]] for lane in range(partitions)]

    quotas = [[len(lane) for lane in lanes(number, 0)] for number in range(len(world.sources))]
    samples_max = SAMPLES_MAX if world.stop == "never" else 10**6
    line = reference_mixture.mixed_line(
        world.weights, world.seed, world.epoch, partitions, quotas, world.stop, samples_max
    )
    return [lanes(source, round_no)[lane][number] for source, round_no, lane, number in line], by_window


class MixtureRun(Run):
    """A run through a mixture, of which enough is seen where it has no end."""

    @property
    def is_over(self) -> bool:
        if self.world.stop != "never":
            return False
        return bool(self.entries) and self.entries[-1].samples_after > SAMPLES_MAX - self.world.global_batch

    @property
    def samples(self) -> list[list[tuple[int, ...]]]:
        """The batches as lists of (source, epoch, object, sample)."""
        is_endless = self.world.stop == "never"
        return [samples_of(e) for e in self.entries if not is_endless or e.samples_after <= SAMPLES_MAX]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    weights = st.sampled_from([0, 0.05, 0.3, 1, 1, 2, 5])
    firsts = draw(st.sampled_from([(0,), (0,), (0, 7), (0, 10, 40), (0, 1, 2)]))
    return tuple((first, draw(weights)) for first in firsts)


@st.composite
def worlds(draw: st.DrawFn, *, stop: str | None = None) -> World:
    """Odd shapes: empty shards and partitions, a source of a sample a partition, sources that differ a hundredfold."""
    partitions = draw(st.integers(1, 4))
    stop = stop or draw(st.sampled_from(["first", "first", "all", "never"]))
    sources = []
    for _ in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 20]), min_size=1, max_size=5))
        counts[-1] += max(0, partitions - sum(counts))
        sizes = draw(st.lists(st.sampled_from([0, 1, 30, 50, 1000]), min_size=len(counts), max_size=len(counts)))
        shuffle = draw(st.sampled_from(["window", "window", "shards", "none"]))
        sources.append(
            Cluster(
                tuple(sizes),
                tuple(counts),
                shuffle=shuffle,
                window_bytes=draw(st.sampled_from([1, 60, 100])),
                seed=draw(st.integers(0, 3)),
            )
        )
    weights = [draw(schedules()) for _ in sources]
    weights[0] = tuple((first, weight or 1) for first, weight in weights[0])
    if stop == "all":
        weights = [(*schedule[:-1], (schedule[-1][0], max(0.3, schedule[-1][1]))) for schedule in weights]
    return World(
        tuple(sources),
        tuple(weights),
        stop,
        partitions,
        nodes=draw(st.integers(1, 5)),
        local=draw(st.integers(1, 3)),
        batch_size=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 2)),
        tail=draw(st.sampled_from(["pad", "drop", "uneven"])),
        drop_last=draw(st.booleans()),
    )
