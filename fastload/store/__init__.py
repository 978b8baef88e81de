"""Where objects come from: one narrow interface over S3, other object stores, web servers and files."""

from fastload.store.listing import resolve
from fastload.store.opening import RequestOptions, StorePool, open_store
from fastload.store.options import StoreOptions
from fastload.store.types import ObjectInfo, Store
from fastload.store.urls import normalise, store_root
from fastload.store.wrappers import Counted, Counters, Limited, Retrying, RetryOptions

__all__ = [
    "Counted",
    "Counters",
    "Limited",
    "ObjectInfo",
    "RequestOptions",
    "RetryOptions",
    "Retrying",
    "Store",
    "StoreOptions",
    "StorePool",
    "normalise",
    "open_store",
    "resolve",
    "store_root",
]
