"""A job as it is described: ranks on nodes that read a corpus, are stopped after some batches, and go on as another
job; and what the reference model of the plan says that each rank gets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from fastload.plan import Tail, batch_count_of_rank
from tests.jobs.pool import Rank
from tests.jobs.shelf import BAD, COUNTS, HUGE, KEYS, SIZES
from tests.plan.cluster import Cluster
from tests.plan.mixtures import SAMPLES_MAX, World
from tests.plan.test_global import GlobalCluster

Shards = tuple[int, ...]
Weight = tuple[tuple[int, float], ...]

_AUTO_BYTES = 1 << 40  # as good as any window that holds all


@dataclass(frozen=True)
class Size:
    """How large a job is. `launcher`: whether ranks have a process group or only the environment. `is_indexed`:
    whether every node's cache knows all sample counts before.
    """

    nodes: int = 1
    local: int = 1
    batch_size: int = 4
    num_workers: int = 0
    launcher: str = "torch"
    is_indexed: bool = False
    service: str = "inprocess"

    @property
    def world_size(self) -> int:
        return self.nodes * self.local

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def ranks(self) -> list[Rank]:
        meets = "job" if self.launcher == "torch" and self.world_size > 1 else None
        return [Rank(rank, self.world_size, self.local, meets) for rank in range(self.world_size)]


@dataclass(frozen=True)
class Mix:
    """What makes a mixture of a case's corpus, which has `weight`, and of `others`."""

    weight: Weight
    others: tuple[tuple[Shards, Weight], ...]
    stop: str = "first"


@dataclass(frozen=True)
class Case:
    """`take` batches of one epoch (None: all of `epochs` epochs), and where `then` is given, the rest of it (or the
    next epoch) at that size, from the state of rank `saver`; `in_same_caches` or in new ones. `skips`: samples that
    cannot be decoded are left out, where otherwise nobody looks at them.
    """

    shards: Shards
    first: Size
    shuffle: bool | str = True
    window: int | str = "auto"
    partitions: int | None = None
    tail: Tail = "pad"
    drop_last: bool = False
    seed: int = 0
    epoch: int = 0
    skips: bool = False
    mix: Mix | None = None
    epochs: int = 1
    take: int | None = None
    then: Size | None = None
    saver: int = 0
    in_same_caches: bool = True

    @property
    def sources(self) -> list[Shards]:
        """The shards of each source; of the only one, where it is no mixture."""
        return [self.shards, *(shards for shards, _ in self.mix.others)] if self.mix else [self.shards]

    @property
    def is_endless(self) -> bool:
        return self.mix is not None and self.mix.stop == "never"

    def model(self, size: Size, epoch: int) -> Model:
        """What the reference says of an epoch that is read by a job of this size."""
        clusters = [self._cluster(shards, size, epoch) for shards in self.sources]
        if self.mix is None:
            return Model(self, clusters[0])
        weights = (self.mix.weight, *(weight for _, weight in self.mix.others))
        cluster = clusters[0]
        world = World(
            tuple(clusters), weights, self.mix.stop, cluster.partitions, size.nodes, size.local, size.batch_size,
            self.seed, epoch, self.tail, self.drop_last,
        )  # fmt: skip
        return Model(self, world)

    def _cluster(self, shards: Shards, size: Size, epoch: int) -> Cluster:
        names: dict[bool | str, str] = {False: "none", True: "window"}
        kind = GlobalCluster if self.shuffle == "global" else Cluster
        return kind(
            sizes=tuple(SIZES[shard] for shard in shards),
            counts=tuple(COUNTS[shard] for shard in shards),
            partitions=self.partitions or self.first.nodes,
            nodes=size.nodes,
            local=size.local,
            batch_size=size.batch_size,
            shuffle=names.get(self.shuffle, str(self.shuffle)),
            window_bytes=_AUTO_BYTES if self.window == "auto" else int(self.window),
            seed=self.seed,
            epoch=epoch,
            tail=self.tail,
            drop_last=self.drop_last,
        )


@dataclass(frozen=True)
class Model:
    """The reference model of one epoch, which speaks in keys."""

    case: Case
    plan: Cluster | World

    @property
    def total(self) -> int:
        """Samples of the epoch; of an endless one, those that the model has."""
        return self.plan.total

    def batches(self, rank: int, delivered: int = 0) -> list[list[str]]:
        """A rank's batches after so many samples of the line."""
        return [
            [key for key in map(self._key, batch) if not (self.case.skips and key in BAD)]
            for batch in self.plan.reference_batches(rank, delivered)
        ]

    def _key(self, sample: Any) -> str:
        source = sample[0] if len(sample) == 4 else 0
        shard, number = sample[-2:]
        return KEYS[self.case.sources[source][shard]][number]


_NODES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


@st.composite
def sizes(draw: st.DrawFn, partitions: int | None) -> Size:
    nodes, local = draw(st.sampled_from(_NODES))
    is_indexed = draw(st.sampled_from([False, False, False, True]))
    # Nodes that cannot ask one another must know all counts, or all read everything.
    is_alone = nodes == 1 or partitions == 1 or is_indexed
    return Size(
        nodes,
        local,
        draw(st.integers(1, 8)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(["torch", "environment"] if is_alone else ["torch"])),
        is_indexed,
        draw(st.sampled_from(["inprocess", "inprocess", "auto"])),
    )


@st.composite
def corpora(draw: st.DrawFn) -> Shards:
    """Some shards, in some order: any, few, only small ones and one that is huge, or only empty ones."""
    some = st.lists(st.integers(0, HUGE - 1), min_size=1, max_size=12, unique=True).map(tuple)
    many = st.lists(st.integers(0, HUGE - 1), min_size=5, max_size=12, unique=True).map(tuple)
    huge = st.permutations([*range(4, 11), HUGE]).map(tuple)
    few = st.lists(st.integers(0, HUGE), min_size=1, max_size=2, unique=True).map(tuple)
    empty = st.sampled_from([(0,), (0, 1), (0, 2, 1)])
    return draw(st.one_of(some, many, many, huge, huge, few, st.one_of(few, empty)))


@st.composite
def mixes(draw: st.DrawFn) -> tuple[Shards, Mix]:
    """Two or three sources, each with some samples for each partition."""
    large = st.integers(11, HUGE - 1)
    sources = draw(st.lists(st.lists(large, min_size=1, max_size=4, unique=True).map(tuple), min_size=2, max_size=3))
    weights = [
        tuple((first, draw(st.sampled_from([0.3, 1.0, 2.0]))) for first in draw(st.sampled_from([(0,), (0, 40)])))
        for _ in sources
    ]
    stop = draw(st.sampled_from(["first", "first", "all", "never"]))
    return sources[0], Mix(weights[0], tuple(zip(sources[1:], weights[1:], strict=True)), stop)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case."""
    is_mixed = draw(st.sampled_from([False, False, False, True]))
    shards, mix = draw(mixes()) if is_mixed else (draw(corpora()), None)
    partitions = draw(st.sampled_from([None, None, 1, 2, 3, 4, 4 if is_mixed else 6]))
    shuffles = [True, True, True, "shards", False] + ["global"] * (not is_mixed)
    case = Case(
        shards,
        draw(sizes(partitions)),
        draw(st.sampled_from(shuffles)),
        draw(st.sampled_from([1, 20_000, 20_000, 65_536, "auto"])),
        partitions,
        draw(st.sampled_from(["pad", "pad", "drop", "uneven"])),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([False, False, True])),
        mix,
    )
    if case.is_endless or draw(st.sampled_from([True, True, False])):
        return _resumed(draw, case)
    return replace(case, epochs=draw(st.sampled_from([1, 1, 2])))


def _resumed(draw: st.DrawFn, case: Case) -> Case:
    then = draw(sizes(case.partitions or case.first.nodes))
    if draw(st.sampled_from([True, True, False])) and case.first.global_batch % then.world_size == 0:
        then = replace(then, batch_size=case.first.global_batch // then.world_size)  # it fits everywhere
    take = st.integers(0, _batch_count(case))
    return replace(
        case,
        take=draw(take if case.is_endless else st.one_of(take, take, take, st.none())),
        then=then,
        saver=draw(st.integers(0, 3)),
        in_same_caches=draw(st.booleans()),
    )


def _batch_count(case: Case) -> int:
    """Batches that every rank has."""
    size, total = case.first, case.model(case.first, case.epoch).total
    if case.is_endless:
        return SAMPLES_MAX // size.global_batch
    partitions = case.partitions or size.nodes
    of_ranks = (
        batch_count_of_rank(total, rank.place(), case.tail, size.batch_size, case.drop_last, partitions)
        for rank in size.ranks()
    )
    return min(of_ranks)
