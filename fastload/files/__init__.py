"""Single objects as files, read through the node's cache: `open`. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastload.files.file import ObjectFile as ObjectFile
    from fastload.files.opening import open as open  # noqa: A004

_HOMES = {"ObjectFile": "fastload.files.file", "open": "fastload.files.opening"}

__all__ = ["ObjectFile", "open"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastload.files' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
