"""From a plan entry to what the user gets: one batch, or the samples of one.

Everything is done for all samples of an entry at once: find their rows in the live windows, gather the columns' bytes,
one decoder call a column. Raw bytes are gathered straight into the slot that becomes the user's; bytes that will be
decoded go through memory that the thread keeps.

Decoders that make random choices are given a key a sample, which follows from the data set's seed, the epoch and the
sample alone.

Where the user lets bad samples be skipped, an entry that fails is looked at sample by sample, and made again without
those that cannot be read. Its batch is shorter then, and may be empty; which samples others get does not change.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload.decode import Decoder
from fastload.decode.keys import Keys, sample_keys
from fastload.decode.plain import Raw
from fastload.engine.columns import KEY, URL, ColumnSet
from fastload.engine.gather import Gatherer, Values
from fastload.engine.run import Entry
from fastload.transport.slots import SlotPool
from fastload.engine.windows import LiveWindows, Window
from fastload.errors import DecodeError, MissingColumnError
from fastload.plan import BatchEntry, Manifest

Ints = npt.NDArray[np.int64]
# What is wrong with one sample, and nothing else.
SAMPLE_ERRORS = (DecodeError, MissingColumnError)

Batch = Any  # dict of column -> value, or a tuple of values


class _Staging(threading.local):
    """Per thread: bytes on their way to a decoder, used again for every batch."""

    memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, byte_count: int) -> npt.NDArray[np.uint8]:
        if len(self.memory) < byte_count:
            self.memory = np.empty(byte_count + byte_count // 4, np.uint8)
        return self.memory[:byte_count]


class _Located:
    """The samples of one entry, with the window and row of each, and their keys for decoders."""

    def __init__(self, entry: BatchEntry, live: LiveWindows, random_keys: Keys | None = None) -> None:
        self.entry, self.random_keys = entry, random_keys
        self._parts: list[tuple[Window, Any, Ints]] = [
            (
                window,
                chosen,
                window.rows(places, entry.sample_no if chosen is None else entry.sample_no[chosen]),
            )
            for window, chosen, places in live.find(entry.object_no.astype(np.int64))
        ]

    def present(self) -> list[str]:
        """The columns that their windows have."""
        return list(dict.fromkeys(name for window, _, _ in self._parts for name in window.columns()))

    def values_of(self, column: str) -> Values:
        """Where the column's values lie; offset -1 where a sample has none."""
        return Values(*(self._spread(part) for part in zip(*self._column_parts(column), strict=True)))

    def keys(self) -> list[str]:
        """The samples' keys."""
        if len(self._parts) == 1:
            window, _, rows = self._parts[0]
            return window.keys(rows)
        keys = np.empty(len(self.entry), object)
        for window, chosen, rows in self._parts:
            keys[chosen] = window.keys(rows)
        listed: list[str] = keys.tolist()
        return listed

    def _column_parts(self, column: str) -> list[tuple[Ints, Ints, Ints]]:
        if not self._parts:
            nothing = np.empty(0, np.int64)
            return [(nothing, nothing, nothing)]
        found = []
        for window, _, rows in self._parts:
            first_chunk, offset, size = window.values_of(column)
            found.append((first_chunk[rows], offset[rows], size[rows]))
        return found

    def _spread(self, parts: tuple[Ints, ...]) -> Ints:
        """Join what was looked up by window, in the order of the samples."""
        if len(parts) == 1:
            return parts[0]
        joined = np.empty(len(self.entry), np.int64)
        for (_, chosen, _), part in zip(self._parts, parts, strict=True):
            joined[chosen] = part
        return joined


class Skips:
    """Counts the samples that were left out, by entry, and says of the first why. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._is_told = False

    def add(self, entry: BatchEntry, error: Exception) -> None:
        """A sample of this entry cannot be read."""
        with self._lock:
            self._counts[entry.number] = self._counts.get(entry.number, 0) + 1
            is_first, self._is_told = not self._is_told, True
        if is_first:
            warnings.warn(
                f'skipped a sample, and will skip others without a word, since on_error="skip": {error}', stacklevel=2
            )

    def take(self, entry: Entry) -> int:
        """How many samples this entry, which has been delivered, was made without."""
        with self._lock:
            return self._counts.pop(entry.number, 0)


class Assembler:
    """Makes batches of one data set. Safe to use from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        columns: ColumnSet,
        live: LiveWindows,
        gatherer: Gatherer,
        slots: SlotPool,
        seed: int,
        skips: Skips | None = None,
    ) -> None:
        self._urls_of = manifest.urls_of
        self._columns = columns
        self._seed = seed
        self._live = live
        self._gatherer = gatherer
        self._slots = slots
        self._skips = skips
        self._staging = _Staging()
        self._present: tuple[str, ...] | None = None  # of the first batch, where all columns are asked for

    def batch(self, entry: BatchEntry, epoch: int) -> Batch:
        """The batch of an entry: a dict with `__key__` and `__url__`, or a tuple of the columns alone."""
        return self.batch_of(entry, epoch)[0]

    def batch_of(self, entry: BatchEntry, epoch: int) -> tuple[Batch, list[int] | None]:
        """The batch, and which samples of the entry it has, where not all."""
        try:
            return self._batch(entry, epoch), None
        except SAMPLE_ERRORS:
            if self._skips is None:
                raise
            kept = self._readable(entry, epoch, self._skips)
            return self._batch(_part(entry, kept), epoch), kept

    def samples(self, entry: BatchEntry, epoch: int) -> Iterator[Batch]:
        """The samples of an entry, one by one, decoded as they are asked for."""
        return self.samples_of(entry, epoch)[0]

    def samples_of(self, entry: BatchEntry, epoch: int) -> tuple[Iterator[Batch], list[int] | None]:
        """The samples, and which of the entry they are, where not all."""
        if self._skips is None:
            return self._samples(entry, epoch), None
        try:
            return iter(list(self._samples(entry, epoch))), None
        except SAMPLE_ERRORS:
            kept = self._readable(entry, epoch, self._skips)
            return self._samples(_part(entry, kept), epoch), kept

    def chunks_of(self, entry: BatchEntry) -> Ints:
        """The chunks that an entry needs. Values that are missing need none: the batch will say what is wrong."""
        located = _Located(entry, self._live)
        names = located.present() if self._columns.names is None else self._columns.names
        return self._gatherer.needed([located.values_of(name) for name in names])

    def _batch(self, entry: BatchEntry, epoch: int) -> Batch:
        located = self._located(entry, epoch)
        names = self._names(located)
        gathered = self._gather(located, names)
        values = [self._decode(located, name, *gathered[name]) for name in names]
        if self._columns.as_tuple:
            return tuple(values)
        return {
            KEY: located.keys(),
            URL: self._urls_of(entry.object_no),
            **dict(zip(names, values, strict=True)),
        }

    def _samples(self, entry: BatchEntry, epoch: int) -> Iterator[Batch]:
        located = self._located(entry, epoch)
        names = self._names(located)
        gathered = self._gather(located, names, reuse=False)
        columns = [
            (name, self._columns.decoder(name), memoryview(values.data), offsets.tolist())
            for name, (values, offsets) in gathered.items()
        ]
        chosen = located.random_keys
        random_keys = [None] * len(entry) if chosen is None else chosen.tolist()
        for number, (key, url) in enumerate(zip(located.keys(), self._urls_of(entry.object_no), strict=True)):
            sample = {
                name: decoder.decode_one(
                    view[offsets[number] : offsets[number + 1]], _place(url, key, name), random_keys[number]
                )
                for name, decoder, view, offsets in columns
            }
            yield tuple(sample.values()) if self._columns.as_tuple else {KEY: key, URL: url, **sample}

    def _located(self, entry: BatchEntry, epoch: int) -> _Located:
        random_keys = None
        if self._columns.wants_keys():
            random_keys = sample_keys(self._seed, epoch, entry.object_no, entry.sample_no)
        return _Located(entry, self._live, random_keys)

    def _readable(self, entry: BatchEntry, epoch: int, skips: Skips) -> list[int]:
        """Which samples of the entry can be read."""
        kept = []
        for number in range(len(entry)):
            try:
                list(self._samples(_part(entry, [number]), epoch))
            except SAMPLE_ERRORS as error:
                skips.add(entry, error)
            else:
                kept.append(number)
        return kept

    def _names(self, located: _Located) -> tuple[str, ...]:
        """The columns of these samples: those that were named, or all, which have to be the same in all shards."""
        if self._columns.names is not None:
            return self._columns.names
        present = tuple(located.present())
        if not present:  # no sample is left
            return self._present or ()
        if self._present is None:
            self._present = present
        if set(present) != set(self._present):
            (url,) = self._urls_of(located.entry.object_no[:1])
            raise MissingColumnError(
                f"{url}: its window of shards has the columns {sorted(present)}, and earlier ones have "
                f"{sorted(self._present)}; name the columns that every sample has with columns=[...] or decode={{...}}"
            )
        return self._present

    def _gather(
        self, located: _Located, names: tuple[str, ...], *, reuse: bool = True
    ) -> dict[str, tuple[npt.NDArray[np.uint8], Ints]]:
        """The bytes of each column: values end to end, and their offsets.

        With `reuse`, what will be decoded lies in memory that this thread's next call overwrites.
        """
        found = {name: self._values(located, name) for name in names}
        offsets = {name: values.out_offsets() for name, values in found.items()}
        staged = [name for name in names if not isinstance(self._columns.decoder(name), Raw)]
        staged_bytes = sum(int(offsets[name][-1]) for name in staged)
        staging = self._staging.take(staged_bytes) if reuse else np.empty(staged_bytes, np.uint8)
        out, used = {}, 0
        for name in names:
            byte_count = int(offsets[name][-1])
            if name in staged:
                out[name] = staging[used : used + byte_count]
                used += byte_count
            else:
                out[name] = self._slots.take(byte_count)
        self._gatherer.fill([(found[name], offsets[name], out[name]) for name in names])
        return {name: (out[name], offsets[name]) for name in names}

    def _values(self, located: _Located, name: str) -> Values:
        values = located.values_of(name)
        missing = np.flatnonzero(values.offset < 0)
        if len(missing):
            raise MissingColumnError(
                f"{self._where(located, name)(int(missing[0]))}: the sample has no such column; the shards read "
                f"with it have {located.present()}. Name the columns that every sample has with columns=[...] "
                "or decode={...}"
            )
        return values

    def _decode(self, located: _Located, name: str, values: npt.NDArray[np.uint8], offsets: Ints) -> Any:
        decoder: Decoder = self._columns.decoder(name)
        where = self._where(located, name)
        if isinstance(decoder, Raw):
            return decoder.decode_owned(values, offsets, where)
        fixed = decoder.fixed()
        if fixed is not None:
            out = self._slots.take_array((len(located.entry), *fixed[0]), fixed[1])
            decoder.decode_into(values, offsets, out, where, located.random_keys)
            return torch.from_numpy(out)
        decoded = decoder.decode(values, offsets, where, located.random_keys)
        return torch.from_numpy(decoded) if isinstance(decoded, np.ndarray) else decoded

    def _where(self, located: _Located, name: str) -> Callable[[int], str]:
        """Says where a value came from; only asked when something is wrong with it."""

        def where(number: int) -> str:
            (url,) = self._urls_of(located.entry.object_no[number : number + 1])
            return _place(url, located.keys()[number], name)

        return where


def _part(entry: BatchEntry, numbers: list[int]) -> BatchEntry:
    return replace(entry, object_no=entry.object_no[numbers], sample_no=entry.sample_no[numbers])


def _place(url: str, key: str, column: str) -> str:
    return f"{url}: sample {key!r}, column {column!r}"
