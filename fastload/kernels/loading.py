"""Loads machine code from an object file into this process; knows the level of its processor.

Levels are those of the x86-64 psABI, which LLVM knows by these names: v3 has AVX2, v4 AVX-512. On other machines there
is one level, what all of them have. Object files for a level serve on every machine that has it, so that a folder may
be shared by nodes of several kinds, and an image may be built on another machine than it runs on.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]

__all__ = [
    "ALIGNED",
    "CONTIGUOUS",
    "LEVELS",
    "PYTHON",
    "WRITABLE",
    "Descr",
    "Header",
    "builtin",
    "level_here",
    "load",
    "processor",
]

_V2 = frozenset(("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"))
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}

# Each with LLVM's name for the processor and the features that it needs; the best first.
_X86 = {
    "x86-64-v4": _V4,
    "x86-64-v3": _V3,
    "x86-64-v2": _V2,
    "x86-64": frozenset[str](),
}

IS_X86 = platform.machine() == "x86_64"

LEVELS = tuple(_X86) if IS_X86 else (f"{platform.machine()}-generic",)
"""Of this machine's architecture."""


def processor(level: str) -> str:
    """LLVM's name for a processor of this level, "" for what all of them have."""
    return level if level in _X86 else ""


@functools.cache
def level_here() -> str:
    """The best level that this processor has."""
    has = {name for name, is_there in binding.get_host_cpu_features().items() if is_there}
    return next(level for level in LEVELS if has >= _X86.get(level, frozenset()))


# Where a numpy array keeps what kernels want to know, for code that reads it without the GIL and without numpy.
#
# The beginning of numpy's `PyArrayObject`, and of its `PyArray_Descr`, has been the same since numpy 1.7 and is part of
# the interface that compiled extensions rely on (pybind11 reads it in the same way). `_prepare` checks that it is so.

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


PYTHON = (
    "PyBool_FromLong",
    "PyErr_Occurred",
    "PyEval_RestoreThread",
    "PyEval_SaveThread",
    "PyFloat_AsDouble",
    "PyLong_AsLongLong",
    "PyLong_FromLongLong",
    "PyObject_CallFunction",
    "PyObject_IsTrue",
    "PyTuple_GetItem",
    "Py_BuildValue",
)
"""What object files call of Python: all of it has been the same since 3.2, and is to remain."""


def load(code: bytes, symbols: Sequence[str]) -> list[int]:
    """Make an object's code runnable, for the rest of the process's life; the addresses of these of its functions."""
    _prepare()
    engine = _engine()
    engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    addresses: list[int] = [engine.get_function_address(name) for name in symbols]
    assert all(addresses), f"an object without {symbols}"
    return addresses


def builtin(name: str, address: int, context: tuple[Any, ...]) -> Callable[..., Any]:
    """The code there as a builtin function of Python, whose `self` is `context`."""
    # Python keeps the definition's address.
    _definitions.append(_Definition(name.encode(), address, _Definition.FASTCALL, None))
    function: Callable[..., Any] = _new_builtin(ctypes.byref(_definitions[-1]), context, None)
    return function


class _Definition(ctypes.Structure):
    """Python's `PyMethodDef`."""

    FASTCALL = 0x80
    _fields_: ClassVar = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_new_builtin = ctypes.pythonapi.PyCFunction_NewEx
_new_builtin.argtypes = ctypes.POINTER(_Definition), ctypes.py_object, ctypes.py_object
_new_builtin.restype = ctypes.py_object

_engines: list[Any] = []
_definitions: list[_Definition] = []


@functools.cache
def _prepare() -> None:
    """Once: where Python's functions are, wherever Python itself may be; and whether arrays are what they should be."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    for name in PYTHON:
        address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        binding.add_symbol(name, address)
    array = np.zeros((3, 5), np.int32)[:, :4]
    array.flags.writeable = False
    found = Header.from_address(id(array))
    read = found.type, found.data, tuple(found.shape[: found.dimensions]), found.flags & WRITABLE, found.descr[0].number
    there = id(np.ndarray), array.ctypes.data, array.shape, 0, array.dtype.num
    if read != there:
        raise RuntimeError(
            f"numpy {np.__version__} lays arrays out in a way that fastload's kernels do not know: {read}"
        )


def _engine() -> Any:
    """One for each object, so that names of one cannot meet those of another."""
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    # Code and constants in one piece of memory. They may otherwise come to lie further apart than their references
    # reach, which ends the process: a mapped arena is larger than that, and constants fit where code does not.
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)
