"""Large pieces put end to end, past the caches.

A core that writes to memory first reads each line into its caches, and drops something else there. What is larger than
the caches, and read next by another core, is better written straight to memory: half the traffic. 256 pieces of 150 kB,
from the caches, take 1.8 ms instead of 3.9, and from memory 2.9 instead of 4.4 (the C library does so only from three
quarters of the last cache on, which on a large machine is never). Batches that fit a cache are better left there.

Addresses are the caller's to vouch for, who holds on to what lies there; everything else is checked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.copying import array_at, copy_past_caches, order_writes
from fastload.kernels.jit import array_in, array_out, int64, kernel, uint8, void

__all__ = ["stack"]

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def stack(addresses: Int64s, piece_bytes: int, out: Bytes) -> None:
    """Copy pieces of `piece_bytes` from these addresses (int64[n]) to `out`, which they fill and do not overlap. Any
    process that is told of `out` afterwards sees them. Runs without the GIL.
    """
    if piece_bytes < 0 or addresses.size * piece_bytes != out.size:
        raise IndexError(f"{addresses.size} pieces of {piece_bytes} bytes do not fill {out.size}")
    stack_pieces(addresses, piece_bytes, out)


@kernel(void(array_in(int64), int64, array_out(uint8)))
def stack_pieces(addresses: Int64s, piece_bytes: int, out: Bytes) -> None:
    """`stack` without its check."""
    for piece in range(addresses.size):
        source = array_at(addresses[piece], piece_bytes, np.uint8)
        copy_past_caches(source, 0, out, piece * piece_bytes, piece_bytes)
    order_writes()
