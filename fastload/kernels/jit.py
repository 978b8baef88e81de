"""How fastload compiles its kernels: once per kernel, when first needed, and kept on disk per user.

A *kernel* is a free function over arrays, compiled by numba without the GIL. What numba does by default costs
a loader dearly, so five things are settled here:

- *One compilation per kernel.* numba compiles a function again for every combination of argument types, and a
  read-only array is another type than a writable one. A kernel states its signature; read-only parameters
  (`array_in`) take both.
- *Not at import.* numba compiles a function with a signature where it is decorated, 0.3-0.5 s each. A kernel
  is compiled when it is first called, or ahead of that by `fastload.kernels.compile_in_background`.
- *numba's own libraries at import.* It loads them (and scipy, where that is installed) when it first compiles or
  loads anything: a third of a second of imports under the GIL, which would stand in the way of the first batch.
- *A cache that cannot return the wrong code.* numba's index file is rewritten without a lock, so that two
  processes which save different entries of one function may leave the one's code under the other's key. Here
  a folder belongs to one processor type and one version of numba, and a function has one entry. An entry is
  stale when any source file beside the kernel has changed, since numba copies called functions into their
  callers and looks only at the caller's file.
- *A cache that cannot do harm.* Entries are unpickled, so the folder must be ours and closed to others;
  otherwise, and where it cannot be written, kernels are compiled afresh in each process and a log line says
  so.

`$NUMBA_CACHE_DIR` names another folder, `$NUMBA_DISABLE_JIT=1` leaves kernels plain Python functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import llvmlite  # type: ignore[import-untyped]
import numba
from llvmlite import binding
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.types import Array, Type

__all__ = ["Kernel", "array_in", "array_out", "kernel"]

Function = TypeVar("Function", bound=Callable[..., Any])

_log = logging.getLogger("fastload.kernels")

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def array_in(element: Type, dimensions: int = 1) -> Type:
    """The type of a C-contiguous array that a kernel only reads; takes writable and read-only ones alike."""
    return Array(element, dimensions, "C", readonly=True)


def array_out(element: Type, dimensions: int = 1) -> Type:
    """The type of a C-contiguous array that a kernel writes into."""
    return Array(element, dimensions, "C")


class Kernel(CPUDispatcher):  # type: ignore[misc]  # numba has no types
    """A numba function with at most one signature, compiled when first called. Any thread may call it."""

    signature: Any = None
    _ready = False

    def prepare(self) -> None:
        """Compile now, or load from the cache; returns at once when that is done.

        Does nothing for a kernel without a signature.
        """
        if self.signature is None or self._ready:
            return
        # numba's own lock, since a second one would be taken in the other order by kernels that call kernels.
        with global_compiler_lock:
            if not self._ready:
                self.compile(self.signature)
                self.disable_compile()
                self._ready = True

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        """Called by numba where no compiled version takes the arguments."""
        if self.signature is None:
            return super()._compile_for_args(*args, **kws)
        self.prepare()
        # Not a compiled entry point: numba calls this again, and checks the arguments against the signature.
        return self

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Called by numba where another kernel that it compiles calls this one."""
        self.prepare()
        return super().get_call_template(args, kws)

    def enable_caching(self) -> None:
        """Keep compiled code on disk, where that can be done safely."""
        try:
            self._cache = _KernelCache(self.py_func)
        except _NoCacheError as error:
            _say_once(f"compiled kernels are not kept: {error}")


def kernel(signature: Any = None, /, **options: Any) -> Callable[[Function], Function]:
    """Make a function a `Kernel`: `@kernel(int64(array_in(uint8), int64))`.

    Without a signature (`@kernel()`) it is compiled for whatever types it is called with, which suits small
    helpers that other kernels call. `options` are those of `numba.njit`, such as `fastmath=True`. `nogil` and
    the cache are always on.
    """
    assert not isinstance(signature, FunctionType), "write @kernel(), with parentheses"
    return lambda function: _make(function, signature, options)


def _make(function: Function, signature: Any, options: dict[str, Any]) -> Function:
    if numba.config.DISABLE_JIT:
        return function
    made = Kernel(py_func=function, targetoptions={"nopython": True, "nogil": True, "boundscheck": None, **options})
    made.signature = signature
    made.enable_caching()
    return made


_CURE = "set NUMBA_CACHE_DIR to a folder of yours"


class _NoCacheError(Exception):
    """Why there can be no cache for compiled code."""


def cache_directory() -> Path:
    """Where compiled code of this processor type and numba version is kept. Not created here."""
    if numba.config.CACHE_DIR:
        base = Path(numba.config.CACHE_DIR)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastload-kernels"
    processor = f"{binding.get_host_cpu_name()} {sorted(binding.get_host_cpu_features().items())}"
    versions = f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}"
    versions += f" {numba.config.BOUNDSCHECK} {numba.config.OPT}"
    return base / hashlib.blake2b(f"{processor} {versions}".encode(), digest_size=8).hexdigest()


class _Locator:
    """Tells numba where one function's compiled code lies and when it is stale."""

    def __init__(self, source: Path, line: int) -> None:
        self._source = source
        self._line = line
        # Installations at different paths must not overwrite each other's entries in turn.
        place = hashlib.blake2b(str(source.parent.resolve()).encode(), digest_size=8).hexdigest()
        self._path = cache_directory() / place

    @classmethod
    def from_function(cls, function: Any, source: str) -> _Locator:
        self = cls(Path(source), function.__code__.co_firstlineno)
        self.ensure_cache_path()
        return self

    def ensure_cache_path(self) -> None:
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._path.stat()
        except OSError as error:
            raise _NoCacheError(f"{self._path}: {error.strerror}; set NUMBA_CACHE_DIR to a folder of yours") from error
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _NoCacheError(f"{self._path} belongs to, or can be written by, another user; chmod 700, or remove it")
        if not os.access(self._path, os.W_OK | os.X_OK):
            raise _NoCacheError(f"{self._path} cannot be written; {_CURE}")

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> bytes:
        return source_stamp(self._source.parent)

    def get_disambiguator(self) -> str:
        return str(self._line)


def source_stamp(folder: Path) -> bytes:
    """A hash of all Python source in `folder`."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.digest()


class _KernelCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]  # numba has no types
    _locator_classes = (_Locator,)


class _KernelCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """numba's cache for one function; trouble with its files costs a compilation, never the run."""

    _impl_class = _KernelCacheImpl

    @contextlib.contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """Wraps numba's loading and saving; loading that ends here counts as "not there"."""
        try:
            yield
        except (OSError, EOFError, pickle.UnpicklingError, _NoCacheError) as error:
            _say_once(f"a kernel is compiled afresh, since its cache fails: {error!r}")


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)
