"""Objects as they are sent and kept: an `ObjectTable` in columns of bytes, which msgpack takes as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastload.errors import ServiceError
from fastload.store.table import ObjectTable, Texts
from fastload.store.types import ObjectInfo


class ObjectRows(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """`ObjectInfo`s by column: integers in little-endian, texts one after the other in UTF-8.

    `sizes` and `mtimes_ns` are int64; `url_bytes` and `etag_bytes`, int32, say how long a text is, -1: it is missing.
    """

    urls: bytes
    url_bytes: bytes
    sizes: bytes
    etags: bytes
    etag_bytes: bytes
    mtimes_ns: bytes

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> ObjectRows:
        """The rows of `objects`."""
        table = ObjectTable.of(objects)
        urls, etags = table.urls, table.etags
        columns = urls.lengths(), table.sizes, etags.lengths(), table.mtimes_ns
        url_bytes, sizes, etag_bytes, mtimes_ns = (_stored(column) for column in columns)
        return cls(urls.raw(), url_bytes, sizes, etags.raw(), etag_bytes, mtimes_ns)

    def digest(self) -> bytes:
        """Sixteen bytes that tell these rows from all others."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).digest()

    def table(self) -> ObjectTable:
        """The objects of the rows; `ServiceError` where the columns do not fit or a size is negative."""
        try:
            urls = Texts.checked(self.urls, np.frombuffer(self.url_bytes, "<i4"))
            etags = Texts.checked(self.etags, np.frombuffer(self.etag_bytes, "<i4"))
            sizes, mtimes_ns = (np.frombuffer(each, "<i8").astype(np.int64) for each in (self.sizes, self.mtimes_ns))
        except ValueError as error:  # UnicodeDecodeError among them
            raise ServiceError(f"a message about objects cannot be read: {error}") from error
        if not len(urls) == len(sizes) == len(etags) == len(mtimes_ns):
            raise ServiceError("a message about objects has columns of different lengths")
        if urls.missing.any() or (sizes < 0).any():
            raise ServiceError("a message about objects has one without a URL, or a negative size")
        return ObjectTable(urls, sizes, etags, mtimes_ns)


def _stored(column: npt.NDArray[np.integer[Any]]) -> bytes:
    return column.astype(column.dtype.newbyteorder("<")).tobytes()
