"""A model that is sharded over all processes, killed at any time, and resumed with any number of them.

    SHARDS='s3://bucket/train-{000000..000099}.tar' CHECKPOINTS=s3://bucket/run \
        torchrun --nproc-per-node 4 examples/train_resume.py
    (a preempted machine, kill -9)
    the same with --nproc-per-node 2

Each process saves its part of model and optimizer, and reads what it needs of them, whatever number of processes has
saved; the loader's state is in the same checkpoint. A step is there once all of it is: what was under way when the job
was killed is no step. Training waits for the copy of the state, and for the save before if that is not done by then.

S3 is configured as for any other tool, by the AWS_* variables or a profile; a sample is one member `KEY.jpg` and one
`KEY.cls` (the label, as digits) in a shard.
"""

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.fsdp import fully_shard

import fastload
from fastload import checkpoint

# Settings -------------------------------------------------------------------------------------------------------------

shards = os.environ.get("SHARDS", "s3://bucket/imagenet/train-{000000..001023}.tar")
cache_dir = os.environ.get("FASTLOAD_CACHE", "/nvme/fastload")  # a folder on a local disk, best NVMe
run = checkpoint.Run(os.environ.get("CHECKPOINTS", "s3://bucket/run"), keep=checkpoint.Keep(last=3))
class_count = int(os.environ.get("CLASSES", "1000"))
epochs = int(os.environ.get("EPOCHS", "3"))
global_batch = int(os.environ.get("GLOBAL_BATCH", "256"))
save_every = int(os.environ.get("SAVE_EVERY", "100"))  # steps
image_size = 32

# Processes ------------------------------------------------------------------------------------------------------------

dist.init_process_group("gloo")  # on GPUs "nccl"
# Saves have a group of their own: they are made in a thread, and must not get between what the training sends.
saves = dist.new_group(backend="gloo")
world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
if global_batch % world_size:
    raise SystemExit(f"GLOBAL_BATCH={global_batch} cannot be shared by {world_size} processes: make it a multiple")

# Data -----------------------------------------------------------------------------------------------------------------

cache = fastload.Cache(cache_dir)
dataset = fastload.StreamingDataset(
    shards,
    cache=cache,
    shuffle=True,
    partitions=8,  # for 1, 2, 4 and 8 nodes
    decode={"jpg": fastload.decode.image(size=image_size), "cls": fastload.decode.integer()},
)
loader: fastload.DataLoader[dict[str, Any]] = fastload.DataLoader(
    dataset, batch_size=global_batch // world_size, num_workers=2
)

# Model ----------------------------------------------------------------------------------------------------------------

torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 64), nn.Tanh(), nn.Linear(64, class_count))
fully_shard(network)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)


def state_at(step: int) -> dict[str, Any]:
    """What a checkpoint holds. The loader's state, the same on every rank, is of JSON's own types, and kept as text."""
    model_state, optimizer_state = get_state_dict(network, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "loader": json.dumps(loader.state_dict()), "step": step}


# Go on where the last run was saved -----------------------------------------------------------------------------------

step, first_epoch = 0, 0
newest = run.latest()
if newest is not None:
    state = state_at(0)
    load(state, storage_reader=checkpoint.Reader(run.step_url(newest)))
    set_state_dict(network, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loader_state = json.loads(state["loader"])
    loader.load_state_dict(loader_state)
    step, first_epoch = state["step"], loader_state["epoch"]
    if is_first:
        print(f"{run.step_url(newest)}: goes on after step {step}, in epoch {first_epoch} of {epochs}", flush=True)

# Training -------------------------------------------------------------------------------------------------------------

saving: Any = None  # the future of the save that was begun last


def save() -> None:
    """Begin to save this step; training goes on as soon as the state is copied."""
    global saving
    finish_saving()
    writer = checkpoint.Writer(run.step_url(step), overwrite=True)
    saving = async_save(state_at(step), storage_writer=writer, process_group=saves)


def finish_saving() -> None:
    """Wait for it, and let old steps go."""
    if saving is not None:
        saving.result()
        if is_first:
            run.prune()


for epoch in range(first_epoch, epochs):
    for batch in loader:
        loss = nn.functional.cross_entropy(network(batch["jpg"].float() / 255), batch["cls"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        optimizer.step()
        step += 1
        mean_loss = loss.detach() / world_size
        dist.all_reduce(mean_loss)
        if is_first:
            print(f"epoch {epoch} step {step} loss {mean_loss.item():.4f}", flush=True)
        if step % save_every == 0:
            save()

save()
finish_saving()
loader.close()
cache.close()
dist.destroy_process_group()
