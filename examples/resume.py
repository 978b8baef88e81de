"""Stop a training at any time, and go on with any number of processes: the same batches as if nothing had been.

    SHARDS='s3://bucket/train-{000000..000099}.tar' torchrun --nproc-per-node 4 examples/resume.py
    (Ctrl-C, a preempted machine, kill -9)
    SHARDS='s3://bucket/train-{000000..000099}.tar' torchrun --nproc-per-node 2 examples/resume.py

Three things make it so: the loader's state is saved with the model's, in one file; a global batch has the same size
for any number of processes, so that each has its part of it; and `partitions` says into how many parts the data
is dealt, where otherwise the number of nodes would. An epoch's last batch may be short and shared unevenly, and DDP
takes the mean of the ranks' means: where the last digit counts, give the loader `drop_last=True`.

`python examples/resume.py` is one process. S3 is configured as for any other tool, by the AWS_* variables or a profile;
a sample is one member `KEY.jpg` and one `KEY.cls` (the label, as digits) in a shard.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastload

# Settings -------------------------------------------------------------------------------------------------------------

shards = os.environ.get("SHARDS", "s3://bucket/imagenet/train-{000000..001023}.tar")
cache_dir = os.environ.get("FASTLOAD_CACHE", "/nvme/fastload")  # a folder on a local disk, best NVMe
checkpoint_path = Path(os.environ.get("CHECKPOINT", "resume.pt"))  # where all nodes see it
class_count = int(os.environ.get("CLASSES", "1000"))
epochs = int(os.environ.get("EPOCHS", "3"))
global_batch = int(os.environ.get("GLOBAL_BATCH", "256"))
save_every = int(os.environ.get("SAVE_EVERY", "100"))  # steps
image_size = 32

# Processes ------------------------------------------------------------------------------------------------------------

if "RANK" in os.environ:
    dist.init_process_group("gloo")
world_size = dist.get_world_size() if dist.is_initialized() else 1
is_first = not dist.is_initialized() or dist.get_rank() == 0
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
network: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, class_count))
optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
trained = DistributedDataParallel(network) if dist.is_initialized() else network

# Go on where the last run was saved -----------------------------------------------------------------------------------

step, first_epoch = 0, 0
if checkpoint_path.exists():
    checkpoint = torch.load(checkpoint_path, weights_only=True)
    network.load_state_dict(checkpoint["network"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    loader.load_state_dict(checkpoint["loader"])
    step, first_epoch = checkpoint["step"], checkpoint["loader"]["epoch"]
    if is_first:
        print(f"{checkpoint_path}: goes on after step {step}, in epoch {first_epoch} of {epochs}", flush=True)


def save() -> None:
    """Write a checkpoint, in full or not at all. The loader's state is the same on every rank."""
    part = checkpoint_path.with_suffix(".part")
    state = {
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": loader.state_dict(),
    }
    torch.save(state, part)
    part.replace(checkpoint_path)


def over_all_ranks(value: torch.Tensor) -> float:
    """The mean over all processes."""
    mean = value.detach() / world_size
    if dist.is_initialized():
        dist.all_reduce(mean)
    return mean.item()


# Training -------------------------------------------------------------------------------------------------------------

for epoch in range(first_epoch, epochs):
    for batch in loader:
        loss = nn.functional.cross_entropy(trained(batch["jpg"].float()), batch["cls"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        optimizer.step()
        step += 1
        mean_loss = over_all_ranks(loss)
        if is_first:
            print(f"epoch {epoch} step {step} loss {mean_loss:.4f}", flush=True)
            if step % save_every == 0:
                save()

if is_first:
    save()
loader.close()
cache.close()
if dist.is_initialized():
    dist.destroy_process_group()
