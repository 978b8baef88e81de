"""Single objects as files, read through the node's cache: `open`. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.files.file import ObjectFile as ObjectFile
    from fastload.files.file import open as open  # noqa: A004

__getattr__, __dir__, __all__ = lazy_names(__name__, {"file": ["ObjectFile", "open"]})
