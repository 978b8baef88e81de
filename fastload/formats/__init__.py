"""The formats of shards, behind one small interface: bytes in, an index out.

Of a tar, a `ShardIndex` says where each member of each sample lies. Of formats of records a `RecordIndex` says where
each sample lies, and how its columns are found once its bytes are there (`records`). Both are made by reading a shard,
and stored. What a `ComputedFormat` gives (`computed_index`) is not: it follows from arguments of the user's.

Large files of some formats are read in pieces (`pieces`).

Nothing here imports numba until the first shard is to be indexed, nor what reads records and token files before that is
needed: the cache service does without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError, ShardError
from fastload.formats.computed_index import PackedIndex, StridedIndex
from fastload.formats.digests import CheckedIndexer, fastest
from fastload.formats.placed_index import RECORD_MAGIC, TABLE_MAGIC
from fastload.formats.record_index import Described, ListedShard, RecordIndex, shard_name
from fastload.formats.shard_index import ShardIndex
from fastload.formats.table_index import TableIndex
from fastload.lazy import lazy_names
from fastload.store.listing import ends_in
from fastload.store.packing import PACKED_ENDINGS, PACKED_TAR_ENDINGS, packing_of
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

if TYPE_CHECKING:
    from fastload.formats.records import RecordReader
    from fastload.formats.token_files import tokens as tokens

__all__ = [
    "ENDINGS",
    "INDEX_NAME",
    "SHARD_ENDINGS",
    "SIDECAR_NAME",
    "ComputedFormat",
    "Described",
    "Format",
    "Index",
    "Indexer",
    "ListedShard",
    "MixedLayoutsError",
    "PackedIndex",
    "ReadAt",
    "RecordIndex",
    "ShardIndex",
    "StoredIndex",
    "StridedIndex",
    "TableIndex",
    "checked_format",
    "described",
    "difference",
    "endings_of",
    "format_of",
    "indexer_for",
    "is_cut",
    "is_described",
    "is_made_so",
    "joined",
    "listed_shards",
    "may_be_beside",
    "may_be_indexed",
    "named_format",
    "record_reader",
    "stored_index",
    "token_shards",
    "tokens",
]

StoredIndex: TypeAlias = ShardIndex | RecordIndex | TableIndex
Index: TypeAlias = StoredIndex | StridedIndex | PackedIndex
ReadAt: TypeAlias = Callable[[int, int], bytes]
"""Reads a part of an object: `read_at(start, length)`."""

__getattr__ = lazy_names(__name__, {"token_files": ["tokens"]})[0]

ENDINGS = {
    "tar": (".tar",),
    "mds": (".mds", "shard.#.json", "shard.#.csv", "shard.#.tsv", "shard.#.xsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "tfrecord": (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord-#-of-#", ".tfrecords-#-of-#"),
    "litdata": ("chunk-#-#.bin", "chunk-#-#.zstd.bin", "chunk-#-#.zstd:#.bin"),
}
"""The formats by name, and how the names of their shards end; "#" is a number."""

_PACKED = {
    "tar": ENDINGS["tar"],
    "mds": ENDINGS["mds"],
    "jsonl": (*ENDINGS["jsonl"], ".json"),
    "tfrecord": ENDINGS["tfrecord"],
    "litdata": ENDINGS["litdata"][:1],
}
"""How the names of those that may be packed as a whole end, without what says how they are packed."""

_PACKED_ENDINGS = {
    name: tuple(ending + packed for ending in endings for packed in PACKED_ENDINGS)
    + (PACKED_TAR_ENDINGS if name == "tar" else ())
    for name, endings in _PACKED.items()
    if name != "litdata"  # whose names say it elsewhere
}

SHARD_ENDINGS = tuple(ending for some in (ENDINGS, _PACKED_ENDINGS) for endings in some.values() for ending in endings)
"""How the names of objects end that are shards, where a prefix is given instead of names."""

_MDS_OF_TEXT = ENDINGS["mds"][1:]
_INDEXED = ("mds", "litdata")

_IN_PIECES = {"jsonl"}
"""The formats by name whose files are cut where they are larger than a piece."""

SIDECAR_NAME = "fastload-index.arrow"
"""What a file of indexes is called that is found by itself beside the shards of a prefix (see `sidecar`)."""

INDEX_NAME = "index.json"
"""What a file is called that names the shards beside it."""

_UNPACK = {".lz4": "unlz4", ".tlz4": "unlz4", ".Z": "uncompress"}
"""What is not unpacked here, and what does it."""


class Indexer(Protocol):
    """Makes the index of one shard from its bytes, as they come: on from the first, or where it asks for others. Used
    by one thread.
    """

    @property
    def next_offset(self) -> int:
        """The offset in the object of the next byte that is needed; the object's size once none is. It may lie before
        what was fed last, where the end of a shard says what is in it.
        """
        ...

    @property
    def done(self) -> bool:
        """Whether no more bytes are needed and `finish` may be called."""
        ...

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read `chunk`, which lies at `start` in the object; it is not kept. ShardError: not this format."""
        ...

    def finish(self) -> StoredIndex:
        """The index, once `done`. ShardError: the samples make no sense."""
        ...


class ComputedFormat(Protocol):
    """A format with arguments, whose indexes follow from these and from what lies beside the shards. So they are made
    where they are needed, in no time, and are no facts of the objects that others could use. Immutable.
    """

    @property
    def reading(self) -> str:
        """The arguments as a text: what the order depends on beside the objects."""
        ...

    @property
    def endings(self) -> tuple[str, ...]:
        """How the names of its shards end under a prefix."""
        ...

    @property
    def beside_ending(self) -> str:
        """How the name of the file ends that may lie beside a shard, in place of the shard's own ending. Beside those
        that may have one file for all of a folder, it is that (`INDEX_NAME`).
        """
        ...

    def count(self, info: ObjectInfo, *, has_beside: bool) -> int:
        """How many samples a shard has, or a piece of one; -1 where its name and size do not say it. ConfigError for
        what it cannot read with these arguments, ShardError for what is damaged.
        """
        ...

    def why_none(self, shards: ObjectTable) -> str:
        """What to say where counts are known and all 0."""
        ...

    def index(self, info: ObjectInfo, read_at: ReadAt, beside: tuple[ReadAt, int] | None) -> Index:
        """The index of a shard, or of a piece of one; `read_at` reads the beginning of its object, `beside` the file
        that lies beside it, and says its size. ShardError or ConfigError where that makes no sense.
        """
        ...


Format: TypeAlias = str | ComputedFormat
"""What users say of the format: its name, or one with arguments."""


def stored_index(
    data: bytes | bytearray | memoryview, url: str, object_size: int, start: int = 0, reach_max: int = 0
) -> StoredIndex:
    """The index that `to_bytes` of any kind stored. ShardError, naming `url`, for anything that is none of an object
    of `object_size` bytes. `start` and `reach_max`: see `RecordIndex.from_bytes`.
    """
    if bytes(data[:8]) == TABLE_MAGIC:
        return TableIndex.from_bytes(bytes(data), url, object_size, _stored_columns)
    if bytes(data[:8]) != RECORD_MAGIC:
        return ShardIndex.from_bytes(data, url, object_size)
    index = RecordIndex.from_bytes(data, url, object_size, start, reach_max)
    try:
        record_reader(index.layout)
    except ShardError as error:
        raise ShardError(f"{url}: its stored index is damaged ({error}); drop it and read the shard") from error
    return index


def is_made_so(index: StoredIndex, url: str, how: str = "auto", about: Described | None = None) -> bool:
    """Whether a stored index of the shard at `url` is what `indexer_for` would make with these arguments. It is not
    where it was made when another format was named, or when the file beside the shard said something else: neither
    changes the shard itself, by whose version it was found.
    """
    if isinstance(index, ShardIndex):
        return format_of(url, how) == "tar"
    if isinstance(index, RecordIndex) and about is not None and about.layout:
        return index.layout == about.layout
    name = _layout_name(index.layout)
    return format_of(url, how) == _FORMAT_OF_LAYOUT.get(name, name)


_FORMAT_OF_LAYOUT = {"lines": "mds", "arrow": "litdata"}
"""The formats of layouts that are not called as these are."""


@functools.lru_cache(maxsize=256)
def _layout_name(layout: bytes) -> str:
    from fastload.formats.records import read_layout

    return read_layout(layout)[0]


def _stored_columns(layout: bytes) -> tuple[str, ...]:
    from fastload.formats.records import TableReader

    read = record_reader(layout)
    return read.stored if isinstance(read, TableReader) else read.columns


def may_be_indexed(url: str, how: str = "auto") -> bool:
    """Whether a shard is of a format that may have a file `INDEX_NAME` beside its shards."""
    if how != "auto":
        return how in _INDEXED
    # Asked of each of a million shards: most names are known not to be by a look.
    lower = url.lower()
    return any(part in lower for part in (".mds", ".bin", "shard.")) and format_of(url) in _INDEXED


def is_described(url: str, how: str = "auto") -> bool:
    """Whether a shard is of a format of which that file says how samples are laid out, so that it has to be there."""
    if not may_be_indexed(url, how):
        return False
    return format_of(url, how) == "litdata" or ends_in(shard_name(url).lower(), _MDS_OF_TEXT)


def listed_shards(data: bytes, url: str) -> list[ListedShard]:
    """The shards that the file `INDEX_NAME` at `url` names. ConfigError, naming `url`, for what is none, and for shards
    that are not read.
    """
    from fastload.formats import litdata, mds

    return litdata.shards_of(data, url) if litdata.is_index(data) else mds.shards_of(data, url)


def token_shards(data: bytes, url: str) -> list[ListedShard]:
    """The shards that the file `INDEX_NAME` at `url` names, of tokens. ConfigError as above."""
    from fastload.formats.litdata import token_chunks

    return [chunk.listed for chunk in token_chunks(data, url).values()]


def described(data: bytes, url: str) -> dict[str, Described]:
    """What reading shards needs of the file `INDEX_NAME` at `url`, by their names. ConfigError as above."""
    from fastload.formats import litdata, mds

    return litdata.described(data, url) if litdata.is_index(data) else mds.described(data, url)


@functools.lru_cache(maxsize=256)
def record_reader(layout: bytes) -> RecordReader:
    """What reads records of this layout; ShardError where that is none."""
    from fastload.formats.records import read_layout

    name, fields = read_layout(layout)
    if name == "mds":
        from fastload.formats.mds import MdsReader

        return MdsReader.of(fields)
    if name == "lines":
        from fastload.formats.mds_lines import LinesReader

        return LinesReader.of(fields)
    if name == "jsonl":
        from fastload.formats.jsonl import JsonlReader

        return JsonlReader.of(fields)
    if name == "arrow":
        from fastload.formats.arrow_table import ArrowReader

        return ArrowReader.of(fields)
    if name == "litdata":
        from fastload.formats.litdata import LitDataReader

        return LitDataReader.of(fields)
    if name == "tfrecord":
        from fastload.formats.tfrecord import TfRecordReader

        return TfRecordReader.of(fields)
    if name == "tokens":
        from fastload.formats.token_reader import TokenReader

        return TokenReader.of(fields)
    raise ShardError(f"its records are of a format called {name!r}, which this fastload does not know")


@functools.lru_cache(maxsize=256)
def joined(layouts: tuple[bytes, ...]) -> bytes:
    """The layout by which records of all of these are read. MixedLayoutsError, where there is none."""
    found = layouts[0]
    for layout in layouts[1:]:
        both = found if layout == found else _of_both(found, layout)
        if both is None:
            raise MixedLayoutsError(*next(pair for pair in combinations(layouts, 2) if _of_both(*pair) is None))
        found = both
    return found


class MixedLayoutsError(Exception):
    """Two layouts whose records cannot be read together."""

    def __init__(self, one: bytes, other: bytes) -> None:
        super().__init__(one, other)
        self.one, self.other = one, other


def _of_both(one: bytes, other: bytes) -> bytes | None:
    """The layout of records of both; None where they are laid out otherwise."""
    readers = record_reader(one), record_reader(other)
    return one if one == other else readers[0].joined(readers[1])


def difference(one: bytes, other: bytes) -> str:
    """In what two layouts differ, in words."""
    first, second = record_reader(one), record_reader(other)
    for name in (*first.columns, *second.columns):
        kinds = [read.kind(name) if name in read.columns else "missing" for read in (first, second)]
        if kinds[0] != kinds[1]:
            return f"column {name!r} is {kinds[0]} in the one and {kinds[1]} in the other"
    return f"in the order {list(first.columns)} in the one and {list(second.columns)} in the other"


def checked_format(how: Format) -> Format:
    """What a user says of the format, of which one with arguments may be a text (see `tokens_of`). ConfigError for what
    is none.
    """
    if isinstance(how, str) and ("(" in how or how == "tokens"):
        from fastload.formats.token_files import tokens_of

        return tokens_of(how)
    endings_of(how)
    return how


def endings_of(name: Format) -> tuple[str, ...]:
    """How shards of the format end; of all formats for "auto". ConfigError for a name that is none."""
    if not isinstance(name, str):
        if not isinstance(getattr(name, "endings", None), tuple):
            raise ConfigError(f"format={name!r} is none; give a name, or fastload.formats.tokens(...)")
        return name.endings
    if name == "auto":
        return SHARD_ENDINGS
    if name not in ENDINGS:
        known = ", ".join(map(repr, ["auto", *ENDINGS, "tokens(LENGTH, DTYPE)"]))
        raise ConfigError(f"format={name!r} is not known; there are {known}")
    return ENDINGS[name] + _PACKED_ENDINGS.get(name, ())


def format_of(url: str, how: str = "auto") -> str:
    """The format of a shard: the one that the user names, or what the ending of its name says; tar where that says
    nothing.
    """
    return how if how != "auto" else named_format(url) or "tar"


def named_format(url: str) -> str | None:
    """The format that the ending of a shard's name says; None where it says nothing."""
    name = shard_name(url).lower()
    known = _PACKED if packing_of(url) else ENDINGS
    return next((each for each, endings in known.items() if ends_in(name, endings)), None)


def may_be_beside(url: str) -> bool:
    """Whether a packed shard under a prefix may be no data, where other formats have shards there: JSON, such as facts
    of a data set of tars.
    """
    return bool(packing_of(url)) and shard_name(url).lower().endswith(".json") and named_format(url) == "jsonl"


def is_cut(url: str, how: Format = "auto") -> bool:
    """Whether an object is a shard of a format whose large files are read in pieces; a packed one can be read from its
    start only.
    """
    if not isinstance(how, str):
        return not url.endswith((how.beside_ending, f"/{INDEX_NAME}"))
    return format_of(url, how) in _IN_PIECES and not packing_of(url)


def indexer_for(
    url: str, size: int, about: Described | None = None, piece: ObjectInfo | None = None, how: str = "auto"
) -> Indexer:
    """An indexer for the shard at `url` of `size` bytes, of the format `how`, or by the ending of its name; tar where
    that says nothing. `about` is what a file beside the shard says of it, where one does (see `described`). Of a
    `piece` it may read on behind its end.

    Raises ConfigError for what is packed in a way that is not read, or not described, ShardError for an empty object.
    """
    indexer = _indexer(url, size, b"" if about is None else about.layout, piece, how)
    algorithm = fastest(about.digests) if about is not None and about.digests else ""
    if about is None or not algorithm:
        return indexer
    return CheckedIndexer(indexer, url, size, algorithm, about.digests[algorithm])


def _indexer(url: str, size: int, layout: bytes, piece: ObjectInfo | None, how: str) -> Indexer:
    name, form = shard_name(url), format_of(url, how)
    for ending, tool in _UNPACK.items():
        if name.lower().endswith(ending.lower()):
            raise ConfigError(f"{url}: shards that are packed in this way are not read; unpack it with: {tool} {name}")
    if is_described(url, how) and not layout:
        raise ConfigError(f"{url}: the list of shards has no file that describes it; make the list again")
    if form == "mds" and layout:
        from fastload.formats.mds_lines import LinesIndexer

        return LinesIndexer(url, size, layout)
    if form == "mds":
        from fastload.formats.mds import MdsIndexer

        return MdsIndexer(url, size)
    if form == "jsonl":
        from fastload.formats.jsonl import JsonlIndexer

        return JsonlIndexer(url, size, piece)
    if form == "litdata":
        from fastload.formats.litdata import LitDataIndexer

        return LitDataIndexer(url, size, layout)
    if form == "tfrecord":
        from fastload.formats.tfrecord import TfRecordIndexer

        return TfRecordIndexer(url, size)
    from fastload.formats.tar import TarIndexer

    return TarIndexer(url, size)
