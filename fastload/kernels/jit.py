"""Kernels: how they are written, and what happens when one is called.

A *kernel* is a free function over arrays, written in the part of Python that numba compiles, and run without the GIL:

    @kernel(int64(array_in(uint8), int64))
    def count(values, of): ...

numba is a compiler here, and is not needed to run what it has compiled. Compiling the kernels of a first batch takes
some five seconds, importing numba half a second of every start, and its cache on disk can hand one function's code to
another (its issues 4807 and 10128). So a module of kernels is compiled once into an *object file* of machine code,
which needs nothing but the C library and Python's stable interface (`compiler`); this page has it found (`objects`) and
loaded (`loading`), after which a kernel is a builtin function. Where object files come from, the first that has it:

- the installation: pip builds them where it builds fastload, and binary wheels carry them, for each *level* of
  processor (x86-64-v3 and so on). Then nothing is ever compiled, numba is not imported, no cache is written.
- a folder of the user's (`objects`), also filled by `fastload compile` when an image is built.
- numba, here and now: in the background, while the first bytes are on their way. What it made is kept in that folder.

Rejected: numba's own cache in the wheel, which fits one version of numba, one of Python and one type of processor;
shared libraries, which need a linker wherever something is compiled; plain Python until the compiler is done, which
holds the GIL and needs as long for one image or one shard of records; writing kernels in C, which takes a C compiler
where there is no wheel.

What a kernel is called with is checked in machine code, too: each array must be of exactly the type that the signature
says. A call takes 0.2 us, half of what numba takes for it, where ctypes takes 1-2.

`$NUMBA_DISABLE_JIT=1` leaves kernels plain Python functions, `$NUMBA_BOUNDSCHECK=1` has their indexes checked.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

import numpy as np

from fastload.kernels import objects
from fastload.lifecycle import held_while_forking

__all__ = [
    "Generated",
    "Kernel",
    "Unit",
    "array_in",
    "array_out",
    "boolean",
    "float32",
    "float64",
    "generated",
    "helper",
    "int32",
    "int64",
    "kernel",
    "tuple_of",
    "uint8",
    "uint64",
    "void",
]

Function = TypeVar("Function", bound=Callable[..., Any])

IS_PLAIN = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
CHECKS_BOUNDS = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")

# What the code of entries relies on, beside Python's stable interface. Part of an object's name.
_CONVENTION = f"1 {object.__basicsize__} {sys.byteorder} {CHECKS_BOUNDS}"


# Types. Numba has them too, and takes a fifth of a second to import.


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, or nothing. Called with types, it is the signature of a function that takes these and returns it; with
    a number, in a kernel, it makes that one of its kind.
    """

    name: str

    def __call__(self, *arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], (Scalar, Array, Tuple)):
            return np.dtype(self.name).type(*arguments)
        return Signature(self, arguments)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Array:
    """A C-contiguous array."""

    element: Scalar
    dimensions: int
    is_writable: bool

    def __str__(self) -> str:
        return f"{'writable ' if self.is_writable else ''}array({self.element}, {self.dimensions}d)"


@dataclass(frozen=True, slots=True)
class Tuple:
    """Several numbers of one type, which a helper returns."""

    element: Scalar
    count: int

    def __call__(self, *arguments: Type) -> Signature:
        return Signature(self, arguments)

    def __str__(self) -> str:
        return f"{self.element} x {self.count}"


Type: TypeAlias = Scalar | Array | Tuple


@dataclass(frozen=True, slots=True)
class Signature:
    """What a kernel returns and takes."""

    returns: Type
    arguments: tuple[Type, ...]

    def __str__(self) -> str:
        return f"{self.returns}({', '.join(map(str, self.arguments))})"


boolean, float32, float64, int32, int64, uint8, uint64, void = map(
    Scalar, ("boolean", "float32", "float64", "int32", "int64", "uint8", "uint64", "void")
)
tuple_of = Tuple


def array_in(element: Scalar, dimensions: int = 1) -> Array:
    """A C-contiguous array that a kernel only reads; takes writable and read-only ones alike."""
    return Array(element, dimensions, is_writable=False)


def array_out(element: Scalar, dimensions: int = 1) -> Array:
    """A C-contiguous array that a kernel writes into."""
    return Array(element, dimensions, is_writable=True)


# Kernels


class Kernel:
    """A compiled function. Called first, it is loaded, and compiled where it has to be. Any thread may call it."""

    def __init__(self, function: FunctionType, signature: Signature, options: dict[str, Any]) -> None:
        assert isinstance(signature, Signature), f"{function.__name__}: a signature of this page's types is needed"
        functools.update_wrapper(self, function)
        self.function, self.signature, self.options = function, signature, options

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.function.__qualname__} is a helper: kernels call it, and Python cannot")


class Entry(Kernel):
    """A kernel that Python calls."""

    def __init__(self, function: FunctionType, signature: Signature, options: dict[str, Any]) -> None:
        super().__init__(function, signature, options)
        takes = all(isinstance(each, Array) or each in (boolean, float64, int64) for each in signature.arguments)
        is_for_python = takes and signature.returns in (boolean, int64, void)
        assert is_for_python, f"{function.__name__} is one for @helper"
        self._run: Callable[..., Any] = self._run_first
        _entries.setdefault(function.__module__, []).append(self)

    @property
    def is_ready(self) -> bool:
        """Whether it has been loaded."""
        return self._run != self._run_first

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def bind(self, builtin: Callable[..., Any]) -> None:
        """Be this function from now on."""
        self._run = builtin

    def refuse(self, place: int, given: object) -> None:
        """Called by the machine code: argument `place` is not what it has to be."""
        name, wanted = self.function.__qualname__, self.signature.arguments
        if place < 0:
            raise RuntimeError(f"{name} failed: an index out of bounds, or an error in what numba compiled for it")
        if place >= len(wanted):
            raise TypeError(f"{name} takes {len(wanted)} arguments: {', '.join(map(str, wanted))}")
        shown = type(given).__name__
        if isinstance(given, np.ndarray):
            access = "writable" if given.flags.writeable else "read-only"
            shown = f"{access} {given.dtype} {shown}, shape {given.shape}, strides {given.strides}"
        raise TypeError(f"{name}: argument {place} has to be a C-contiguous {wanted[place]}; it is a {shown}")

    def _run_first(self, *args: Any) -> Any:
        prepare(self.function.__module__)
        assert self.is_ready, f"{self.function.__qualname__} was not among what was compiled"
        return self._run(*args)


class Generated:
    """See `generated`."""

    def __init__(self, function: FunctionType) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]  # nobody calls it
        self.name = function.__name__


def kernel(signature: Signature, /, **options: Any) -> Callable[[Function], Function]:
    """Make a function a kernel: `@kernel(int64(array_in(uint8), int64))`. Python can call those that return int64,
    boolean or nothing and take arrays, int64, float64 and boolean.

    `options` are those of `numba.njit`, such as `fastmath=True`. Kernels raise nothing: a division by zero is whatever
    the processor makes of it. They allocate nothing, either: scratch comes from the caller.
    """
    return lambda function: _made(Entry, function, signature, options)


def helper(signature: Signature, /, **options: Any) -> Callable[[Function], Function]:
    """Make a function one that kernels call: as `kernel`, of any types, and compiled into each module that uses it."""
    return lambda function: _made(Kernel, function, signature, options)


def generated(function: Function) -> Function:
    """Make a function one that kernels call and whose code is that of `fastload.kernels.intrinsics`, under its name.
    The decorated function says the same in Python, as far as that can.
    """
    assert isinstance(function, FunctionType), function
    return function if IS_PLAIN else Generated(function)  # type: ignore[return-value]


def _made(kind: Callable[..., Any], function: Function, signature: Signature, options: dict[str, Any]) -> Function:
    assert isinstance(function, FunctionType), function
    return function if IS_PLAIN else kind(function, signature, options)


# Compiling and loading

_entries: dict[str, list[Entry]] = {}  # by module
# A child that is forked while another thread compiles would find numba half imported, and its locks held for ever.
_lock = held_while_forking(threading.RLock())

# After a compilation the lock is left alone for so long: who waits for it has called a kernel, and is to have the next.
_TURN_S = 0.01
_PROGRESS_S = 5.0

_log = logging.getLogger("fastload.kernels")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is compiled in one go: kernels of a module, which Python calls, with all that they call."""

    module: str
    kernels: tuple[Entry, ...]

    def object_name(self, level: str) -> str:
        """The name of its object file: another one for each change of what the code is made of."""
        digest = hashlib.blake2b(_CONVENTION.encode(), digest_size=12)
        for each in self.kernels:
            digest.update(f" {each.function.__qualname__} {each.signature} {each.options}".encode())
        ingredients: set[Path | str] = {Path(__file__).parent / name for name in _COMPILER}
        for each in self.kernels:
            _add_ingredients(each, ingredients)
        for one in sorted(_file_digest(each) if isinstance(each, Path) else each for each in ingredients):
            digest.update(f" {one}".encode())
        return f"{self.module.rpartition('.')[2]}-{digest.hexdigest()}.{level}.o"


# What decides about the code of any kernel.
_COMPILER = ("compiler.py", "entries.py", "intrinsics.py", "jit.py", "layout.py", "loading.py")


def _add_ingredients(kernel: Kernel, found: set[Path | str]) -> None:
    """The source files of a kernel and of those that it calls, and the constants that they take from elsewhere."""
    code, names = kernel.function.__code__, kernel.function.__globals__
    found.add(Path(code.co_filename))
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, Kernel):
            _add_ingredients(value, found)
        elif isinstance(value, (int, float, np.generic)):
            plain = value.item() if isinstance(value, np.generic) else value  # numpy's words for it have changed
            found.add(f"{name}={type(value).__name__} {plain!r}")


@functools.cache
def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def units(*modules: str) -> list[Unit]:
    """What these modules, imported, have to be compiled."""
    return [Unit(module, tuple(_entries[module])) for module in modules if module in _entries]


def prepare(*modules: str) -> int:
    """Load the kernels of these modules, compiling those that are not found; returns how many the modules have."""
    missing = []
    for module in modules:
        with _lock:
            unit = _pending(module)
            if unit is not None and not _load(unit):
                missing.append(module)
    if missing:
        _compile(missing)
    return sum(len(_entries.get(module, ())) for module in modules)


def _pending(module: str) -> Unit | None:
    """What is not loaded yet of a module, if anything."""
    kernels = tuple(each for each in _entries.get(module, ()) if not each.is_ready)
    return Unit(module, kernels) if kernels else None


def _load(unit: Unit) -> bool:
    """Whether it was found."""
    from fastload.kernels import loading  # llvmlite takes 20 ms to import

    code = objects.find(unit.object_name(loading.level_here()))
    if code is not None:
        _bind(unit, code)
    return code is not None


def _compile(modules: Sequence[str]) -> None:
    """Compile and load what these have that is not loaded yet; one process says so at once, and how far it is."""
    from fastload.kernels import loading

    level = loading.level_here()
    began = said = time.monotonic()
    speaks = False
    for number, module in enumerate(modules, 1):
        with _lock, objects.alone():
            unit = _pending(module)
            if unit is None or _load(unit):
                continue  # by another thread or process, for which we have waited
            from fastload.kernels import compiler

            name = unit.object_name(level)
            speaks = speaks or objects.is_first_to_compile()
            if speaks:
                _announce("NUMBA_BOUNDSCHECK is set" if CHECKS_BOUNDS else objects.why_not_installed(name))
            code = compiler.compile_unit(unit, [level])[level]
            objects.keep(name, code)
            _bind(unit, code)
        now = time.monotonic()
        if speaks and now - said > _PROGRESS_S:
            _log.warning("%d of %d modules of kernels are ready, after %.0f s", number, len(modules), now - began)
            said = now
        time.sleep(_TURN_S)


@functools.cache  # once in a process
def _announce(reason: str) -> None:
    _log.warning(
        "fastload compiles its kernels now, some ten seconds in all, since %s. `fastload compile` does that before a "
        "job starts; pip does it for all users where it installs fastload",
        reason,
    )


def _bind(unit: Unit, code: bytes) -> None:
    from fastload.kernels import loading

    addresses = loading.load(code, [symbol(each) for each in unit.kernels])
    for each, address in zip(unit.kernels, addresses, strict=True):
        each.bind(loading.builtin(each.function.__name__, address, (np.ndarray, each.refuse)))


def symbol(entry: Entry) -> str:
    """Its name in the object file."""
    return f"fastload.{entry.function.__qualname__}"
