"""Kernels: free functions over arrays, compiled by numba, run without the GIL. How: `fastload.kernels.jit`.

Import what you need from its module (`fastload.kernels.gather`, ...). Loading the kernels of a first batch takes 60 ms;
compiling them, where that was not done before, some seconds. So a caller that will need them starts early:

    compile_in_background("tarindex", "gather")     # while the first bytes are on their way

The interpreter joins the thread when it exits. A fork waits until it is between two modules.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastload.errors import ConfigError
from fastload.kernels import jit, objects
from fastload.kernels.declare import units

__all__ = [
    "FIRST_BATCH",
    "OF_DECODERS",
    "compile_in_background",
    "compile_into",
    "is_compiled",
    "module_names",
    "object_names",
    "warm_up",
]

_log = logging.getLogger("fastload.kernels")

FIRST_BATCH = ("shuffling", "tarindex", "grouping", "rows", "gather")
"""What the first batch needs of compiled code, beside its decoders'."""
OF_DECODERS = {"image": ("resize",), "integer": ("parse",), "number": ()}
"""What these decoders may need: images only where there is no C unit."""


_COMPILER = {"compiler", "declare", "entries", "intrinsics", "jit", "loading", "objects", "numba_jit", "yielding"}


def module_names() -> list[str]:
    """The modules of this package that hold kernels."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in _COMPILER)


def warm_up(*modules: str) -> int:
    """Import these modules of `fastload.kernels` and load all their kernels, compiling what was not compiled before;
    returns the number of kernels.
    """
    return jit.prepare(*map(_imported, modules))


def compile_into(
    folder: Path,
    modules: Iterable[str],
    levels: Sequence[str] = (),
    *,
    is_public: bool = True,
    on_unit: Callable[[str], None] = lambda _: None,
) -> int:
    """Compile these modules' kernels for these levels of processor, or all that this kind of machine has, into a folder
    for object files; returns how many were not there yet. ConfigError where they are compiled the plain way.
    """
    from fastload.kernels import loading

    why = jit.why_plain()
    if why is not None:
        raise ConfigError(f"kernels cannot be compiled ahead: {why}; each job has numba compile them, and keeps them")
    count = 0
    for unit in units(*map(_imported, modules)):
        on_unit(unit.module)
        names = {level: jit.object_name(unit, level) for level in levels or loading.LEVELS}
        missing = [level for level, name in names.items() if objects.find_in(folder, name) is None]
        if missing:
            from fastload.kernels import compiler  # which imports numba

            for level, code in compiler.compile_unit(unit, missing, checks_bounds=jit.CHECKS_BOUNDS).items():
                objects.write(folder, names[level], code, is_public=is_public)
        count += len(missing)
    return count


def object_names(modules: Iterable[str], level: str) -> list[str]:
    """The names of these modules' object files for a level of processor; modules without kernels have none."""
    return [jit.object_name(unit, level) for unit in units(*map(_imported, modules))]


def is_compiled(module: str) -> bool:
    """Whether the kernels of this module can be called without compiling: they are loaded, or are found compiled."""
    return all(
        all(kernel.is_ready for kernel in unit.kernels) or jit.is_found(unit) for unit in units(_imported(module))
    )


def _imported(name: str) -> str:
    return importlib.import_module(f"{__name__}.{name}").__name__


def compile_in_background(*modules: str) -> threading.Thread:
    """Start `warm_up(*modules)` in a thread, and return it. A call of a kernel waits meanwhile for its module."""
    thread = threading.Thread(target=_warm_up_ahead, args=(modules,), name="fastload-compile", daemon=False)
    thread.start()
    return thread


def _warm_up_ahead(modules: tuple[str, ...]) -> None:
    try:
        warm_up(*modules)
    except (
        Exception
    ):  # nothing is remembered of it, so the first call of a kernel tries again, and raises what it meets
        _log.warning(
            "kernels of %s could not be loaded ahead; the first call of one tries again",
            ", ".join(modules),
            exc_info=True,
        )
