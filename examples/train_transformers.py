"""transformers' `Trainer`, which makes its loaders itself: `install()` has it make ours.

pip install transformers accelerate && python examples/train_transformers.py     # or torchrun --nproc-per-node 2
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import fastload


class Points(Dataset[dict[str, torch.Tensor]]):
    """On which side of a plane points lie."""

    def __init__(self) -> None:
        self.points = torch.randn(1000, 8)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.points[index], "labels": (self.points[index].sum() > 0).long()}


class Classifier(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder: str = "trained-transformers", **settings: Any) -> nn.Module:
    """The trained network; `settings` are of `TrainingArguments`."""
    torch.manual_seed(0)
    dataset, classifier = Points(), Classifier()
    arguments = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=20, dataloader_num_workers=2, use_cpu=True, **settings
    )
    Trainer(classifier, arguments, train_dataset=dataset).train()
    return classifier.network


if __name__ == "__main__":
    fastload.install()
    train()
