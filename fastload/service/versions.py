"""Which version of an object a URL stands for, as the store said when it was asked last.

Asking costs a request, as much as a small object itself, and a data set of single objects opens each of them in every
epoch and from any of its processes. So an answer holds for an hour, or until the store says that the object is another
by now; and only for those who would ask the same store as the same person, by their store options: others may not see
the object, or see another. About 200 bytes each, and at most a million.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable

from fastload.service import bounded
from fastload.store.types import ObjectInfo

FRESH_S = 3600.0
_COUNT_MAX = 1 << 20
_HEAD = struct.Struct("<qqd?")  # size, modification time, when it was asked for, whether there is an ETag


class Versions:
    """Used by the loop's thread only."""

    def __init__(self, now: Callable[[], float] = time.monotonic, count_max: int = _COUNT_MAX) -> None:
        self._now, self._count_max = now, count_max
        self._by_url: dict[bytes, bytes] = {}

    def get(self, options_key: str, url: str) -> ObjectInfo | None:
        """The version, where it was asked for with these store options, and not too long ago."""
        packed = self._by_url.get(_digest(options_key, url))
        if packed is None:
            return None
        size, mtime_ns, asked, has_etag = _HEAD.unpack_from(packed)
        if self._now() - asked > FRESH_S:
            return None
        return ObjectInfo(url, size, packed[_HEAD.size :].decode() if has_etag else None, mtime_ns)

    def learn(self, options_key: str, info: ObjectInfo) -> None:
        """The store has said this just now."""
        head = _HEAD.pack(info.size, info.mtime_ns, self._now(), info.etag is not None)
        packed = head + (info.etag or "").encode()
        bounded.put(self._by_url, _digest(options_key, info.url), packed, self._count_max)

    def clear(self) -> None:
        """Forget all of them."""
        self._by_url.clear()

    def forget(self, options_key: str, url: str) -> None:
        """It is not to be believed any more."""
        self._by_url.pop(_digest(options_key, url), None)


def _digest(options_key: str, url: str) -> bytes:
    return hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16, key=options_key.encode()).digest()
