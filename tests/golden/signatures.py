"""What users write: names, parameters and their defaults, members, kinds of errors, commands and their options.

Annotations are left out, since `tests/test_types.py` has type checkers look at them.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer.main

import fastload
import fastload.files
from tests.golden.doors import IndexedDataset, command_line
from tests.golden.world import data_set, world

# Members without an underscore that are for loaders of ours: they may change.
INSIDE = frozenset(
    [
        "adopt",
        "adopt_order",
        "begin",
        "begin_epoch",
        "cache_name",
        "has_functions",
        "next_epoch",
        "on_batches",
        "open",
        "plan",
        "read_position",
        "settle",
        "shuffled",
        "skips_errors",
        "warn_once",
    ]
)
SPECIAL = frozenset(
    f"__{name}__"
    for name in ["array", "call", "enter", "eq", "exit", "getitem", "getitems", "iter", "len", "next", "torch_function"]
)


def record(folder: Path) -> dict[str, Any]:
    """All of it."""
    classes = [
        fastload.Cache,
        fastload.DataLoader,
        fastload.Mixture,
        fastload.Ragged,
        fastload.StreamingDataset,
        IndexedDataset,
        fastload.files.ObjectFile,
        fastload.decode.Decoder,
    ]
    modules = {
        "fastload": fastload,
        "fastload.decode": fastload.decode,
        "fastload.files": fastload.files,
        "fastload.metrics": fastload.metrics,
    }
    return {
        "names": {name: sorted(module.__all__) for name, module in modules.items()},
        "functions": {
            f"{name}.{each}": _parameters(getattr(module, each))
            for name, module in modules.items()
            for each in sorted(module.__all__)
            if inspect.isroutine(getattr(module, each))
        },
        "classes": {kind.__name__: _class(kind) for kind in classes},
        "attributes": _attributes(folder),
        "errors": {
            name: [base.__name__ for base in getattr(fastload, name).__mro__]
            for name in sorted(fastload.__all__)
            if name.endswith("Error")
        },
        "commands": dict(sorted(_commands("fastload", typer.main.get_command(command_line)))),
    }


def _class(kind: type) -> dict[str, Any]:
    is_made_by_users = kind.__name__ in (*fastload.__all__, *fastload.decode.__all__)
    members = {"(made)": _parameters(kind)} if is_made_by_users else {}
    for name in dir(kind):
        owner = next(each for each in kind.__mro__ if name in vars(each))
        is_shown = name in SPECIAL or not name.startswith("_")
        if owner.__module__.startswith("fastload") and is_shown and name not in INSIDE:
            member = inspect.getattr_static(kind, name)
            members[name] = "property" if not _called(member) else _parameters(getattr(kind, name))
    bases = [base.__name__ for base in kind.__mro__[1:] if not base.__module__.startswith("fastload")]
    return {"bases": bases, "members": members}


def _called(member: Any) -> bool:
    return inspect.isroutine(member) or isinstance(member, classmethod | staticmethod)


def _parameters(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _attributes(folder: Path) -> dict[str, list[str]]:
    """What frameworks read of a loader to make another."""
    with world(folder) as cache, fastload.DataLoader(data_set(cache), batch_size=4) as loader:
        other = fastload.DataLoader(list(range(3)))
        return {
            "DataLoader": sorted(name for name in vars(loader) if not name.startswith("_")),
            "DataLoader of a list": sorted(name for name in vars(other) if not name.startswith("_")),
        }


def _commands(name: str, command: Any) -> list[tuple[str, Any]]:
    options = {}
    for each in command.params:
        default = each.default() if callable(each.default) else each.default
        options[" ".join([*each.opts, *each.secondary_opts])] = {
            "kind": each.param_type_name,
            "default": default if isinstance(default, str | int | float | bool | None) else repr(default),
            "required": each.required,
            "values": "many" if getattr(each, "multiple", False) else each.nargs,
        }
    found = [(name, options)]
    for verb, below in getattr(command, "commands", {}).items():
        found += _commands(f"{name} {verb}", below)
    return found
