"""Lightning: a module for torch's `DataLoader`, with one import changed. Its samplers are injected as ever.

pip install lightning && python examples/train_lightning.py     # or torchrun --nproc-per-node 2
"""

import os
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastload import DataLoader  # was: from torch.utils.data import DataLoader


class Classifier(lightning.LightningModule):  # type: ignore[misc]  # Lightning is not checked
    """On which side of a plane points lie."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


# torchrun has started so many processes; without it, Lightning starts one.
processes = {
    "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
}


def train(**settings: Any) -> nn.Module:
    """The trained network; `settings` are Lightning's."""
    lightning.seed_everything(0, verbose=False)
    points = torch.randn(1000, 8)
    dataset = TensorDataset(points, (points.sum(dim=1) > 0).long())
    loader = DataLoader(dataset, batch_size=20, shuffle=True, num_workers=2, persistent_workers=True)
    classifier = Classifier()
    lightning.Trainer(accelerator="cpu", **{"max_epochs": 2, **processes, **settings}).fit(classifier, loader)
    return classifier.network


if __name__ == "__main__":
    train()
