"""How a kernel is declared: the types of its arguments, and the decorators.

    @kernel(int64(array_in(uint8), int64))
    def count(values, of): ...

numba has such types, too, but takes a fifth of a second to import. Neither this module nor `jit` needs numpy to be
imported: where pip builds without it, `python -m fastload.kernels` says what it lacks.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

__all__ = [
    "Array",
    "Entry",
    "Generated",
    "Kernel",
    "Scalar",
    "Tuple",
    "Type",
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
    "load_with",
    "tuple_of",
    "uint8",
    "uint64",
    "units",
    "void",
]

Function = TypeVar("Function", bound=Callable[..., Any])

IS_PYTHON = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
"""Kernels are left plain Python functions."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, or nothing. Called with types, it is the signature of a function that takes these and returns it; with
    a number, in a kernel, it makes that one of its kind.
    """

    name: str

    def __call__(self, *arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], (Scalar, Array, Tuple)):
            import numpy as np

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
        assert isinstance(signature, Signature), f"{function.__name__}: a signature of the types below is needed"
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
    def symbol(self) -> str:
        """Its name in an object file."""
        return f"fastload.{self.function.__qualname__}"

    @property
    def is_ready(self) -> bool:
        """Whether it has been loaded."""
        return self._run != self._run_first

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def bind(self, builtin: Callable[..., Any]) -> None:
        """Call this function from now on."""
        self._run = builtin

    def refuse(self, place: int, given: object) -> None:
        """Called by the machine code: argument `place` is of another kind than declared."""
        name, wanted = self.function.__qualname__, self.signature.arguments
        if place < 0:
            raise RuntimeError(f"{name} failed: an index out of bounds, or an error in what numba compiled for it")
        if place >= len(wanted):
            raise TypeError(f"{name} takes {len(wanted)} arguments: {', '.join(map(str, wanted))}")
        import numpy as np

        shown = type(given).__name__
        if isinstance(given, np.ndarray):
            access = "writable" if given.flags.writeable else "read-only"
            shown = f"{access} {given.dtype} {shown}, shape {given.shape}, strides {given.strides}"
        raise TypeError(f"{name}: argument {place} has to be a C-contiguous {wanted[place]}; it is a {shown}")

    def _run_first(self, *args: Any) -> Any:
        _load(self.function.__module__)
        assert self.is_ready, f"{self.function.__qualname__} was not among what was compiled"
        return self._run(*args)


class Generated:
    """See `generated`."""

    def __init__(self, function: FunctionType) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]  # it is never called
        self.name = function.__name__


def kernel(signature: Signature, /, **options: Any) -> Callable[[Function], Function]:
    """Make a function a kernel: `@kernel(int64(array_in(uint8), int64))`. Python can call those that return int64,
    boolean or nothing and take arrays, int64, float64 and boolean.

    `options` are those of `numba.njit`, such as `fastmath=True`. Kernels raise nothing: a division by zero gives what
    the processor makes of it. They allocate nothing, either: the caller passes scratch.
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
    return function if IS_PYTHON else Generated(function)  # type: ignore[return-value]


def _made(kind: Callable[..., Any], function: Function, signature: Signature, options: dict[str, Any]) -> Function:
    assert isinstance(function, FunctionType), function
    return function if IS_PYTHON else kind(function, signature, options)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is compiled in one go: kernels of a module, which Python calls, with all that they call."""

    module: str
    kernels: tuple[Entry, ...]


_entries: dict[str, list[Entry]] = {}  # by module
_load: Callable[[str], object]


def units(*modules: str) -> list[Unit]:
    """The kernels of these modules, which have been imported."""
    return [Unit(module, tuple(_entries[module])) for module in modules if module in _entries]


def load_with(load: Callable[[str], object]) -> None:
    """Have this function load the kernels of a module when one of them is called first."""
    global _load
    _load = load
