"""Windows: some shards whose samples batches are being built from, and where each of their samples lies.

A window's shards are indexed when it opens; from then on, a sample is a row in arrays that cover the whole window, so
that a batch finds its bytes with a few vector operations and no Python per sample. Its chunks are leased while it is
live and given back once no batch can need them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from fastload.errors import MissingColumnError, ShardError
from fastload.formats import (
    Index,
    MixedLayoutsError,
    PackedIndex,
    ShardIndex,
    TableIndex,
    difference,
    joined,
    record_reader,
)
from fastload.formats.record_index import RECORD
from fastload.formats.side_index import UnprovenIndex
from fastload.kernels.rows import append_keys, find_rows, look_up
from fastload.kernels.yielding import yield_state
from fastload.pipeline.columns import shown
from fastload.pipeline.names import Keys, KeyTable, Names, NumberedKeys, UrlTable
from fastload.plan import BatchEntry

Ints = npt.NDArray[np.int64]

# Places of values, 16 bytes each, in a table of all columns.
_PLACES_MAX, _PLACES_A_MEMBER_MAX = 1 << 20, 16


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Where the n values of each of c columns lie: int64[c, n], C-contiguous. A size of 0 needs no chunk."""

    first_chunk: Ints
    offset: Ints
    size: Ints

    @classmethod
    def room(cls, columns: int, count: int) -> Values:
        """For `count` values of each column; to be filled in."""
        return cls(*np.empty((3, columns, count), np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class RecordParts:
    """The parts of n records, those of a record one after the other: where they lie, and their tags. Record i has the
    parts from `part_start[i]` up to `part_start[i + 1]`.
    """

    values: Values
    tag: Ints | None = None  # None: each record is one part
    part_start: Ints | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _PartTable:
    """The parts of all rows of a window; the `counts[r]` of row r begin at number `first[r]`."""

    values: Values
    tag: Ints
    first: Ints
    counts: Ints


@dataclass(slots=True)
class Window:
    """Some whole shards and where each of their samples lies."""

    key: Hashable
    object_nos: Ints
    indexes: list[Index]
    first_chunk: Ints
    chunk_nos: Ints
    number: int = field(init=False, default=-1)  # of its opening, given by `LiveWindows`
    counts: Ints = field(init=False)
    _member_count: int = field(init=False)
    _base: Ints = field(init=False)
    keys: Keys = field(init=False)
    _places: dict[tuple[str, ...], Ints] = field(init=False, default_factory=dict)
    _columns: tuple[str, ...] | None = field(init=False, default=None)
    # How its samples are laid out, each with the number of the first object that has it; of shards of members nothing.
    layouts: dict[bytes, int] = field(init=False, default_factory=dict)
    unproven: list[tuple[int, int, UnprovenIndex]] = field(init=False)  # with first row and first chunk
    is_packed: bool = field(init=False)  # records are put together of parts
    _parts: _PartTable | None = field(init=False, default=None)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.counts = np.array([index.sample_count for index in self.indexes], np.int64)
        self._member_count = sum(index.member_count for index in self.indexes)
        self._base = np.concatenate([[0], np.cumsum(self.counts)])
        places = zip(self._base.tolist(), self.first_chunk.tolist(), self.indexes, strict=False)
        self.unproven = [(row, chunk, index) for row, chunk, index in places if isinstance(index, UnprovenIndex)]
        self.is_packed = any(isinstance(index, PackedIndex) for index in self.indexes)
        for index, number in zip(self.indexes, self.object_nos.tolist(), strict=True):
            if not isinstance(index, ShardIndex):
                self.layouts.setdefault(index.layout, number)
        self.keys = _keys_of(self.indexes, self._base)

    def parts(self) -> _PartTable:
        """The parts of all rows."""
        with self._lock:
            if self._parts is None:
                self._parts = self._parts_of_all()
            return self._parts

    def _parts_of_all(self) -> _PartTable:
        indexes = [index for index in self.indexes if isinstance(index, PackedIndex)]
        assert len(indexes) == len(self.indexes), "shards of one layout have indexes of one kind"
        counts = [len(index.offset) for index in indexes]
        firsts = np.cumsum([0, *counts])
        starts = [index.part_start[:-1] + first for index, first in zip(indexes, firsts.tolist(), strict=False)]
        values = Values(
            np.repeat(self.first_chunk, counts)[None],
            np.concatenate([index.offset for index in indexes])[None],
            np.concatenate([index.size for index in indexes])[None],
        )
        part_counts = np.concatenate([np.diff(index.part_start) for index in indexes])
        return _PartTable(values, np.concatenate([index.tag for index in indexes]), np.concatenate(starts), part_counts)

    def columns(self) -> tuple[str, ...]:
        """The names of all columns in these shards, in the order in which they first appear."""
        with self._lock:
            return self._columns_here()

    def _columns_here(self) -> tuple[str, ...]:
        if self._columns is None:
            self._columns = tuple(dict.fromkeys(name for index in self.indexes for name in _columns_of(index)))
        return self._columns

    @property
    def is_sparse(self) -> bool:
        """Whether most samples have few of the columns, so that a table of all would take far more memory than the
        shards' own indexes.
        """
        return int(self._base[-1]) * len(self.columns()) > _PLACES_MAX + _PLACES_A_MEMBER_MAX * self._member_count

    # Rows are what the following know samples by: one for each, those of a shard behind those of the shard before.

    @property
    def first_rows(self) -> Ints:
        """The row of each shard's first sample."""
        return self._base[:-1]

    def look_up(self, columns: tuple[str, ...], rows: Ints, samples: Ints, values: Values) -> int:
        """Write to `samples` of `values`, which has these columns, where their values lie (offset -1 and size 0:
        nowhere). Returns how many are nowhere.
        """
        with self._lock:
            if columns not in self._places:
                self._places[columns] = self._places_of(columns)
            places = self._places[columns]
        missing: int = look_up(yield_state, places, rows, samples, values.first_chunk, values.offset, values.size)
        if missing < 0:
            row, sample = rows[-1 - missing], samples[-1 - missing]
            raise IndexError(f"row {row} is none of {len(places)}, or sample {sample} none of {values.size.shape[1]}")
        return missing

    def _places_of(self, columns: tuple[str, ...]) -> Ints:
        choices = [self._choices(name) for name in columns]
        each = tuple(dict.fromkeys(name for names in choices for name in names))
        table = self._places_of_each(each)
        if each == columns:
            return table
        # Of several names for one column the first counts that a sample has.
        chosen = np.empty((len(table), 1 + 2 * len(columns)), np.int64)
        chosen[:, 0] = table[:, 0]
        for number, names in enumerate(choices):
            at = [1 + 2 * each.index(name) for name in names]
            found = table[:, at[-1] : at[-1] + 2]
            for place in reversed(at[:-1]):
                found = np.where(table[:, place : place + 1] >= 0, table[:, place : place + 2], found)
            chosen[:, 1 + 2 * number : 3 + 2 * number] = found
        return chosen

    def _choices(self, column: str) -> list[str]:
        """The names of members that a column may stand for: `jpg;png` for two, unless there is one called so."""
        return [column] if ";" not in column or column in self._columns_here() else column.split(";")

    def _places_of_each(self, columns: tuple[str, ...]) -> Ints:
        table = np.empty((int(self._base[-1]), 1 + 2 * len(columns)), np.int64)
        numbers = {name: number for number, name in enumerate(columns)}
        for index, first_chunk, base in zip(self.indexes, self.first_chunk.tolist(), self._base.tolist(), strict=False):
            assert not isinstance(index, PackedIndex), "parts have a table of their own"
            index.fill_places(lambda name: numbers.get(name, -1), first_chunk, table[base : base + index.sample_count])
        return table


def _columns_of(index: Index) -> tuple[str, ...]:
    return index.columns if isinstance(index, ShardIndex | TableIndex) else record_reader(index.layout).columns


def _keys_of(indexes: Sequence[Index], base: Ints) -> Keys:
    """The keys of a window's rows; those of shard i begin at row `base[i]`."""
    named = [index for index in indexes if isinstance(index, ShardIndex)]
    if len(named) < len(indexes):
        if named:
            raise ShardError("shards with keys of their own and shards of records are read together; name one kind")
        numbered = [index for index in indexes if not isinstance(index, ShardIndex)]
        return NumberedKeys([index.name for index in numbered], base, [index.first_number for index in numbered])
    # Ends fall together with the next start, so one array of S + 1 offsets serves the whole window.
    first_bytes = np.cumsum([0, *(len(index.key_bytes) for index in named)]).tolist()
    key_bytes, key_starts = np.empty(first_bytes[-1], np.uint8), np.empty(int(base[-1]) + 1, np.int64)
    key_starts[-1], key_bytes_max = first_bytes[-1], 0
    for index, row, first_byte in zip(named, base.tolist(), first_bytes, strict=False):
        starts = key_starts[row : row + index.sample_count]
        longest = append_keys(index.key_offsets, index.key_bytes, first_byte, starts, key_bytes)
        assert longest >= 0, f"keys of {index.sample_count} samples do not fit their window"
        key_bytes_max = max(key_bytes_max, longest)
    return KeyTable(key_bytes, key_starts, key_bytes_max)


class LiveWindows:
    """The open windows of one pass over the data, and how many batches that are being built need each.

    `open`, `hold` and `retire_all_but` are called by the feeder, `find` and `done` by the threads that make batches. A
    window is handed back to be closed (the caller gives its leases back) once the feeder has retired it and no batch
    holds it. A shard may be in two open windows, those of two epochs; either serves its samples.
    """

    def __init__(self, object_count: int) -> None:
        self._lock = threading.Lock()
        self._open: dict[Hashable, Window] = {}
        self._by_number: dict[int, Window] = {}
        self._opened_count = 0
        self._window_of = np.full(object_count, -1, np.int64)  # by object: the number of a window that is open
        self._first_row_of = np.zeros(object_count, np.int64)
        self._holders: dict[Hashable, int] = {}  # window -> how many batches that are being built need it
        self._retired: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._open

    def open(self, window: Window) -> None:
        """Make a window's samples available."""
        with self._lock:
            window.number = self._opened_count
            self._opened_count += 1
            self._show(window)
            self._open[window.key] = self._by_number[window.number] = window
            self._retired.discard(window.key)

    def find(self, object_no: npt.NDArray[np.int32], sample_no: Ints) -> list[tuple[Window, Ints, Ints]]:
        """The windows of these samples: (window, which of the samples, their rows)."""
        object_no, sample_no = np.ascontiguousarray(object_no), np.ascontiguousarray(sample_no)
        found = np.empty((2, len(object_no)), np.int64)
        with self._lock:
            numbers, ends = np.empty((2, len(self._by_number)), np.int64)
            by_object = self._window_of, self._first_row_of
            count = find_rows(*by_object, object_no, sample_no, numbers, ends, found)
            assert count >= 0, f"object {object_no[-1 - count]} is in no open window"
            windows = [self._by_number[number] for number in numbers[:count].tolist()]
        bounds = pairwise([0, *ends[:count].tolist()])
        return [(window, *found[:, start:end]) for window, (start, end) in zip(windows, bounds, strict=True)]

    def hold(self, windows: Iterable[Hashable]) -> None:
        """A batch whose samples lie in these windows is being built."""
        with self._lock:
            for key in windows:
                self._holders[key] = self._holders.get(key, 0) + 1

    def done(self, windows: Iterable[Hashable]) -> list[Window]:
        """That batch is built (or given up); returns the windows that may be closed now."""
        with self._lock:
            for key in windows:
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
            return self._close()

    def retire_all_but(self, needed: Collection[Hashable]) -> list[Window]:
        """No batch that is still to come needs a window that is not in `needed`; returns those to be closed now."""
        with self._lock:
            self._retired = {key for key in self._open if key not in needed}
            return self._close()

    def close_all(self) -> list[Window]:
        """The pass is given up: all open windows."""
        with self._lock:
            closed = list(self._open.values())
            self._open.clear()
            self._by_number.clear()
            self._retired.clear()
            self._window_of.fill(-1)  # a batch that is being built finds none
            return closed

    def _show(self, window: Window) -> None:
        self._window_of[window.object_nos] = window.number
        self._first_row_of[window.object_nos] = window.first_rows

    def _close(self) -> list[Window]:
        closed = [self._open.pop(key) for key in sorted(self._retired - self._holders.keys(), key=repr)]
        for window in closed:
            self._retired.discard(window.key)
            del self._by_number[window.number]
        for window in closed:
            self._hide(window)
        return closed

    def _hide(self, window: Window) -> None:
        """Where another window that is open has some of its shards, that one serves them from now on."""
        mine = window.object_nos[self._window_of[window.object_nos] == window.number]
        self._window_of[mine] = -1
        for other in self._by_number.values():
            places = np.flatnonzero(np.isin(other.object_nos, mine))
            self._window_of[other.object_nos[places]] = other.number
            self._first_row_of[other.object_nos[places]] = other.first_rows[places]


class LocatedSamples:
    """The samples of one plan entry, looked up in the open windows: where their values lie, their keys and URLs.

    They may lie in several windows. Each window fills in the rows of its own samples, so that arrays are in the entry's
    order from the start. Used by one thread.
    """

    def __init__(self, entry: BatchEntry, live: LiveWindows, urls: UrlTable) -> None:
        self.entry = entry
        self._urls = urls
        self._parts = live.find(entry.object_no, entry.sample_no)

    def have(self, column: str) -> bool:
        return any(column in window.columns() for window, _, _ in self._parts)

    def present(self) -> tuple[str, ...]:
        if len(self._parts) == 1:
            return self._parts[0][0].columns()
        return tuple(dict.fromkeys(name for window, _, _ in self._parts for name in window.columns()))

    def all_columns(self) -> tuple[str, ...]:
        """Those that are present, to read all of them. MissingColumnError where most samples lack most of them."""
        for window, samples, _ in self._parts:
            if window.is_sparse:
                (url,) = self._urls.of(self.entry.object_no[samples[:1]])
                raise MissingColumnError(
                    f"{url}: its window of shards has {len(window.columns())} columns, and most samples lack most of "
                    f"them: {shown(window.columns())}. A column is what follows the first dot of a member's name, so "
                    "dots within keys make columns of their own. Name the columns with columns=[...] or "
                    "decode={...}, and write 'txt?' for one that samples may lack"
                )
        return self.present()

    def unproven(self) -> Iterator[tuple[UnprovenIndex, Ints, Values]]:
        """Of each shard whose index has to be proven which of these samples are not yet, and where the headers of their
        members lie.
        """
        for window, _, rows in self._parts:
            for first_row, first_chunk, index in window.unproven:
                samples = rows - first_row
                samples = np.unique(samples[(samples >= 0) & (samples < index.sample_count)])
                samples = samples[~index.is_proven[samples]]
                if len(samples):
                    start, size = index.places_of_headers(samples)
                    yield index, samples, Values(np.full_like(start, first_chunk)[None], start[None], size[None])

    def values_of(self, columns: tuple[str, ...]) -> tuple[Values, int]:
        """Where the values of these columns lie, offset -1 where a sample has none, and how many of these there are."""
        values = Values.room(len(columns), len(self.entry))
        missing = [window.look_up(columns, rows, samples, values) for window, samples, rows in self._parts]
        return values, sum(missing)

    def record_parts(self) -> RecordParts:
        """Where the parts of these samples lie, which are records; most records have one."""
        count = len(self.entry)
        if not any(window.is_packed for window, _, _ in self._parts):
            return RecordParts(self.values_of((RECORD,))[0])
        tables = [window.parts() for window, _, _ in self._parts]
        part_start = np.zeros(count + 1, np.int64)
        for table, (_, samples, rows) in zip(tables, self._parts, strict=True):
            part_start[samples + 1] = table.counts[rows]
        np.cumsum(part_start, out=part_start)
        values, tag = Values.room(1, int(part_start[-1])), np.empty(int(part_start[-1]), np.int64)
        for table, (_, samples, rows) in zip(tables, self._parts, strict=True):
            _copy_parts(table, rows, part_start[samples], values, tag)
        return RecordParts(values, tag, part_start)

    def layout(self) -> bytes | None:
        """How these samples are laid out; None where they have members. ShardError where they differ."""
        found: dict[bytes, int] = {}
        for window, _, _ in self._parts:
            for layout, number in window.layouts.items():
                found.setdefault(layout, number)
        if len(found) < 2:
            return next(iter(found), None)
        try:
            return joined(tuple(found))
        except MixedLayoutsError as mixed:
            urls = self._urls.of(np.array([found[mixed.one], found[mixed.other]], np.int64))
            raise ShardError(
                f"{urls[0]} and {urls[1]} have other columns: {difference(mixed.one, mixed.other)}; write them alike"
            ) from mixed

    def names(self) -> Names:
        """The samples' keys and URLs."""
        is_one = len(self._parts) == 1
        keys = [(None if is_one else samples, window.keys, rows) for window, samples, rows in self._parts]
        return Names(keys, self.entry.object_no, self._urls)


def _copy_parts(table: _PartTable, rows: Ints, to: Ints, values: Values, tag: Ints) -> None:
    """Copy the parts of these rows to the places that begin at `to`."""
    first, counts = table.first[rows], table.counts[rows]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    source, target = np.repeat(first, counts) + within, np.repeat(to, counts) + within
    for name in ("first_chunk", "offset", "size"):
        getattr(values, name)[0, target] = getattr(table.values, name)[0, source]
    tag[target] = table.tag[source]


def window_chunks(first_chunk: Ints, object_nos: Sequence[int] | Ints) -> Ints:
    """All chunk numbers of these objects, in order."""
    numbers = np.asarray(object_nos, np.int64)
    runs = map(range, first_chunk[numbers].tolist(), first_chunk[numbers + 1].tolist())
    return np.fromiter(chain.from_iterable(runs), np.int64)
