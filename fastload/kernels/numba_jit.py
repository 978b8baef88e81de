"""The plain way: kernels as numba's own dispatchers, `numba.njit(nogil=True, cache=True)`, where `jit` decides so.

Only what numba documents is used, so that versions serve which were not tried. numba's index of what it keeps is
not made for several writers, and it does not see that a function changes which another calls. So what it keeps lies in
a folder of the user's that belongs to one version of everything, and one process at a time compiles a module
(`objects.alone`). Where numba fails to read or write there (a full disk, one that fails), the process goes on without:
it compiles that kernel once more, and keeps nothing from then on.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import threading
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np
from numba import types

from fastload.kernels import intrinsics, objects
from fastload.kernels.declare import Array, Entry, Generated, Kernel, Scalar, Tuple, Type, Unit

__all__ = ["bind", "is_kept"]

_dispatchers: dict[Kernel, Any] = {}
# Once set, nothing more is kept: what fails would fail again, and each time cost a compilation.
_folder_fails = threading.Event()


def bind(unit: Unit) -> None:
    """Compile a unit's kernels, or load them from the user's folder. One process at a time, and one thread."""
    folder = None if _folder_fails.is_set() else objects.writable_folder(_folder_name())
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        for entry in unit.kernels:
            entry.bind(_dispatcher(entry, is_kept=folder is not None))
    finally:
        numba.config.CACHE_DIR = before


def is_kept(module: str) -> bool:
    """Whether something that was compiled of this module is in the user's folder."""
    folder = objects.writable_folder(_folder_name())
    try:
        return folder is not None and any(folder.rglob(f"{module.rpartition('.')[2]}.*.nbi"))
    except OSError:  # `bind` will say so
        return False


def _folder_name() -> str:
    versions = f"{numba.__version__} {llvmlite.__version__} {np.__version__} {sys.version} {numba.config.BOUNDSCHECK}"
    digest = hashlib.blake2b(versions.encode(), digest_size=12)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"numba-{digest.hexdigest()}"


def _dispatcher(kernel: Kernel, is_kept: bool) -> Any:
    if kernel not in _dispatchers:
        options = {"nogil": True, "error_model": "numpy", **kernel.options}
        function = _with_dispatchers(kernel.function, is_kept)
        if isinstance(kernel, Entry):
            signature = _numba_type(kernel.signature.returns)(*map(_numba_type, kernel.signature.arguments))
            _dispatchers[kernel] = _compiled(function, signature, options, is_kept)
        else:  # compiled with its callers, for the types that they pass
            _dispatchers[kernel] = numba.njit(**options)(function)
    return _dispatchers[kernel]


def _compiled(function: FunctionType, signature: Any, options: dict[str, Any], is_kept: bool) -> Any:
    if is_kept and not _folder_fails.is_set():
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except (OSError, RuntimeError) as error:  # RuntimeError: numba found no folder at all that it can write to
            _folder_fails.set()
            if isinstance(error, OSError) and not error.filename:  # a write to an open file does not name it
                error.filename = numba.config.CACHE_DIR
            objects.say_not_kept(error)
    return numba.njit(signature, **options)(function)


def _with_dispatchers(function: FunctionType, is_kept: bool) -> FunctionType:
    """The same function, with numba's types and functions under the names of our own."""
    code, names = function.__code__, dict(function.__globals__)
    for name in {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}:
        value = names.get(name)
        if isinstance(value, Kernel):
            names[name] = _dispatcher(value, is_kept)
        elif isinstance(value, Generated):
            names[name] = getattr(intrinsics, value.name)
        elif isinstance(value, Scalar):
            names[name] = _numba_type(value)
    twin = FunctionType(code, names, function.__name__, function.__defaults__)
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    return twin


def _numba_type(of: Type) -> Any:
    if isinstance(of, Array):
        return types.Array(_numba_type(of.element), of.dimensions, "C", readonly=not of.is_writable)
    if isinstance(of, Tuple):
        return types.UniTuple(_numba_type(of.element), of.count)
    return getattr(types, of.name)
