"""A kernel that is compiled in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A kernel that calls another, and has a constant from elsewhere, in a folder of its own.
SOURCE = """
import sys, logging
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import numpy as np
from fastload.kernels.declare import array_in, helper, int64, kernel, uint8
from constants import MORE

@helper(int64(int64, int64))
def add(a, b):
    return a + b

@kernel(int64(array_in(uint8), int64))
def first(data, more):
    return add(data[0], more) + MORE

data = np.ones(4, np.uint8)
frozen = data.view()
frozen.flags.writeable = False
print(first(data, 1), first(frozen, np.int32(2)), "compiled" if "numba" in sys.modules else "loaded")
"""


def command(folder: Path, cache: Path, source: str = SOURCE, **environ: str) -> dict[str, object]:
    """What starts a process that compiles or loads the kernel, for `subprocess`."""
    folder.mkdir(exist_ok=True)
    (folder / "example.py").write_text(source)
    if not (folder / "constants.py").exists():
        (folder / "constants.py").write_text("MORE = 5")
    clean = {name: value for name, value in os.environ.items() if name not in ("FASTLOAD_KERNELS", "XDG_CACHE_HOME")}
    return {
        "args": [sys.executable, "-B", str(folder / "example.py")],  # what is imported changes within a second
        "env": {**clean, "FASTLOAD_KERNELS": str(cache), **environ},
        "text": True,
    }


def run(folder: Path, cache: Path, source: str = SOURCE, **environ: str) -> tuple[str, str]:
    """Output and log of such a process."""
    done = subprocess.run(**command(folder, cache, source, **environ), capture_output=True, check=True)  # type: ignore[call-overload]
    return done.stdout.strip(), done.stderr.strip()
