"""The node's cache service and its clients: the one owner of what is in RAM and on disk, for all processes of a node.

`Handle` is what a `fastload.Cache` stands for, `Consumer` a data set's connection through it. Names are imported when
they are first used, since the service process forks before it imports anything that may have threads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastload.service.client import Consumer as Consumer
    from fastload.service.client import Held as Held
    from fastload.service.handle import Handle as Handle
    from fastload.service.protocol import Progress as Progress

_HOMES = {
    "Handle": "fastload.service.handle",
    "Consumer": "fastload.service.client",
    "Held": "fastload.service.client",
    "Progress": "fastload.service.protocol",
}

__all__ = ["Consumer", "Handle", "Held", "Progress"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastload.service' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
