"""DistributedDataParallel, with its sampler: a script for torch's `DataLoader`, with one import changed.

torchrun --nproc-per-node 2 examples/train_ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset

from fastload import DataLoader  # was: from torch.utils.data import DataLoader


def train(epochs: int = 2) -> nn.Module:
    """The trained network, the same on every rank."""
    torch.manual_seed(0)
    points = torch.randn(1000, 8)
    dataset = TensorDataset(points, (points.sum(dim=1) > 0).long())
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=20, sampler=sampler, num_workers=2)
    network = nn.Linear(8, 2)
    trained = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(trained(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            optimizer.step()
        print(f"rank {dist.get_rank()} epoch {epoch} loss {loss.item():.4f}")
    return network


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # without torchrun: a group of one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    train()
    dist.destroy_process_group()
