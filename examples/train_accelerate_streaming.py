"""accelerate over shards in object storage: the data set divides itself among the processes, so its loader is not
prepared; it is registered, so that accelerate's checkpoints hold where it is. Run again, it goes on there.

    pip install accelerate
    SHARDS='s3://bucket/points-{000000..000099}.tar' accelerate launch examples/train_accelerate_streaming.py

A sample is a point, `KEY.npy` (8 float32), and its class, `KEY.cls` (digits).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import fastload


def train(
    accelerator: Accelerator,
    shards: str,
    folder: str = "trained-accelerate",
    epochs: int = 3,
    save_every: int = 100,
    on_step: Callable[[int, torch.Tensor], None] = lambda epoch, points: None,
) -> nn.Module:
    """The trained network, the same in every process."""
    torch.manual_seed(0)
    decode = {"npy": fastload.decode.array(8, "float32"), "cls": fastload.decode.integer()}
    dataset = fastload.StreamingDataset(shards, shuffle=True, decode=decode, as_tuple=True)
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_size=4, num_workers=2)
    network: nn.Module = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network, optimizer = accelerator.prepare(network, optimizer)
    accelerator.register_for_checkpointing(loader)  # its state is the same in every process
    if Path(folder).exists():
        accelerator.load_state(folder)
    step = 0
    for epoch in range(loader.state_dict()["epoch"], epochs):
        for points, labels in loader:
            points, labels = points.to(accelerator.device), labels.to(accelerator.device)
            loss = nn.functional.cross_entropy(network(points), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % save_every == 0:
                accelerator.save_state(folder)
            on_step(epoch, points)
        accelerator.print(f"epoch {epoch} loss {loss.item():.4f}")
    loader.close()
    trained: nn.Module = accelerator.unwrap_model(network)
    return trained


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    train(accelerator, os.environ.get("SHARDS", "s3://bucket/points-{000000..000099}.tar"))
    accelerator.end_training()
