"""A case, tried: real ranks read it from a real store, and what each got is held against the reference."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.jobs.case import Case, Shards, Size
from tests.jobs.pool import Failed, Rank, RankPool
from tests.jobs.reading import SMALL, Read, Reading, read
from tests.jobs.shelf import BAD, KEYS, Shelf
from tests.plan import reference
from tests.plan.mixtures import SAMPLES_MAX

Batches = list[list[str]]


class Trial:
    """In a folder of its own, where every node has a cache."""

    def __init__(self, case: Case, pool: RankPool, shelf: Shelf, folder: Path) -> None:
        self._case, self._pool, self._shelf, self._folder = case, pool, shelf, folder

    def run(self) -> None:
        """Read, and compare. AssertionError, which names the case."""
        case = self._case
        found = self._read(case.first, "first", epoch=case.epoch, epochs=case.epochs, take=case.take)
        for epoch in range(case.epochs):
            model = case.model(case.first, case.epoch + epoch)
            of_ranks = [one.epochs[epoch] for one in found]
            for rank, batches in enumerate(of_ranks):
                self._compare(rank, batches, model.batches(rank)[: case.take])
            if case.take is None:
                self._check_once(of_ranks, case.first.world_size)
                self._check_repeats(case.first, found, epoch, model.total)
        if case.then is not None:
            self._go_on(case.then, found)

    def _go_on(self, then: Size, found: list[Read]) -> None:
        case = self._case
        state = json.loads(json.dumps(found[case.saver % len(found)].state))
        folder = "first" if case.in_same_caches else "then"
        if case.take is None:
            self._go_on_in(case.epoch + case.epochs, 0, [], then, folder, state)
            return
        model = case.model(then, case.epoch)
        delivered = case.take * case.first.global_batch
        if not case.is_endless:
            delivered = min(delivered, model.total)
        if delivered % then.global_batch and (delivered < model.total or case.is_endless):
            self._check_refused(self._answers(then, folder, state=state), delivered)
            return
        self._go_on_in(case.epoch, delivered, [one.batches for one in found], then, folder, state)

    def _go_on_in(
        self, epoch: int, delivered: int, before: list[Batches], then: Size, folder: str, state: dict[str, Any]
    ) -> None:
        """Read the rest of an epoch, of which so many samples were delivered, in the batches `before`."""
        case, model = self._case, self._case.model(then, epoch)
        take = (SAMPLES_MAX - delivered) // then.global_batch if case.is_endless else None
        rest = self._read(then, folder, state=state, take=take)
        for rank, one in enumerate(rest):
            self._compare(rank, one.batches, model.batches(rank, delivered)[:take])
        if not case.is_endless:
            self._check_repeats(then, rest, 0, model.total - delivered)
            self._check_once([*before, *(one.batches for one in rest)], max(case.first.world_size, then.world_size))

    def _read(self, size: Size, folder: str, **how: Any) -> list[Read]:
        answers = self._answers(size, folder, **how)
        failed = [answer.trace for answer in answers if isinstance(answer, Failed)]
        assert not failed, f"{self._case}\n" + "\n".join(failed)
        if self._case.tail != "uneven":
            counts = {tuple(map(len, one.epochs)) for one in answers}
            assert len(counts) == 1, self._case
        return answers

    def _answers(self, size: Size, folder: str, **how: Any) -> list[Any]:
        case = self._case
        caches = [str(self._folder / f"{folder}-{node}") for node in range(size.nodes)]
        common = {"environment": dict(self._shelf.environment), "cache": {**SMALL, "service": size.service}}
        if size.is_indexed:
            for shards in case.sources:
                index = Reading(self._urls(shards), caches, {"partitions": 1, "columns": ["cls"]}, {"batch_size": 512})
                nodes = [Rank(node, size.nodes, 1) for node in range(size.nodes)]
                self._pool.run(f"index of {case}", read, nodes, index.with_(**common))
        dataset = {
            "shuffle": case.shuffle,
            "seed": case.seed,
            "shuffle_window": case.window,
            "tail": case.tail,
            "partitions": case.partitions,
            "skips": case.skips,
        }
        loader = {"batch_size": size.batch_size, "num_workers": size.num_workers, "drop_last": case.drop_last}
        reading = Reading(self._urls(case.shards), caches, dataset, loader, **common, **how)
        if case.mix is not None:
            others = [(self._urls(shards), weight) for shards, weight in case.mix.others]
            mix = {"seed": case.seed, "stop": case.mix.stop, "tail": case.tail}
            reading = reading.with_(mixture=(case.mix.weight, others, mix))
        return self._pool.run(str(case), read, size.ranks(), reading)

    def _urls(self, shards: Shards) -> list[str]:
        return [self._shelf.urls[shard] for shard in shards]

    def _compare(self, rank: int, batches: Batches, expected: Batches) -> None:
        for number, (batch, due) in enumerate(zip(batches, expected, strict=False)):
            assert batch == due, f"batch {number} of rank {rank} of {self._case}"
        assert len(batches) == len(expected), f"rank {rank} of {self._case}"

    def _check_refused(self, answers: list[Any], delivered: int) -> None:
        for rank, one in enumerate(answers):
            assert isinstance(one, Failed), f"rank {rank} of {self._case}"
            assert one.kind == "StateError", one.trace
            assert f"after {delivered} samples" in one.message

    def _check_once(self, of_ranks: Sequence[Batches], world_size: int) -> None:
        """Every sample once but for what the tail says. Of mixtures only the model says what that is."""
        case = self._case
        if case.mix is not None:
            return
        given = Counter(key for batches in of_ranks for batch in batches for key in batch)
        every = Counter(key for shard in case.shards for key in KEYS[shard] if not (case.skips and key in BAD))
        assert (given - every).total() < (world_size if case.tail == "pad" else 1), case
        assert given >= every or case.tail == "drop" or case.drop_last, case

    def _check_repeats(self, size: Size, found: list[Read], epoch: int, samples: int) -> None:
        expected = reference.repeat_count(samples, size.world_size, self._case.tail)
        counted = sum(one.stats[epoch]["repeats"] for one in found)
        assert counted == expected or (self._case.drop_last and counted < expected), self._case
