"""`install()`: code that constructs torch's `DataLoader` gets a `fastload.DataLoader`.

Some frameworks make loaders by the name that they imported from torch: transformers' Trainer makes its own, and
accelerate makes another of each that it is given. Replacing the class under that name would help only in modules that
are known here and were imported already, and with two classes of one name `isinstance` gives surprising answers. So the
class stays, and its constructor changes: an object that is constructed as torch's `DataLoader` itself becomes a
`fastload.DataLoader`, which is a subclass, before other code sees it. This holds for every name of the class, wherever
and whenever it was imported. Subclasses, torchdata's for example, do not change.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, get_args

import torch.utils.data

from fastload.errors import ConfigError
from fastload.loader import DataLoader, WorkersMode

_TorchLoader = torch.utils.data.DataLoader

_changing = threading.Lock()
_ours: Any = None  # the constructor that torch's class was given last
_workers: WorkersMode = "auto"  # of loaders whose maker does not say


def install(workers: WorkersMode = "auto") -> None:
    """From now on `torch.utils.data.DataLoader(...)` makes a `fastload.DataLoader`, in all of this process.

    `workers` is for loaders whose maker does not name it: frameworks never do. To be called where a script begins;
    called again, it changes `workers`. Loaders that there are already, and subclasses of torch's, stay what they are.
    """
    global _ours, _workers
    if workers not in get_args(WorkersMode) or workers == "side":
        raise ConfigError(f'install(workers={workers!r}): "auto", "process" or "thread" suit any data set')
    with _changing:
        _workers = workers
        if not _is_installed():
            _ours = _making_ours(_constructor())
            _set_constructor(_ours)


def uninstall() -> None:
    """torch's class makes its own objects again; those made meanwhile stay what they are. Idempotent.

    RuntimeError where the constructor was wrapped after `install()` and not restored.
    """
    with _changing:
        if not _is_installed():
            return
        found = _constructor()
        if found is not _ours:
            raise RuntimeError(
                f"the constructor of torch's DataLoader was wrapped after install(), by {found!r}; undo that first"
            )
        _set_constructor(found.__wrapped__)


def _making_ours(constructor: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(constructor)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not _TorchLoader:  # a subclass's call of its base
            constructor(self, *args, **kwargs)
            return
        ours: Any = DataLoader
        self.__class__ = ours
        ours.__init__(self, *args, **{"workers": _workers, **kwargs})

    return made


def _is_installed() -> bool:
    """Whether torch's class has our constructor, or one that was wrapped around it (Lightning does so for a while)."""
    constructor = _constructor()
    while constructor is not None and constructor is not _ours:
        constructor = getattr(constructor, "__wrapped__", None)
    return constructor is not None


def _constructor() -> Any:
    return vars(_TorchLoader)["__init__"]


def _set_constructor(constructor: Callable[..., None]) -> None:
    setattr(_TorchLoader, "__init__", constructor)  # noqa: B010  # mypy takes the plain form for a mistake
