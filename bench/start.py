"""How long a training process takes from its start to its first decoded batch, beyond what `import torch` takes.

    python -m bench.start                 # two minutes
    python -m bench.start --rounds 15

A process imports torch, makes a data set and a loader of photographs, and gets one batch of 64 of them, decoded to
224 x 224; another imports torch and does nothing else. They take turns within a round; figures are medians over rounds
of the difference within a round. The data is in the cache on the disk, and the page cache has what a start reads.

*service running*: another job on the node uses the cache, so that its service is there and its memory is filled.
*service not running*: the process starts it, and the service reads from the disk tier.
*nothing compiled*: the same without compiled kernels, in the installation or of this user. Once a round.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fastload.kernels import FIRST_BATCH, OF_DECODERS, objects, warm_up

TARGET_S = 0.7
BATCH_SIZE = 64
SHARDS, SAMPLES_A_SHARD = 4, 200
READY = "ready"

TORCH = f"import torch, time; print('{READY}', time.process_time(), flush=True)"
JOB = f"""
import sys, time
import torch
import fastload
from fastload import decode
dataset = fastload.StreamingDataset(
    sys.argv[1],
    cache=fastload.Cache(sys.argv[2], ram_bytes="256MiB", disk_bytes="1GiB"),
    shuffle=True,
    decode={{"jpg": decode.image(224, random_resized_crop=True, hflip=0.5), "cls": decode.integer()}},
)
loader = fastload.DataLoader(dataset, batch_size={BATCH_SIZE}, num_workers=2)
iterator = iter(loader)
batch = next(iterator)
assert batch["jpg"].shape == ({BATCH_SIZE}, 3, 224, 224)
print("{READY}", time.process_time(), flush=True)
loader.close()
"""
# As where neither pip nor this user has compiled anything: the folder of the installation is looked for elsewhere.
UNCOMPILED = "from pathlib import Path\nfrom fastload.kernels import objects\nobjects.INSTALLED = Path('/nowhere')\n"


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds from the process's start until it was ready."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Measure and print; the status is 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warm_up(*FIRST_BATCH, *(name for names in OF_DECODERS.values() for name in names))
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as folder:
        is_met = report(measure(Path(folder), options.rounds))
    sys.exit(0 if is_met else 1)


def measure(folder: Path, rounds: int) -> dict[str, list[Took]]:
    """All cases in turn, `rounds` times, after one that does not count."""
    write_shards(folder / "data")
    urls, cache = f"{folder}/data/", f"{folder}/cache"
    took: dict[str, list[Took]] = {
        name: [] for name in ("torch", "service running", "service not running", "nothing compiled")
    }
    run(JOB + "for batch in fastload.DataLoader(dataset, batch_size=64): pass", urls, cache)
    for number in range(rounds + 1):
        now = {"torch": run(TORCH), "service not running": run(JOB, urls, cache)}
        with ExitStack() as stack:
            keep_service(stack, cache)
            run(JOB, urls, cache)  # what its order begins with is in memory now
            now["service running"] = run(JOB, urls, cache)
        if number < min(rounds, 3):
            nowhere = {objects.VARIABLE: f"{folder}/kernels-{number}"}
            now["nothing compiled"] = run(UNCOMPILED + JOB, urls, cache, environ=nowhere)
        if number > 0:
            for name, one in now.items():
                took[name].append(one)
    return took


def write_shards(folder: Path) -> None:
    """Photographs of 500 x 375 and numbers, in a few tar shards."""
    from bench.decode import SMALL, crops

    folder.mkdir()
    files = crops(SMALL, 93, SAMPLES_A_SHARD)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:06}.tar", "w") as archive:
            for number, file in enumerate(files):
                for column, data in (("jpg", file), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"{shard:06}{number:06}.{column}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def keep_service(stack: ExitStack, cache: str) -> None:
    """Have a service run until the stack ends."""
    from fastload.client.cache import Handle as Cache

    stack.enter_context(stack.enter_context(Cache(cache)).consumer(None, "bench"))


def run(code: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Took:
    """Start a process that says when it is ready, and wait for its end and that of a service which it started."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "FASTLOAD_IDLE_S": "0", **(environ or {})},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        word, cpu_s = process.stdout.readline().split()
        wall_s = time.monotonic() - began
    assert (word, process.returncode) == (READY, 0), process.returncode
    return Took(wall_s, float(cpu_s))


def report(took: dict[str, list[Took]]) -> bool:
    """A table; whether the targets are met."""
    torch = took.pop("torch")
    print(f"import torch alone: {middle(torch, 'wall_s'):.2f} s\n")
    print(f"{'beyond that, to the first batch':34} {'s':>6} {'range':>12} {'CPU-s':>6} {'target':>7}")
    is_met = True
    for name, runs in took.items():
        walls = [one.wall_s - alone.wall_s for one, alone in zip(runs, torch, strict=False)]
        cpu_s = statistics.median(one.cpu_s - alone.cpu_s for one, alone in zip(runs, torch, strict=False))
        has_target = name.startswith("service")
        is_met &= not has_target or statistics.median(walls) <= TARGET_S
        print(
            f"{name:34} {statistics.median(walls):6.2f} {f'{min(walls):.2f}-{max(walls):.2f}':>12} {cpu_s:6.2f}"
            f" {TARGET_S if has_target else '':>7}"
        )
    return is_met


def middle(runs: list[Took], what: str) -> float:
    """The median."""
    found: float = statistics.median(getattr(one, what) for one in runs)
    return found


if __name__ == "__main__":
    main()
