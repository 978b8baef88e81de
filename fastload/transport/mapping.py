"""Shared memory seen as an array, without a descriptor.

`mmap.mmap` keeps a duplicate of the descriptor for as long as the memory is mapped. A trainer that keeps many batches
would run out of descriptors (the limit is often 1024), so the system call is made through ctypes.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import numpy.typing as npt

from fastload.lifecycle import on_drop
from fastload.transport.slots import Owner

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_shared(fd: int, byte_count: int) -> npt.NDArray[np.uint8]:
    """The first bytes of a memfd as a writable array; unmapped when the last view of it is gone. Raises `OSError`."""
    return _mapped(fd, byte_count, mmap.MAP_SHARED)


def map_private(fd: int, byte_count: int) -> npt.NDArray[np.uint8]:
    """The same, but what is written to it is seen by this process only."""
    return _mapped(fd, byte_count, mmap.MAP_PRIVATE)


def _mapped(fd: int, byte_count: int, flags: int) -> npt.NDArray[np.uint8]:
    address = _libc.mmap(None, byte_count, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {byte_count} bytes of shared memory: {os.strerror(number)}")
    owner = Owner(address, byte_count)
    on_drop(owner, _libc.munmap, address, byte_count)
    return np.asarray(owner)
