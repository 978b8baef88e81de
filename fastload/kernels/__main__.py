"""`python -m fastload.kernels FOLDER LEVEL ...`: compile all kernels into a folder, as pip does where it builds."""

from __future__ import annotations

import sys
from pathlib import Path

from fastload.kernels import compile_into, loading, module_names

if __name__ == "__main__":
    folder, *levels = sys.argv[1:]
    compile_into(Path(folder), module_names(), [loading.level_here() if each == "here" else each for each in levels])
