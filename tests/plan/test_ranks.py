"""Where rank and world size come from, and what follows for counts."""

from __future__ import annotations

import pytest

from fastload.errors import ConfigError
from fastload.plan import (
    Ranks,
    batch_count_of_rank,
    check_tail,
    default_partitions,
    resolve_ranks,
    sample_count_of_rank,
    turn_of,
)
from tests.programs import run

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_single_process_by_default():
    assert resolve_ranks(environ={}) == Ranks(0, 1, 0, 1)


def test_the_launchers_environment():
    assert resolve_ranks(environ=TORCHRUN) == Ranks(5, 8, 1, 4)
    assert resolve_ranks(environ={"RANK": "5", "WORLD_SIZE": "8"}) == Ranks(5, 8, 5, 8)


def test_other_launchers_say_which_ranks_share_a_node():
    mpi = {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    }
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    for environ in (mpi, slurm):
        assert resolve_ranks(5, 8, environ) == Ranks(5, 8, 1, 4)
        assert resolve_ranks(environ={"RANK": "5", "WORLD_SIZE": "8", **environ}) == Ranks(5, 8, 1, 4)
        assert resolve_ranks(1, 2, environ) == Ranks(1, 2, 1, 2)
        assert resolve_ranks(environ=environ) == Ranks()  # a single process in an allocation
    uneven = {**slurm, "SLURM_STEP_TASKS_PER_NODE": "4,3,1", "SLURM_NODEID": "1"}
    assert resolve_ranks(5, 8, uneven) == Ranks(5, 8, 1, 3)
    for broken in ({"SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, {"SLURM_NODEID": "2"}):
        with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE="):
            resolve_ranks(5, 8, {**slurm, **broken})


def test_the_process_environment_is_read_by_default(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert resolve_ranks() == Ranks(5, 8, 1, 4)


def test_explicit_values_win_and_the_node_is_only_believed_about_the_same_ranks():
    assert resolve_ranks(5, 8, TORCHRUN) == Ranks(5, 8, 1, 4)
    assert resolve_ranks(1, 2, TORCHRUN) == Ranks(1, 2, 1, 2)  # data-parallel ranks of their own
    assert resolve_ranks(1, 2, {}) == Ranks(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((0, None), {}, "rank is set but world_size is not"),
        ((None, 2), {}, "world_size is set but rank is not"),
        ((None, None), {"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ((None, None), {"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ((None, None), {"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is not an integer"),
        ((2, 2), {}, "rank=2 must be from 0 to 1, since world_size=2"),
        ((-1, 2), {}, "rank=-1 must be from 0 to 1"),
        ((0, 0), {}, "world_size=0 must be at least 1"),
        ((None, None), {**TORCHRUN, "LOCAL_RANK": "4"}, "local_rank=4 must be from 0 to 3"),
        ((None, None), {**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "local_world_size=9 is above world_size=8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, environ, message):
    with pytest.raises(ConfigError, match=message):
        resolve_ranks(*arguments, environ=environ)


def test_torch_distributed_is_asked_where_it_is_initialised():
    """In a process of its own, since a process group is for the whole process."""
    program = """
import torch.distributed as distributed
from fastload.plan import Ranks, resolve_ranks
assert resolve_ranks(environ={}) == Ranks()
store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
assert resolve_ranks(environ={"RANK": "1", "WORLD_SIZE": "4"}) == Ranks(0, 1, 0, 1)
assert resolve_ranks(1, 3, {}) == Ranks(1, 3, 1, 3)
distributed.destroy_process_group()
"""
    run(program)


def test_counts_of_a_rank():
    def counts(total, tail):
        return [sample_count_of_rank(total, Ranks(r, 4, r, 4), tail) for r in range(4)]

    assert counts(10, "pad") == [3, 3, 3, 3]
    assert counts(10, "drop") == [2, 2, 2, 2]
    assert counts(10, "uneven") == [3, 3, 2, 2]
    assert counts(8, "pad") == counts(8, "drop") == counts(8, "uneven") == [2, 2, 2, 2]
    assert counts(0, "pad") == [0, 0, 0, 0]
    assert batch_count_of_rank(10, Ranks(), "pad", 4, drop_last=False) == 3
    assert batch_count_of_rank(10, Ranks(), "pad", 4, drop_last=True) == 2


def test_an_unknown_tail_is_refused():
    with pytest.raises(ConfigError, match="tail='cut' must be 'pad', 'drop' or 'uneven'"):
        check_tail("cut")


def test_replicas_read_the_same_samples():
    assert resolve_ranks(environ=TORCHRUN, replicas=2) == Ranks(2, 4, 0, 2)
    assert resolve_ranks(environ=TORCHRUN, replicas=4) == Ranks(1, 2, 0, 1)
    assert resolve_ranks(environ=TORCHRUN, replicas=8) == Ranks()
    assert resolve_ranks(5, 6, {}, replicas=3) == Ranks(1, 2, 1, 2)
    groups = [Ranks(rank, 16, rank % 4, 4).with_replicas(8) for rank in range(16)]
    assert groups == [Ranks(0, 2, 0, 1)] * 8 + [Ranks(1, 2, 0, 1)] * 8


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (0, "replicas=0 must divide world_size=8"),
        (3, "replicas=3 must divide world_size=8"),
        (16, "replicas=16 must divide world_size=8"),
    ],
)
def test_replicas_that_do_not_fit_are_refused(replicas, message):
    with pytest.raises(ConfigError, match=message):
        resolve_ranks(environ=TORCHRUN, replicas=replicas)
    with pytest.raises(ConfigError, match="replicas=4 neither divides local_world_size=6 nor"):
        Ranks(0, 12, 0, 6).with_replicas(4)


def test_a_partition_a_node_by_default():
    assert default_partitions(Ranks()) == 1
    assert default_partitions(Ranks(5, 8, 1, 4)) == 2
    assert default_partitions(Ranks(0, 1024, 0, 8)) == 128


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 6, 8, 64])
@pytest.mark.parametrize(("nodes", "local"), [(1, 4), (2, 3), (6, 1), (8, 2), (12, 1)])
def test_every_turn_is_one_ranks(nodes, local, partitions):
    world = [Ranks(rank, nodes * local, rank % local, local) for rank in range(nodes * local)]
    turns = [turn_of(ranks, partitions) for ranks in world]
    assert sorted(turns) == list(range(nodes * local))
    if partitions == 1 or nodes == 1:
        assert turns == list(range(nodes * local))
    if partitions % nodes == 0:
        assert [turn % nodes for turn in turns] == [ranks.rank // local for ranks in world]
