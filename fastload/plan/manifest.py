"""The manifest: the frozen list of a data set's shards, which everything else in the plan is a function of.

It is made once, by one listing, and never changes while a run reads it. Where an object stands in the list is
its *object number*; all plans, positions and batches speak in these numbers, so two processes understand each
other exactly when their manifests are the same. That is what `fingerprint` is for. An object that was asked
for twice is there twice, under two numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.store.types import ObjectInfo

FORMAT_VERSION = 1


class _Wire(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON form: `objects` holds `[url, size, etag or null, mtime_ns]` in the order of their numbers."""

    version: int
    fingerprint: str
    objects: list[tuple[str, int, str | None, int]]


class Manifest:
    """Objects by number. Immutable; the arrays it gives out are read-only."""

    def __init__(self, objects: Iterable[ObjectInfo]) -> None:
        self.objects: tuple[ObjectInfo, ...] = tuple(objects)

    def __len__(self) -> int:
        return len(self.objects)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.objects == other.objects

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} objects, {int(self.sizes.sum())} bytes, {self.fingerprint[:12]})"

    def __getstate__(self) -> dict[str, Any]:
        return {"objects": self.objects}

    @cached_property
    def fingerprint(self) -> str:
        """Hex of a blake2b-128 over the URL, size, ETag and modification time of every object, in order."""
        return hashlib.blake2b(msgspec.msgpack.encode(self._rows()), digest_size=16).hexdigest()

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each object, int64[object_count]."""
        sizes = np.fromiter((info.size for info in self.objects), np.int64, len(self.objects))
        sizes.flags.writeable = False
        return sizes

    def first_chunk(self, chunk_bytes: int) -> NDArray[np.int64]:
        """int64[object_count + 1]: the chunk number of each object's first chunk, and last the number of
        chunks.
        """
        first = np.zeros(len(self.objects) + 1, np.int64)
        np.cumsum(-(-self.sizes // chunk_bytes), out=first[1:])
        first.flags.writeable = False
        return first

    def to_json(self) -> bytes:
        """The manifest as JSON, with its fingerprint."""
        return msgspec.json.encode(_Wire(FORMAT_VERSION, self.fingerprint, self._rows()))

    @classmethod
    def from_json(cls, data: bytes | str, source: str = "manifest") -> Manifest:
        """What `to_json` wrote; `source` says in errors where `data` came from. Raises `ConfigError`."""
        try:
            wire = msgspec.json.decode(data, type=_Wire)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{source} is not a manifest: {error}; write it again") from error
        if wire.version != FORMAT_VERSION:
            raise ConfigError(
                f"{source} has manifest version {wire.version}; "
                f"this fastload reads version {FORMAT_VERSION}: write it again"
            )
        manifest = cls(ObjectInfo(*row) for row in wire.objects)
        if manifest.fingerprint != wire.fingerprint:
            raise ConfigError(
                f"{source} says fingerprint {wire.fingerprint}, but its objects have {manifest.fingerprint}: "
                "it was damaged or edited; write it again"
            )
        return manifest

    def _rows(self) -> list[tuple[str, int, str | None, int]]:
        return [(info.url, info.size, info.etag, info.mtime_ns) for info in self.objects]
