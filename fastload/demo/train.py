"""What `fastload demo` does: the main job, small enough for a laptop and real from end to end.

A real S3 server on this machine, real photographs in WebDataset shards, a small network that learns to tell the
photographs apart, and a row of figures an epoch. The first epoch fetches every byte once; those that follow are served
by the node's own cache. All that is started here is stopped here, however it ends: Ctrl-C and SIGTERM included.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import fastload
from fastload.config import cpu_count, format_bytes
from fastload.demo import photos
from fastload.demo.weed import WeedServer

BUCKET = "photos"
IMAGE_SIZE = 64
BATCH_SIZE = 64
LEARNING_RATE = 2e-3

# What a row says: title and width; 79 columns in all.
_COLUMNS = (
    ("epoch", 5),
    ("samples/s", 9),
    ("MB/s", 6),
    ("first batch", 11),
    ("RAM", 5),
    ("disk", 5),
    ("remote", 6),
    ("fetched", 9),
    ("loss", 6),
    ("accuracy", 8),
)


@dataclass(frozen=True, slots=True)
class Learned:
    """What the network made of one epoch, over the samples as they came."""

    loss: float
    accuracy: float


def run(*, epochs: int = 3, samples: int = 5000, console: Console | None = None) -> list[dict[str, Any]]:
    """The demo; `loader.stats()` of each epoch, with `loss` and `accuracy`.

    Takes about 200 MB three times over (shards, store, cache) in the temporary directory, and gives it back.
    """
    console = console or Console()
    with ExitStack() as stack:
        stack.enter_context(_sigterm_unwinds())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastload-demo-")))
        with console.status("starting an object store (weed mini) ..."):
            server = stack.enter_context(WeedServer(folder / "store"))
        console.print(f"object store: {server.endpoint_url}, [bold]weed mini[/] in {folder}")
        _upload_photographs(server, folder / "shards", samples, console)
        cache = stack.enter_context(fastload.Cache(folder / "cache", ram_bytes="512MiB", disk_bytes="1GiB"))
        return _train(cache, server, epochs, samples, console)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Make SIGTERM an exception like Ctrl-C's, so that every `with` on the way out does its part."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _upload_photographs(server: WeedServer, shard_folder: Path, samples: int, console: Console) -> None:
    with console.status(f"cutting {samples} crops from {photos.LABEL_COUNT} photographs ..."):
        paths = photos.write_shards(shard_folder, count=samples)
    with console.status("uploading ..."):
        server.make_bucket(BUCKET)
        for path in paths:
            server.upload(path, f"s3://{BUCKET}/train/{path.name}")
    size = sum(path.stat().st_size for path in paths)
    console.print(
        f"data: {samples} JPEGs of {photos.WIDTH}x{photos.HEIGHT} in {len(paths)} shards, {format_bytes(size)}"
    )


def _train(
    cache: fastload.Cache, server: WeedServer, epochs: int, samples: int, console: Console
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dataset = fastload.StreamingDataset(
        f"s3://{BUCKET}/train/",
        cache=cache,
        shuffle=True,
        decode={"jpg": fastload.decode.image(size=IMAGE_SIZE), "cls": fastload.decode.integer()},
        storage_options={name.lower(): value for name, value in server.environment().items()},
    )
    loader: fastload.DataLoader[Any] = fastload.DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=cpu_count())
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    rows = []
    console.print("\n" + " ".join(title.rjust(width) for title, width in _COLUMNS), style="bold", highlight=False)
    try:
        for epoch in range(epochs):
            learned = _train_epoch(loader, network, optimizer, epoch, samples, console)
            rows.append({**loader.stats(), "loss": learned.loss, "accuracy": learned.accuracy})
            console.print(_row(epoch, rows[-1]), highlight=False)
    finally:
        loader.close()
    return rows


def _train_epoch(
    loader: fastload.DataLoader[Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    samples: int,
    console: Console,
) -> Learned:
    loss_sum = torch.zeros(())
    right = torch.zeros((), dtype=torch.int64)
    with _progress(console) as progress:
        task = progress.add_task(f"epoch {epoch}", total=samples)
        for batch in loader:
            images, labels = batch["jpg"], batch["cls"]
            scores = network(images)
            loss = nn.functional.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            optimizer.step()
            loss_sum += loss.detach() * len(labels)
            right += (scores.argmax(1) == labels).sum()
            progress.advance(task, len(labels))
    return Learned(loss_sum.item() / samples, right.item() / samples)


def _network() -> nn.Sequential:
    """Four convolutions, 61 thousand weights: enough for sixteen photographs, and nothing for two cores."""

    def stage(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    stages = [layer for channels in ((3, 16), (16, 32), (32, 48), (48, 64)) for layer in stage(*channels)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, photos.LABEL_COUNT))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _row(epoch: int, stats: dict[str, Any]) -> str:
    read_bytes = sum(stats[f"{source}_bytes"] for source in ("ram", "disk", "remote"))
    cells = (
        str(epoch),
        f"{stats['samples'] / stats['elapsed_s']:,.0f}",
        f"{read_bytes / stats['elapsed_s'] / 1e6:.1f}",
        f"{stats['first_batch_s']:.2f} s",
        *(f"{stats[f'{source}_share']:.0%}" for source in ("ram", "disk", "remote")),
        format_bytes(stats["fetched_bytes"]),
        f"{stats['loss']:.3f}",
        f"{stats['accuracy']:.1%}",
    )
    return " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
