"""A job as a whole: ranks on nodes that read a corpus, are stopped after some batches, and go on as another job.

What must come out is what the reference model of the plan says, batch by batch and rank by rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fastload.plan import batch_count_of_rank, repeat_count
from tests.jobs.pool import Failed, Rank, RankPool
from tests.jobs.reading import SMALL, Read, Reading, read
from tests.jobs.shelf import COUNTS, HUGE, Shelf
from tests.plan.cluster import Cluster

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

    def ranks(self) -> list[Rank]:
        meets = "job" if self.launcher == "torch" and self.world_size > 1 else None
        return [Rank(rank, self.world_size, self.local, meets) for rank in range(self.world_size)]


@dataclass(frozen=True)
class Case:
    """`take` batches of one epoch (None: all of `epochs` epochs), and where `then` is given, the rest of it at that
    size, from the state of rank `saver`; `in_same_caches` or in new ones.
    """

    shards: tuple[int, ...]
    first: Size
    shuffle: bool | str = True
    window: int | str = "auto"
    partitions: int | None = None
    tail: str = "pad"
    drop_last: bool = False
    seed: int = 0
    epoch: int = 0
    epochs: int = 1
    take: int | None = None
    then: Size | None = None
    saver: int = 0
    in_same_caches: bool = True

    def cluster(self, size: Size, epoch: int) -> Cluster:
        """The reference's view of it."""
        return Cluster(
            sizes=(),
            counts=tuple(COUNTS[shard] for shard in self.shards),
            partitions=self.partitions or self.first.nodes,
            nodes=size.nodes,
            local=size.local,
            batch_size=size.batch_size,
            shuffle={False: "none", True: "window"}.get(self.shuffle, self.shuffle),  # type: ignore[arg-type]
            window_bytes=_AUTO_BYTES if self.window == "auto" else int(self.window),
            seed=self.seed,
            epoch=epoch,
            tail=self.tail,  # type: ignore[arg-type]
            drop_last=self.drop_last,
        )


class Trial:
    """A case on its way, in a folder of its own."""

    def __init__(self, case: Case, pool: RankPool, shelf: Shelf, folder: Path) -> None:
        self.case, self._pool, self._shelf, self._folder = case, pool, shelf, folder
        self._urls = [shelf.urls[shard] for shard in case.shards]

    def run(self) -> None:
        """Read, and compare with the reference; AssertionError names the case."""
        case = self.case
        found = self._read(case.first, "first", epoch=case.epoch, epochs=case.epochs, take=case.take)
        for rank, one in enumerate(found):
            for epoch, batches in enumerate(one.epochs):
                self._check(rank, batches, self._expected(case.first, case.epoch + epoch, rank)[: case.take])
        if case.take is None:
            for epoch in range(case.epochs):
                self._check_epoch(case.first.world_size, [one.epochs[epoch] for one in found])
                self._check_alike([one.epochs[epoch] for one in found])
                self._check_repeats(case.first, [one.stats[epoch] for one in found], 0)
        if case.then is not None:
            self._go_on(case.then, found)

    def _go_on(self, then: Size, found: list[Read]) -> None:
        case = self.case
        assert case.take is not None
        state = json.loads(json.dumps(found[case.saver % len(found)].state))
        cluster = self._cluster(case.first, case.epoch)
        delivered = min(case.take * cluster.global_batch, cluster.total)
        folder = "first" if case.in_same_caches else "then"
        global_batch = then.batch_size * then.world_size
        if delivered % global_batch and delivered < cluster.total:
            for rank, one in enumerate(self._answers(then, folder, state=state)):
                assert isinstance(one, Failed), self._name(rank)
                assert one.kind == "StateError", one.trace
                assert f"after {delivered} samples" in one.message
            return
        rest = self._read(then, folder, state=state)
        for rank, one in enumerate(rest):
            self._check(rank, one.batches, self._expected(then, case.epoch, rank, delivered))
        self._check_repeats(then, [one.stats[0] for one in rest], delivered)
        self._check_alike([one.batches for one in rest])
        self._check_epoch(max(case.first.world_size, then.world_size), [one.batches for one in [*found, *rest]])

    def _read(self, size: Size, folder: str, **how: Any) -> list[Read]:
        answers = self._answers(size, folder, **how)
        failed = [answer.trace for answer in answers if isinstance(answer, Failed)]
        assert not failed, self._name() + "\n" + "\n".join(failed)
        return answers

    def _answers(self, size: Size, folder: str, **how: Any) -> list[Any]:
        caches = [str(self._folder / f"{folder}-{node}") for node in range(size.nodes)]
        cache = {**SMALL, "service": size.service}
        if size.is_indexed:
            nodes = [Rank(node, size.nodes, 1) for node in range(size.nodes)]
            index = Reading(
                self._urls, caches, {"partitions": 1, "columns": ["cls"]}, {"batch_size": 512}, self._environment, cache
            )
            self._pool.run(self._name(), read, nodes, index)
        case = self.case
        dataset = {
            "columns": ["cls"],
            "shuffle": case.shuffle,
            "seed": case.seed,
            "shuffle_window": case.window,
            "tail": case.tail,
            "partitions": case.partitions,
        }
        loader = {"batch_size": size.batch_size, "num_workers": size.num_workers, "drop_last": case.drop_last}
        reading = Reading(self._urls, caches, dataset, loader, self._environment, cache, **how)
        return self._pool.run(self._name(), read, size.ranks(), reading)

    @property
    def _environment(self) -> dict[str, str]:
        return dict(self._shelf.environment)

    def _cluster(self, size: Size, epoch: int) -> Cluster:
        return self.case.cluster(size, epoch).with_(sizes=tuple(self._shelf.sizes[shard] for shard in self.case.shards))

    def _expected(self, size: Size, epoch: int, rank: int, delivered: int = 0) -> list[list[str]]:
        batches = self._cluster(size, epoch).reference_batches(rank, delivered)
        return self._shelf.names(self.case.shards, batches)

    def _check(self, rank: int, batches: list[list[str]], expected: list[list[str]]) -> None:
        for number, (batch, due) in enumerate(zip(batches, expected, strict=False)):
            assert batch == due, f"batch {number} of {self._name(rank)}"
        assert len(batches) == len(expected), self._name(rank)

    def _check_epoch(self, world_size: int, of_ranks: Sequence[Sequence[Sequence[str]]]) -> None:
        """Every sample once but for what the tail says."""
        case = self.case
        given = Counter(key for batches in of_ranks for batch in batches for key in batch)
        every = Counter(key for shard in case.shards for key in self._shelf.keys[shard])
        assert (given - every).total() < (world_size if case.tail == "pad" else 1), self._name()
        assert given >= every or case.tail == "drop" or case.drop_last, self._name()

    def _check_alike(self, of_ranks: Sequence[Sequence[Sequence[str]]]) -> None:
        """As many batches on every rank, and as many samples in each."""
        sizes = {tuple(map(len, batches)) for batches in of_ranks}
        assert len(sizes) == 1 or self.case.tail == "uneven", self._name()

    def _check_repeats(self, size: Size, stats: Sequence[dict[str, Any]], delivered: int) -> None:
        total = self._cluster(size, 0).total
        expected = repeat_count(total - delivered, size.world_size, self.case.tail)  # type: ignore[arg-type]
        counted = sum(one["repeats"] for one in stats)
        assert counted == expected or (self.case.drop_last and counted < expected), self._name()

    def _name(self, rank: int | None = None) -> str:
        return f"{self.case}" if rank is None else f"rank {rank} of {self.case}"


def with_(case: Case, **changes: Any) -> Case:
    """The case, changed."""
    return Case(**{**{name: getattr(case, name) for name in asdict(case)}, **changes})


_NODES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


@st.composite
def sizes(draw: st.DrawFn, partitions: int | None) -> Size:
    nodes, local = draw(st.sampled_from(_NODES))
    is_indexed = draw(st.sampled_from([False, False, False, True]))
    # Nodes that cannot ask one another must know all counts, or all read everything.
    alone = nodes == 1 or partitions == 1 or is_indexed
    return Size(
        nodes,
        local,
        draw(st.integers(1, 8)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(["torch", "environment"] if alone else ["torch"])),
        is_indexed,
        draw(st.sampled_from(["inprocess", "inprocess", "auto"])),
    )


@st.composite
def shards(draw: st.DrawFn) -> tuple[int, ...]:
    """Some shards, in some order: any, few, only small ones and one that is huge, or only empty ones."""
    some = st.lists(st.integers(0, len(COUNTS) - 2), max_size=12, unique=True).map(tuple)
    huge = st.permutations([*range(4, 11), HUGE]).map(tuple)
    few = st.lists(st.integers(0, len(COUNTS) - 1), min_size=1, max_size=2, unique=True).map(tuple)
    empty = st.sampled_from([(0,), (0, 1), (0, 2, 1)])
    return draw(st.one_of(some.filter(bool), some.filter(lambda found: len(found) > 4), huge, few, empty))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case."""
    partitions = draw(st.sampled_from([None, None, 1, 2, 3, 4, 6]))
    first = draw(sizes(partitions))
    case = Case(
        shards=draw(shards()),
        first=first,
        shuffle=draw(st.sampled_from([True, True, True, "shards", False])),
        window=draw(st.sampled_from([1, 20_000, 20_000, 65_536, "auto"])),
        partitions=partitions,
        tail=draw(st.sampled_from(["pad", "pad", "drop", "uneven"])),
        drop_last=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
    )
    if draw(st.sampled_from([True, True, False])):
        return _resumed(draw, case)
    return with_(case, epochs=draw(st.sampled_from([1, 1, 2])))


def _resumed(draw: st.DrawFn, case: Case) -> Case:
    partitions = case.partitions or case.first.nodes
    then = draw(sizes(partitions))
    first_batch = case.first.batch_size * case.first.world_size
    if draw(st.sampled_from([True, True, False])) and first_batch % then.world_size == 0:
        then = Size(**{**asdict(then), "batch_size": first_batch // then.world_size})  # it fits everywhere
    first = case.cluster(case.first, case.epoch)
    batches = [
        batch_count_of_rank(
            first.total, first.ranks(rank), first.tail, first.batch_size, first.drop_last, first.partitions
        )
        for rank in range(first.world_size)
    ]
    if not min(batches):
        return case
    return with_(
        case,
        # Before the first batch a state does not say how many partitions there are.
        take=draw(st.integers(0 if case.partitions else 1, min(batches))),
        then=then,
        saver=draw(st.integers(0, 3)),
        in_same_caches=draw(st.booleans()),
    )
