"""Which samples come, in which order: of the plan, by object and sample number; of loaders, by key."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastload
from tests.golden.doors import Position
from tests.golden.texts import digest
from tests.golden.world import MIXTURES, data_set, mixture, world
from tests.plan.cluster import Cluster
from tests.plan.mixtures import World

SIZES = (100, 37, 0, 64, 250, 90, 12, 75, 130, 41, 88)
COUNTS = (30, 11, 0, 21, 55, 28, 1, 22, 40, 13, 27)

# Partitions, nodes, ranks of a node, batch size.
LAYOUTS = ((1, 1, 1, 4), (1, 1, 2, 3), (2, 2, 2, 3), (4, 2, 1, 5), (3, 2, 1, 2))


def record(folder: Path) -> dict[str, Any]:
    """All orders. `folder` is for shards and cache."""
    return {kind: record_kind(folder, kind) for kind in KINDS}


def record_kind(folder: Path, kind: str) -> dict[str, Any]:
    """Those of one kind, by what they are of."""
    return json.loads(json.dumps(dict(KINDS[kind](folder))))


def _plans(_: Path) -> Iterator[tuple[str, Any]]:
    for shuffle, (seed, epoch), layout in itertools.product(
        ("none", "window", "shards", "global"), ((0, 0), (0, 1), (7, 0), (7, 3)), LAYOUTS
    ):
        if shuffle == "none" and (seed, epoch) != (7, 3):
            continue  # these are the same
        cluster = _cluster(layout, shuffle=shuffle, seed=seed, epoch=epoch)
        yield f"{shuffle} seed={seed} epoch={epoch} {_of(layout)}", _summary(_all_ranks(cluster))
    for tail, drop_last, layout in itertools.product(("pad", "drop", "uneven"), (False, True), LAYOUTS):
        cluster = _cluster(layout, seed=3, tail=tail, drop_last=drop_last)
        yield f"tail={tail} drop_last={drop_last} {_of(layout)}", _summary(_all_ranks(cluster))
    for window_bytes in (1, 60, 10_000):
        yield f"window_bytes={window_bytes}", _summary(_all_ranks(_cluster(LAYOUTS[2], window_bytes=window_bytes)))


def _workers(_: Path) -> Iterator[tuple[str, Any]]:
    for shuffle, split in itertools.product(("window", "global"), ("batches", "samples")):
        cluster = _cluster(LAYOUTS[2], shuffle=shuffle, seed=5)
        batches = [cluster.run(1, worker=(worker, 3), split=split).samples for worker in range(3)]
        yield f"{shuffle} split={split}", _summary(batches)


def _resumed(_: Path) -> Iterator[tuple[str, Any]]:
    """After three batches, at the size that they were made at and at another with global batches of the same size."""
    for shuffle, layout in itertools.product(("none", "window", "shards", "global"), LAYOUTS):
        cluster = _cluster(layout, shuffle=shuffle, seed=2, epoch=1)
        at_once = cluster.with_(nodes=1, local=1, batch_size=cluster.global_batch)
        run = cluster.run()
        state = run.cursor.position(run.entries[2]).to_state()
        start = Position.from_state(json.loads(json.dumps(state)))
        rests = {"rest": _summary(_all_ranks(cluster, start)), "rest at one rank": _summary(_all_ranks(at_once, start))}
        yield f"{shuffle} {_of(layout)}", {"state": state, **rests}


def _mixtures(_: Path) -> Iterator[tuple[str, Any]]:
    for stop, (seed, epoch), layout in itertools.product(("first", "all", "never"), ((0, 0), (7, 2)), LAYOUTS):
        mixed = _mixed(stop, layout, seed=seed, epoch=epoch)
        runs = [mixed.run(rank).samples for rank in range(mixed.world_size)]
        yield f"{stop} seed={seed} epoch={epoch} {_of(layout)}", _summary(runs)


def _mixtures_resumed(_: Path) -> Iterator[tuple[str, Any]]:
    for stop, layout in itertools.product(("first", "all", "never"), LAYOUTS):
        mixed = _mixed(stop, layout, seed=1, epoch=1)
        run = mixed.run()
        state = run.cursor.position(run.entries[2]).to_state()
        start = Position.from_mixture_state(json.loads(json.dumps(state)))
        rest = [mixed.run(rank, start).samples for rank in range(mixed.world_size)]
        yield f"{stop} {_of(layout)}", {"state": state, "rest": _summary(rest)}


def _cluster(layout: tuple[int, ...], **options: Any) -> Cluster:
    partitions, nodes, local, batch_size = layout
    of = {"partitions": partitions, "nodes": nodes, "local": local, "batch_size": batch_size, "window_bytes": 200}
    return Cluster(SIZES, COUNTS, **{**of, **options})


def _mixed(stop: str, layout: tuple[int, ...], **options: Any) -> World:
    partitions, nodes, local, batch_size = layout
    sources = (
        Cluster(SIZES, COUNTS, window_bytes=200, seed=4),
        Cluster(SIZES[:4], COUNTS[:4], shuffle="shards", seed=1),
        Cluster(SIZES[4:8], COUNTS[4:8], shuffle="none"),
    )
    weights = (((0, 3.0),), ((0, 1.0), (60, 0.5)), ((0, 0.7),))
    return World(sources, weights, stop, partitions, nodes, local, batch_size, **options)


def _all_ranks(cluster: Cluster, start: Position | None = None) -> list[Any]:
    return [run.samples for run in cluster.runs(start)]


def _of(layout: tuple[int, ...]) -> str:
    return "partitions={} nodes={} local={} batch_size={}".format(*layout)


def _summary(ranks: list[Any]) -> dict[str, Any]:
    """The batches of each rank or worker."""
    first = [sample for batch in ranks[0] for sample in batch][:3]
    counts = [sum(map(len, batches)) for batches in ranks]
    return {"digest": digest(ranks), "samples": counts, "first": [list(sample) for sample in first]}


# The same through the public names


def _loaders(folder: Path) -> Iterator[tuple[str, Any]]:
    with world(folder) as cache:
        for shuffle, seed in ((False, 0), *itertools.product((True, "shards", "global"), (0, 9))):
            for rank, world_size in ((0, 1), (1, 2)):
                dataset = data_set(cache, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
                yield f"shuffle={shuffle} seed={seed} rank={rank} of {world_size}", _epochs(dataset, 2)
        for options in (
            {"tail": "drop", "rank": 2, "world_size": 4, "partitions": 2},
            {"tail": "uneven", "rank": 3, "world_size": 4, "partitions": 2},
            {"rank": 3, "world_size": 4, "replicas": 2},
            {"partitions": 3, "shuffle_window": "auto"},
        ):
            dataset = data_set(cache, shuffle=True, seed=2, **options)
            yield ", ".join(f"{name}={value}" for name, value in options.items()), _epochs(dataset, 1)
        for options in MIXTURES:
            yield f"mixture {options}", _epochs(mixture(cache, **options), 2)
        for options in ({"num_workers": 2}, {"num_workers": 2, "workers": "side"}):
            dataset = data_set(cache, shuffle=True, seed=9)
            yield ", ".join(f"{name}={value}" for name, value in options.items()), _epochs(dataset, 1, **options)


def _epochs(dataset: Any, count: int, **options: Any) -> list[Any]:
    with fastload.DataLoader(dataset, batch_size=4, **options) as loader:
        epochs = []
        for _ in range(count):
            keys = [list(batch["__key__"]) for batch in itertools.islice(loader, 40)]
            epochs.append({"digest": digest(keys), "batches": len(keys), "first": keys[0]})
        return epochs


KINDS = {
    "plan": _plans,
    "plan of workers": _workers,
    "plan resumed": _resumed,
    "mixture": _mixtures,
    "mixture resumed": _mixtures_resumed,
    "loader": _loaders,
}
