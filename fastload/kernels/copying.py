"""Moving bytes inside a kernel.

`copy_bytes` is for short texts. A slice assignment `out[:n] = source` would do the same, but makes numba compile its
machinery for broadcasting and overlap: 1.8 s the first time in a process and 0.2 s for each use, where this loop takes
0.06. LLVM vectorises it, and its indexes are checked if `NUMBA_BOUNDSCHECK` is set.

`copy_range` is the C library's memcpy, a third faster from a few hundred bytes on; its caller has checked
everything. `prefetch` asks for a cache line that will be read soon, into the second cache level; it never faults.
`copy_line_past_caches` writes a cache line to memory without reading it first and without keeping it: for what is too
large for its reader to find it in a cache. Such writes are in no order with others until `order_writes`.
`scratch` is on the stack, since kernels have no other memory of their own. `array_at` is what lies at an address: a
signature says how many arrays a kernel takes, so this is how one call serves any number. Its caller keeps them alive.

`stack` puts large pieces end to end, past the caches. A core that writes to memory first reads each line into its
caches, and drops something else there. What is larger than the caches, and read next by another core, is better written
straight to memory: half the traffic. 256 pieces of 150 kB, from the caches, take 1.8 ms instead of 3.9, and from memory
2.9 instead of 4.4 (the C library does so only from three quarters of the last cache on, which on a large machine is
never). Batches that fit a cache are better left there.

The caller vouches for the addresses that it gives, and keeps alive what lies there; everything else is checked.
"""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_in, array_out, generated, helper, int64, kernel, uint8, void

__all__ = [
    "LINE_BYTES",
    "PAST_CACHES_BYTES",
    "address_of",
    "array_at",
    "copy_bytes",
    "copy_line_past_caches",
    "copy_past_caches",
    "copy_range",
    "order_writes",
    "prefetch",
    "scratch",
    "stack",
]

# A cache line, or a part of one: no processor that there are kernels for has smaller ones.
LINE_BYTES = 64
# The reader of a batch of this size finds it in no cache: two or three batches are in flight, and the trainer has its
# own data. Where smaller ones are written past the caches, reading them takes twice as long.
PAST_CACHES_BYTES = 16 << 20

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)


@helper(void(array_in(uint8), array_out(uint8)))
def copy_bytes(source: Bytes, out: Bytes) -> None:
    """Copy all of `source` to the start of `out`, which must be long enough. They do not overlap."""
    for i in range(source.size):
        out[i] = source[i]


@generated
def address_of(array: NDArray[Any]) -> int:
    """Where it begins."""
    return int(array.ctypes.data)


@generated
def copy_range(source: Bytes, at: int, out: Bytes, to: int, size: int) -> None:
    """Copy `size` bytes from `source[at]` to `out[to]`."""
    out[to : to + size] = source[at : at + size]


@generated
def copy_line_past_caches(source: Bytes, at: int, out: Bytes, to: int) -> None:
    """Copy `LINE_BYTES` from `source[at]` to `out[to]`, whose address has to be a multiple of that."""
    out[to : to + LINE_BYTES] = source[at : at + LINE_BYTES]


@helper(void(array_in(uint8), int64, array_out(uint8), int64, int64))
def copy_past_caches(source: Bytes, at: int, out: Bytes, to: int, size: int) -> None:
    """Copy `size` bytes from `source[at]` to `out[to]`: whole lines past the caches, what is around them by the caches.
    To be followed by `order_writes`.
    """
    head = min(size, (-(address_of(out) + to)) % LINE_BYTES)
    copy_range(source, at, out, to, head)
    lines_end = head + (size - head) // LINE_BYTES * LINE_BYTES
    for passed in range(head, lines_end, LINE_BYTES):
        copy_line_past_caches(source, at + passed, out, to + passed)
    copy_range(source, at + lines_end, out, to + lines_end, size - lines_end)


@generated
def order_writes() -> None:
    """A reader that sees a write made after this sees all writes made before it."""


@generated
def prefetch(source: Bytes, at: int) -> None:
    """Ask for the cache line of `source[at]`."""


@generated
def array_at(address: int, length: int, dtype: type[Number]) -> NDArray[Number]:
    """The array of `length` that begins at `address`."""
    data = (ctypes.c_uint8 * (int(length) * np.dtype(dtype).itemsize)).from_address(int(address))
    return np.ctypeslib.as_array(data).view(dtype)


@generated
def scratch(length: int, dtype: type[Number]) -> NDArray[Number]:
    """An array of some constant length, not initialised, that ends with the function that asks for it."""
    return np.empty(length, dtype)


def stack(addresses: Int64s, piece_bytes: int, out: Bytes) -> None:
    """Copy pieces of `piece_bytes` from these addresses (int64[n]) to `out`, which they fill and do not overlap. Any
    process that is notified of `out` afterwards sees them. Runs without the GIL.
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
