"""Lightning over shards in object storage: the data set divides itself among the processes, and Lightning's checkpoints
hold where it is. Run again, it goes on after the last one, also in the middle of an epoch.

    pip install lightning
    fastload index 's3://bucket/points-{000000..000099}.tar'
    SHARDS='s3://bucket/points-{000000..000099}.tar' python examples/train_lightning_streaming.py

or `torchrun --nproc-per-node 2` in place of `python`.
The index is needed: where it does not know how many batches there are, Lightning reads one ahead, and would save a
state that is one further. A sample is a point, `KEY.npy` (8 float32), and its class, `KEY.cls` (digits).
"""

import os
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import fastload


class Classifier(lightning.LightningModule):  # type: ignore[misc]  # Lightning is not checked
    """On which side of a plane points lie."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        points, labels = batch
        return nn.functional.cross_entropy(self.network(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


# torchrun has started so many processes; without it, Lightning starts one.
processes = {
    "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
}


def train(shards: str, folder: str = "trained-lightning", save_every: int = 100, **settings: Any) -> nn.Module:
    """The trained network; `settings` are Lightning's."""
    lightning.seed_everything(0, verbose=False)
    decode = {"npy": fastload.decode.array(8, "float32"), "cls": fastload.decode.integer()}
    dataset = fastload.StreamingDataset(shards, shuffle=True, decode=decode, as_tuple=True)
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_size=4, num_workers=2)
    checkpoints = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=save_every)
    classifier = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu", callbacks=[checkpoints], **{"max_epochs": 3, **processes, **settings}
    )
    trainer.fit(classifier, loader, ckpt_path="last")
    loader.close()
    return classifier.network


if __name__ == "__main__":
    train(os.environ.get("SHARDS", "s3://bucket/points-{000000..000099}.tar"))
