"""Kernels: how they are compiled, and what happens when one is called.

A *kernel* is a free function over arrays, written in the part of Python that numba compiles, and run without the GIL
(`declare`). numba is a compiler here, and is not needed to run what it has compiled. A module of kernels is compiled
once into an *object file* of machine code, which needs nothing but the C library and Python's stable interface
(`compiler`); this module finds it (`objects`) and loads it (`loading`), after which a kernel is a builtin function.
Object files come from, in this order:

- the installation: pip builds them where it builds fastload, and binary wheels carry them, for each *level* of
  processor (x86-64-v3 and so on). Then nothing is ever compiled, numba is not imported, no cache is written.
- a folder of the user's (`objects`), also filled by `fastload compile` when an image is built.
- numba, here and now: in the background, while the first bytes are on their way. The result is kept in that folder.

The plain way is `numba.njit(nogil=True, cache=True)`, with a folder of its own for each version of everything and one
process that compiles at a time (`plain`). It is taken where numba, llvmlite or numpy is of a version that the compiler
was not tried with (`TRIED`), and where `$FASTLOAD_PLAIN_NUMBA` is 1. It works, and is not the default, since users
would feel the difference. `python -m bench.kernels` on two busy cores (load 11 to 18; in turn; medians of five rounds,
and of two where nothing was compiled; CPU-seconds, since other programs had most of the wall time):

                                                        ahead of time    numba's own
    first batch of photographs, beyond `import torch`     0.8 CPU-s         1.9
    kernels of a first batch, in a process with torch     0.09              1.1
    - in one without                                      0.1               1.3
    - in eight at once                                    1.9              15
    - for a user with nowhere to write                    0.3              21
    - nothing compiled yet: one process                  16                22
    - nothing compiled yet: eight at once                26                34
    memory of each process                               22 MiB            69
    one call                                              0.25 us           0.57

So each process of a job would start a second later, where `bench.start` asks for 0.7 s in all, and would need 45 MiB
more; and jobs in images and on read-only machines would compile in every process. A batch takes the GIL as often either
way (`bench.interference --case records`: six times in the thread that decodes), but dispatchers now and then hold it
for 5 ms, and these kernels for 1. numba's cache cannot be part of a wheel: it fits one version of numba and Python,
and one type of processor.

Rejected, too: shared libraries, which need a linker wherever something is compiled; plain Python until the compiler is
done, which holds the GIL and needs as long for one image or one shard of records; writing kernels in C, which takes a C
compiler where there is no wheel.

What a kernel is called with is checked in machine code, too: each array must be of exactly the type that the signature
says. (numba's dispatchers check as strictly, but for floats, which they cut to integers.)

`$NUMBA_DISABLE_JIT=1` leaves kernels plain Python functions, `$NUMBA_BOUNDSCHECK=1` has their indexes checked.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fastload.kernels import objects
from fastload.kernels.declare import Kernel, Unit, load_with, units
from fastload.lifecycle import held_while_forking

__all__ = ["PLAIN", "TRIED", "is_found", "object_name", "prepare", "why_plain"]

CHECKS_BOUNDS = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")

TRIED = {"numpy": ((1, 26), (2, 4)), "llvmlite": ((0, 43), (0, 50)), "numba": ((0, 60), (0, 68))}
"""The first and the last version of each with which the compiler here, and what it makes, has been tried."""
PLAIN = "FASTLOAD_PLAIN_NUMBA"
"""Where this variable is 1, kernels are compiled the plain way."""

# What the code of entries relies on, beside Python's stable interface. Part of an object's name.
_CONVENTION = f"1 {object.__basicsize__} {sys.byteorder} {CHECKS_BOUNDS}"

# A child that is forked while another thread compiles would find numba half imported, and its locks held for ever.
_lock = held_while_forking(threading.RLock())

# After a compilation the lock is free for so long: a thread that waits for it has called a kernel, and goes first.
_LOCK_FREE_S = 0.01
_PROGRESS_S = 5.0

_log = logging.getLogger("fastload.kernels")


def why_plain(*packages: str) -> str | None:
    """Why kernels are compiled the plain way, if they are, as far as these packages decide: all of those in `TRIED`, or
    the ones that run what was compiled before.
    """
    if os.environ.get(PLAIN, "0") not in ("", "0"):
        return f"{PLAIN} is set"
    for name in packages or TRIED:
        installed, (first, last) = importlib.import_module(name).__version__, TRIED[name]
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
            return f"{name} {installed} is not among the versions that fastload's compiler was tried with"
    return None


def object_name(unit: Unit, level: str) -> str:
    """The name of a unit's object file: another one for each change of what the code is made of."""
    digest = hashlib.blake2b(_CONVENTION.encode(), digest_size=12)
    for each in unit.kernels:
        digest.update(f" {each.function.__qualname__} {each.signature} {each.options}".encode())
    ingredients: set[Path | str] = {Path(__file__).parent / name for name in _COMPILER}
    for each in unit.kernels:
        _add_ingredients(each, ingredients)
    for one in sorted(_file_digest(each) if isinstance(each, Path) else each for each in ingredients):
        digest.update(f" {one}".encode())
    return f"{unit.module.rpartition('.')[2]}-{digest.hexdigest()}.{level}.o"


# What decides about the code of any kernel.
_COMPILER = ("compiler.py", "entries.py", "intrinsics.py", "declare.py", "loading.py")


def _add_ingredients(kernel: Kernel, found: set[Path | str]) -> None:
    """The source files of a kernel and of those that it calls, and the constants that they take from elsewhere."""
    import numpy as np

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
    return sum(len(unit.kernels) for unit in units(*modules))


load_with(prepare)


def _pending(module: str) -> Unit | None:
    """What is not loaded yet of a module, if anything."""
    kernels = tuple(each for unit in units(module) for each in unit.kernels if not each.is_ready)
    return Unit(module, kernels) if kernels else None


def is_found(unit: Unit) -> bool:
    """Whether there is an object file of a unit. (What numba keeps is not looked for, as that takes importing it.)"""
    return _find(unit) is not None


def _find(unit: Unit) -> bytes | None:
    """Its object file, if there is one that can be used."""
    if why_plain("llvmlite", "numpy") is not None:
        return None
    from fastload.kernels import loading  # llvmlite takes 20 ms to import

    return objects.find(object_name(unit, loading.level_here()))


def _load(unit: Unit) -> bool:
    """Whether it was found."""
    code = _find(unit)
    if code is not None:
        _bind(unit, code)
    return code is not None


def _compile(modules: Sequence[str]) -> None:
    """Compile and load what these have that is not loaded yet; one process says so at once, and how far it is."""
    began = said = time.monotonic()
    speaks = False
    for number, module in enumerate(modules, 1):
        with _lock, objects.alone():
            unit = _pending(module)
            if unit is None or _load(unit):
                continue  # another thread or process has compiled it meanwhile
            speaks = speaks or objects.is_first_to_compile()
            why = why_plain()  # here, since it imports numba, which a process that has only waited does not need
            if why is not None:
                _compile_plainly(unit, why, speaks)
            else:
                _compile_ahead(unit, speaks)
        now = time.monotonic()
        if speaks and now - said > _PROGRESS_S:
            _log.warning("%d of %d modules of kernels are ready, after %.0f s", number, len(modules), now - began)
            said = now
        time.sleep(_LOCK_FREE_S)


def _compile_ahead(unit: Unit, speaks: bool) -> None:
    from fastload.kernels import compiler, loading

    level = loading.level_here()
    name = object_name(unit, level)
    if speaks:
        _announce("NUMBA_BOUNDSCHECK is set" if CHECKS_BOUNDS else objects.why_not_installed(name))
    code = compiler.compile_unit(unit, [level], checks_bounds=CHECKS_BOUNDS)[level]
    objects.keep(name, code)
    _bind(unit, code)


def _compile_plainly(unit: Unit, why: str, speaks: bool) -> None:
    from fastload.kernels import numba_jit

    if speaks and not numba_jit.is_kept(unit.module):
        _announce_plain(why)
    numba_jit.bind(unit)


@functools.cache
def _announce_plain(why: str) -> None:
    _log.warning(
        "fastload compiles its kernels now, some twenty seconds in all, and needs numba at every start, since %s",
        why,
    )


@functools.cache  # once in a process
def _announce(reason: str) -> None:
    _log.warning(
        "fastload compiles its kernels now, some ten seconds in all, since %s. `fastload compile` does that before a "
        "job starts; pip does it for all users where it installs fastload",
        reason,
    )


def _bind(unit: Unit, code: bytes) -> None:
    import numpy as np

    from fastload.kernels import loading

    addresses = loading.load(code, [each.symbol for each in unit.kernels])
    for each, address in zip(unit.kernels, addresses, strict=True):
        each.bind(loading.builtin(each.function.__name__, address, (np.ndarray, each.refuse)))
