"""The manifest: the frozen list of a data set's shards, which everything else in the plan is a function of.

It is made once, by one listing, and never changes while a run reads it. Where an object stands in the list is
its *object number*; all plans, positions and batches speak in these numbers, so two processes understand each
other exactly when their manifests are the same. That is what `fingerprint` is for. An object that was asked
for twice is there twice, under two numbers.

Data that grows while training goes on is listed again between two epochs, and `next_version` makes the next
manifest of the last: what was there keeps its number, and so its partition and whatever is cached of it; what
is new comes behind. An object that is no longer there keeps its number too, and is *gone*: it still counts where
shards are dealt to partitions, and is never read. An object that changed is gone, and there anew. Once more than
half of the numbers are of objects that are gone, all are numbered anew.

A large file may be cut into *pieces*, each of which is a row of the list, one after the other, as an object of its own;
a piece may hold bytes that the next one begins with. Of a packed file the list has what is in it, of which the size is
the unpacked one.

`reading` is what the user said of how samples are made of the objects, where that is no fact of the objects alone, such
as the length of sequences; the order depends on it.

`excluded` are single samples, by key, that the data set is read without; the order depends on these, too.

`sidecars` and `promised` say where more is known of the objects: files of indexes beside them, and how many samples
a file beside the data promises of each. The order does not depend on them, and neither does the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastload.cached_attribute import cached_attribute
from fastload.errors import ConfigError
from fastload.store.packing import PACKINGS
from fastload.store.table import ObjectLike, ObjectTable, Row, are_inside

FORMAT_VERSION = 1

_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Row(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """An object in JSON."""

    url: str
    size: _Count
    etag: str | None
    mtime_ns: _Int64
    start: _Count = 0
    object_size: _Int64 = -1
    packing: str = ""

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"no packing is called {self.packing!r}")


class _Wire(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON form: `objects` holds `[url, size, etag or null, mtime_ns]` in the order of their numbers, and for
    pieces also `start, object_size`; for what is in a packed object `0, object_size, packing`.
    """

    version: int
    fingerprint: str
    objects: list[_Row]
    version_starts: list[_Count] = []
    gone: list[_Count] = []
    promised: list[_Int64] = []
    sidecars: list[_Row] = []
    reading: str = ""
    excluded: list[tuple[_Count, str]] = []


class _WireOut(msgspec.Struct, omit_defaults=True):
    """The same for writing, with rows that are JSON already."""

    version: int
    fingerprint: str
    objects: msgspec.Raw
    version_starts: Sequence[int] = []
    gone: list[int] = []
    promised: list[int] = []
    sidecars: list[Row] = []
    reading: str = ""
    excluded: list[tuple[int, str]] = []


class Manifest:
    """Objects by number. Immutable; the arrays it gives out are read-only.

    `version_starts` are the numbers of the first objects of all versions but the first; `gone` int64, rising, those of
    objects that are no longer there. `promised`, int64[objects] or None, says how many samples each object should hold
    (-1: not known). `sidecars` are files of indexes that may be of use. `reading`: see the module. `excluded`: by
    object, the keys of samples that are not read.
    """

    def __init__(
        self,
        objects: Iterable[ObjectLike],
        version_starts: Sequence[int] = (),
        gone: Sequence[int] | NDArray[np.int64] = (),
        *,
        promised: Sequence[int] | NDArray[np.int64] | None = None,
        sidecars: Iterable[ObjectLike] = (),
        reading: str = "",
        excluded: Mapping[int, Iterable[str]] | None = None,
    ) -> None:
        """ValueError where the numbers do not fit the objects."""
        self.objects: ObjectTable = ObjectTable.of(objects)
        self.version_starts: tuple[int, ...] = tuple(version_starts)
        self.gone: NDArray[np.int64] = _read_only(gone)
        is_promised = promised is not None and len(promised) > 0
        self.promised: NDArray[np.int64] | None = _read_only(promised) if is_promised else None
        self.sidecars: ObjectTable = ObjectTable.of(sidecars)
        self.reading = reading
        by_number = sorted((excluded or {}).items())
        self.excluded: Mapping[int, tuple[str, ...]] = {number: tuple(sorted(set(keys))) for number, keys in by_number}
        self._check()

    def _check(self) -> None:
        if not _rises((0, *self.version_starts, len(self))) and self.version_starts:
            raise ValueError(f"versions of {len(self)} objects begin at {self.version_starts}")
        if len(self.gone) and not _rises((-1, *self.gone.tolist(), len(self))):
            raise ValueError(f"{len(self.gone)} objects are gone whose numbers are not those of {len(self)} objects")
        if self.objects.pieces is not None and not are_inside(self.sizes, self.objects.pieces):
            raise ValueError("a piece of an object is none of it")
        if self.promised is not None and len(self.promised) != len(self):
            raise ValueError(f"{len(self.promised)} sample counts for {len(self)} objects")
        if any(not 0 <= number < len(self) for number in self.excluded):
            raise ValueError(f"samples are excluded of objects that are none of {len(self)}")

    def __len__(self) -> int:
        return len(self.objects)

    def __eq__(self, other: object) -> bool:
        """Whether the order of both is the same."""
        return isinstance(other, Manifest) and (
            self.objects == other.objects
            and self.version_starts == other.version_starts
            and np.array_equal(self.gone, other.gone)
            and self.reading == other.reading
            and self.excluded == other.excluded
        )

    def says_the_same_as(self, other: Manifest) -> bool:
        """Whether both are equal, also in what does not change the order."""
        if self.promised is None or other.promised is None:
            is_promised_alike = self.promised is other.promised
        else:
            is_promised_alike = np.array_equal(self.promised, other.promised)
        return is_promised_alike and self == other and self.sidecars == other.sidecars

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        gone = f", {len(self.gone)} gone" if len(self.gone) else ""
        return f"Manifest({len(self)} objects{gone}, {int(self.sizes.sum())} bytes, {self.fingerprint[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        hints = self.promised, self.sidecars
        return _unpickled, (self.objects, self.version_starts, self.gone, *hints, self.reading, self.excluded)

    @cached_attribute
    def fingerprint(self) -> str:
        """Hex of a blake2b-128 over the URL, size, ETag and modification time of every object, in order, and where
        there are several versions or objects that are gone, over these; and over `reading` and `excluded` where these
        say anything.
        """
        digest = hashlib.blake2b(_array_header(len(self)), digest_size=16)
        for rows in self.objects.rows():
            digest.update(b"".join(map(msgspec.msgpack.encode, rows)))
        if self.version_starts or len(self.gone):
            digest.update(msgspec.msgpack.encode([self.version_starts, self.gone.tolist()]))
        if self.reading:
            digest.update(msgspec.msgpack.encode(self.reading))
        if self.excluded:
            digest.update(msgspec.msgpack.encode(self._excluded_rows()))
        return digest.hexdigest()

    def _excluded_rows(self) -> list[tuple[int, str]]:
        return [(number, key) for number, keys in self.excluded.items() for key in keys]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each object, int64[object_count]; also of those that are gone."""
        return self.objects.sizes

    @cached_attribute
    def is_there(self) -> NDArray[np.bool_]:
        """bool[object_count]: False for objects that are gone."""
        there = np.ones(len(self), np.bool_)
        there[self.gone] = False
        there.flags.writeable = False
        return there

    def first_chunk(self, chunk_bytes: int) -> NDArray[np.int64]:
        """int64[object_count + 1]: the chunk number of each object's first chunk, and last the number of
        chunks.
        """
        first = np.zeros(len(self.objects) + 1, np.int64)
        np.cumsum(-(-self.sizes // chunk_bytes), out=first[1:])
        first.flags.writeable = False
        return first

    def urls_of(self, object_nos: NDArray[np.integer[Any]]) -> list[str]:
        """The URL of each of these, which may be named many times."""
        distinct, places = np.unique(object_nos, return_inverse=True)
        urls = np.array(self.objects.urls.take(distinct).to_list(), object)
        found: list[str] = urls[places].tolist()
        return found

    def to_json(self) -> bytes:
        """The manifest as JSON, with its fingerprint."""
        parts = (msgspec.json.encode(rows)[1:-1] for rows in self.objects.rows())
        wire = _WireOut(
            FORMAT_VERSION,
            self.fingerprint,
            msgspec.Raw(b"[" + b",".join(parts) + b"]"),
            self.version_starts or [],
            self.gone.tolist(),
            [] if self.promised is None else self.promised.tolist(),
            [row for rows in self.sidecars.rows() for row in rows],
            self.reading,
            self._excluded_rows(),
        )
        return msgspec.json.encode(wire)

    @classmethod
    def from_json(cls, data: bytes | str | msgspec.Raw, source: str = "manifest") -> Manifest:
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
        excluded: dict[int, list[str]] = {}
        for number, key in wire.excluded:
            excluded.setdefault(number, []).append(key)
        try:
            manifest = cls(
                wire.objects,
                wire.version_starts,
                wire.gone,
                promised=wire.promised,
                sidecars=wire.sidecars,
                reading=wire.reading,
                excluded=excluded,
            )
        except ValueError as error:
            raise ConfigError(f"{source} contradicts itself ({error}): write it again") from error
        if manifest.fingerprint != wire.fingerprint:
            raise ConfigError(
                f"{source} says fingerprint {wire.fingerprint}, but its objects have {manifest.fingerprint}: "
                "it was damaged or edited; write it again"
            )
        return manifest


def next_version(old: Manifest, listed: Manifest) -> Manifest:
    """What follows `old` when a new listing gave `listed`; `old` itself where that says the same.

    See the module's text. New objects come in the order of the listing.
    """
    if listed.objects == old.objects and not len(old.gone):
        return _with_hints(old, listed, np.arange(len(old)))
    source = _numbers_in(listed, old)
    fresh = np.setdiff1d(np.arange(len(listed)), source)
    gone = np.flatnonzero(source < 0)
    if not len(fresh) and np.array_equal(gone, old.gone):
        return _with_hints(old, listed, source)
    starts = (*old.version_starts, len(old)) if len(fresh) and len(old) else old.version_starts
    objects, source = ObjectTable.joined([old.objects, listed.objects.take(fresh)]), np.concatenate([source, fresh])
    if 2 * len(gone) > len(objects):
        kept = np.flatnonzero(source >= 0)
        objects, source, starts, gone = objects.take(kept), source[kept], (), gone[:0]
    return _saying(listed, source, objects, starts, gone)


def _numbers_in(listed: Manifest, old: Manifest) -> NDArray[np.int64]:
    """int64[objects of `old`]: the number of each in `listed`, -1 where it is not there as it was. Objects that are
    there several times are matched one by one.
    """
    numbers: dict[tuple[object, ...], int] = {}  # of the first that is not matched yet
    again: dict[int, int] = {}  # the next number of the same object
    last: dict[int, int] = {}
    for number, identity in enumerate(old.objects.identities()):
        first = numbers.setdefault(identity, number)
        if first != number:
            again[last.get(first, first)] = number
            last[first] = number
    source = np.full(len(old), -1, np.int64)
    for number, identity in enumerate(listed.objects.identities()):
        found = numbers.get(identity, -1)
        if found >= 0:
            source[found] = number
            numbers[identity] = again.get(found, -1)
    return source


def _with_hints(old: Manifest, listed: Manifest, source: NDArray[np.int64]) -> Manifest:
    """`old`, with what `listed` says of its objects."""
    new = _saying(listed, source, old.objects, old.version_starts, old.gone)
    return old if new.says_the_same_as(old) else new


def _saying(
    listed: Manifest,
    source: NDArray[np.int64],
    objects: ObjectTable,
    version_starts: Sequence[int],
    gone: NDArray[np.int64],
) -> Manifest:
    """A manifest of these objects, with what `listed` says of them; `source` has their numbers there, -1 for none."""
    excluded = {}
    if listed.excluded:
        numbers = source.tolist()
        excluded = {at: listed.excluded[number] for at, number in enumerate(numbers) if number in listed.excluded}
    return Manifest(
        objects,
        version_starts,
        gone,
        promised=None if listed.promised is None else np.where(source >= 0, listed.promised[source], -1),
        sidecars=listed.sidecars,
        reading=listed.reading,
        excluded=excluded,
    )


def _read_only(values: Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.int64]:
    array = np.array(values, np.int64)
    array.flags.writeable = False
    return array


def _rises(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _array_header(count: int) -> bytes:
    """How msgpack begins an array of so many items, so that the items can follow in pieces."""
    if count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def _unpickled(
    objects: ObjectTable,
    version_starts: Sequence[int],
    gone: NDArray[np.int64],
    promised: NDArray[np.int64] | None,
    sidecars: ObjectTable,
    reading: str = "",
    excluded: Mapping[int, tuple[str, ...]] | None = None,
) -> Manifest:
    return Manifest(
        objects, version_starts, gone, promised=promised, sidecars=sidecars, reading=reading, excluded=excluded
    )
