"""Many epochs over little data: memory, descriptors, threads and files must not grow.

    python -m bench.endurance            # 1000 epochs in each mode of workers
    python -m bench.endurance --epochs 100 --mode thread torch

reads a data set of two megabytes from local files, over and over, through one loader, in a process of its own for each
mode. After some of the epochs it adds up what this process, its workers and the cache service hold. What is held in the
last third of the run is compared with the second third; the first is for pools and caches to fill. The status is 1
where anything grew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.utils.data

import fastload
from fastload.bench import measure

SHARDS, SAMPLES_A_SHARD, SAMPLE_BYTES = 4, 8, 64 << 10
BATCH_SIZE = 4
_LOOKS = 60
# What may differ from one look to the next for no reason: a thread that is about to end, a file about to be renamed.
_SLACK = 2
# Memory comes and goes by what an allocator keeps. A leak of one batch an epoch is 250 kB an epoch, of an epoch's index
# some kB.
MEMORY_SLACK_BYTES = 3 << 20


def _plain(sample: Any) -> Any:
    return sample


@dataclass
class Held:
    """What was held after each look: bytes of memory, and numbers of descriptors, threads and files."""

    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self, folder: Path) -> None:
        """Add up what this process, those below it and the services of caches in `folder` hold."""
        pids = measure.descendants([os.getpid(), *measure.find_processes("fastload.service", str(folder))])
        self.memory.append(measure.memory_bytes(pids))
        self.descriptors.append(sum(_entries(f"/proc/{pid}/fd") for pid in pids))
        self.threads.append(sum(_entries(f"/proc/{pid}/task") for pid in pids))
        self.files.append(sum(len(names) for _, _, names in os.walk(folder)))

    def grown(self) -> list[str]:
        """What is more in the last third than in the second, in words."""
        found = []
        for name, values in vars(self).items():
            third = len(values) // 3
            before, after = statistics.median(values[third:-third]), statistics.median(values[-third:])
            if after - before > (MEMORY_SLACK_BYTES if name == "memory" else _SLACK):
                found.append(f"{name} grew from {before:.0f} to {after:.0f}")
        return found


def _entries(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def write_data(folder: Path) -> str:
    """The shards; their URL."""
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:04}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for sample in range(SAMPLES_A_SHARD):
                info = tarfile.TarInfo(f"{shard}-{sample}.bin")
                content = hashlib.shake_128(info.name.encode()).digest(SAMPLE_BYTES)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"{folder}/"


def _loader(mode: str, url: str, cache: fastload.Cache) -> Any:
    given = {"cache": cache, "shuffle": True, "columns": ["bin"], "partitions": 1}
    if mode.startswith("torch"):
        dataset = fastload.StreamingDataset(url, batch_size=BATCH_SIZE, **given)  # type: ignore[call-overload]
        return torch.utils.data.DataLoader(
            dataset, BATCH_SIZE, num_workers=2, collate_fn=list, persistent_workers=mode == "torch-persistent"
        )
    dataset = fastload.StreamingDataset(url, **given)  # type: ignore[call-overload]
    if mode == "inline":
        return fastload.DataLoader(dataset, BATCH_SIZE)
    if mode in ("foreign-process", "foreign-thread"):
        ours = torch.utils.data.TensorDataset(torch.zeros(SHARDS * SAMPLES_A_SHARD, SAMPLE_BYTES, dtype=torch.uint8))
        workers = mode.partition("-")[2]
        return fastload.DataLoader(ours, BATCH_SIZE, shuffle=True, num_workers=2, workers=workers)  # type: ignore[call-overload]
    return fastload.DataLoader(dataset.map(_plain), BATCH_SIZE, num_workers=2, collate_fn=list, workers=mode)  # type: ignore[call-overload]


MODES = (
    "inline", "thread", "process", "side", "torch", "torch-persistent", "foreign-process", "foreign-thread",
)  # fmt: skip


def endure(mode: str, epochs: int, folder: Path) -> Held:
    """Read so many epochs; what was held meanwhile. AssertionError where an epoch is not whole."""
    url = write_data(folder / "data")
    held, every = Held(), max(1, epochs // _LOOKS)
    with fastload.Cache(
        folder / "cache", ram_bytes="8MiB", disk_bytes="32MiB", chunk_bytes="128KiB", history_bytes="8KiB"
    ) as cache:
        cache.pin(url)  # so that the catalog, which is otherwise written some seconds on, is there from the start
        cache.unpin(url)
        loader = _loader(mode, url, cache)
        for epoch in range(epochs):
            batches = iter(loader)
            assert sum(map(len, _samples(batches))) == SHARDS * SAMPLES_A_SHARD
            del batches
            if epoch % every == 0:
                held.look(folder)
        if hasattr(loader, "close"):
            loader.close()
    return held


def _samples(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, dict):
            yield batch["__key__"]
        elif isinstance(batch[0], dict):
            yield batch
        else:
            yield batch[0]


def main() -> int:
    """All modes, one after the other; the status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--here", action="store_true", help="in this process; for one mode")
    options = parser.parse_args()
    if options.here:
        # A full collection writes to every object that was made before the workers were forked, and so unshares some
        # 40 MB at once, at a moment of its own choice.
        gc.freeze()
        with tempfile.TemporaryDirectory(prefix="fastload-endurance-") as folder:
            (mode,) = options.mode
            held = endure(mode, options.epochs, Path(folder))
        middle = {name: statistics.median(values[len(values) // 3 :]) for name, values in vars(held).items()}
        grown = held.grown()
        print(
            f"{mode:16} {options.epochs} epochs: {middle['memory'] / 1e6:.1f} MB, {middle['descriptors']:.0f} "
            f"descriptors, {middle['threads']:.0f} threads, {middle['files']:.0f} files: {'; '.join(grown) or 'flat'}",
            flush=True,
        )
        return 1 if grown else 0
    command = [sys.executable, "-m", "bench.endurance", "--here", f"--epochs={options.epochs}", "--mode"]
    environment = {**os.environ, "FASTLOAD_IDLE_S": "3"}
    return max(subprocess.run([*command, mode], env=environment, check=False).returncode for mode in options.mode)


if __name__ == "__main__":
    sys.exit(main())
