"""Where a numpy array keeps what kernels want to know, for code that reads it without the GIL and without numpy.

The beginning of numpy's `PyArrayObject`, and of its `PyArray_Descr`, has been the same since numpy 1.7 and is part of
the interface that compiled extensions rely on (pybind11 reads it in the same way). `loading` looks whether it still is.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

__all__ = ["ALIGNED", "CONTIGUOUS", "WRITABLE", "Descr", "Header"]

CONTIGUOUS, ALIGNED, WRITABLE = 0x1, 0x100, 0x400

# Whatever a Python object begins with, the last of it is its type.
_HEAD_BYTES = object.__basicsize__


class Descr(ctypes.Structure):
    """Of a dtype; `byteorder` is "=", "|", or that which is not this machine's. `number` is `dtype.num`."""

    _fields_: ClassVar = [
        ("head", ctypes.c_char * _HEAD_BYTES),
        ("typeobj", ctypes.c_void_p),
        ("kind", ctypes.c_char),
        ("type", ctypes.c_char),
        ("byteorder", ctypes.c_char),
        ("flags", ctypes.c_char),
        ("number", ctypes.c_int32),
    ]


class Header(ctypes.Structure):
    """Of an array."""

    _fields_: ClassVar = [
        ("head", ctypes.c_char * (_HEAD_BYTES - ctypes.sizeof(ctypes.c_void_p))),
        ("type", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("dimensions", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("base", ctypes.c_void_p),
        ("descr", ctypes.POINTER(Descr)),
        ("flags", ctypes.c_int32),
    ]
