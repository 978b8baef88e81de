"""The heap of a worker process: what a sample needed is kept for the next one.

glibc takes memory for a large array from the kernel and gives it back when the array is freed. A worker that makes
batches of tens of megabytes so pays for fresh pages in every one of them, which takes longer than filling them (batches
of 38 MB, made by copying: 37 ms of CPU time each, and 22 ms with this). So a worker's large arrays come from its heap,
which keeps some of what is freed. Only what is asked of the C library by the process as a whole can say so: hence not
in threads, whose process is the user's.

Python's collector looks for garbage whenever some hundreds of objects were made, as a batch of tensors is, and now and
then among all objects: with torch imported, and the user's data set, these are hundreds of thousands, which it also
writes to, so that a forked worker has to have its own copy of each page. What a worker began with lives as long as the
worker, or longer than anybody would wait for its end: it is no concern of the collector there (taking 1024 small
tensors: 0.67 ms, and 0.67 to 1.2 without this). What is made later is collected as ever.
"""

from __future__ import annotations

import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What some releases take at most: half of a heap of 64 MiB.
_MMAP_THRESHOLD_BYTES_MAX = 32 << 20
# What the user says of it, by whatever name, holds.
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def spare_what_is_here() -> None:
    """Have the collector look for garbage among objects that are made from now on."""
    gc.freeze()


def keep_freed_memory(byte_count: int) -> bool:
    """Keep up to so much at the top of the heap; whether the C library is one that can, and was not told otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _SETTINGS):
        return False
    kept = min(byte_count, (1 << 31) - 1)
    takes_all = mallopt(_M_MMAP_THRESHOLD, kept) or mallopt(_M_MMAP_THRESHOLD, min(kept, _MMAP_THRESHOLD_BYTES_MAX))
    return bool(mallopt(_M_TRIM_THRESHOLD, kept) and takes_all)
