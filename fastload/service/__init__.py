"""The node's cache service and its clients: the one owner of what is in RAM and on disk, for all processes of a node.

`Handle` is what a `fastload.Cache` stands for, `Consumer` a data set's connection through it. Names are imported when
they are first used, since the service process forks before it imports anything that may have threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.protocol import Progress as Progress
    from fastload.service.client import Consumer as Consumer
    from fastload.service.client import Held as Held
    from fastload.service.handle import Handle as Handle

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"client": ["Consumer", "Held"], "handle": ["Handle"], "protocol": ["Progress"]}
)
