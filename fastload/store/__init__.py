"""Where objects come from: one narrow interface over S3, other object stores, web servers and files.

Names are imported when they are first used: what a job needs is names and settings, and only the service opens stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastload.lazy import lazy_names

if TYPE_CHECKING:
    from fastload.store.conditions import check_conditions as check_conditions
    from fastload.store.listing import resolve as resolve
    from fastload.store.opening import RequestOptions as RequestOptions
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

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "conditions": ["check_conditions"],
        "listing": ["resolve"],
        "opening": ["RequestOptions", "open_store"],
        "options": ["StoreOptions"],
        "types": ["ObjectInfo", "Store"],
        "urls": ["normalise", "store_root"],
        "wrappers": ["Counted", "Counters", "Limited", "RetryOptions", "Retrying", "Watched"],
    },
)
