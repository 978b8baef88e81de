"""A pass over a mixture: the windows, counts and batches of each of its data sets, and one walk over all.

Each source has a session, a plan and live windows of its own, as if it were read alone. A batch is gathered part by
part, one for each source and epoch of it.

A line without end has a plan without end, so some windows ahead are told to the service, and more of them whenever half
of these have been opened.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from fastload.cpu_priority import breathe
from fastload.pipeline.finish import Function, GatheredParts, MixedMaker, rows_of_parts
from fastload.pipeline.gather import LocalMemory, Memory, SampleGatherer, Skips, part_of_entry
from fastload.pipeline.passes import SourcePass
from fastload.plan import (
    Cursor,
    MixtureEntry,
    MixtureOptions,
    Position,
    Ranks,
    SourcePlan,
    WindowKey,
)
from fastload.plan.mixture import mixture_cursor
from fastload.stats import Account, JointAccount
from fastload.transport.slots import SlotPool
from fastload.waiting import JointWaits, Waits

_PLANNED_WINDOWS = 1024


class MixedFeed:
    """The entries of one rank (or worker) for one epoch of a mixture, from where its cursor starts."""

    def __init__(self, cursor: Cursor[MixtureEntry], sources: Sequence[SourcePass]) -> None:
        self._cursor, self._sources = cursor, sources
        self._using_cursor = threading.Lock()  # the feeder walks, and others ask for positions
        self._opened = 0  # windows since the last plan

    def entries(self) -> Iterator[MixtureEntry]:
        """Every entry in order; each is held until `done` is called with it."""
        cursor = self._cursor
        entries: list[MixtureEntry] | None = []
        for number, each in enumerate(self._sources):
            known = each.counts.known()
            with self._using_cursor:
                entries = [*(entries or []), *cursor.tell(number, *known)]
            breathe()
        is_exact = cursor.is_counted
        self._plan()
        breathe()
        while entries is not None:
            yield from self._held(entries)
            self._retire_all_but(cursor.needed)
            breathe()
            if (cursor.is_counted and not is_exact) or self._opened > _PLANNED_WINDOWS // 2:
                is_exact = cursor.is_counted
                self._plan()
            entries = self._more()
        with self._using_cursor:
            entries = cursor.finish()
        yield from self._held(entries)
        self._retire_all_but(frozenset())
        for each in self._sources:
            each.reader.exhausted(np.empty(0, np.int32), cursor.epoch + 1)

    def position(self, entry: MixtureEntry) -> Position:
        """Where a run stands once an entry is delivered. Any thread may ask."""
        with self._using_cursor:
            return self._cursor.position(entry)

    def done(self, entry: MixtureEntry) -> None:
        """The entry's batch is made, or given up."""
        for part in entry.parts:
            self._sources[part.source].reader.done(part, part.windows)

    def _plan(self) -> None:
        windows: list[list[tuple[WindowKey, Any]]] = [[] for _ in self._sources]
        with self._using_cursor:
            for key in islice(self._cursor.windows_ahead(), _PLANNED_WINDOWS):
                windows[key.source].append((key, self._cursor.objects_of(key)))
        for each, planned in zip(self._sources, windows, strict=True):
            each.reader.plan(planned, self._cursor.epoch)
        self._opened = 0

    def _more(self) -> list[MixtureEntry] | None:
        """What is settled next, by opening a window or hearing of counts; perhaps nothing yet. None at the end."""
        with self._using_cursor:
            entries = self._cursor.settled()
            key = None if entries else self._cursor.next_window
            wanted = {} if entries or key is not None else self._cursor.counts_wanted
        if entries:
            return entries
        if key is not None:
            return self._open(key)
        # The counts of one source may be all that is needed.
        if not wanted:
            return None
        number, objects = next(iter(wanted.items()))
        told = self._sources[number].counts.ask(objects)
        with self._using_cursor:
            return self._cursor.tell(number, *told)

    def _open(self, key: WindowKey) -> list[MixtureEntry]:
        with self._using_cursor:
            object_nos = self._cursor.objects_of(key)
        each = self._sources[key.source]
        counts = each.reader.open(key, object_nos)
        breathe()
        each.counts.counted(object_nos, counts)
        breathe()
        self._opened += 1
        with self._using_cursor:
            return self._cursor.add(key, counts)

    def _held(self, entries: list[MixtureEntry]) -> Iterator[MixtureEntry]:
        breathe()
        for entry in entries:
            for part in entry.parts:
                self._sources[part.source].reader.hold(part, part.windows)
        for entry in entries:
            for part in entry.parts:
                self._sources[part.source].reader.due(part)
            yield entry

    def _retire_all_but(self, needed: frozenset[WindowKey]) -> None:
        for number, each in enumerate(self._sources):
            each.reader.retire_all_but({key for key in needed if key.source == number})


class MixedAssembler:
    """Gathers the samples of entries of a mixture. Safe to use from several threads."""

    def __init__(self, assemblers: Sequence[SampleGatherer]) -> None:
        self._assemblers = assemblers

    def gather(self, entry: MixtureEntry, memory: Memory, *, is_keyed: bool = False) -> GatheredParts:
        """The bytes of an entry's samples, part by part."""
        memory.begin()
        parts = [
            self._assemblers[part.source].gather(part, part.epoch, memory, is_keyed=is_keyed) for part in entry.parts
        ]
        return GatheredParts(parts, entry.part_of, [part.source for part in entry.parts])

    def readable(self, entry: MixtureEntry, memory: Memory) -> MixtureEntry:
        """The entry without those of its samples that cannot be read and may be left out."""
        parts, is_kept = [], np.zeros(len(entry), np.bool_)
        for part, rows in zip(entry.parts, rows_of_parts(entry.part_of, len(entry.parts)), strict=True):
            kept = self._assemblers[part.source].readable(part, part.epoch, memory)
            parts.append(part_of_entry(part, kept))
            is_kept[rows[kept]] = True
        return replace(entry, parts=tuple(parts), part_of=entry.part_of[is_kept])


@dataclass(frozen=True, slots=True)
class MixedPass:
    """A pass over a mixture."""

    cursor: Cursor[MixtureEntry]
    feed: MixedFeed
    assembler: MixedAssembler
    maker: MixedMaker
    memory: Memory
    sources: Sequence[SourcePass]
    skips: Skips | None
    _waits: Waits

    @property
    def waits(self) -> Waits:
        """Those of all sessions; what is waited for in common is booked there too."""
        return self._waits

    @property
    def slots(self) -> SlotPool:
        """Where batches go that this process makes."""
        return self.sources[0].source.slots

    @property
    def account(self) -> Account:
        """All consumers."""
        return JointAccount([(each.source.cache_name, each.session.consumer) for each in self.sources])

    def gather(self, entry: MixtureEntry, memory: Memory, *, is_keyed: bool = False) -> GatheredParts:
        """The bytes of an entry's samples."""
        return self.assembler.gather(entry, memory, is_keyed=is_keyed)

    def readable(self, entry: MixtureEntry, memory: Memory) -> MixtureEntry:
        """The entry without those of its samples that cannot be read and may be left out."""
        return self.assembler.readable(entry, memory)

    def position(self, entry: MixtureEntry) -> Position:
        """Where a run stands once an entry is delivered."""
        return self.feed.position(entry)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While it is entered, waits for bytes or counts end."""
        with ExitStack() as entered:
            for each in self.sources:
                entered.enter_context(each.session.consumer.interrupted())
            yield

    def end(self) -> None:
        """It is over, finished or not."""
        with ExitStack() as ending:
            for each in self.sources:
                ending.callback(each.end)


def begin_mixed_pass(
    sources: Sequence[SourcePass],
    plans: Sequence[SourcePlan],
    options: MixtureOptions,
    names: tuple[str, ...] | None,
    functions: tuple[Function, ...],
    skips: Skips | None,
    epoch: int,
    ranks: Ranks,
    batch_size: int,
    **cursor_options: Any,
) -> MixedPass:
    """A pass over an epoch of a mixture of `sources`, which are open. `names`: of the columns of tuples, if it makes
    tuples; `functions` are applied to its samples. `cursor_options` are those of `mixture_cursor`. Raises `ConfigError`
    and `StateError`.
    """
    cursor = mixture_cursor(plans, options, epoch, ranks, batch_size, **cursor_options)
    assemblers = [each.assembler for each in sources]
    maker = MixedMaker(tuple(each.maker for each in assemblers), names, functions)
    memory, waits = LocalMemory(sources[0].source.slots), JointWaits([each.session.waits for each in sources])
    return MixedPass(
        cursor, MixedFeed(cursor, sources), MixedAssembler(assemblers), maker, memory, sources, skips, waits
    )
