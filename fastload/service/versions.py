"""Which version of an object a URL stands for, as the store said when it was asked last.

Asking costs a request, as much as a small object itself, and a data set of single objects opens each of them in every
epoch and from any of its processes. So an answer holds for an hour, or until the store says that the object is another
by now. About 200 bytes each, and at most a million.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable
from itertools import islice

from fastload.store.types import ObjectInfo

FRESH_S = 3600.0
_COUNT_MAX = 1 << 20
_HEAD = struct.Struct("<8sqqd?")  # endpoint, size, modification time, when it was asked for, whether there is an ETag


class Versions:
    """Used by the loop's thread only."""

    def __init__(self, now: Callable[[], float] = time.monotonic, count_max: int = _COUNT_MAX) -> None:
        self._now, self._count_max = now, count_max
        self._by_url: dict[bytes, bytes] = {}

    def get(self, endpoint: str, url: str) -> ObjectInfo | None:
        """The version, where `endpoint` was asked for it, and not too long ago."""
        packed = self._by_url.get(_digest(url, 16))
        if packed is None:
            return None
        asked_of, size, mtime_ns, asked, has_etag = _HEAD.unpack_from(packed)
        if asked_of != _digest(endpoint, 8) or self._now() - asked > FRESH_S:
            return None
        return ObjectInfo(url, size, packed[_HEAD.size :].decode() if has_etag else None, mtime_ns)

    def learn(self, endpoint: str, info: ObjectInfo) -> None:
        """The store has said this just now."""
        if len(self._by_url) >= self._count_max:
            for oldest in list(islice(self._by_url, self._count_max // 16 + 1)):
                del self._by_url[oldest]
        asked_of, has_etag = _digest(endpoint, 8), info.etag is not None
        head = _HEAD.pack(asked_of, info.size, info.mtime_ns, self._now(), has_etag)
        self.forget(info.url)  # what was learnt last is the youngest
        self._by_url[_digest(info.url, 16)] = head + (info.etag or "").encode()

    def clear(self) -> None:
        """None is."""
        self._by_url.clear()

    def forget(self, url: str) -> None:
        """It is not to be believed any more."""
        self._by_url.pop(_digest(url, 16), None)


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size).digest()
