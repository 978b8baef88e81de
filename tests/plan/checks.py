"""Promises that hold for a data set and for a mixture; a `world` is a `cluster.Cluster` or a `mixtures.World`."""

from __future__ import annotations

import json
import sys
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from fastload.errors import StateError
from fastload.plan import Position
from tests.plan.cluster import Run

# How counts become known; see `Run.tell_early`.
TOLD = ("wanted", "some", "all")


def saved_and_loaded(position: Position) -> Position:
    read = Position.from_state if position.mixture is None else Position.from_mixture_state
    return read(json.loads(json.dumps(position.to_state())))


def check_resumed_at_another_size(
    world: Any, run: Run, told: str, data: st.DataObject, *, nodes_max: int = 8, ranks_max: int = 24
) -> None:
    """From any batch of `run`, with any change of nodes, ranks and batch size: where a global batch begins there."""
    entries = [entry for entry in run.entries if entry.samples_after <= world.total]
    if not entries:
        return
    entry = data.draw(st.sampled_from(entries))
    start = saved_and_loaded(run.cursor.position(entry))
    other = world.with_(
        nodes=data.draw(st.integers(1, nodes_max)),
        local=data.draw(st.integers(1, 3)),
        batch_size=data.draw(st.sampled_from([1, 2, world.batch_size])),
    )
    delivered, is_endless = entry.samples_after, run.cursor.total is None
    assert is_endless or delivered == min((entry.number + 1) * world.global_batch, world.total)
    if delivered % other.global_batch and (is_endless or delivered < world.total):
        with pytest.raises(StateError, match=f"after {delivered} samples"):
            other.cursor(0, start)
        return
    for rank in range(min(ranks_max, other.world_size)):
        assert other.run(rank, start, told).samples == other.reference_batches(rank, delivered)


def check_workers_share(world: Any, rank: int, worker_count: int, split: str) -> None:
    """Together they have the rank's batches, or its samples, each once, in its order."""
    world = world.with_(drop_last=False)
    expected = world.reference_batches(rank)
    mine = [sample for batch in expected for sample in batch]
    for worker in range(worker_count):
        got = world.run(rank, worker=(worker, worker_count), split=split).samples
        if split == "batches":
            assert got == expected[worker::worker_count]
        else:
            assert [sample for batch in got for sample in batch] == mine[worker::worker_count]


def check_nodes_never_wait_for_ever(world: Any, random: Random) -> None:
    """Each node counts what it opens, and what another wants of the partitions that it reads; nothing else is known."""
    runs = [world.begun(rank) for rank in range(0, world.world_size, world.local)]
    owned = set().union(*map(_owned_by, runs))
    counted: set[tuple[int, int]] = set()
    asked: set[tuple[int, int]] = set()
    going, told = list(runs), 0

    def progress():
        return len(counted), len(asked), told, sum(len(run.opened) for run in runs), len(going)

    while going:
        before = progress()
        counted |= asked & owned
        for run in random.sample(going, len(going)):
            wanted = {source: set(objects.tolist()) for source, objects in run.cursor.counts_wanted.items()}
            asked |= {(source, n) for source, objects in wanted.items() for n in objects}
            if run.is_over:
                going.remove(run)
            elif run.cursor.next_window is not None:
                run.step()
                key = run.opened[-1]
                counted |= {(key.source, n) for n in run.cursor.objects_of(key).tolist()}
            elif wanted:
                for source, objects in wanted.items():
                    known = sorted(n for n in objects if (source, n) in counted)
                    told += len(known)
                    run.add_counts(source, np.array(known, np.int32))
            else:
                run.to_the_end()
                going.remove(run)
        assert progress() != before
    for run in runs:
        assert run.samples == world.reference_batches(run.cursor.ranks.rank)


def _owned_by(run: Run) -> set[tuple[int, int]]:
    """The objects of the partitions that a node reads, in each source."""
    return {
        (number, object_no)
        for number, source in enumerate(run.world.sources)
        for partition, order in enumerate(source.with_(partitions=run.world.partitions).orders)
        if partition in run.cursor.home
        for object_no in order.object_order.tolist()
    }


def calls_of(run: Any) -> int:
    """How many Python functions, and functions of C, a call of `run` calls, by Python's own profiler hook."""
    run()  # what is made once is made
    count = 0

    def hook(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
