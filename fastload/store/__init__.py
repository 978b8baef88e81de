"""Where objects come from: one narrow interface over S3, other object stores, web servers and files.

Names are imported when they are first used: what a job needs is names and settings, and only the service opens stores.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastload.store.listing import resolve as resolve
    from fastload.store.opening import RequestOptions as RequestOptions
    from fastload.store.opening import StorePool as StorePool
    from fastload.store.opening import open_store as open_store
    from fastload.store.options import StoreOptions as StoreOptions
    from fastload.store.types import ObjectInfo as ObjectInfo
    from fastload.store.types import Store as Store
    from fastload.store.urls import normalise as normalise
    from fastload.store.urls import store_root as store_root
    from fastload.store.wrappers import Counted as Counted
    from fastload.store.wrappers import Counters as Counters
    from fastload.store.wrappers import Limited as Limited
    from fastload.store.wrappers import Retrying as Retrying
    from fastload.store.wrappers import RetryOptions as RetryOptions
    from fastload.store.wrappers import Watched as Watched

_HOMES = {
    "Counted": "wrappers",
    "Counters": "wrappers",
    "Limited": "wrappers",
    "ObjectInfo": "types",
    "RequestOptions": "opening",
    "RetryOptions": "wrappers",
    "Retrying": "wrappers",
    "Store": "types",
    "StoreOptions": "options",
    "StorePool": "opening",
    "Watched": "wrappers",
    "normalise": "urls",
    "open_store": "opening",
    "resolve": "listing",
    "store_root": "urls",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastload.store' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastload.store.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
