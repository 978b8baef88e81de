"""Files of tokens: bare ones (`.bin`, `.npy`), those of Megatron, which have an index beside them (`.idx`), and the
chunks that LitData writes for its TokensLoader, which one index for all describes.

A sample is a window of `length` tokens of a bare file or a chunk, and a document of one with an index, unless
documents are packed into windows (`pack`). Which bytes a sample has follows from sizes, arguments and the index: of
windows by arithmetic, so that a file of any size is read from anywhere at once. A sample belongs to the piece of the
file in which its first byte lies.

The index of Megatron (`megatron/core/datasets/indexed_dataset.py`), all integers little-endian:

    9 bytes         "MMIDIDX" and two zeros
    u64             version, 1
    u8              dtype, one of `_DTYPES`
    u64, u64        n, the number of sequences; d, one more than the number of documents
    i32[n]          tokens of each sequence
    i64[n]          where each begins in the data, in bytes
    i64[d]          the first sequence of each document, and last n
    i8[n]           the mode of each sequence, where data is of several

Of a piece only the parts of it are read that speak of the piece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from fastload.callers import public
from fastload.decode.npy import declared_dtype, read_header
from fastload.errors import ConfigError, DecodeError, ShardError
from fastload.formats.computed_index import PackedIndex, StridedIndex
from fastload.formats.pieces import own_bytes
from fastload.formats.record_index import RecordIndex, shard_name
from fastload.formats.token_reader import token_layout
from fastload.kernels.tokens import best_fit
from fastload.store.listing import ends_in
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

__all__ = ["Tokens", "pack_documents", "tokens", "tokens_of", "windows_of_piece"]

Int64s = NDArray[np.int64]
ReadAt = Callable[[int, int], bytes]
Pack = Literal["cut", "fit"]

_LENGTH_MAX = 1 << 24
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
# The codes of Megatron; 9 and 10 are those of fairseq, which it has them from.
_DTYPES = {
    1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2", 9: "<u4", 10: "<u8",
}  # fmt: skip
_CALL = re.compile(r"\s*(?:fastload\.formats\.)?tokens\s*\((.*)\)\s*", re.DOTALL)
_ARGUMENT = re.compile(r"""\s*(?:([a-z_]+)\s*=\s*)?(?:"([^"]*)"|'([^']*)'|([\w.<>|+-]+))\s*(?:,\s*|$)""", re.ASCII)
_NPY_HEAD_BYTES = 10_012  # the longest header that is read
_READ_AT_ONCE = 4096  # numbers of an index, which end a search


@public
def tokens(
    length: int,
    dtype: npt.DTypeLike | None = None,
    overlap: int = 1,
    header_bytes: int = 0,
    pack: Pack | None = None,
    pad: float = 0,
    end: int | None = None,
) -> Tokens:
    """Files of tokens, for `format=`: bare `.bin` and `.npy`, Megatron's `.bin` with its `.idx`, and the chunks that
    LitData writes for TokensLoader; docs/formats.md.

    `length`: tokens of a sample; each window begins `overlap` tokens before the end of the last one. `dtype` of bare
    files, which begin with `header_bytes` of something else; `.npy` and `.idx` say it. With an index a sample is a
    document; `pack="cut"` takes windows of documents end to end, `pack="fit"` puts whole documents into `length`, with
    `pad` behind the last. `end`: the token that ends a document in files without an index.
    """
    for name, value, least in (("length", length, 1), ("overlap", overlap, 0), ("header_bytes", header_bytes, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number, at least {least}")
    if length > _LENGTH_MAX:
        raise ConfigError(f"length={length} must be at most {_LENGTH_MAX}")
    if overlap >= length:
        raise ConfigError(f"overlap={overlap} must be less than length={length}, or no window begins behind the last")
    if pack is not None and pack not in get_args(Pack):
        raise ConfigError(f'pack={pack!r} must be "cut", "fit" or None')
    declared = None if dtype is None else declared_dtype(dtype)
    if declared is not None and declared.kind not in "iuf":
        raise ConfigError(f"dtype={dtype!r} is none of tokens; give one of numbers, such as 'uint16'")
    stored = None if dtype is None else np.dtype(dtype).str
    for name, number in (("pad", pad), ("end", end)):
        if number is not None:
            _check_number(name, number, stored)
    return Tokens(length, stored, overlap, header_bytes, pack, pad, end)


def tokens_of(text: str) -> Tokens:
    """What `tokens` gives, as it is written where there is no Python: `tokens(2048, uint16, pack=cut)`, with quotes or
    without. ConfigError, which names the text, for what is none.
    """
    names = [field.name for field in fields(Tokens)]
    arguments: dict[str, Any] = {}
    call = _CALL.fullmatch(text)
    inner, at = (call[1].strip(), 0) if call is not None else (text, len(text))
    while at < len(inner):
        found = _ARGUMENT.match(inner, at)
        if found is None:
            raise _unread(text, f"it cannot be read from {inner[at : at + 40]!r} on")
        name, *quoted, bare = found.groups()
        if name is None and list(arguments) != names[: len(arguments)]:
            raise _unread(text, f"{found[0].strip(' ,')} comes behind arguments with names, and has none")
        if name is None and len(arguments) < len(names):
            name = names[len(arguments)]
        if name not in names or name in arguments:
            raise _unread(text, f"it takes {', '.join(names)}, each once")
        arguments[name] = _value(bare) if bare is not None else next(each for each in quoted if each is not None)
        at = found.end()
    if call is None or "length" not in arguments:
        raise _unread(text, "it does not say the length of a sample" if call is not None else "it is not of this form")
    try:
        return tokens(**arguments)
    except ConfigError as error:
        raise ConfigError(f"format={text!r}: {error}") from error


def _value(text: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "None" else text


def _unread(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"format={text!r}: {why}; write tokens(LENGTH), or with a dtype and more, such as "
        "tokens(2048, uint16, overlap=0)"
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """What `tokens` was given; see `formats.ComputedFormat`."""

    length: int
    dtype: str | None
    overlap: int
    header_bytes: int
    pack: Pack | None
    pad: float
    end: int | None

    @property
    def endings(self) -> tuple[str, ...]:
        return (".bin", ".npy")

    @property
    def beside_ending(self) -> str:
        return ".idx"

    @property
    def reading(self) -> str:
        """`pad` and `end` change what samples hold, and not their order."""
        given = f"length={self.length}, dtype={self.dtype!r}, overlap={self.overlap}"
        return f"tokens({given}, header_bytes={self.header_bytes}, pack={self.pack!r})"

    def count(self, info: ObjectInfo, *, has_beside: bool) -> int:
        """See `ComputedFormat`: of bare files it follows from the size."""
        if has_beside or _is_npy(info):
            return -1
        if _is_chunk(info):
            raise ConfigError(
                f"{info.url} is litdata by its name, whose tokens index.json beside it describes, and there is none; "
                "upload it"
            )
        return self._windows(info, self._bare(info))[1]

    def why_none(self, shards: ObjectTable) -> str:
        """See `ComputedFormat`."""
        longest = max(shards, key=lambda info: info.whole.size)
        count = self._bare(longest).token_count
        cure = f"give a length of at most {count}, or join the files" if count else "look at what is in them"
        most = f"the longest, {longest.url}, has {count} tokens"
        return f"tokens(length={self.length}): no file has so many, and {most}; {cure}"

    def index(
        self, info: ObjectInfo, read_at: ReadAt, beside: tuple[ReadAt, int] | None
    ) -> StridedIndex | RecordIndex | PackedIndex:
        """See `ComputedFormat`."""
        if beside is not None and _is_chunk(info):
            read_about, byte_count = beside
            data = self._chunk(info, read_about(0, byte_count))
        elif beside is not None and not _is_npy(info):
            return self._of_documents(info, DocumentIndex(*beside, info.whole, self.dtype))
        else:
            data = self._npy(info, read_at) if _is_npy(info) else self._bare(info)
        first, count, number = self._windows(info, data)
        item_bytes = data.dtype.itemsize
        layout = token_layout(data.dtype, self.length, end=self.end)
        stride = (self.length - self.overlap) * item_bytes
        name = shard_name(info.url)
        return StridedIndex(layout, first, stride, self.length * item_bytes, count, name, number)

    def _windows(self, info: ObjectInfo, data: _Data) -> tuple[int, int, int]:
        """Where the first window of a piece begins in it, how many there are, and its number in the file."""
        item_bytes = data.dtype.itemsize
        start = info.start - data.start
        windows = data.token_count, item_bytes, self.length, self.overlap
        number, stop = windows_of_piece(start, start + own_bytes(info), *windows)
        stride = (self.length - self.overlap) * item_bytes
        return data.start + number * stride - info.start, stop - number, number

    def _bare(self, info: ObjectInfo) -> _Data:
        """What a bare file holds. ConfigError where that is not said."""
        url, size = info.url, info.whole.size
        if self.pack == "fit":
            raise ConfigError(
                f'{url}: pack="fit" needs an index of its documents beside it ({self.beside_ending}), which is not '
                'there; upload it, or use pack="cut"'
            )
        if self.dtype is None:
            raise ConfigError(
                f"{url} does not say what its tokens are, and there is no index beside it; give "
                "tokens(dtype=...), such as 'uint16'"
            )
        dtype = np.dtype(self.dtype)
        count, rest = divmod(size - self.header_bytes, dtype.itemsize)
        if size < self.header_bytes or rest:
            raise ShardError(
                f"{url} has {size} bytes, and {self.header_bytes} of a header and a whole number of {dtype} (each of "
                f"{dtype.itemsize} bytes) do not make that: it was cut short, or give another dtype= or header_bytes="
            )
        return _Data(self.header_bytes, count, dtype)

    def _npy(self, info: ObjectInfo, read_at: ReadAt) -> _Data:
        """What the header of an .npy file says of it."""
        url, size = info.url, info.whole.size
        if self.header_bytes or self.pack == "fit":
            given = f"header_bytes={self.header_bytes}" if self.header_bytes else f"pack={self.pack!r}"
            raise ConfigError(f"{url}: {given} is for other files than .npy; leave it out")
        try:
            header = read_header(memoryview(read_at(0, min(size, _NPY_HEAD_BYTES))))
        except DecodeError as error:
            raise ShardError(f"{url}: {error}; upload it again") from error
        if header.dtype.kind not in "iuf" or (header.fortran_order and len(header.shape) > 1):
            order = " in Fortran's order" if header.fortran_order else ""
            raise ShardError(f"{url} holds {header.dtype}{list(header.shape)}{order}, and no tokens; write it again")
        if header.data_start + header.data_bytes != size:
            raise ShardError(
                f"{url} has {size} bytes, and its header says {header.data_start + header.data_bytes}: it was cut "
                "short; upload it again"
            )
        _check_dtype(url, self.dtype, header.dtype)
        return _Data(header.data_start, header.data_bytes // header.dtype.itemsize, header.dtype)

    def _chunk(self, info: ObjectInfo, about: bytes) -> _Data:
        """What the index of LitData's chunks, which lies beside them, says of one."""
        from fastload.formats.litdata import token_chunks

        url, size = info.url, info.whole.size
        if self.header_bytes or self.pack == "fit":
            given = f"header_bytes={self.header_bytes}" if self.header_bytes else f"pack={self.pack!r}"
            raise ConfigError(f"{url}: {given} is for other files than LitData's; leave it out")
        folder, _, name = url.rpartition("/")
        chunk = token_chunks(about, f"{folder}/index.json").get(name)
        if chunk is None:
            raise ConfigError(f"{folder}/index.json does not name {name}; remove it, or write the index again")
        _check_dtype(url, self.dtype, chunk.dtype)
        there = max(0, size - chunk.start) // chunk.dtype.itemsize
        if size < chunk.start or (chunk.token_count or 0) > there:
            raise ShardError(
                f"{url} has {size} bytes, and its index says that from byte {chunk.start} on {chunk.token_count} "
                f"{chunk.dtype} lie in it: it was cut short; upload it again"
            )
        return _Data(chunk.start, there if chunk.token_count is None else chunk.token_count, chunk.dtype)

    # With an index

    def _of_documents(self, info: ObjectInfo, index: DocumentIndex) -> RecordIndex | PackedIndex | StridedIndex:
        if self.header_bytes or self.end is not None:
            given = f"header_bytes={self.header_bytes}" if self.header_bytes else f"end={self.end}"
            raise ConfigError(f"{info.url}: {given} is for files without an index, and it has one; leave it out")
        dtype, item_bytes = index.dtype, index.dtype.itemsize
        more = ("position", "segment", *(("mode",) if index.has_modes else ()))
        if self.pack == "cut":
            first, count, number = self._windows(info, _Data(0, index.token_count, dtype))
            begin = info.start + first + (self.length - self.overlap) * item_bytes * np.arange(count)
            end = begin + self.length * item_bytes
            units = index.units(int(begin[0]), int(end[-1])) if count else index.units(0, 0)
            layout = token_layout(dtype, self.length, parts=more)
            return _packed(layout, begin, end, np.arange(count + 1), units, info, shard_name(info.url), number)
        documents = index.documents(info.start, info.start + own_bytes(info))
        begin, end = documents.begin, documents.end
        if self.pack is None and not index.has_modes:
            sizes = end - begin
            if len(sizes) and sizes.max() >= 1 << 32:
                number = documents.number + int(sizes.argmax())
                raise ShardError(f"{info.url}: document {number} has {sizes.max()} bytes, above 4 GiB")
            name, offsets = shard_name(info.url), begin - info.start
            return RecordIndex(token_layout(dtype), offsets, sizes.astype(np.uint32), info.size, name, documents.number)
        units = index.units(int(begin[0]), int(end[-1])) if len(begin) else index.units(0, 0)
        if self.pack is None:
            layout, starts = token_layout(dtype, parts=more), np.arange(len(begin) + 1)
            return _packed(layout, begin, end, starts, units, info, shard_name(info.url), documents.number)
        layout = token_layout(dtype, self.length, pad=self.pad, parts=more)
        begin, end = cut_long(begin, end, self.length * item_bytes, self.overlap * item_bytes)
        order, starts = pack_documents((end - begin) // item_bytes, self.length)
        name = shard_name(info.url, info.start)
        return _packed(layout, begin[order], end[order], starts, units, info, name, 0)


class _Data(NamedTuple):
    """The tokens of a file: where they begin, how many there are, of which dtype in the file's byte order."""

    start: int
    token_count: int
    dtype: np.dtype[Any]


def windows_of_piece(
    start: int, end: int, token_count: int, item_bytes: int, length: int, overlap: int
) -> tuple[int, int]:
    """The first window of a piece, and the one behind its last. The piece is the bytes from `start` up to `end`,
    counted from the first of `token_count` tokens; a window belongs to the piece in which its first byte lies.
    """
    stride = (length - overlap) * item_bytes
    count = (token_count - length) // (length - overlap) + 1 if token_count >= length else 0
    return tuple(min(count, max(0, -(-edge // stride))) for edge in (start, end))  # type: ignore[return-value]


def cut_long(begin: Int64s, end: Int64s, bytes_max: int, overlap_bytes: int) -> tuple[Int64s, Int64s]:
    """The same ranges without empty ones, and those that are too long in parts that overlap."""
    is_any = end > begin
    begin, end = begin[is_any], end[is_any]
    step = bytes_max - overlap_bytes
    counts = 1 + np.maximum(0, -(-(end - begin - bytes_max) // step))
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(begin, counts) + step * within
    return begins, np.minimum(begins + bytes_max, np.repeat(end, counts))


def pack_documents(sizes: Int64s, length: int) -> tuple[Int64s, Int64s]:
    """Which documents of these sizes, from 1 to `length`, share a sample, by best fit from the longest to the shortest.

    The documents in the order of the samples, and where those of each begin there, and last how many there are. Samples
    are in the order of their first documents, and documents of a sample in the order of the file.
    """
    count = len(sizes)
    if not count:
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    largest_first = np.argsort(-sizes, kind="stable")
    bin_of = np.empty(count, np.int64)
    scratch = np.full(length + 1, -1, np.int64), np.empty(count, np.int64)
    has_any = np.zeros(2 << length.bit_length(), np.uint8)
    bins = best_fit(np.ascontiguousarray(sizes, np.int64), largest_first, length, *scratch, has_any, bin_of)
    assert bins >= 0, f"a document of {sizes[largest_first[-1 - bins]]} tokens does not fit into {length}"
    _, first = np.unique(bin_of, return_index=True)
    rank = np.empty(bins, np.int64)
    rank[np.argsort(first)] = np.arange(bins)
    sample_of = rank[bin_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(sample_of, minlength=bins))])
    return np.argsort(sample_of, kind="stable"), starts.astype(np.int64)


class Units(NamedTuple):
    """What parts of samples do not go beyond: documents, or sequences where these have modes. Where each begins,
    whether that begins a document, and its mode; last, where all of them end.
    """

    begin: Int64s
    is_first: NDArray[np.bool_]
    mode: Int64s
    end: int


def _packed(
    layout: bytes, begin: Int64s, end: Int64s, starts: Int64s, units: Units, info: ObjectInfo, name: str, number: int
) -> PackedIndex:
    """Samples of ranges of the file, those of sample i from `starts[i]` on, each cut where a unit begins."""
    low = np.searchsorted(units.begin, begin, side="right") - 1
    high = np.maximum(low + 1, np.searchsorted(units.begin, end, side="left"))
    counts = np.where(end > begin, high - low, 0)
    which = np.repeat(np.arange(len(begin)), counts)
    is_first = np.zeros(len(which), np.bool_)
    is_first[(np.cumsum(counts) - counts)[counts > 0]] = True
    within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    unit = low[which] + within
    part_begin = np.maximum(units.begin[unit], begin[which])
    part_end = np.minimum(np.append(units.begin[1:], units.end)[unit], end[which])
    tag = 2 * units.mode[unit] + (units.is_first[unit] | is_first)
    part_start = np.concatenate([[0], np.cumsum(counts)])[starts].astype(np.int64)
    return PackedIndex(layout, part_start, part_begin - info.start, part_end - part_begin, tag, name, number)


class Documents(NamedTuple):
    """Documents of a piece: where each begins and ends in the file, in bytes, and the number of the first."""

    begin: Int64s
    end: Int64s
    number: int


class DocumentIndex:
    """What an index of Megatron says of the data beside it. Reads what it is asked for. For one thread."""

    def __init__(self, read_at: ReadAt, size: int, data: ObjectInfo, dtype: str | None) -> None:
        """ShardError for what is no index of `data`; ConfigError where that has another dtype."""
        self._read_at, self._url, self._data_bytes = read_at, data.url, data.size
        if size < _HEADER.size:
            raise self._wrong(f"it has {size} bytes, less than its header")
        magic, version, code, self._sequences, starts = _HEADER.unpack(read_at(0, _HEADER.size))
        if magic != _MAGIC:
            raise self._wrong(f"it begins with {magic!r}, and no index of Megatron does")
        if version != 1 or code not in _DTYPES:
            what = f"version {version}" if version != 1 else f"dtype {code}"
            raise self._wrong(f"it has {what}, which fastload does not know")
        self.dtype = np.dtype(_DTYPES[code])
        self._documents = starts - 1
        self._lengths = _HEADER.size
        self._pointers = self._lengths + 4 * self._sequences
        self._firsts = self._pointers + 8 * self._sequences
        self._modes = self._firsts + 8 * starts
        self.has_modes = self._sequences > 0 and size == self._modes + self._sequences
        if starts < 1 or (size != self._modes and not self.has_modes):
            raise self._wrong(
                f"it has {size} bytes, and its {self._sequences} sequences and {self._documents} documents take "
                f"{self._modes}, or with modes {self._modes + self._sequences}"
            )
        _check_dtype(data.url, dtype, self.dtype)
        edges = self._numbers(self._firsts, 0, 1)[0], self._numbers(self._firsts, self._documents, starts)[0]
        if edges != (0, self._sequences):
            raise self._wrong(f"its documents are of sequences {edges[0]} to {edges[1]} of {self._sequences}")
        end = self._end_of(self._sequences)
        if end != data.size:
            raise ShardError(
                f"{data.url} has {data.size} bytes, and the index beside it says {end}: one of the two was cut short, "
                "or is another one; upload both again"
            )

    @property
    def token_count(self) -> int:
        return self._data_bytes // self.dtype.itemsize

    def documents(self, start: int, end: int) -> Documents:
        """Those that begin in these bytes of the data; those that begin where it ends belong to its last piece."""
        is_last = end >= self._data_bytes
        low = self._search(self._pointers, self._sequences, start)
        high = self._sequences if is_last else self._search(self._pointers, self._sequences, end)
        first = self._search(self._firsts, self._documents, low) if start else 0
        stop = self._documents if is_last else self._search(self._firsts, self._documents, high)
        if stop < first:
            raise self._wrong(f"documents {stop} to {first} do not lie in their order")
        firsts = self._numbers(self._firsts, first, stop + 1)
        # Compared, not subtracted, since a difference could overflow.
        if np.any(firsts[1:] < firsts[:-1]) or firsts[0] < 0 or firsts[-1] > self._sequences:
            raise self._wrong(f"documents {first} to {stop} do not begin with sequences that rise")
        begins = self._begins(int(firsts[0]), int(firsts[-1]))
        edges = begins[firsts - firsts[0]]
        return Documents(edges[:-1], edges[1:], first)

    def units(self, start: int, end: int) -> Units:
        """The documents that have some of these bytes, or the sequences, where they have modes. None is empty."""
        low = max(0, self._search(self._pointers, self._sequences, start + 1) - 1)
        high = max(low, self._search(self._pointers, self._sequences, end)) if end > start else low
        # Empty sequences share the place of the next one: the last of those that begin there has the bytes.
        begins = self._begins(low, high)
        if end > start and not begins[0] <= start < end <= begins[-1]:
            raise self._wrong(f"sequences {low} to {high} are not those of bytes {start} to {end}")
        begin, is_any = begins[:-1], np.diff(begins) > 0
        document = self._search(self._firsts, self._documents, low)
        firsts = self._numbers(self._firsts, document, self._search(self._firsts, self._documents, high))
        is_first = np.zeros(high - low, np.bool_)
        is_first[firsts[(firsts >= low) & (firsts < high)] - low] = True
        # A document may begin with a sequence that is empty.
        is_first = np.isin(begin, begin[is_first])
        mode = np.zeros(high - low, np.int64)
        if self.has_modes:
            mode = np.frombuffer(self._read_at(self._modes + low, high - low), np.int8).astype(np.int64)
            if len(mode) and mode.min() < 0:
                raise self._wrong(f"sequence {low + int(mode.argmin())} has the mode {mode.min()}")
        kept = is_any if self.has_modes else is_any & is_first
        if len(kept) and is_any.any():
            kept[int(is_any.argmax())] = True  # what begins before `start`
        return Units(begin[kept], is_first[kept], mode[kept], int(begins[-1]))

    def _begins(self, first: int, stop: int) -> Int64s:
        """Where these sequences begin, and last where they end. ShardError where they do not follow each other."""
        if first == stop:
            return np.array([self._end_of(first)], np.int64)
        lengths = np.frombuffer(self._read_at(self._lengths + 4 * first, 4 * (stop - first)), "<i4").astype(np.int64)
        pointers = self._numbers(self._pointers, first, stop)
        ends = pointers + lengths * self.dtype.itemsize
        is_wrong = np.append(pointers[1:], self._end_of(stop)) != ends
        is_wrong |= (lengths < 0) | (pointers < 0) | (pointers > self._data_bytes) | (ends > self._data_bytes)
        if is_wrong.any():
            at = int(is_wrong.argmax())
            raise self._wrong(
                f"sequence {first + at} has {lengths[at]} tokens from byte {pointers[at]}, and the next does not begin "
                "behind it, or the data ends before"
            )
        return np.append(pointers, ends[-1])

    def _end_of(self, stop: int) -> int:
        """Where the sequences before number `stop` end."""
        if stop < self._sequences:
            return int(self._numbers(self._pointers, stop, stop + 1)[0])
        if not stop:
            return 0
        (length,) = struct.unpack("<i", self._read_at(self._lengths + 4 * (stop - 1), 4))
        end: int = self._numbers(self._pointers, stop - 1, stop).tolist()[0] + length * self.dtype.itemsize
        return end

    def _numbers(self, offset: int, first: int, stop: int) -> Int64s:
        """Some of the 64-bit numbers that begin at `offset`."""
        return np.frombuffer(self._read_at(offset + 8 * first, 8 * (stop - first)), "<i8").astype(np.int64)

    def _search(self, offset: int, count: int, value: int) -> int:
        """How many of the rising numbers at `offset` are below `value`."""
        low, high = 0, count
        while high - low > _READ_AT_ONCE:
            middle = (low + high) // 2
            if self._numbers(offset, middle, middle + 1)[0] < value:
                low = middle + 1
            else:
                high = middle
        numbers = self._numbers(offset, low, high)
        if np.any(numbers[1:] < numbers[:-1]):
            raise self._wrong(f"sequences or documents {low} to {high} do not lie in their order")
        below: int = np.searchsorted(numbers, value).tolist()
        return low + below

    def _wrong(self, what: str) -> ShardError:
        return ShardError(f"the index beside {self._url} cannot be used: {what}; write or upload it again")


def _is_chunk(info: ObjectInfo) -> bool:
    return ends_in(shard_name(info.url).lower(), ("chunk-#-#.bin",))


def _is_npy(info: ObjectInfo) -> bool:
    return shard_name(info.url).lower().endswith(".npy")


def _check_dtype(url: str, given: str | None, found: np.dtype[Any]) -> None:
    if given is not None and np.dtype(given) != found:
        raise ConfigError(
            f"{url} holds {found}, and tokens(dtype={np.dtype(given).name!r}) says otherwise; leave it out"
        )


def _check_number(name: str, number: float, stored: str | None) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(f"{name}={number!r} must be a number")
    dtype = np.dtype(stored or "i8")
    if dtype.kind in "iu" and not (
        (isinstance(number, int) or number.is_integer()) and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max
    ):
        raise ConfigError(f"{name}={number!r} is no {dtype.name}")
