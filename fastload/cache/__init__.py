"""The two tiers of a node's cache, RAM and disk, and the directory that they belong to.

`ChunkKey` and `object_id` say which bytes are meant, `Arena` is the RAM tier and `ArenaView` a consumer's
look at it, `DiskTier` is the disk tier, `CacheDirectory` their place. None of them decides what is kept: that
is the service's part.
"""

from fastload.cache.arena import Arena, ArenaView
from fastload.cache.directory import CacheDirectory
from fastload.cache.disk import DiskTier
from fastload.cache.key import ChunkKey, object_id, url_without_credentials

__all__ = [
    "Arena",
    "ArenaView",
    "CacheDirectory",
    "ChunkKey",
    "DiskTier",
    "object_id",
    "url_without_credentials",
]
