"""Many objects in columns: what a listing of a million keys is kept and sent as.

A million `ObjectInfo`s take 350 MB, and each way through a socket makes them anew. In columns they take their texts and
some 35 bytes each, are cut without a copy, and cross a socket or a pickle as they are. An `ObjectTable` reads like a
list of `ObjectInfo`s, which are made as one looks at them.

Objects as they are sent and kept: an `ObjectTable` in columns of bytes, which msgpack takes as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Protocol, cast, overload

import msgspec
import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from fastload.errors import ServiceError
from fastload.store.packing import PACKINGS
from fastload.store.types import ObjectInfo

# URL, size, ETag, time of the last change; of a piece also where it begins, and the size of the whole object; of what
# is in a packed object 0, the size of that, and how it is packed.
Row = (
    tuple[str, int, str | None, int]
    | tuple[str, int, str | None, int, int, int]
    | tuple[str, int, str | None, int, int, int, str]
)
# Rows that are Python objects at a time, where all are gone through.
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A column of n texts, some of which may be missing.

    `data` holds them in UTF-8; text i is `data[starts[i]:starts[i + 1]]`, `starts` int64[n + 1]. A missing one has no
    bytes, and `missing`, bool[n], says so.
    """

    data: bytes
    starts: NDArray[np.int64]
    missing: NDArray[np.bool_]

    @classmethod
    def of(cls, texts: Sequence[str | None]) -> Texts:
        """The column of these."""
        missing = np.fromiter((text is None for text in texts), np.bool_, len(texts))
        there = [text or "" for text in texts]
        joined = "".join(there)
        data = joined.encode()
        if len(data) == len(joined):
            lengths = np.fromiter(map(len, there), np.int64, len(there))
        else:
            lengths = np.fromiter((len(text.encode()) for text in there), np.int64, len(there))
        return cls(data, _starts(lengths), missing)

    @classmethod
    def checked(cls, data: bytes, lengths: NDArray[np.integer[Any]]) -> Texts:
        """The column of texts of these lengths in bytes, -1 for a missing one. ValueError where that cannot be."""
        missing = lengths < 0
        starts = _starts(np.where(missing, 0, lengths).astype(np.int64))
        if (lengths < -1).any() or starts[-1] != len(data):
            raise ValueError(f"texts of {starts[-1]} bytes in a column of {len(data)}")
        data.decode()
        heads = np.frombuffer(data, np.uint8)[starts[:-1][starts[:-1] < len(data)]]
        if ((heads & 0xC0) == 0x80).any():
            raise ValueError("a text begins in the middle of a character")
        return cls(data, starts, missing)

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """One column of several."""
        data = b"".join(part.data[part.starts[0] : part.starts[-1]] for part in parts)
        lengths = [np.diff(part.starts) for part in parts]
        return cls(data, _starts(np.concatenate(lengths)), np.concatenate([part.missing for part in parts]))

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, at: int) -> str | None:
        return None if self.missing[at] else self.data[self.starts[at] : self.starts[at + 1]].decode()

    def cut(self, start: int, stop: int) -> Texts:
        """Those from `start` up to `stop`. Nothing is copied."""
        return Texts(self.data, self.starts[start : stop + 1], self.missing[start:stop])

    def take(self, numbers: NDArray[np.integer[Any]]) -> Texts:
        starts, ends = self.starts[numbers], self.starts[numbers + 1]
        data = b"".join([self.data[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
        return Texts(data, _starts(ends - starts), self.missing[numbers])

    def to_list(self) -> list[str | None]:
        """All of them."""
        places = (self.starts - self.starts[0]).tolist()
        raw = self.data[self.starts[0] : self.starts[-1]]
        text = raw.decode()
        if len(text) == len(raw):
            found: list[str | None] = [text[a:b] for a, b in pairwise(places)]
        else:
            found = [raw[a:b].decode() for a, b in pairwise(places)]
        for at in np.flatnonzero(self.missing).tolist():
            found[at] = None
        return found

    def lengths(self) -> NDArray[np.int32]:
        """Bytes of each, -1 for a missing one: with the bytes, what `checked` takes."""
        return np.where(self.missing, -1, np.diff(self.starts)).astype(np.int32)

    def raw(self) -> bytes:
        """The bytes of all, one after the other."""
        return self.data[self.starts[0] : self.starts[-1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts.checked, (self.raw(), self.lengths())

    def same_as(self, other: Texts) -> bool:
        """Whether both hold the same texts."""
        return (
            np.array_equal(self.missing, other.missing)
            and np.array_equal(np.diff(self.starts), np.diff(other.starts))
            and self.raw() == other.raw()
        )


class ObjectLike(Protocol):
    """Anything that has the fields of an `ObjectInfo`."""

    @property
    def url(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def etag(self) -> str | None: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def object_size(self) -> int: ...
    @property
    def packing(self) -> str: ...


class ObjectTable(Sequence[ObjectInfo]):
    """`ObjectInfo`s in columns: `urls`, `sizes` (int64), `etags`, `mtimes_ns` (int64). Immutable.

    `pieces`, int64[3, n], says of each where it begins, how large its object is, and by its number in `PACKINGS` how
    that is packed (0, -1 and 0 for one that is whole); None where all are whole, as in most tables.
    """

    __slots__ = ("etags", "mtimes_ns", "pieces", "sizes", "urls")

    def __init__(
        self,
        urls: Texts,
        sizes: NDArray[np.int64],
        etags: Texts,
        mtimes_ns: NDArray[np.int64],
        pieces: NDArray[np.int64] | None = None,
    ) -> None:
        assert len(urls) == len(sizes) == len(etags) == len(mtimes_ns), "columns of different lengths"
        assert pieces is None or pieces.shape == (3, len(sizes)), "columns of different lengths"
        self.urls, self.sizes, self.etags, self.mtimes_ns = urls, sizes, etags, mtimes_ns
        self.pieces = None if pieces is None or not (pieces - _WHOLE).any() else pieces
        for array in (sizes, mtimes_ns, self.pieces):
            if array is not None:
                array.flags.writeable = False

    @classmethod
    def of(cls, objects: Iterable[ObjectLike]) -> ObjectTable:
        """The table of these; a table is its own."""
        if isinstance(objects, ObjectTable):
            return objects
        rows = iter(objects)
        parts = []
        while part := list(islice(rows, ROWS_AT_ONCE)):
            parts.append(cls._of_part(part))
        return cls.joined(parts)

    @classmethod
    def _of_part(cls, objects: Sequence[ObjectLike]) -> ObjectTable:
        return cls(
            Texts.of([info.url for info in objects]),
            np.array([info.size for info in objects], np.int64),
            Texts.of([info.etag for info in objects]),
            np.array([info.mtime_ns for info in objects], np.int64),
            np.array(
                [
                    [info.start for info in objects],
                    [info.object_size for info in objects],
                    [PACKINGS.index(info.packing) for info in objects],
                ],
                np.int64,
            ),
        )

    @classmethod
    def joined(cls, parts: Sequence[ObjectTable]) -> ObjectTable:
        """One table of several."""
        if len(parts) == 1:
            return parts[0]
        parts = parts or [cls._of_part([])]
        return cls(
            Texts.joined([part.urls for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            Texts.joined([part.etags for part in parts]),
            np.concatenate([part.mtimes_ns for part in parts]),
            None
            if all(part.pieces is None for part in parts)
            else np.concatenate([part.all_pieces() for part in parts], axis=1),
        )

    def all_pieces(self) -> NDArray[np.int64]:
        """`pieces`, also where that is None."""
        return np.repeat(_WHOLE, len(self), axis=1) if self.pieces is None else self.pieces

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, at: int) -> ObjectInfo: ...
    @overload
    def __getitem__(self, at: slice) -> ObjectTable: ...
    def __getitem__(self, at: int | slice) -> ObjectInfo | ObjectTable:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            assert step == 1, "a table is cut in one piece"
            return self._cut(start, max(start, stop))
        number = range(len(self))[at]
        url = self.urls[number]
        assert url is not None, "an object without a URL"
        start, object_size, packing = (0, -1, 0) if self.pieces is None else self.pieces[:, number].tolist()
        etag, mtime_ns = self.etags[number], int(self.mtimes_ns[number])
        return ObjectInfo(url, int(self.sizes[number]), etag, mtime_ns, start, object_size, PACKINGS[packing])

    def __iter__(self) -> Iterator[ObjectInfo]:
        return (ObjectInfo(*row) for part in self.rows() for row in part)

    def rows(self) -> Iterator[list[Row]]:
        """All rows as tuples, some at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            part = self[start : start + ROWS_AT_ONCE]
            urls = cast(list[str], part.urls.to_list())  # no object lacks one
            rows = zip(urls, part.sizes.tolist(), part.etags.to_list(), part.mtimes_ns.tolist(), strict=True)
            if part.pieces is None:
                yield list(rows)
            else:
                places = part.pieces.T.tolist()
                yield [_row(row, *place) for row, place in zip(rows, places, strict=True)]

    def identities(self) -> Iterator[tuple[str, int, str | int, tuple[int | str, ...]]]:
        """What distinguishes one version of an object from another: URL, size, and the strong ETag or else the time of
        the last change; and where it is a piece, which. As in the ids of cached chunks, a time that changes under the
        same ETag is no other version.
        """
        for part in self.rows():
            for url, size, etag, mtime_ns, *piece in part:
                version = mtime_ns if etag is None or etag[:2] in _WEAK else etag.strip('" ') or mtime_ns
                yield url, size, version, cast(tuple[int | str, ...], tuple(piece))

    def take(self, numbers: NDArray[np.integer[Any]]) -> ObjectTable:
        return ObjectTable(
            self.urls.take(numbers),
            self.sizes[numbers],
            self.etags.take(numbers),
            self.mtimes_ns[numbers],
            None if self.pieces is None else self.pieces[:, numbers],
        )

    def with_etags(self, etags: Texts) -> ObjectTable:
        """The same objects with other ETags."""
        return ObjectTable(self.urls, self.sizes, etags, self.mtimes_ns, self.pieces)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectTable) and (
            np.array_equal(self.sizes, other.sizes)
            and np.array_equal(self.mtimes_ns, other.mtimes_ns)
            and self.urls.same_as(other.urls)
            and self.etags.same_as(other.etags)
            and np.array_equal(self.all_pieces(), other.all_pieces())
        )

    __hash__ = None  # type: ignore[assignment]  # compared by its contents

    def __repr__(self) -> str:
        return f"ObjectTable({len(self)} objects)"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectTable, (self.urls, self.sizes, self.etags, self.mtimes_ns, self.pieces)

    def _cut(self, start: int, stop: int) -> ObjectTable:
        return ObjectTable(
            self.urls.cut(start, stop),
            self.sizes[start:stop],
            self.etags.cut(start, stop),
            self.mtimes_ns[start:stop],
            None if self.pieces is None else self.pieces[:, start:stop],
        )


_WEAK = ("W/", "w/")
_WHOLE = np.array([[0], [-1], [0]], np.int64)


def _row(row: tuple[str, int, str | None, int], start: int, object_size: int, packing: int) -> Row:
    if object_size < 0:
        return row
    return (*row, start, object_size, PACKINGS[packing]) if packing else (*row, start, object_size)


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


class ObjectRows(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """`ObjectInfo`s by column: integers in little-endian, texts one after the other in UTF-8.

    `sizes` and `mtimes_ns` are int64; `url_bytes` and `etag_bytes`, int32, say how long a text is, -1: it is missing.
    Where some are pieces of objects, `sizes` goes on with where each begins, and then how large its object is (-1: it
    is whole); and where some are what is in packed objects, by which number in `PACKINGS`.
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
        pieces = [] if table.pieces is None else [*table.pieces] if table.pieces[2].any() else [*table.pieces[:2]]
        sizes_and_pieces = np.concatenate([table.sizes, *pieces])
        columns = urls.lengths(), sizes_and_pieces, etags.lengths(), table.mtimes_ns
        url_bytes, sizes, etag_bytes, mtimes_ns = (_stored(column) for column in columns)
        return cls(urls.raw(), url_bytes, sizes, etags.raw(), etag_bytes, mtimes_ns)

    def digest(self) -> bytes:
        """A fingerprint of these rows, sixteen bytes."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).digest()

    def table(self) -> ObjectTable:
        """The objects of the rows; `ServiceError` where the columns do not fit or a size is negative."""
        try:
            urls = Texts.checked(self.urls, np.frombuffer(self.url_bytes, "<i4"))
            etags = Texts.checked(self.etags, np.frombuffer(self.etag_bytes, "<i4"))
            sizes, mtimes_ns = (np.frombuffer(each, "<i8").astype(np.int64) for each in (self.sizes, self.mtimes_ns))
        except ValueError as error:  # UnicodeDecodeError among them
            raise ServiceError(f"a message about objects cannot be read: {error}") from error
        count = len(urls)
        if not count == len(etags) == len(mtimes_ns) or len(sizes) not in (count, 3 * count, 4 * count):
            raise ServiceError("a message about objects has columns of different lengths")
        sizes, more = sizes[:count].copy(), sizes[count:].reshape(-1, count) if count else sizes.reshape(0, 0)
        if urls.missing.any() or (sizes < 0).any():
            raise ServiceError("a message about objects has one without a URL, or a negative size")
        pieces = None if not len(more) else np.concatenate([more, np.zeros((3 - len(more), count), np.int64)])
        if pieces is not None and not are_inside(sizes, pieces):
            raise ServiceError("a message about objects has a piece that is none of its object")
        return ObjectTable(urls, sizes, etags, mtimes_ns, pieces)


def are_inside(sizes: NDArray[np.int64], pieces: NDArray[np.int64]) -> bool:
    """Whether each of these sizes is that of a piece of its object, or the whole of it, or may be that of what is in
    it; see `ObjectTable.pieces`.
    """
    starts, object_sizes, packings = pieces
    is_whole = (object_sizes == -1) & (packings == 0)
    is_packed = (packings > 0) & (packings < len(PACKINGS))
    # Written so that no sum can overflow.
    is_inside = (starts >= 0) & (starts <= object_sizes) & (sizes <= object_sizes - np.minimum(starts, object_sizes))
    is_inside &= packings == 0
    may_be_packed = is_packed & (starts == 0) & (object_sizes >= 0)
    return bool(np.all(may_be_packed | np.where(is_whole, starts == 0, is_inside)))


def _stored(column: npt.NDArray[np.integer[Any]]) -> bytes:
    return column.astype(column.dtype.newbyteorder("<")).tobytes()
