"""The one narrow interface that every object store has, and what an object is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One version of one remote object, as a listing gave it, or a piece of that, or what is in it where it is packed.
    `url` holds no credentials.

    A piece is `size` bytes from `start` on of an object of `object_size`, which is -1 for whole objects. What is in a
    packed object of `object_size` bytes has a `packing` (one of `packing.PACKINGS`), and `size` bytes unpacked. Stores
    know only whole objects, as they are stored.

    `etag` is None where the store has none; then size and `mtime_ns` say which version it is. That of a local file is
    made up (`localversion`).
    """

    url: str
    size: int
    etag: str | None = None
    mtime_ns: int = 0
    start: int = 0
    object_size: int = -1
    packing: str = ""

    @property
    def is_piece(self) -> bool:
        return self.object_size >= 0 and not self.packing

    @property
    def whole(self) -> ObjectInfo:
        """The object that this is, or is a piece of; of what is in a packed object, all that is in it."""
        return self.stored if self.is_piece else self

    @property
    def stored(self) -> ObjectInfo:
        """The object as its store has it."""
        return ObjectInfo(self.url, self.object_size, self.etag, self.mtime_ns) if self.object_size >= 0 else self


@runtime_checkable
class Store(Protocol):
    """Where objects come from. Safe to call from several threads at once; never used across a fork.

    Errors are those of `fastload.errors`, each naming the URL: `ObjectMissingError`, `AccessDeniedError`,
    `StoreUnavailableError` (the only one that is worth retrying) and `ObjectChangedError`; of conditional writes also
    `WriteConflictError`. What a store cannot do at all is a `ConfigError`.

    A write is of a whole object, of which readers see nothing before all of it is there (of fsspec's file systems not
    all promise that). It is durable when the call returns. `data` is contiguous, is not copied where the client library
    can do without (all but fsspec), and must not change until then. A write that ends with `StoreUnavailableError` may
    still have been carried out, or be so later.
    """

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """All objects whose URL starts with `prefix_url`, in the order of their keys. Nothing there: no items."""
        ...

    def head(self, url: str) -> ObjectInfo:
        """The object at `url`. For single URLs where a listing is not to be had (http) or not worth it."""
        ...

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `start`; the whole of `out` or an error.

        The read is conditional: an object that is no longer the version of `info` is an `ObjectChangedError`.
        """
        ...

    def put(self, url: str, data: Buffer) -> str | None:
        """Store `data` as the object at `url`, in place of what is there; its ETag, None where the store has none."""
        ...

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        """`put` where there is no such object; of several callers at once exactly one does not get a
        `WriteConflictError`.
        """
        ...

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        """`put` where the object is still the version of that ETag; a `WriteConflictError` also where it is gone.

        In many stores the ETag is of the content, so that `data` should differ from all that was there before.
        """
        ...

    def delete(self, url: str) -> None:
        """Delete the object at `url`. One that is not there is deleted already."""
        ...

    def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...
