"""accelerate, which makes a loader of its own of the one that it is given: `install()` has it make ours.

pip install accelerate && accelerate launch examples/train_accelerate.py     # or torchrun --nproc-per-node 2, or python
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastload


def train(accelerator: Accelerator, epochs: int = 2) -> nn.Module:
    """The trained network, the same in every process."""
    torch.manual_seed(0)
    points = torch.randn(1000, 8)
    dataset = TensorDataset(points, (points.sum(dim=1) > 0).long())
    network = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loader = DataLoader(dataset, batch_size=20, shuffle=True, num_workers=2)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for epoch in range(epochs):
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(network(inputs), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch} loss {loss.item():.4f}")
    trained: nn.Module = accelerator.unwrap_model(network)
    return trained


if __name__ == "__main__":
    fastload.install()
    accelerator = Accelerator(cpu=True)
    train(accelerator)
    accelerator.end_training()
