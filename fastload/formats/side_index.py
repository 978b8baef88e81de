"""Indexes of single shards, as other tools write them beside these: of a tar `a.tar` in `a.tar.idx` or `a.idx`, of a
TFRecord file `a.tfrecord` in the same way.

    Energon's, of a tar      u64, little-endian: where the first header of each sample begins, and last where they end
    DALI's, of a tar         v1.2 2
                             jpg 512 1000 a.jpg cls 2048 1 a.cls
                             jpg 3072 900 b.jpg cls 4608 1 b.cls
    DALI's, of TFRecord      0 124
                             124 98

DALI's text of a tar has all that a `ShardIndex` has: for each sample the ending, offset, size and name of its members.
The others say where samples begin, but not what is in them, and so how many there are.

Nothing in a file says which version of the shard it was made of. What it says has to fit the shard's size to the end;
if not, it is of another version, and of no use. Where it fits, an index that was made of it is *unproven*: the headers
before each member, in the shard, have to name it and its size before a sample is believed (`UnprovenIndex.prove`).
Samples of one size in another order would fit, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ShardError
from fastload.formats.shard_index import ShardIndex
from fastload.store.types import ObjectInfo

ENDING = ".idx"
BYTES_MAX = 256 << 20
# Between two members: long names, pax headers, folders. What has more is read by walking over it.
_GAP_BYTES_MAX = 128 << 10
_BLOCK = 512
_ENDINGS = {"tar": (".tar",), "tfrecord": (".tfrecord", ".tfrecords", ".tfrec")}
_DALI = re.compile(rb"v1\.2 (\d{1,18})\s*")

Int64s = NDArray[np.int64]


def names_beside(url: str, format_name: str) -> tuple[str, ...]:
    """What the index of a shard of this format may be called; nothing where there is none of that kind."""
    if format_name not in _ENDINGS:
        return ()
    ending = next((each for each in _ENDINGS[format_name] if url.lower().endswith(each)), "")
    return tuple(dict.fromkeys((url + ENDING, url[: len(url) - len(ending)] + ENDING)))


def read(data: bytes, url: str, shard: ObjectInfo, format_name: str) -> int | UnprovenIndex:
    """What the file at `url` says of a shard: its index, or how many samples it holds. ShardError where that is of
    another version, or makes no sense.
    """
    if format_name == "tfrecord":
        return _record_count(data, url, shard.size)
    if data.startswith(b"v"):
        return _members(data, url, shard)
    return _sample_count(data, url, shard.size)


def _require(holds: object, url: str, what: str) -> None:
    if not holds:
        raise ShardError(f"{url}: {what}")


_OTHER = "it does not fit the shard, and is of another version of it"


def _sample_count(data: bytes, url: str, shard_bytes: int) -> int:
    _require(data and len(data) % 8 == 0, url, f"{len(data)} bytes are no numbers of 8 bytes")
    starts = np.frombuffer(data, "<u8")
    _require((starts <= shard_bytes).all(), url, _OTHER)
    _require((starts % _BLOCK == 0).all() and (starts[1:] > starts[:-1]).all(), url, "its offsets are out of order")
    _check_tail(int(starts[-1]), url, shard_bytes)
    return len(starts) - 1


def _record_count(data: bytes, url: str, shard_bytes: int) -> int:
    words, lines = data.split(), _line_count(data)
    _require(len(words) == 2 * lines, url, "its lines are no pairs of an offset and a size")
    offsets, sizes = _integers(words, url).reshape(-1, 2).T
    _require(((offsets >= 0) & (sizes >= 16) & (sizes <= shard_bytes)).all(), url, _OTHER)
    ends = np.cumsum(sizes)
    _require(np.array_equal(offsets[1:], ends[:-1]) and not offsets[:1].any(), url, "its records leave gaps")
    _require((int(ends[-1]) if len(ends) else 0) == shard_bytes, url, _OTHER)
    return len(offsets)


def _members(data: bytes, url: str, shard: ObjectInfo) -> UnprovenIndex:
    from fastload.formats.tar import index_of_members

    head, _, body = data.partition(b"\n")
    match = _DALI.fullmatch(head)
    _require(match, url, f"it begins with {head[:40]!r}, and 'v1.2' and a number is read; write it again with wds2idx")
    lines = _line_count(body)
    assert match is not None, "it was required"
    _require(int(match[1]) == lines, url, f"it has {lines} samples, and says {int(match[1])}")
    words = body.split()
    _require(len(words) % 4 == 0, url, "a line is no list of endings, offsets, sizes and names (which have no blanks)")
    names = words[3::4]
    _require(b"\\" not in b"".join(names), url, "a name has characters that are not written as they are")
    offsets, sizes = _integers(words[1::4], url), _integers(words[2::4], url)
    inside = (offsets >= 0) & (sizes >= 0) & (offsets <= shard.size)
    _require((inside & (sizes <= shard.size - np.where(inside, offsets, 0))).all(), url, _OTHER)
    ends = offsets + sizes + -sizes % _BLOCK
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    gaps = offsets - starts
    _require(((gaps >= _BLOCK) & (offsets % _BLOCK == 0)).all(), url, "its members are out of order")
    _require((gaps <= _GAP_BYTES_MAX).all(), url, f"more than {_GAP_BYTES_MAX} bytes are between two of its members")
    _require(len(ends), url, "it has no samples")
    _check_tail(int(ends[-1]), url, shard.size)
    try:
        index = index_of_members(shard.url, names, offsets, sizes, shard.size)
    except ShardError as error:
        raise ShardError(f"{url}: by its names, {error}") from error
    # Of those nothing would be asked, and so whether they are what their names say.
    _require(index.member_count == len(names), url, "it names members that belong to no sample")
    return UnprovenIndex(
        **{name: getattr(index, name) for name in ShardIndex.__dataclass_fields__},
        url=shard.url,
        side_url=url,
        header_start=starts,
        is_proven=np.zeros(index.sample_count, np.bool_),
        end=int(ends[-1]),
    )


def _line_count(data: bytes) -> int:
    return data.count(b"\n") + (bool(data) and not data.endswith(b"\n"))


def _integers(words: list[bytes], url: str) -> Int64s:
    try:
        return np.array(list(map(int, words)), np.int64)
    except (ValueError, OverflowError) as error:
        raise ShardError(f"{url}: an offset or size is no number") from error


def _check_tail(end: int, url: str, shard_bytes: int) -> None:
    """Behind its last member a tar has an end mark, and is filled up to a whole record."""
    from fastload.formats.tar import tail_bytes_max

    _require(0 <= shard_bytes - end <= tail_bytes_max(shard_bytes), url, _OTHER)


@dataclass(frozen=True, eq=False)
class UnprovenIndex(ShardIndex):
    """An index of the shard at `url` that the file at `side_url` says, and not the shard.

    `header_start`, int64[M]: from where on headers before a member are its own, which is where the member before it
    ends. `is_proven`, bool[S]: which samples are found to be right; it changes, and only from False to True.
    `end`: of the last member, behind which there is nothing but the archive's own end.
    """

    url: str
    side_url: str
    header_start: Int64s
    is_proven: NDArray[np.bool_]
    end: int

    @property
    def byte_count(self) -> int:
        """As of a `ShardIndex`."""
        return super().byte_count + self.header_start.nbytes + self.is_proven.nbytes

    def without(self, samples: NDArray[np.bool_]) -> UnprovenIndex:
        found = super().without(samples)
        members = np.repeat(~samples, np.diff(self.member_start))
        assert isinstance(found, UnprovenIndex), "it is of the same class"
        return replace(found, header_start=self.header_start[members], is_proven=self.is_proven[~samples])

    def members_of(self, samples: Int64s) -> Int64s:
        """The numbers of all members of these samples."""
        bounds = zip(self.member_start[samples].tolist(), self.member_start[samples + 1].tolist(), strict=True)
        return np.array([member for first, end in bounds for member in range(first, end)], np.int64)

    def places_of_headers(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Where the headers of all members of these samples lie, and behind those of the last sample what is left of
        the archive: offsets and sizes.
        """
        members = self.members_of(samples)
        start = self.header_start[members]
        size = self.member_offset[members] - start
        if len(samples) and samples[-1] == self.sample_count - 1:
            start, size = np.append(start, self.end), np.append(size, self.object_size - self.end)
        return start, size

    def prove(self, samples: Int64s, headers: NDArray[np.uint8], ends: Int64s) -> None:
        """Check the bytes at `places_of_headers` of these samples, which rise; they are end to end in `headers`, up to
        `ends`. ShardError, naming the file, where they say something else.
        """
        from fastload.formats.tar import HeaderReader

        read = HeaderReader(self.url, self.object_size)
        members = self.members_of(samples)
        owners = np.repeat(samples, np.diff(self.member_start)[samples])
        for member, sample, end in zip(
            members.tolist(), owners.tolist(), ends[1 : len(members) + 1].tolist(), strict=True
        ):
            start, offset = int(self.header_start[member]), int(self.member_offset[member])
            found = read.member(headers[end - (offset - start) : end], start)
            key = self.key_bytes[self.key_offsets[sample] : self.key_offsets[sample + 1]].tobytes()
            if found != (key, self.columns[self.member_column[member]], offset, int(self.member_size[member])):
                raise ShardError(
                    f"{self.side_url} is no index of {self.url} as that is now: there is no member "
                    f"{self.key(sample) + '.' + self.columns[self.member_column[member]]!r} of "
                    f"{self.member_size[member]} bytes at offset {offset}; write it again, or remove it"
                )
        if len(ends) > len(members) + 1 and not read.is_end(headers[ends[-2] :], self.end):
            raise ShardError(
                f"{self.side_url} is no index of {self.url} as that is now: there are more members from offset "
                f"{self.end} on; write it again, or remove it"
            )
        self.is_proven[samples] = True
