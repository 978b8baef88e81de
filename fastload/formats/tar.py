"""Tar shards, as webdataset writes them.

A `TarIndexer` takes an archive in pieces and makes its `ShardIndex`. It needs only the bytes of headers:
`next_offset` says where the next one is, so that chunks in the middle of a large member need not be there.

Grouping is webdataset's. Consecutive members with the same key are one sample; the key is the folder and the
base name up to its first dot, the column is all after that dot, lower-cased. Directories, links, members
without a dot, members whose base name starts with a dot, and anything in a top folder `__named_so__` are
passed over.

The object's size is known from the listing, so a member that passes the object's end is found from its header
alone: a truncated shard fails when it is indexed, before a batch is made from it. So does one with more after its end
mark than zeros up to the next record of tar's: a copy into a file that was made large enough first, and was
interrupted, leaves many zeros, and archives that were joined leave another one. Readers stop there without a word.
"""

from __future__ import annotations

import os
from itertools import pairwise, takewhile
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.record_index import shard_name
from fastload.formats.shard_index import ShardIndex
from fastload.kernels import tarindex
from fastload.kernels.grouping import group
from fastload.kernels.tarindex import STATE_SIZE, scan
from fastload.store.listing import of_table

__all__ = ["HeaderReader", "TarIndexer", "index_of_members", "tail_bytes_max"]

Number = TypeVar("Number", bound=np.generic)

# A name is at most 4 KiB on Linux; a pax header may also carry access lists and extended attributes.
NAME_BYTES_MAX = 64 << 10
PAYLOAD_BYTES_MAX = 1 << 20
# Members that the kernel has room for. Most shards have fewer; otherwise a batch of its output stays in the
# processor's cache.
_MEMBERS = 4096

# Archives are padded to whole records: of 20 blocks mostly, or as many as tar was given (--blocking-factor), which is a
# power of two, 40 or 80 then. With any more, an archive that was cut off and ends in zeros would seem whole.
_RECORDS_BYTES = (*(10_240 << power for power in range(3)), *(1 << power for power in range(14, 21)))
_END_MARK_BYTES = 1024

# Where the hashes of columns begin.
_SEED = int.from_bytes(os.urandom(8), "little") >> 1

# What a sample's dict already has under these names.
_RESERVED = ("__key__", "__url__")

_WORDS = {
    tarindex.BAD_CHECKSUM: "this is no tar header (its checksum is wrong): not a tar archive, or damaged",
    tarindex.BAD_SIZE: "the header's size field is not a number: the archive is damaged",
    tarindex.TRUNCATED_HEADER: "the archive ends in the middle of a header: it is truncated; write it again",
    tarindex.TOO_LONG: (
        f"a name is longer than {NAME_BYTES_MAX} bytes, or a pax header than {PAYLOAD_BYTES_MAX}: "
        "give its file a shorter name, or fewer attributes"
    ),
    tarindex.BAD_PAX: "a pax header's records are malformed: the archive is damaged",
    tarindex.SPARSE: "sparse members are not supported; pack it again without tar's --sparse",
    tarindex.GLOBAL_SIZE: "a global pax header sets one size for all members; pack it again",
    tarindex.DANGLING: "the archive ends after a long name or pax header: it is truncated; write it again",
}
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"\xfd7zXZ": "unxz", b"BZh": "bunzip2"}


class TarIndexer:
    """Indexes one tar archive of `size` bytes. Used by one thread; `feed` runs without the GIL.

    `url` is for messages. After an error the indexer is of no more use.
    """

    def __init__(self, url: str, size: int) -> None:
        if size == 0:
            raise ShardError(f"{url}: the object is empty; a tar archive has at least an end mark of 1024 zero bytes")
        self._url = url
        self._size = size
        self._state = np.zeros(STATE_SIZE, np.int64)
        self._state[[tarindex.PENDING_NAME, tarindex.PENDING_SIZE, tarindex.GLOBAL_NAME]] = -1
        self._payload = np.empty(PAYLOAD_BYTES_MAX, np.uint8)
        self._pending = np.empty(NAME_BYTES_MAX, np.uint8)
        self._shared = np.empty(NAME_BYTES_MAX, np.uint8)
        self._names = np.empty(_MEMBERS * 128 + NAME_BYTES_MAX, np.uint8)
        self._ends, self._offsets, self._sizes = (np.empty(_MEMBERS, np.int64) for _ in range(3))
        self._found: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        self._name_bytes = 0
        self._tail: int | None = None  # up to where there is nothing but zeros after the end mark, once that was seen
        self._ended = False

    @property
    def next_offset(self) -> int:
        """The offset in the object of the next byte that is needed; the object's size once none is."""
        return int(self._state[tarindex.POSITION]) if self._tail is None else self._tail

    @property
    def done(self) -> bool:
        """Whether the end has been reached and `finish` may be called."""
        return self._ended

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read the headers in `chunk` (uint8[n], may be read-only), which lies at `start` in the object.

        Pieces come in order and start at multiples of 512; all but the object's last are multiples of 512
        long. Those that lie before `next_offset` may be left out, or given: they are passed over. Nothing of
        `chunk` is kept.

        Raises ShardError, naming URL and offset, where the bytes are not a tar archive of this size.
        """
        end = start + len(chunk)
        if start < 0 or end > self._size or start % 512 or (len(chunk) % 512 and end != self._size):
            raise ValueError(
                f"{self._url}: bytes {start} to {end} are not a piece of {self._size} bytes in blocks of 512"
            )
        if start > self.next_offset:
            raise ValueError(f"{self._url}: byte {self.next_offset} is needed next, not {start}")
        while self._tail is None and end > self.next_offset:
            code = scan(
                chunk,
                start,
                self._size,
                self._state,
                self._payload,
                self._pending,
                self._shared,
                self._names,
                self._ends,
                self._offsets,
                self._sizes,
            )
            if code < 0:
                raise ShardError(self._explain(code, chunk, start))
            if code in (tarindex.END, tarindex.FULL):
                self._drain()
            if code == tarindex.END:
                self._tail = min(int(self._state[tarindex.POSITION]), self._size)
                self._check_length_of_tail(self._tail)
        if self._tail is not None and end > self._tail:
            self._take_tail(chunk[self._tail - start :], end)
        self._ended = self._tail == self._size

    def _check_length_of_tail(self, mark: int) -> None:
        if self._size - mark > tail_bytes_max(self._size if self._found else 0):
            raise ShardError(
                f"{self._url}, offset {mark}: an end mark with {self._size - mark} bytes after it, where the object "
                "should end: a copy that was interrupted, or archives that were joined; write it again"
            )

    def _take_tail(self, rest: NDArray[np.uint8], end: int) -> None:
        if rest.any():
            at = end - len(rest) + int((rest != 0).argmax())
            raise ShardError(
                f"{self._url}, offset {at}: data after the archive's end mark, which readers pass over: archives that "
                "were joined, or an older and longer one below this; write it again, or cut it off there"
            )
        self._tail = end

    def _drain(self) -> None:
        """Take over what the kernel found."""
        state = self._state
        count, name_bytes = int(state[tarindex.MEMBERS]), int(state[tarindex.NAME_BYTES])
        if count:
            outputs = (self._ends, self._offsets, self._sizes)
            ends, offsets, sizes = (array[:count].copy() for array in outputs)
            self._found.append((self._names[:name_bytes].copy(), ends, offsets, sizes))
        self._name_bytes += name_bytes
        if self._name_bytes > self._size:  # only where all members have one name, of any length
            raise ShardError(f"{self._url}: a global pax header names all members; pack it again")
        state[[tarindex.MEMBERS, tarindex.NAME_BYTES]] = 0

    def _explain(self, code: int, chunk: NDArray[np.uint8], start: int) -> str:
        state = self._state
        at = int(state[tarindex.POSITION if code == tarindex.TRUNCATED_HEADER else tarindex.HEADER_AT])
        where = f"{self._url}, offset {at}"
        if code == tarindex.BAD_CHECKSUM and at == start == 0:
            for magic, tool in _COMPRESSED.items():
                if chunk[: len(magic)].tobytes() == magic:
                    return (
                        f"{self._url}: it is compressed, and its name does not say so; let that end in .tar.gz, "
                        f".tar.zst, .tar.xz or .tar.bz2, or unpack it with {tool}"
                    )
        name = self._shown_name() if code != tarindex.TRUNCATED_HEADER else ""  # which has none that is whole
        if code == tarindex.PASSES_END:
            size = int(state[tarindex.SIZE_SHOWN])
            member = f"member {name!r}" if name else "a long name or pax header"
            return (
                f"{where}: {member} of {size} bytes passes the end of the object ({self._size} bytes): "
                "the archive is truncated or this length lies; write it again"
            )
        said = f"{where}: {_WORDS[code]}" + (f" (member {name!r})" if name else "")
        if at or shard_name(self._url).lower().endswith(".tar"):
            return said
        if table := of_table(shard_name(self._url)):
            return f"{self._url}: {table}"
        return (
            f"{said}; it is read as a WebDataset tar, as its name says nothing else: if it is none, name its "
            'format: format="jsonl", or "tokens(LENGTH, DTYPE)" for a file of tokens'
        )

    def _shown_name(self) -> str:
        """The name of the member whose header was read last, if that had one and was not taken over."""
        at = int(self._state[tarindex.NAME_BYTES])
        return _text(self._names[at : at + int(self._state[tarindex.NAME_SHOWN])])

    def _begin_at(self, start: int) -> None:
        """What was read before counts no more."""
        self._state[:] = 0
        self._state[[tarindex.PENDING_NAME, tarindex.PENDING_SIZE, tarindex.GLOBAL_NAME]] = -1
        self._state[tarindex.POSITION] = start
        self._tail, self._ended = None, False

    def has_ended(self, rest: NDArray[np.uint8], start: int) -> bool:
        """See `HeaderReader`."""
        none = np.empty(0, np.int64)
        before = np.empty(0, np.uint8), none, none, none
        self._found = [before]
        self._begin_at(start)
        self.feed(rest, start)
        return self._ended and len(self._found) == 1

    def single(self, headers: NDArray[np.uint8], start: int) -> tuple[bytes, str, int, int] | None:
        """See `HeaderReader`."""
        state = self._state
        self._begin_at(start)
        self.feed(headers, start)
        if state[tarindex.MEMBERS] != 1 or self._tail is not None:
            return None
        folder, slash, base = self._names[: int(state[tarindex.NAME_BYTES])].tobytes().rpartition(b"/")
        stem, _, column = base.partition(b".")
        shown = column.decode("utf-8", "backslashreplace").lower()
        return folder + slash + stem, shown, int(self._offsets[0]), int(self._sizes[0])

    def finish(self) -> ShardIndex:
        """The index; raises ShardError where a column is doubled. Only once `done`."""
        if not self._ended:
            raise ValueError(f"{self._url}: byte {self.next_offset} of {self._size} has not been fed yet")
        names, ends, offsets, sizes = _join(self._found)
        return _Grouping(self._url, names, ends).index(offsets, sizes, self._size)


def tail_bytes_max(size: int) -> int:
    """How many bytes an archive of this size may have behind its last member; of 0 bytes: one without members."""
    record_bytes = max((each for each in _RECORDS_BYTES if size and size % each == 0), default=10_240)
    return record_bytes + _END_MARK_BYTES


def index_of_members(
    url: str, names: list[bytes], offsets: NDArray[np.int64], sizes: NDArray[np.int64], object_size: int
) -> ShardIndex:
    """The index of an archive with these members, in the order of their data; raises ShardError as `finish` does."""
    joined = np.frombuffer(b"".join(names), np.uint8)
    return _Grouping(url, joined, np.cumsum([len(name) for name in names], dtype=np.int64)).index(
        offsets, sizes, object_size
    )


class HeaderReader:
    """Reads single members of an archive, of which only the headers are there. For one thread."""

    def __init__(self, url: str, size: int) -> None:
        self._indexer = TarIndexer(url, size)

    def member(self, headers: NDArray[np.uint8], start: int) -> tuple[bytes, str, int, int] | None:
        """The key, column, offset and size of the one member whose headers these are, from `start` on; None where there
        is none, or more.
        """
        try:
            return self._indexer.single(headers, start)
        except ShardError:
            return None  # what was wrong with the shard is said where it is walked over

    def is_end(self, rest: NDArray[np.uint8], start: int) -> bool:
        """Whether the rest of the archive, from `start` on, holds no member."""
        try:
            return len(rest) == 0 or self._indexer.has_ended(rest, start)
        except ShardError:
            return False


def _join(
    found: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Several batches of members as one."""
    if not found:
        none = np.empty(0, np.int64)
        return np.empty(0, np.uint8), none, none, none
    if len(found) == 1:
        return found[0]
    names, ends, offsets, sizes = zip(*found, strict=True)
    starts = np.cumsum([0] + [len(part) for part in names[:-1]])
    shifted = [part + start for part, start in zip(ends, starts, strict=True)]
    return np.concatenate(names), np.concatenate(shifted), np.concatenate(offsets), np.concatenate(sizes)


def _trimmed(array: NDArray[Number], length: int) -> NDArray[Number]:
    """The beginning of an array, which does not keep the rest of it."""
    return array if length == len(array) else array[:length].copy()


def _text(raw: NDArray[np.uint8]) -> str:
    return raw.tobytes().decode("utf-8", "backslashreplace")


class _Grouping:
    """The members of one archive as samples and columns."""

    def __init__(self, url: str, names: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        count = len(ends)
        self._url = url
        self._names = names
        self._ends = ends
        self._key_bytes, self._column_bytes = np.empty_like(names), np.empty_like(names)
        self._key_offsets, self._member_start = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
        self._column_ends, self._last_seen = np.empty(count + 2, np.int64), np.empty(count, np.int64)
        self._member_column, self._kept = np.empty(count, np.int32), np.empty(count + 1, np.int64)
        self._table = np.empty(1 << (2 * count + 1).bit_length(), np.int32)

    def index(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], object_size: int) -> ShardIndex:
        """The index, with the members' `offsets` and `sizes` as found in the archive."""
        samples = group(
            self._names,
            self._ends,
            self._key_bytes,
            self._key_offsets,
            self._column_bytes,
            self._column_ends,
            self._last_seen,
            self._member_start,
            self._member_column,
            self._table,
            self._kept,
            _SEED,
        )
        if samples < 0:
            raise self._doubled(-1 - samples, int(offsets[-1 - samples]))
        kept = self._kept[: self._kept[-1]]
        columns, member_column = self._columns(offsets, kept, samples)
        return ShardIndex(
            columns=columns,
            key_bytes=self._key_bytes[: self._key_offsets[samples]].copy(),
            key_offsets=_trimmed(self._key_offsets, samples + 1),
            member_start=_trimmed(self._member_start, samples + 1),
            member_column=member_column,
            member_offset=offsets if len(kept) == len(offsets) else offsets[kept],
            member_size=sizes if len(kept) == len(sizes) else sizes[kept],
            object_size=object_size,
        )

    def _columns(
        self, offsets: NDArray[np.int64], kept: NDArray[np.int64], samples: int
    ) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Names of columns and their number per member; unlike the kernel, lower-cases all of Unicode."""
        ends = takewhile(lambda end: end >= 0, self._column_ends)
        numbers: dict[str, int] = {}
        spelled = [_text(self._column_bytes[a:b]).lower() for a, b in pairwise(ends)]
        merged = np.array([numbers.setdefault(name, len(numbers)) for name in spelled], np.int32)
        members = _trimmed(self._member_column, len(kept))
        if len(numbers) < len(spelled):
            members = merged[members]
            self._check_doubled(members, offsets, kept, samples)
        for name in _RESERVED:
            if name in numbers:
                raise ShardError(f"{self._url}: a member's column is {name!r}, which is reserved; rename it")
        return tuple(numbers), members

    def _check_doubled(
        self, columns: NDArray[np.int32], offsets: NDArray[np.int64], kept: NDArray[np.int64], samples: int
    ) -> None:
        """The kernel's check again, for names that only Unicode's lower case makes equal."""
        sample = np.searchsorted(self._member_start[: samples + 1], np.arange(len(kept)), side="right")
        order = np.lexsort((columns, sample))
        same = (np.diff(columns[order]) == 0) & (np.diff(sample[order]) == 0)
        if np.any(same):
            number = int(kept[order[1:][same].min()])
            raise self._doubled(number, int(offsets[number]))

    def _doubled(self, number: int, offset: int) -> ShardError:
        start = int(self._ends[number - 1]) if number else 0
        name = _text(self._names[start : self._ends[number]])
        folder, slash, base = name.rpartition("/")
        stem, _, column = base.partition(".")
        return ShardError(
            f"{self._url}, offset {offset}: sample {folder + slash + stem!r} has column {column.lower()!r} "
            f"twice (member {name!r}); a sample's members must have different endings"
        )
