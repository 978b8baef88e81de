"""Compiles kernels into an object file, by numba. Imported only where something is compiled.

A unit's kernels and all that they call become one LLVM module, which is optimised once for each level of processor.
numba optimises each function by itself, then again within each caller, and wraps each for Python: that took twice as
long. There is no reference counting and no memory management in what comes out (`nrt`), so that it needs nothing of
numba's, and nothing that raises (`error_model`).

Beside each kernel stands its entry, which Python calls (`entries`).
"""

from __future__ import annotations

import dis
import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from llvmlite import binding  # type: ignore[import-untyped]
from numba.core import types
from numba.core.codegen import AOTCPUCodegen
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.errors import NumbaWarning
from numba.core.registry import cpu_target
from numba.core.types import UniTuple  # type: ignore[attr-defined]
from numba.core.typing import make_concrete_template

from fastload.kernels import entries, intrinsics, loading
from fastload.kernels.declare import Array, Generated, Kernel, Scalar, Tuple, Type, Unit

__all__ = ["compile_unit"]

# What an object may call beside Python's functions: it is there in every process.
_C_LIBRARY = frozenset(
    ("ceil", "clock_gettime", "floor", "memcpy", "memmove", "memset", "round", "rint", "sched_yield", "sqrt", "trunc")
)


@global_compiler_lock  # type: ignore[untyped-decorator]
def compile_unit(unit: Unit, levels: Sequence[str], *, checks_bounds: bool = False) -> dict[str, bytes]:
    """The object file of a unit for each of these levels of processor."""
    library = _Lowering(unit, checks_bounds).library
    return {level: _emitted(unit, library, level) for level in levels}


class _Lowering:
    """A unit's kernels in one LLVM module, not optimised yet."""

    def __init__(self, unit: Unit, checks_bounds: bool) -> None:
        self._checks_bounds = checks_bounds
        self._context = _context("")
        self.library = self._context.codegen().create_library(unit.module)
        self._typed: dict[Kernel, tuple[FunctionType, Any]] = {}
        for entry in unit.kernels:
            entries.add_entry(self.library, self._context, entry, self._compiled(entry)[1].fndesc)

    def _compiled(self, kernel: Kernel) -> tuple[FunctionType, Any]:
        """A kernel, once it is in the library: the function that stands for it in others, and what numba made of it."""
        if kernel not in self._typed:
            function = self._function(kernel.function)
            signature, flags = kernel.signature, Flags()
            options = {**_OPTIONS, **kernel.options, "boundscheck": self._checks_bounds}
            cpu_target.options.parse_as_flags(flags, options)
            flags.no_compile = True
            _refresh()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NumbaWarning)
                made = compile_extra(
                    cpu_target.typing_context,
                    self._context,
                    function,
                    args=tuple(map(_numba_type, signature.arguments)),
                    return_type=_numba_type(signature.returns),
                    flags=flags,
                    locals={},
                    library=self.library,
                )
            template = make_concrete_template(function.__name__, function, [made.signature])
            cpu_target.typing_context.insert_global(function, types.Function(template))
            self._context.insert_user_function(function, made.fndesc)
            self._typed[kernel] = function, made
        return self._typed[kernel]

    def _function(self, function: FunctionType) -> FunctionType:
        """The same function, with numba's types and functions under the names of our own."""
        code, names = function.__code__, dict(function.__globals__)
        loaded = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
        for name in loaded:
            value = names.get(name)
            if isinstance(value, Kernel):
                names[name] = self._compiled(value)[0]
            elif isinstance(value, Generated):
                names[name] = getattr(intrinsics, value.name)
            elif isinstance(value, Scalar):
                names[name] = _numba_type(value)
        twin = FunctionType(code, names, function.__name__, function.__defaults__)
        twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
        return twin


# Without wrappers for Python's sake, without the reference counts of arrays.
_OPTIONS = {
    "nopython": True,
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}


def _emitted(unit: Unit, lowered: Any, level: str) -> bytes:
    codegen = _context(loading.processor(level)).codegen()
    library = codegen.create_library(unit.module)
    module = library._final_module
    module.link_in(binding.parse_bitcode(lowered._final_module.as_bitcode()))
    for each in lowered._linking_libraries:  # what numba has written of itself in Python
        library.add_linking_library(each)
    ours = {entry.symbol for entry in unit.kernels}
    for function in module.functions:
        if not function.is_declaration and function.name not in ours:
            function.linkage = "internal"  # so that nothing is left of it once it is inlined
    library.finalize()
    called = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")}
    if odd := called.difference(_C_LIBRARY, loading.PYTHON):
        raise TypeError(f"kernels of {unit.module} call {', '.join(sorted(odd))}: no kernel may allocate, or raise")
    code: bytes = library.emit_native_object()
    return code


class _Codegen(AOTCPUCodegen):  # type: ignore[misc]  # numba has no types
    """Code for a type of processor, not for this process."""

    def _customize_tm_features(self) -> str:
        # Gathering from memory by one instruction is slow on AMD's, and on Intel's since it leaks (Downfall): resizing
        # takes half as long again with it.
        is_known = binding.llvm_version_info[0] >= 17
        return "+prefer-no-gather" if is_known and loading.IS_X86 else ""


def _context(cpu_name: str) -> Any:
    _refresh()
    return cpu_target.target_context.subtarget(_internal_codegen=_Codegen("fastload", cpu_name), aot_mode=True)


def _refresh() -> None:
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def _numba_type(of: Type) -> Any:
    if isinstance(of, Array):
        return types.Array(_numba_type(of.element), of.dimensions, "C", readonly=not of.is_writable)
    if isinstance(of, Tuple):
        return UniTuple(_numba_type(of.element), of.count)
    return getattr(types, of.name)
