"""The trainer's side of the cache: it finds or starts the node's service, connects to it, and leases chunks from it.

`Handle` is what a `fastload.Cache` stands for, `Consumer` a data set's connection through it. Names are imported when
they are first used, since the service process forks before it imports anything that may have threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.client.cache import Handle as Handle
    from fastload.client.consumer import Consumer as Consumer
    from fastload.client.leases import Held as Held

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"consumer": ["Consumer"], "cache": ["Handle"], "leases": ["Held"]}
)
