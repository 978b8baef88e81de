"""Packages whose names are imported when they are first used (PEP 562).

The cache service and the command line do without torch, most of a trainer does without object stores, and a process
that forks must not import anything that may have threads. So the front of such a package imports nothing: it says which
module each name is in, and imports the same names under `TYPE_CHECKING` for type checkers and editors.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, names_of: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, given the names that it has from each of its modules.

    A module without names is itself a name of the package.
    """
    module_of = {name: module for module, names in names_of.items() for name in names or (module,)}
    own = vars(sys.modules[package])

    def getattr_(name: str) -> Any:
        if name not in module_of:
            # With `name` and `obj`, Python can suggest the name that was meant.
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        module = _imported(f"{package}.{module_of[name]}")
        value = own[name] = getattr(module, name) if names_of[module_of[name]] else module
        return value

    def dir_() -> list[str]:
        return sorted({*module_of, *(name for name in own if name.startswith("__"))})

    return getattr_, dir_, sorted(module_of)


def _imported(name: str) -> ModuleType:
    """A module. Beside torch, one collection of garbage takes 80 ms, half of what importing all of fastload does, and
    nothing that is imported is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()
