"""`fastload demo`: the main job, on real photographs from a real object store on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train.")] = 3,
) -> None:
    """Start an object store, upload photographs, and train a small network from it for three epochs."""
    from fastload.demo import train

    train.run(epochs=epochs)
