"""Other loaders over the same samples, each in a file of its own and run in a process of its own.

Each module says in its opening how the loader's own documentation sets it up for such data, and has three names:
`ABOUT`, `Loader` and, where the loader reads a format of its own, `convert`. None is imported before it is asked for,
since few of them are installed anywhere (`pip install fastload[bench]` brings them at the versions that are measured).
`fastload` is among them, so that ours is measured by the same code.

`job` is what a loader is given and what it gives; `race` has them take turns, `order` (pure) says how well each
shuffled. `python -m fastload.bench.peers` is the process that runs one of them.
"""

from __future__ import annotations

import importlib
from typing import Any

OURS = "fastload"
NAMES = ("webdataset", "streaming", "litdata", "spdl", "s3torchconnector", "torch", "datasets")


def module(name: str) -> Any:
    """The module of a loader; it imports the loader itself only when a `Loader` is made."""
    assert name in (OURS, *NAMES), name
    return importlib.import_module(f"{__name__}.{name}")
