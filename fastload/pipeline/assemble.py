"""From a plan entry to the bytes of its samples.

Everything is done for all samples of an entry at once: find their rows in the live windows, and gather the columns'
bytes. Raw bytes are gathered straight into the memory that becomes the user's; bytes that will be decoded go through
memory that is used again. What is made of them is another matter: see `finish`.

Where the user lets bad samples be skipped, an entry that fails is looked at sample by sample, and made again without
those that cannot be read. Its batch is shorter then, and may be empty; which samples others get does not change.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastload import callers
from fastload.decode.keys import Keys, sample_keys
from fastload.decode.plain import Raw
from fastload.errors import ConfigError, MissingColumnError
from fastload.pipeline.columns import meant, shown
from fastload.pipeline.finish import SAMPLE_ERRORS, Gathered, Names, OneMaker
from fastload.pipeline.gather import Gatherer, Values
from fastload.pipeline.located import Located
from fastload.pipeline.run import Entry
from fastload.pipeline.windows import LiveWindows
from fastload.plan import BatchEntry, Manifest
from fastload.transport import SharedPool
from fastload.transport.slots import SlotPool

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Memory(Protocol):
    """Where gathered bytes go."""

    def begin(self) -> None:
        """A batch begins: what this thread staged before is used no more."""
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
    """For batches that another process makes."""

    def __init__(self, pool: SharedPool) -> None:
        self.stage = self.give = pool.take

    def begin(self) -> None:
        """Each block is used again by itself."""


class Skips:
    """Counts the samples that were left out of a pass, by entry, and says of the first why; and at the end once more,
    where nothing else was there. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._total, self._first = 0, ""  # `_first`: what was wrong with the first of them
        self._line = callers.line()  # that began the pass: threads of ours have none of the user's

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

    def take(self, entry: Entry) -> int:
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


class Assembler:
    """Gathers the samples of entries of one data set. Safe to use from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        maker: OneMaker,
        live: LiveWindows,
        gatherer: Gatherer,
        seed: int,
        skips: Skips | None = None,
    ) -> None:
        self.maker = maker
        self._urls_of = manifest.urls_of
        self._columns = maker.columns
        self._seed = seed
        self._live = live
        self._gatherer = gatherer
        self._skips = skips
        self._present: tuple[str, ...] | None = None  # of the first batch, where all columns are asked for

    def gather(self, entry: BatchEntry, epoch: int, memory: Memory, *, is_keyed: bool = False) -> Gathered:
        """The bytes of an entry's samples, and a key for each where decoders want them or `is_keyed`."""
        random_keys: Keys | None = None
        if is_keyed or self._columns.wants_keys():
            random_keys = sample_keys(self._seed, epoch, entry.object_no, entry.sample_no)
        located = Located(entry, self._live, self._urls_of)
        names = self._names(located)
        values = self._values(located, names)
        present = {
            name: values.offset[number] >= 0 for number, name in enumerate(names) if name in self._columns.optional
        }
        of_samples = Names(located.keys, located.urls)
        return Gathered(len(entry), of_samples, self._gather(values, names, memory), random_keys, present)

    def readable(self, entry: BatchEntry, epoch: int, memory: Memory) -> list[int]:
        """Which samples of the entry can be read; all of them where the user does not let any be skipped."""
        if self._skips is None:
            return list(range(len(entry)))
        kept = []
        for number in range(len(entry)):
            memory.begin()
            try:
                gathered = self.gather(part_of_entry(entry, [number]), epoch, memory)
                list(OneMaker(self._columns).samples(gathered, lambda key: None))
            except SAMPLE_ERRORS as error:
                self._skips.add(entry, error)
            else:
                kept.append(number)
        return kept

    def chunks_of(self, entry: BatchEntry) -> Ints:
        """The chunks that an entry needs. Values that are missing need none: the batch will say what is wrong."""
        located = Located(entry, self._live, self._urls_of)
        members = located.all_columns() if self._columns.members is None else self._columns.members
        return self._gatherer.lay_out(located.values_of(members)[0]).chunk_nos

    def _names(self, located: Located) -> tuple[str, ...]:
        """The columns of these samples: those that were named, or all, which have to be the same in all shards."""
        if self._columns.names is not None:
            return self._columns.names
        present = located.all_columns()
        if not present:  # no sample is left
            return self._present or ()
        if self._present is None:
            self._present = present
        if present is not self._present and set(present) != set(self._present):
            (url,) = self._urls_of(located.entry.object_no[:1])
            raise MissingColumnError(
                f"{url}: its window of shards has the columns {shown(sorted(present))}, and earlier ones "
                f"have {shown(sorted(self._present))}; name the columns with columns=[...] or decode={{...}}, and "
                "write 'txt?' for one that samples may lack"
            )
        return self._present

    def _gather(self, values: Values, names: tuple[str, ...], memory: Memory) -> dict[str, tuple[Bytes, Ints]]:
        """The bytes of each column: values end to end, and their offsets."""
        layout = self._gatherer.lay_out(values)
        out = []
        for name, byte_count in zip(names, layout.out_offset[:, -1].tolist(), strict=True):
            take = memory.give if isinstance(self._columns.decoder(name), Raw) else memory.stage
            out.append(take(byte_count))
        self._gatherer.fill(layout, out)
        return dict(zip(names, zip(out, layout.out_offset, strict=True), strict=True))

    def _values(self, located: Located, names: tuple[str, ...]) -> Values:
        columns = self._columns
        values, missing = located.values_of(names if columns.members is None else columns.members)
        if columns.optional:
            self._check_marks(located, names)
        if missing:
            lacking = [number for number, name in enumerate(names) if name not in columns.optional]
            found = np.argwhere(values.offset[lacking] < 0)
            if len(found):
                name, number = names[lacking[found[0, 0]]], int(found[0, 1])
                told = "" if columns.names is not None else " name the columns with columns=[...], and"
                place = Names(located.keys, located.urls).place(number, name)
                raise MissingColumnError(
                    f"{place}: the sample has no such column; the shards read with it have "
                    f"{shown(located.present())}.{meant(name, located.present())} Where samples may lack it,{told} "
                    f"write {name + '?'!r}"
                )
        return values

    def _check_marks(self, located: Located, names: tuple[str, ...]) -> None:
        """Raise `ConfigError` where what the user wrote for an optional column is also the name of another."""
        members = self._columns.members or ()
        for name, member in zip(names, members, strict=True):
            marked = member + "?"
            if name in self._columns.optional and marked not in members and located.have(marked):
                raise ConfigError(
                    f"{located.urls()[0]}: its window of shards has a column whose name is {marked!r}, and "
                    f"{name + '?'!r} means {name!r}, which samples may lack; write {name + '??'!r} for the other one"
                )


def part_of_entry(entry: BatchEntry, numbers: list[int]) -> BatchEntry:
    """The entry with some of its samples alone."""
    return replace(entry, object_no=entry.object_no[numbers], sample_no=entry.sample_no[numbers])
