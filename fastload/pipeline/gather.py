"""From a plan entry to the bytes of its samples, out of the cache's arena.

All samples of an entry are handled at once: their rows are looked up in the live windows (`SampleGatherer`), and the
bytes of all columns are copied in one call (`Gatherer`). This is the one copy that every byte of a sample makes. Raw
bytes go straight into memory that the user will own; bytes that will be decoded go into staging memory that is reused.
Decoding comes later: see `finish`.

The values of a batch lie in many chunks. The chunks that are leased now are pinned together and copied from; the rest
are waited for and copied in a later pass. Nothing stays pinned during a wait, so progress is guaranteed, however small
the arena is and however many threads and processes share it.

With `on_error="skip"`, an entry that fails is checked sample by sample and made again without those that cannot be
read. Its batch is then shorter, and may be empty; which samples other batches get does not change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastload import callers
from fastload.client.consumer import Consumer
from fastload.decode.base import Decoder, Keys, sample_keys
from fastload.decode.flat import Flat
from fastload.errors import ConfigError, MissingColumnError
from fastload.formats import record_reader
from fastload.formats.records import (
    LooseReader,
    PartReader,
    Pickled,
    RecordReader,
    TableReader,
    copy_out,
    find_by_heads,
    number_of,
    split,
)
from fastload.kernels.gather import gather_columns, lay_out
from fastload.pipeline.columns import KEY, URL, meant, shown
from fastload.pipeline.delivery import PlanEntry
from fastload.pipeline.finish import SAMPLE_ERRORS, Gathered, SourceBuilder
from fastload.pipeline.names import UrlTable
from fastload.pipeline.pieces import PiecePlaces
from fastload.pipeline.windows import Ints, LiveWindows, LocatedSamples, RecordParts, Values
from fastload.plan import BatchEntry, Manifest
from fastload.transport import SharedPool
from fastload.transport.slots import SlotPool

Bytes = npt.NDArray[np.uint8]
Found = dict[str, tuple[Bytes, Ints]]  # of columns, their values end to end, and their offsets
Take = Callable[[str, int], Bytes]
Place = Callable[[int], str]
# From so many bytes on, on average, it is cheaper to read the head of a record first than to copy its values twice.
_BY_HEAD_BYTES = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where `values` go when those of a column are put end to end (`out_offset`, int64[c, n + 1]), and the chunks in
    which they lie, each once, rising.
    """

    values: Values
    out_offset: Ints
    chunk_nos: Ints


class _Scratch(threading.local):
    """Per thread: tables over all chunks of the data set, clean between calls."""

    seen: Bytes = np.zeros(0, np.uint8)
    chunk_offset: Ints = np.empty(0, np.int64)
    found: Ints = np.empty(0, np.int64)

    def reserve(self, chunk_count: int) -> None:
        if len(self.seen) != chunk_count:
            self.seen = np.zeros(chunk_count, np.uint8)
            self.chunk_offset = np.full(chunk_count, -1, np.int64)
            self.found = np.empty(chunk_count, np.int64)


class Gatherer:
    """Copies values of one data set out of the arena. Thread-safe."""

    def __init__(self, consumer: Consumer, chunk_count: int, chunk_bytes: int) -> None:
        self._consumer = consumer
        self._chunk_count = chunk_count
        self._chunk_bytes = chunk_bytes
        self._scratch = _Scratch()

    def lay_out(self, values: Values) -> Layout:
        """Decide where they go, and which chunks they need."""
        self._scratch.reserve(self._chunk_count)
        columns, count = values.size.shape
        out_offset = np.empty((columns, count + 1), np.int64)
        first_chunk, offset, size = (array.reshape(-1) for array in (values.first_chunk, values.offset, values.size))
        seen, found = self._scratch.seen, self._scratch.found
        chunks = lay_out(columns, first_chunk, offset, size, self._chunk_bytes, seen, found, out_offset.reshape(-1))
        if chunks < 0:
            at = -1 - chunks
            raise IndexError(
                f"value {at % count} of column {at // count} (first chunk {first_chunk[at]}, offset {offset[at]}, "
                f"{size[at]} bytes) lies outside of {self._chunk_count} chunks of {self._chunk_bytes} bytes"
            )
        return Layout(values, out_offset, np.array(sorted(found[:chunks].tolist()), np.int64))

    def fill(self, layout: Layout, out: Sequence[Bytes]) -> None:
        """Copy each column's values to their places in its `out`; waits for the chunks that they need."""
        remaining, copied = layout.chunk_nos, 0
        while len(remaining):
            with self._consumer.acquire(remaining) as held:
                here = held.chunk_nos
                for arena, chunk_nos, offsets in held.groups:
                    copied += self._copy(layout, out, arena, chunk_nos, offsets)
            if len(here) == len(remaining):
                break
            remaining = np.setdiff1d(remaining, here, assume_unique=True)
        expected = sum(layout.out_offset[:, -1].tolist())
        assert copied == expected, f"gathered {copied} of {expected} bytes"

    def _copy(self, layout: Layout, out: Sequence[Bytes], arena: Bytes, chunk_nos: Ints, offsets: Ints) -> int:
        table, values = self._scratch.chunk_offset, layout.values
        table[chunk_nos] = offsets
        places = values.first_chunk, values.offset, values.size, layout.out_offset
        try:
            return gather_columns(arena, table, self._chunk_bytes, *places, out)
        finally:
            table[chunk_nos] = -1


class Memory(Protocol):
    """Where gathered bytes go."""

    def begin(self) -> None:
        """A batch begins: what this thread staged before may be overwritten."""
        ...

    def stage(self, byte_count: int) -> Bytes:
        """For bytes that will be decoded."""
        ...

    def give(self, byte_count: int) -> Bytes:
        """For bytes that the user will own."""
        ...


class LocalMemory(threading.local):
    """For batches that are made in this process: per thread, staged bytes go where those of the last batch went."""

    def __init__(self, slots: SlotPool) -> None:
        self._slots = slots
        self._staging, self._used = np.empty(0, np.uint8), 0

    def begin(self) -> None:
        self._used = 0

    def stage(self, byte_count: int) -> Bytes:
        if self._used + byte_count > len(self._staging):
            self._staging, self._used = np.empty(self._used + byte_count + byte_count // 4, np.uint8), 0
        self._used += byte_count
        return self._staging[self._used - byte_count : self._used]

    def give(self, byte_count: int) -> Bytes:
        return self._slots.take(byte_count)


class SharedMemory:
    """For batches that a worker process makes."""

    def __init__(self, pool: SharedPool) -> None:
        self.stage = self.give = pool.take

    def begin(self) -> None:
        """Each block is used again by itself."""


class Skips:
    """Counts the samples that a pass leaves out, by entry. Thread-safe.

    It warns of the first, with its error; and at the end again, if no sample could be read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._total, self._first = 0, ""  # `_first`: what was wrong with the first of them
        self._line = callers.line()  # that began the pass: our threads have no frame of the user's

    def add(self, entry: BatchEntry, error: Exception) -> None:
        """A sample of this entry cannot be read."""
        with self._lock:
            self._counts[entry.number] = self._counts.get(entry.number, 0) + 1
            self._total += 1
            is_first = self._total == 1
            self._first = str(error) if is_first else self._first
        if is_first:
            message = f'skipped a sample, and will skip others without a word, since on_error="skip": {error}'
            callers.warn(message, at=self._line)

    def take(self, entry: PlanEntry) -> int:
        """How many samples this entry, which has been delivered, was made without."""
        with self._lock:
            return self._counts.pop(entry.number, 0)

    def ended(self, epoch: int, delivered: int) -> None:
        """The pass has come to its end, after so many samples that could be read."""
        if self._total and not delivered:
            message = (
                f'all {self._total} samples that were read of epoch {epoch} were skipped, since on_error="skip"; the '
                f"first error: {self._first}; mend decode= or columns=, or leave on_error out, so that it is raised"
            )
            callers.warn(message, RuntimeWarning, self._line)


class SampleGatherer:
    """Gathers the samples of entries of one data set. Thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        builder: SourceBuilder,
        live: LiveWindows,
        gatherer: Gatherer,
        seed: int,
        skips: Skips | None = None,
        pieces: PiecePlaces | None = None,
    ) -> None:
        self._pieces = pieces
        self.builder = builder
        self._urls = UrlTable(manifest.urls_of)
        self._columns = builder.columns
        self._seed = seed
        self._live = live
        self._gatherer = gatherer
        self._skips = skips
        self._present: tuple[str, ...] | None = None  # of the first batch, where all columns are asked for

    def gather(self, entry: BatchEntry, memory: Memory, *, is_keyed: bool = False) -> Gathered:
        """The bytes of an entry's samples, and a key for each where decoders want them or `is_keyed`."""
        random_keys: Keys | None = None
        if is_keyed or self._columns.wants_keys():
            random_keys = sample_keys(self._seed, entry.epoch, entry.object_no, entry.sample_no)
        located = LocatedSamples(entry, self._live, self._urls)
        self._prove(located)
        layout = located.layout()
        if layout is not None:
            return self._gather_typed(located, record_reader(layout), memory, random_keys)
        names = self._names(located)
        values = self._values(located, names)
        present = {
            name: values.offset[number] >= 0 for number, name in enumerate(names) if self._columns.may_lack(name)
        }
        return Gathered(len(entry), located.names(), self._gather(values, names, memory), random_keys, present)

    def readable(self, entry: BatchEntry, memory: Memory) -> list[int]:
        """Which samples of the entry can be read; all of them where the user does not let any be skipped."""
        if self._skips is None:
            return list(range(len(entry)))
        kept = []
        for number in range(len(entry)):
            memory.begin()
            try:
                gathered = self.gather(part_of_entry(entry, [number]), memory)
                list(SourceBuilder(self._columns).samples(gathered, lambda key: None))
            except SAMPLE_ERRORS as error:
                self._skips.add(entry, error)
            else:
                kept.append(number)
        return kept

    def chunks_of(self, entry: BatchEntry) -> Ints:
        """The chunks that an entry needs. Missing values need none; they are an error when the batch is built."""
        located = LocatedSamples(entry, self._live, self._urls)
        layout = located.layout()
        if layout is not None:
            read = record_reader(layout)
            names = [name for name in self._columns.names or read.columns if read.may_have(name)]
            if isinstance(read, TableReader):
                values = located.values_of(_stored(read, names))[0]
            else:
                values = self._record_parts(located).values
            return self._gatherer.lay_out(values).chunk_nos
        members = located.all_columns() if self._columns.members is None else self._columns.members
        chunks = self._gatherer.lay_out(located.values_of(members)[0]).chunk_nos
        for _, _, headers in located.unproven():
            chunks = np.union1d(chunks, self._gatherer.lay_out(headers).chunk_nos)
        return chunks

    def _prove(self, located: LocatedSamples) -> None:
        """Raise `ShardError` where an index that another tool left beside a shard is not right about these samples."""
        for index, samples, headers in located.unproven():
            layout = self._gatherer.lay_out(headers)
            data = np.empty(int(layout.out_offset[0, -1]), np.uint8)
            self._gatherer.fill(layout, [data])
            index.prove(samples, data, layout.out_offset[0])

    def _names(self, located: LocatedSamples) -> tuple[str, ...]:
        """The columns of these samples: those that were named, or all, which have to be the same in all shards."""
        if self._columns.names is not None:
            return self._columns.names
        if self._columns.all_optional:
            return located.present()
        present = located.all_columns()
        if not present:  # no sample is left
            return self._present or ()
        if self._present is None:
            self._present = present
        if present is not self._present and set(present) != set(self._present):
            (url,) = self._urls.of(located.entry.object_no[:1])
            raise MissingColumnError(
                f"{url}: its window of shards has the columns {shown(sorted(present))}, and earlier ones "
                f"have {shown(sorted(self._present))}; name the columns with columns=[...] or decode={{...}}, and "
                "write 'txt?' for one that samples may lack"
            )
        return self._present

    def _record_parts(self, located: LocatedSamples) -> RecordParts:
        parts = located.record_parts()
        return parts if self._pieces is None else self._pieces.continued(parts, located.entry.object_no)

    def _gather_typed(
        self, located: LocatedSamples, read: RecordReader, memory: Memory, random_keys: Keys | None
    ) -> Gathered:
        """The columns of shards that say what these hold. Those of records are found in their bytes, which are gathered
        first, and then copied out; of tables each value is gathered by itself.
        """
        names = self._columns.names if self._columns.names is not None else read.columns
        samples = located.names()
        reserved = [name for name in read.columns if name in (KEY, URL)]
        if self._columns.names is None and reserved:
            raise ConfigError(
                f"{samples.urls()[0]}: it has a column {reserved[0]!r}, which every sample has anyway, with another "
                "value; name the others with columns=[...]"
            )
        lacking = [name for name in names if not read.may_have(name)]
        for name in lacking:
            if not self._columns.may_lack(name):
                raise MissingColumnError(
                    f"{samples.place(0, name)}: its shard has no such column; it has {shown(read.columns)}."
                    f"{meant(name, [each.lower() for each in read.columns])}"
                )
            if name + "?" not in names and read.may_have(name + "?"):
                raise _marked(samples.urls()[0], name, name + "?")
        wanted = [name for name in names if name not in lacking]
        try:
            decoders = {name: read.decoder(name) for name in wanted if name not in self._columns.decoders}
        except ConfigError as error:  # what is not decoded
            raise ConfigError(f"{samples.urls()[0]}: {error}") from error
        pickled = next((name for name, decoder in decoders.items() if isinstance(decoder, Pickled)), None)
        if pickled is not None and not self._columns.allow_pickle:
            raise ConfigError(
                f"{samples.place(0, pickled)}: it holds pickles, which may run any code when they are read; leave it "
                f"out (columns=[...]), take its bytes (decode={{{pickled!r}: fastload.decode.raw()}}), or, where you "
                "trust those who wrote the data, give allow_pickle=True"
            )

        def take(name: str, byte_count: int) -> Bytes:
            decoder = decoders.get(name) or self._columns.decoder(name)
            return (memory.give if decoder.is_in_place else memory.stage)(byte_count)

        def where(number: int) -> str:
            return f"{samples.urls()[number]}: sample {samples.keys()[number]!r}"

        nullable: set[str] = set()  # columns of which a value may be none
        if isinstance(read, TableReader):
            values, _ = located.values_of(_stored(read, wanted))
            found, is_there = self._gather_columns(values, read, wanted, memory, take)
            nullable = {name for name in decoders if not is_there[name].all()}
        else:
            parts = self._record_parts(located)
            is_by_heads = read.sizes is not None and parts.values.size.mean() >= _BY_HEAD_BYTES
            found, is_there = (
                self._gather_by_heads(parts.values, read, wanted, memory, take, where)
                if is_by_heads
                else self._gather_whole(parts, read, wanted, memory, take, where)
            )
        count = len(located.entry)
        nothing = np.empty(0, np.uint8), np.zeros(count + 1, np.int64)
        columns = {name: found.get(name, nothing) for name in names}
        present = {name: np.zeros(count, np.bool_) for name in lacking}
        for name in wanted:
            row = is_there.get(name)
            if self._columns.may_lack(name) or name in nullable:
                present[name] = np.ones(count, np.bool_) if row is None else row
                if row is None or row.all():
                    continue
                if name in decoders and not decoders[name].takes_missing():
                    raise ConfigError(
                        f"{samples.place(int(np.argmin(row)), name)}: the sample has none, and batches of it are "
                        f"tensors, which have no room for that; say what stands for it: {_with_default(name, decoders)}"
                    )
            elif row is not None and not row.all():
                number = int(np.argmin(row))
                has = ""
                if isinstance(read, LooseReader):
                    there = read.columns_of(self._record(located, number))
                    alike = next((each for each in there if each.lower() == name.lower()), None)
                    hint = meant(name, there) if alike is None else f" Did you mean {alike!r}? Their case counts."
                    has = f"it has {shown(there)}.{hint} Or, "
                raise MissingColumnError(
                    f"{samples.place(number, name)}: the sample has no such column; {has}where samples may lack it, "
                    f"write {name + '?'!r}"
                )
        kinds = {name: read.kind(name) for name in wanted if name in self._columns.decoders and _is_number(read, name)}
        return Gathered(count, samples, columns, random_keys, present, decoders=decoders, kinds=kinds)

    def _record(self, located: LocatedSamples, number: int) -> bytes:
        """The record of one sample, for a message."""
        parts = self._record_parts(located)
        starts = np.arange(len(located.entry) + 1) if parts.part_start is None else parts.part_start
        layout = self._gatherer.lay_out(_rows(parts.values, np.s_[:, starts[number] : starts[number + 1]]))
        record = np.empty(int(layout.out_offset[0, -1]), np.uint8)
        self._gatherer.fill(layout, [record])
        return record.tobytes()

    def _gather_whole(
        self, parts: RecordParts, read: RecordReader, wanted: Sequence[str], memory: Memory, take: Take, where: Place
    ) -> tuple[Found, dict[str, npt.NDArray[np.bool_]]]:
        """The wanted columns, by gathering whole records; and which samples have them, where not all do."""
        layout = self._gatherer.lay_out(parts.values)
        offsets = layout.out_offset[0] if parts.part_start is None else layout.out_offset[0, parts.part_start]
        whole = next((name for name in wanted if isinstance(read, PartReader) and name.lower() == read.whole), None)
        records = memory.stage(int(offsets[-1])) if whole is None else take(whole, int(offsets[-1]))
        self._gatherer.fill(layout, [records])
        of_parts = {name for name in wanted if isinstance(read, PartReader) and name.lower() in read.of_parts}
        rest = [name for name in wanted if name != whole and name not in of_parts]
        found: Found = {}
        is_there: dict[str, npt.NDArray[np.bool_]] = {}
        if rest:
            found, found_there = split(read, records, offsets, rest, take, where)
            is_there = dict(zip(rest, found_there, strict=True))
        if whole is not None:
            found[whole] = records, offsets
        for name in of_parts:
            found[name] = _described(parts, take(name, 16 * parts.values.size.size))
        return found, is_there

    def _gather_by_heads(
        self, records: Values, read: RecordReader, wanted: Sequence[str], memory: Memory, take: Take, where: Place
    ) -> tuple[Found, dict[str, npt.NDArray[np.bool_]]]:
        """The same, of records whose heads say where their columns lie, so that values are copied once."""
        assert read.sizes is not None, "records without heads"
        head_bytes = np.minimum(records.size, 4 * read.sizes.count(-1))
        layout = self._gatherer.lay_out(Values(records.first_chunk, records.offset, head_bytes))
        heads = memory.stage(int(layout.out_offset[0, -1]))
        self._gatherer.fill(layout, [heads])
        places = np.empty((2, len(wanted), records.size.shape[1]), np.int64)
        numbers = [number_of(read.columns, name) for name in wanted]
        starts = np.ascontiguousarray(layout.out_offset[0, :-1])
        find_by_heads(heads, starts, records.size[0], read.sizes, numbers, places, where)
        first_chunk = np.repeat(records.first_chunk, len(wanted), 0)
        return self._gather_values(Values(first_chunk, records.offset + places[0], places[1]), wanted, take), {}

    def _gather_columns(
        self, values: Values, read: TableReader, wanted: Sequence[str], memory: Memory, take: Take
    ) -> tuple[Found, dict[str, npt.NDArray[np.bool_]]]:
        """The wanted columns of tables, whose pieces these values are; and which samples have them."""
        counts = [len(read.parts(name)) for name in wanted]
        firsts = np.cumsum([0, *counts])[:-1]
        if len(values.size) == len(wanted):
            return self._gather_values(values, wanted, take), dict(zip(wanted, values.offset >= 0, strict=True))
        single = np.flatnonzero(np.array(counts) == 1)
        found = self._gather_values(_rows(values, firsts[single]), [wanted[number] for number in single.tolist()], take)
        is_there = dict(zip(wanted, values.offset[firsts] >= 0, strict=True))
        for name, first, count in zip(wanted, firsts.tolist(), counts, strict=True):
            if count > 1:
                pieces = _rows(values, np.arange(first, first + count))
                found[name] = self._gather_pieces(pieces, is_there[name], partial(take, name), memory)
        return found, is_there

    def _gather_pieces(
        self, pieces: Values, is_there: npt.NDArray[np.bool_], take: Callable[[int], Bytes], memory: Memory
    ) -> tuple[Bytes, Ints]:
        """One column whose values have several pieces each: their sizes, and they themselves."""
        count, samples = pieces.size.shape
        of_each = pieces.first_chunk, pieces.offset, pieces.size
        layout = self._gatherer.lay_out(Values(*(np.ascontiguousarray(each.T).reshape(1, -1) for each in of_each)))
        staged = memory.stage(int(layout.out_offset[0, -1]))
        self._gatherer.fill(layout, [staged])
        heads = np.ascontiguousarray(pieces.size.T, "<u4").view(np.uint8).reshape(-1)
        runs = layout.out_offset[0, ::count]
        offset, size = np.empty((2, samples, 2), np.int64)
        offset[:, 0], offset[:, 1] = 4 * count * np.arange(samples), len(heads) + runs[:-1]
        size[:, 0], size[:, 1] = np.where(is_there, 4 * count, 0), np.diff(runs)
        out_offset = np.concatenate([[0], np.cumsum(size)])
        out = take(int(out_offset[-1]))
        memory_of_both = np.concatenate([heads, staged])
        copy_out(memory_of_both, offset.reshape(1, -1), size.reshape(1, -1), out_offset.reshape(1, -1), [out])
        return out, np.ascontiguousarray(out_offset[::2])

    def _gather_values(self, values: Values, names: Sequence[str], take: Take) -> Found:
        """The values of these columns, each end to end."""
        layout = self._gatherer.lay_out(values)
        outs = [take(name, size) for name, size in zip(names, layout.out_offset[:, -1].tolist(), strict=True)]
        self._gatherer.fill(layout, outs)
        return dict(zip(names, zip(outs, layout.out_offset, strict=True), strict=True))

    def _gather(self, values: Values, names: tuple[str, ...], memory: Memory) -> dict[str, tuple[Bytes, Ints]]:
        """The bytes of each column: values end to end, and their offsets."""
        layout = self._gatherer.lay_out(values)
        out = []
        for name, byte_count in zip(names, layout.out_offset[:, -1].tolist(), strict=True):
            take = memory.give if self._columns.decoder(name).is_in_place else memory.stage
            out.append(take(byte_count))
        self._gatherer.fill(layout, out)
        return dict(zip(names, zip(out, layout.out_offset, strict=True), strict=True))

    def _values(self, located: LocatedSamples, names: tuple[str, ...]) -> Values:
        columns = self._columns
        values, missing = located.values_of(names if columns.members is None else columns.members)
        if columns.optional:
            self._check_marks(located, names)
        if missing:
            lacking = [number for number, name in enumerate(names) if not columns.may_lack(name)]
            found = np.argwhere(values.offset[lacking] < 0)
            if len(found):
                name, number = names[lacking[found[0, 0]]], int(found[0, 1])
                hint = "" if columns.names is not None else " name the columns with columns=[...], and"
                place = located.names().place(number, name)
                raise MissingColumnError(
                    f"{place}: the sample has no such column; the shards read with it have "
                    f"{shown(located.present())}.{meant(name, located.present())} Where samples may lack it,{hint} "
                    f"write {name + '?'!r}"
                )
        return values

    def _check_marks(self, located: LocatedSamples, names: tuple[str, ...]) -> None:
        """Raise `ConfigError` where what the user wrote for an optional column is also the name of another."""
        members = self._columns.members or ()
        for name, member in zip(names, members, strict=True):
            marked = member + "?"
            if name in self._columns.optional and marked not in members and located.have(marked):
                raise _marked(located.names().urls()[0], name, marked)


def _marked(url: str, name: str, marked: str) -> ConfigError:
    return ConfigError(
        f"{url}: its window of shards has a column whose name is {marked!r}, and {name + '?'!r} means {name!r}, which "
        f"samples may lack; write {name + '??'!r} for the other one"
    )


def _rows(values: Values, numbers: npt.NDArray[np.int64] | tuple[slice, slice]) -> Values:
    return Values(values.first_chunk[numbers], values.offset[numbers], values.size[numbers])


def _is_number(read: RecordReader, name: str) -> bool:
    """Whether a column holds numbers, or arrays of them, as they lie in memory."""
    try:
        return isinstance(read.decoder(name), Flat)
    except ConfigError:  # what is not decoded
        return False


def _stored(read: TableReader, names: Sequence[str]) -> tuple[str, ...]:
    """The pieces of these columns as a table calls them."""
    return tuple(part for name in names for part in read.parts(name))


def _with_default(name: str, decoders: Mapping[str, Decoder]) -> str:
    """A decoder, as the user writes it, that is like that of this column but has a default."""
    fixed = decoders[name].fixed()
    assert fixed is not None, f"{name}: only batches of one shape have no room"
    shape, dtype = fixed
    return f"decode={{{name + '?'!r}: fastload.decode.flat({dtype.name!r}, {shape}, default=-1)}}"


def _described(parts: RecordParts, out: Bytes) -> tuple[Bytes, Ints]:
    """Bytes and tag of each part, written to `out`, and where those of each record begin."""
    assert parts.tag is not None, "there are columns of parts"
    assert parts.part_start is not None, "there are columns of parts"
    table = np.stack([parts.values.size[0], parts.tag], axis=1)
    out[:] = table.reshape(-1).view(np.uint8)
    return out, 16 * parts.part_start


def part_of_entry(entry: BatchEntry, numbers: list[int]) -> BatchEntry:
    """The entry with some of its samples alone."""
    return replace(entry, object_no=entry.object_no[numbers], sample_no=entry.sample_no[numbers])


def joined_entry(parts: Sequence[BatchEntry]) -> BatchEntry:
    """An entry with the samples of all `parts`, which are of one source and epoch, for their bytes alone."""
    if len(parts) == 1:
        return parts[0]
    object_no, sample_no = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("object_no", "sample_no")
    )
    return replace(parts[0], object_no=object_no, sample_no=sample_no)
