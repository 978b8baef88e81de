"""Tensor parallelism: ranks that hold parts of one model read the same samples, and groups of them read others.

    SHARDS='s3://bucket/train-{000000..000099}.tar' torchrun --nproc-per-node 4 examples/device_mesh.py

Four processes are a mesh of two by two: two data-parallel groups ("dp") of two ranks that share a model ("tp"). Two
processes are one group, and one has the model to itself. All that the data set must know is how many ranks read the
same: `replicas`, the size of the mesh's inner dimension. It needs no GPU. S3 is configured as for any other tool, by
the AWS_* variables or a profile; a sample is one member `KEY.jpg` and one `KEY.cls` (the label, as digits) in a shard.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastload

# Settings -------------------------------------------------------------------------------------------------------------

shards = os.environ.get("SHARDS", "s3://bucket/imagenet/train-{000000..001023}.tar")
cache_dir = os.environ.get("FASTLOAD_CACHE", "/nvme/fastload")  # a folder on a local disk, best NVMe
class_count = int(os.environ.get("CLASSES", "1000"))
batch_size = int(os.environ.get("BATCH", "32"))  # of each data-parallel group
image_size = 32

# Mesh -----------------------------------------------------------------------------------------------------------------

if "RANK" not in os.environ:  # without torchrun: a group of one
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
world_size = int(os.environ.get("WORLD_SIZE", "1"))
tp_size = min(2, world_size)  # how many ranks share a model
if world_size % tp_size:
    raise SystemExit(f"{world_size} processes are not groups of {tp_size}: start another number of them")
mesh = init_device_mesh("cpu", (world_size // tp_size, tp_size), mesh_dim_names=("dp", "tp"))
dp, tp = mesh["dp"], mesh["tp"]

# Data: ranks that follow one another in the inner dimension are one group ---------------------------------------------

cache = fastload.Cache(cache_dir)
dataset = fastload.StreamingDataset(
    shards,
    cache=cache,
    shuffle=True,
    replicas=tp.size(),
    decode={"jpg": fastload.decode.image(size=image_size), "cls": fastload.decode.integer()},
)
loader = fastload.DataLoader[dict[str, Any]](dataset, batch_size=batch_size, num_workers=2)

# Model: each rank of a group holds its part of the hidden units -------------------------------------------------------

torch.manual_seed(0)
network: nn.Module = nn.Sequential(
    nn.Flatten(), nn.Linear(3 * image_size**2, 64), nn.ReLU(), nn.Linear(64, class_count)
)
network = parallelize_module(network, tp, {"1": ColwiseParallel(), "3": RowwiseParallel()})
optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)


def average_over_groups() -> None:
    """Each group has seen other samples: the gradient is that of all of them."""
    for parameter in network.parameters():
        gradient = parameter.grad
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(local, group=dp.get_group())
        local /= dp.size()


# Training -------------------------------------------------------------------------------------------------------------

place = f"dp {dp.get_local_rank()} tp {tp.get_local_rank()}"
for step, batch in enumerate(loader):
    loss = nn.functional.cross_entropy(network(batch["jpg"].float()), batch["cls"])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
    average_over_groups()
    optimizer.step()
    if step == 0:
        print(f"{place} begins with {batch['__key__'][0]}, loss {loss.item():.4f}", flush=True)

print(f"{place} has read {loader.stats()['samples']} samples, loss {loss.item():.4f}", flush=True)
loader.close()
cache.close()
dist.destroy_process_group()
