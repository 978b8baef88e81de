"""transformers' `Trainer` over shards in object storage: the data set divides itself among the processes, so the
Trainer is given its loader as it is, and a callback keeps where it is beside the Trainer's checkpoints. Run again, it
goes on after the last one.

    pip install transformers accelerate
    fastload index 's3://bucket/points-{000000..000099}.tar'
    SHARDS='s3://bucket/points-{000000..000099}.tar' python examples/train_transformers_streaming.py

or `torchrun --nproc-per-node 2` in place of `python`. With the index the Trainer knows how many steps an epoch has;
without, give it `max_steps`. A sample is a point, `KEY.npy` (8 float32), and its class, `KEY.cls` (digits).
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fastload


class Classifier(nn.Module):
    """A network as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class StreamingTrainer(Trainer):  # type: ignore[misc]  # transformers is not checked
    """Takes the loader as it is."""

    def __init__(self, loader: fastload.DataLoader[Any], **options: Any) -> None:
        super().__init__(**options)
        self.loader = loader

    def get_train_dataloader(self) -> fastload.DataLoader[Any]:
        return self.loader


class LoaderState(TrainerCallback):  # type: ignore[misc]
    """Saves the loader's state, the same in every process, with each checkpoint."""

    def __init__(self, loader: fastload.DataLoader[Any]) -> None:
        self.loader = loader

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.loader.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", "loader.pt"))


def as_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of the network."""
    return {"inputs": batch["npy"], "labels": batch["cls"]}


def train(shards: str, folder: str = "trained-transformers-streaming", **settings: Any) -> nn.Module:
    """The trained network; `settings` are of `TrainingArguments`."""
    torch.manual_seed(0)
    decode = {"npy": fastload.decode.array(8, "float32"), "cls": fastload.decode.integer()}
    dataset = fastload.StreamingDataset(shards, shuffle=True, decode=decode).map_batch(as_inputs)
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_size=4, num_workers=2, workers="thread")
    classifier = Classifier()
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ignore_data_skip=True,  # the loader skips what was read, without reading it again
        **{"num_train_epochs": 3, "save_steps": 100, "learning_rate": 0.1, **settings},
    )
    last = get_last_checkpoint(folder) if Path(folder).exists() else None
    if last is not None:
        loader.load_state_dict(torch.load(Path(last, "loader.pt"), weights_only=True))
    trainer = StreamingTrainer(loader, model=classifier, args=arguments, callbacks=[LoaderState(loader)])
    trainer.train(resume_from_checkpoint=last)
    loader.close()
    return classifier.network


if __name__ == "__main__":
    train(os.environ.get("SHARDS", "s3://bucket/points-{000000..000099}.tar"))
