"""Copying bytes inside a kernel.

A slice assignment `out[:n] = source` would do the same, but makes numba compile its machinery for
broadcasting and overlap: 1.8 s the first time in a process and 0.2 s for each use, where this loop takes
0.06. LLVM vectorises it.
"""

from __future__ import annotations

import numpy as np
from numba import uint8, void
from numpy.typing import NDArray

from fastload.kernels.jit import array_in, array_out, kernel

__all__ = ["copy_bytes"]


@kernel(void(array_in(uint8), array_out(uint8)))
def copy_bytes(source: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Copy all of `source` to the start of `out`, which must be long enough. They do not overlap."""
    for i in range(source.size):
        out[i] = source[i]
