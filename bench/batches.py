"""What a batch costs beyond its samples: warm epochs of small records, in batches of 16 to 65,536.

    python -m bench.batches                     # two minutes
    python -m bench.batches --rounds 5

Records of 600 bytes, as bytes (`raw`, a `Ragged`), as arrays of one shape (`flat`, a tensor) and of any length (`flat`,
a `Ragged`), and eight digits as integers (a tensor), are read out of a warm cache by two threads, shuffled; the
consumer drops each batch at once. CPU time is that of the trainer's process, all threads together.

The fixed cost of a batch is what remains of a batch of 16 when 16 samples are taken off, each at what it costs in the
cheapest size. Sizes take turns within a round; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import data, records
from bench.targets import Figure, show

SIZES = (16, 64, 256, 1024, 4096, 16384, 65536)
SHARDS = 4
THREADS = 2
# An epoch of batches of 16 is cut off there.
BATCHES_MAX = 3000
FIXED_US = 60.0


def main() -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(
        prog="bench.batches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="data sets; a real disk")
    options = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f}")
    return int(sum(show_kind(kind, options) for kind in kinds(options.folder)) > 0)


def kinds(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By name, the shards of each kind and how they are decoded."""
    from fastload import decode

    binary, digits = records.prepare(folder), prepare_digits(folder)
    return {
        "raw": (binary, {"bin": decode.raw()}),
        "arrays of one shape": (binary, {"bin": decode.flat("uint16", records.RECORD_BYTES // 2)}),
        "arrays of any length": (binary, {"bin": decode.flat("uint16")}),
        "integers": (digits, {"cls": decode.integer()}),
    }


def prepare_digits(folder: Path) -> Path:
    """The folder with shards of integers; made first where it is not there."""
    final = folder / f"digits-v{records.VERSION}-{SHARDS}x{records.RECORDS_A_SHARD}"
    if not final.exists():
        part = folder / f"{final.name}.part-{os.getpid()}"
        part.mkdir(parents=True)
        for number in range(SHARDS):
            first, count = number * records.RECORDS_A_SHARD, records.RECORDS_A_SHARD
            texts = records.digits(np.arange(first, first + count), 8, 10)
            (part / f"train-{number:06d}.tar").write_bytes(records.tar_of(first, texts, "cls"))
        part.rename(final)
    return final


def show_kind(kind: str, options: argparse.Namespace) -> bool:
    """The figures of one kind; whether a target is missed."""
    folder, decoders = kinds(options.folder)[kind]
    urls = f"{folder}/train-{{000000..{SHARDS - 1:06d}}}.tar"
    cpu_us: dict[int, list[float]] = {size: [] for size in SIZES}
    per_s: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.rounds):
        for size in SIZES:
            with records.warm_loaders(urls, size, [THREADS], decode=decoders) as (loaders, _):
                batches, wall_s, cpu_s = timed(loaders[THREADS], size)
            cpu_us[size].append(cpu_s / batches * 1e6)
            per_s[size].append(batches * size / wall_s)
    figures = []
    for size in SIZES:
        figures.append(Figure(f"batches of {size:,}: CPU time a batch", "us", cpu_us[size]))
        figures.append(Figure(f"batches of {size:,}: 1000 samples a second", "", [rate / 1000 for rate in per_s[size]]))
    fixed = []
    for number in range(options.rounds):
        of_sample = min(cpu_us[size][number] / size for size in SIZES)
        fixed.append(cpu_us[SIZES[0]][number] - SIZES[0] * of_sample)
    figures.append(Figure("fixed cost of a batch", "us", fixed, at_most=FIXED_US))
    return show(f"{kind}, {SHARDS * records.RECORDS_A_SHARD:,} records", figures)


def timed(loader: Any, size: int) -> tuple[int, float, float]:
    """Batches of two epochs, or the first of them, the seconds and the CPU-seconds that they took."""
    batches, cpu_s, began = 0, time.process_time(), time.perf_counter()
    for _ in range(2):
        for number, _batch in enumerate(loader):
            batches += 1
            if number == BATCHES_MAX:
                break
    return batches, time.perf_counter() - began, time.process_time() - cpu_s


if __name__ == "__main__":
    sys.exit(main())
