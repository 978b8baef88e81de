"""The drop-in `DataLoader` beside torch's: hand-over, map-style data sets, starting, and what a training step notices.

    python -m bench.dataloader                           # fifteen minutes; status 1 where a target is missed
    python -m bench.dataloader --part small --rounds 9

Loaders take turns within a round, and ratios are taken within a round; shown are medians over rounds, and ranges.
`bench/handover.py`, `mapped.py`, `spawned.py` and `steps.py` say what is done.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench import handover, mapped, spawned, steps
from bench.targets import Figure, show

Part = Callable[[int, Path], list[Figure]]

PARTS: dict[str, tuple[str, Part]] = {
    "handover": ("256 x 3 x 224 x 224 from one worker process", lambda rounds, _: handover.figures(rounds)),
    "small": ("Map-style, 1 kB tensors, batches of 1024", lambda rounds, _: mapped.small_figures(rounds)),
    "folder": ("Map-style, pictures", mapped.folder_figures),
    "spawn": ("Starting", lambda rounds, _: spawned.figures(rounds)),
    "steps": ("Interference", steps.figures),
}


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}")
    missed = False
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as folder:
        for name in options.part:
            title, part = PARTS[name]
            missed |= show(title, part(options.rounds, Path(folder) / name))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
