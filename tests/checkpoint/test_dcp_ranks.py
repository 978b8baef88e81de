"""torch.distributed.checkpoint with our writer and reader: several ranks, on other meshes than before."""

from __future__ import annotations

import gc
import os
import signal
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastload
from fastload import checkpoint
from fastload.checkpoint import Reader, Writer, attempts, retention
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.writing import images_of
from fastload.client.cache import handle_of
from fastload.errors import CheckpointError, CheckpointExistsError
from fastload.store import StoreOptions, open_store
from tests.checkpoint.test_single import same
from tests.jobs.pool import Failed, Rank, RankError, RankPool
from tests.patience import PATIENCE_S


def place(path: Path) -> Place:
    return Place.of(open_store(str(path), StoreOptions()), str(path))


SHAPES = [(), (3,), (7, 5), (8, 6), (2, 3, 4), (1, 9), (0, 4)]


def whole(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, generator=generator)


def layouts(world_size: int) -> list[tuple[Any, list[Any]]]:
    """Meshes of all ranks, and how tensors lie on them."""
    line = init_device_mesh("cpu", (world_size,))
    found: list[tuple[Any, list[Any]]] = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if world_size % 2 == 0:
        square = init_device_mesh("cpu", (2, world_size // 2))
        found += [
            (square, [Replicate(), Shard(0)]),
            (square, [Shard(0), Shard(1)]),
            (square, [Shard(1), Shard(0)]),
            (square, [Shard(0), Shard(0)]),
        ]
    return found


def dealt(world_size: int, *, saves: bool) -> dict[str, Any]:
    """Each tensor as it lies in each way when it is saved, and in each way when it is loaded: then it has zeros."""
    state: dict[str, Any] = {"plain": {}, "sharded": local_shards(world_size, saves=saves)}
    found = layouts(world_size)
    for number, shape in enumerate(SHAPES):
        content = whole(number, shape)
        state["plain"][str(number)] = content if saves else torch.zeros(shape)
        for saved in range(7):
            for taken in range(7):
                mesh, placements = found[(saved if saves else taken) % len(found)]
                if any(isinstance(each, Shard) and each.dim >= len(shape) for each in placements):
                    placements = [Replicate() for _ in placements]
                tensor = distribute_tensor(content, mesh, placements)
                state[f"{number} {saved} {taken}"] = tensor if saves else torch.zeros_like(tensor)
    return state


def local_shards(world_size: int, *, saves: bool) -> Any:
    """A ShardedTensor of which each rank has two parts that do not lie side by side."""
    rank, count = torch.distributed.get_rank(), 24 // world_size
    rows = whole(99, (48, 3))
    shards = []
    for half in range(2):
        start = count * (rank + half * world_size)
        part = rows[start : start + count].clone() if saves else torch.zeros(count, 3)
        shards.append(LocalShard.from_tensor_and_offsets(part, [start, 0], rank))
    return init_from_local_shards(shards, 48, 3)


def check_dealt(state: dict[str, Any], world_size: int) -> None:
    expected = dealt(world_size, saves=True)
    for name, tensor in dealt(world_size, saves=True).items():
        if isinstance(tensor, DTensor):
            number, _, _ = map(int, name.split())
            have = state[name]
            want = distribute_tensor(whole(number, SHAPES[number]), have.device_mesh, have.placements)
            assert torch.equal(have.to_local(), want.to_local()), name
    same(expected["plain"], state["plain"])
    for one, other in zip(state["sharded"].local_shards(), expected["sharded"].local_shards(), strict=True):
        same(other.tensor, one.tensor)


def save_dealt(rank: Rank, url: str, **options: Any) -> None:
    dcp.save(dealt(rank.world_size, saves=True), storage_writer=Writer(url, overwrite=True), **options)


def load_dealt(rank: Rank, url: str) -> None:
    state = dealt(rank.world_size, saves=False)
    dcp.load(state, storage_reader=Reader(url))
    check_dealt(state, rank.world_size)


def ranks(world_size: int) -> list[Rank]:
    return [Rank(rank, world_size, world_size, "dcp") for rank in range(world_size)]


def run(pool: RankPool, function: Any, world_size: int, *arguments: Any) -> list[Any]:
    found = pool.run(function.__name__, function, ranks(world_size), *arguments)
    failed = [f"rank {rank}: {one.trace}" for rank, one in enumerate(found) if isinstance(one, Failed)]
    assert not failed, failed[0]
    return found


def test_other_ranks_on_other_meshes_load_it(pool: RankPool, tmp_path: Path) -> None:
    url = str(tmp_path / "1")
    run(pool, save_dealt, 4, url)
    for world_size in (2, 3, 1, 4):
        run(pool, load_dealt, world_size, url)
    check_alone(url)


def check_alone(url: str) -> None:
    """One process reads it without torch.distributed.checkpoint."""
    found = checkpoint.load(url, names=["plain", "sharded"])
    same(
        {str(number): whole(number, shape) for number, shape in enumerate(SHAPES)}, dict(sorted(found["plain"].items()))
    )
    same(whole(99, (48, 3)), found["sharded"])


def test_without_collectives(pool: RankPool, tmp_path: Path) -> None:
    """Ranks agree by torch's store who writes what several of them have."""
    run(pool, save_without_collectives, 4, str(tmp_path / "1"))
    check_alone(str(tmp_path / "1"))
    run(pool, load_dealt, 2, str(tmp_path / "1"))


def save_without_collectives(rank: Rank, url: str) -> None:
    for _ in range(2):
        save_dealt(rank, url, use_collectives=False)
    with pytest.raises(CheckpointError if rank.rank else CheckpointExistsError, match="pass overwrite=True"):
        dcp.save({"w": torch.ones(2)}, storage_writer=Writer(url), use_collectives=False)


def test_a_rank_that_fails(pool: RankPool, tmp_path: Path) -> None:
    """All ranks raise, and the checkpoint before is whole."""
    url = str(tmp_path / "1")
    run(pool, save_dealt, 2, url)
    before = attempts.current(place(tmp_path / "1"))
    run(pool, fail, 2, url)
    assert attempts.current(place(tmp_path / "1")) == before
    check_alone(url)
    run(pool, save_dealt, 2, url)
    assert len(list((tmp_path / "1").glob("*/plan.json"))) == 2  # those that have failed are given up


class Failing(dcp.DefaultSavePlanner):
    """Of which rank 1 cannot say what it holds."""

    def resolve_data(self, write_item: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise OSError("no longer there")
        return super().resolve_data(write_item)


def fail(rank: Rank, url: str) -> None:
    writer = Writer(url, overwrite=True)
    with pytest.raises(CheckpointException, match=r"RANK 1(.|\n)*no longer there"):
        dcp.save(dealt(2, saves=True), storage_writer=writer, planner=Failing())
    saving = dcp.async_save(dealt(2, saves=True), storage_writer=writer, planner=Failing())
    with pytest.raises(CheckpointException, match=r"RANK 1(.|\n)*no longer there"):
        saving.result()
    del writer, saving
    gc.collect()


def test_a_rank_that_is_killed(mortals: RankPool, tmp_path: Path) -> None:
    """Of a save in which one has stored its part, and the other has died, nothing is to be seen."""
    url = str(tmp_path / "1")
    run(mortals, save_dealt, 2, url)
    before = attempts.current(place(tmp_path / "1"))
    with pytest.raises(RankError, match="die: EOFError"):
        run(mortals, die, 2, url)
    assert attempts.current(place(tmp_path / "1")) == before
    check_alone(url)
    run(mortals, save_dealt, 2, url)
    assert attempts.current(place(tmp_path / "1")) != before


class Dying(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def die(rank: Rank, url: str) -> None:
    dcp.save(dealt(2, saves=True), storage_writer=Writer(url, overwrite=True), planner=Dying())


def test_fully_sharded_and_tensor_parallel_at_once(pool: RankPool, tmp_path: Path) -> None:
    """Rows that both deal out lie on the ranks in an order of their own."""
    run(pool, save_in_two_ways, 4, str(tmp_path / "1"))
    same({"0.weight": whole(0, (12, 6)), "1.weight": whole(1, (6, 12))}, checkpoint.load(tmp_path / "1")["model"])
    run(pool, load_in_one_way, 3, str(tmp_path / "1"))


def model_of(fill: bool) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(6, 12, bias=False), torch.nn.Linear(12, 6, bias=False))
    for number, layer in enumerate(model):
        layer.weight.data.copy_(whole(number, tuple(layer.weight.shape)) if fill else torch.zeros(layer.weight.shape))
    return model


def save_in_two_ways(rank: Rank, url: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = model_of(True)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in [*model, model]:
        fully_shard(layer, mesh=mesh["data"])
    dcp.save({"model": model.state_dict()}, storage_writer=Writer(url))
    load_model(model, url)


def load_in_one_way(rank: Rank, url: str) -> None:
    model = model_of(False)
    fully_shard(model)
    load_model(model, url)


def load_model(model: torch.nn.Module, url: str) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()
    state = {"model": model.state_dict()}
    dcp.load(state, storage_reader=Reader(url))
    for number, tensor in enumerate(state["model"].values()):
        same(whole(number, tuple(tensor.shape)), tensor.full_tensor())


def test_the_service_carries_what_ranks_save(pool: RankPool, tmp_path: Path) -> None:
    """The call returns when all is in the service's memory, which stores it, commits it, and gives it back."""
    url, cache = str(tmp_path / "1"), str(tmp_path / "cache")
    run(pool, save_to_memory, 2, url, cache)
    same(torch.arange(4.0 * (1 << 20)).reshape(4, -1), checkpoint.load(url)["w"])


def save_to_memory(rank: Rank, url: str, directory: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    rows = torch.arange(4.0 * (1 << 20)).reshape(4, -1)
    w = distribute_tensor(rows, mesh, [Shard(0)])
    with fastload.Cache(directory, ram_bytes="1MiB", disk_bytes="1MiB", chunk_bytes="64KiB") as cache:
        for save in (dcp.save, dcp.async_save, dcp.async_save, dcp.async_save):  # of which the last uses memory again
            writer = Writer(url, until="memory", overwrite=True, cache=cache)
            alike = {str(number): torch.full((1 << 18,), float(number)) for number in range(8)}
            future = save({"step": torch.tensor(7), "w": w, "alike": alike}, storage_writer=writer)
            if save is dcp.async_save:
                future.result()
            assert writer.saving is not None
            writer.saving.wait("store", PATIENCE_S)
            torch.distributed.barrier()
        for path in Path(url).glob("*/*.safetensors"):  # the store has lost its bytes, and the service has them still
            path.write_bytes(bytes(path.stat().st_size))
        torch.distributed.barrier()
        state = {"w": torch.zeros(4, 1 << 20), "alike": {str(number): torch.zeros(1 << 18) for number in range(8)}}
        dcp.load(state, storage_reader=Reader(url, cache=cache))
        assert torch.equal(state["w"], rows)
        assert all(torch.equal(state["alike"][name], alike[name]) for name in alike)
        torch.distributed.barrier()
        if rank.rank == 0:
            dcp.save({"w": rows}, storage_writer=Writer(url, overwrite=True, cache=cache), no_dist=True)
        torch.distributed.barrier()
    writer.close()


def test_what_the_step_before_has_is_not_stored_again(pool: RankPool, tmp_path: Path) -> None:
    """Each rank refers to what any rank of the step before has stored, also on another mesh; and to nothing of a step
    that was deleted since this save has begun.
    """
    steps = checkpoint.Run(tmp_path, keep=checkpoint.Keep(last=1))
    for step, world_size, options in (
        (1, 4, {}),
        (2, 4, {}),
        (3, 2, {}),
        (4, 2, {"use_collectives": False}),
        (5, 2, {"planner": Deleting(str(tmp_path / "4"))}),
    ):
        before = stored(tmp_path)
        run(pool, save_again, world_size, str(tmp_path / str(step)), step, options)
        if step in (2, 4):
            # Of 24 MiB one row has changed, and what is smaller than a piece.
            assert stored(tmp_path) - before < (2 << 20)
        found = checkpoint.load(tmp_path / str(step))
        expected = big(step)
        assert torch.equal(found["rows"], expected)
        assert torch.equal(found["alike"], expected)
        assert len(list((tmp_path / str(step)).glob("*/plan.json"))) == 1
        if step < 4:
            steps.prune(grace_s=0.0)
        assert steps.latest() == step
    assert steps.steps() == [3, 5]
    current = attempts.current(place(tmp_path / "5"))
    assert current is not None
    assert current.manifest is not None
    assert current.manifest.refers == ()


def stored(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.safetensors"))


def big(step: int) -> torch.Tensor:
    rows = torch.arange(3.0 * (1 << 20)).reshape(64, -1)
    rows[17] += step
    return rows


def save_again(rank: Rank, url: str, step: int, options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (rank.world_size,))
    state = {"rows": distribute_tensor(big(step), mesh, [Shard(0)]), "alike": big(step), "step": torch.tensor(step)}
    save = dcp.save if step % 2 else dcp.async_save
    saving = save(state, storage_writer=Writer(url, dedup=True), **options)
    if save is dcp.async_save:
        saving.result()
    with handle_of(None):
        torch.distributed.barrier()


class Deleting(dcp.DefaultSavePlanner):
    """Deletes a step once all ranks have their plans."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def finish_plan(self, new_plan: Any) -> Any:
        if torch.distributed.get_rank() == 0:
            with attempts.opened(self.step, None) as place:
                retention.remove(place)
        torch.distributed.barrier()
        return super().finish_plan(new_plan)


def test_plans_that_are_kept(pool: RankPool, tmp_path: Path) -> None:
    """A planner hands over the plan of an earlier save, which was another attempt's."""
    run(pool, save_with_kept_plans, 2, str(tmp_path))
    for number in range(3):
        same(torch.full((4,), float(number)), checkpoint.load(tmp_path / str(number))["w"])


def save_with_kept_plans(rank: Rank, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for number in range(3):
        state = {"w": distribute_tensor(torch.full((4,), float(number)), mesh, [Shard(0)])}
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=Writer(f"{folder}/{number}"), planner=planner)


def test_a_process_saves(mortals: RankPool, tmp_path: Path) -> None:
    """Thousands of tensors take one descriptor to another process, and may change as soon as the call returns."""
    run(mortals, save_by_process, 2, str(tmp_path))
    for number in range(3):
        found = checkpoint.load(tmp_path / str(number))
        same(torch.arange(24.0).reshape(8, 3) + number, found["w"])
        assert found["others"]["1999"].tolist() == [1999 + number]
        assert found["step"] == number
        for name in ("large", "alike") if number else ():
            assert torch.equal(found[name], torch.arange(5.0 * (1 << 20)).reshape(1 << 20, 5) + number)


def save_by_process(rank: Rank, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for number in range(3):
        w = distribute_tensor(torch.arange(24.0).reshape(8, 3) + number, mesh, [Shard(0)])
        others = {str(name): torch.tensor([float(name + number)]) for name in range(2000)}
        state = {"w": w, "others": others, "step": number}
        if number:  # which is too much to go straight to the store: the process hands on what it was sent
            large = torch.arange(5.0 * (1 << 20)).reshape(1 << 20, 5) + number
            state |= {"large": distribute_tensor(large, mesh, [Shard(0)]), "alike": large.clone()}
        saving = dcp.async_save(
            state,
            storage_writer=Writer(f"{folder}/{number}"),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        assert len(os.listdir("/proc/self/fd")) < 100
        w.to_local().zero_()
        others["1999"].zero_()
        if number:
            state["large"].to_local().zero_()
            state["alike"].zero_()
        saving.result()
    with handle_of(None) as handle:
        assert len(images_of(handle)._images) == 1  # since it was taken back
    _async_process_executor._CHECKPOINT_PROCESS = None  # whose finalizer ends the process
    resource_sharer.stop()  # the thread of multiprocessing's that has sent the descriptors


def test_what_torch_saved_in_several_ranks(pool: RankPool, tmp_path: Path) -> None:
    run(pool, save_by_torch, 4, str(tmp_path))
    for world_size in (3, 4):
        run(pool, load_dealt, world_size, str(tmp_path / "1"))
    check_alone(str(tmp_path / "1"))
    run(pool, load_own, 4, str(tmp_path / "2"))


def save_by_torch(rank: Rank, folder: str) -> None:
    dcp.save(dealt(rank.world_size, saves=True), storage_writer=dcp.FileSystemWriter(f"{folder}/1"))
    state = {"w": torch.full((3,), float(rank.rank))}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{folder}/2"), use_collectives=False)


def load_own(rank: Rank, url: str) -> None:
    """What each rank has saved without the others."""
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=Reader(url))
    assert state["w"].tolist() == [rank.rank] * 3


def test_fully_sharded_models(pool: RankPool, tmp_path: Path) -> None:
    """From four ranks to two, and on to three: the same losses as one that was never saved."""
    losses = run(pool, train, 4, str(tmp_path / "1"), None)[0]
    losses += run(pool, train, 2, str(tmp_path / "2"), str(tmp_path / "1"))[0]
    losses += run(pool, train, 3, str(tmp_path / "3"), str(tmp_path / "2"))[0]
    alone = run(pool, train, 1, str(tmp_path / "4"), None, 6)[0]
    assert losses == pytest.approx(alone, rel=1e-4)
    trained, other = checkpoint.load(tmp_path / "3"), checkpoint.load(tmp_path / "4")
    assert trained["step"] == other["step"] == 6
    for name, weight in other["model"].items():
        torch.testing.assert_close(trained["model"][name], weight)


def train(rank: Rank, url: str, begins: str | None, steps: int = 2) -> list[float]:
    """So many steps with the same batch, of which each rank takes a part."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 5))
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    if begins is not None:
        dcp.load(state, storage_reader=Reader(begins))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    batch = whole(1, (12, 6)).chunk(rank.world_size)[rank.rank]
    losses = []
    for _ in range(steps):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / rank.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": state["step"] + steps}
    saving = dcp.async_save(state, storage_writer=Writer(url))
    for parameter in model.parameters():
        parameter.data.zero_()
    saving.result()
    return losses
