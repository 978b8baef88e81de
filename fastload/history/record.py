"""What one run reads, gathered until it is written: a log of (reader, object, chunk, time).

A *trace* is what one reader, a consumer's connection, asks for, in its order; all reads of a run are in the order in
which the service received them. A chunk that a reader has only just asked for is not noted again: it was fetched ahead,
then waited for, or read in pieces.

Bounded: beyond so many reads or objects only figures go on. URLs that may carry secrets are left out: those with a user
and password, and of web servers those with a query, where signatures stand.

Numbers for keys, in the order in which they come: a dictionary for millions of them.

A dict of a million ints takes 100 MB. Here most keys lie in sorted arrays, 12 bytes each, and only the last ones in a
dict; when that is full, it is merged into the arrays. Keys, which are hashes, are spread over many such pairs by their
low bits, so that no merge takes longer than a fraction of a millisecond: with one pair it was 400 at two million keys,
in the loop that serves all.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastload.history import runfile
from fastload.history.runfile import EndpointSummary, Reads, RunSummary
from fastload.store.table import ObjectRows
from fastload.store.types import ObjectInfo
from fastload.store.urls import scheme

TRACES_MAX = 1 << 16
# Kinds of readers that are distinguished, and of the name of one.
_NAMES_MAX, _NAME_MAX = 64, 100
# Reads of a trace in which a chunk is the same read still.
_SAME_WITHIN = 16
_TICK_S = 0.1
_TICKS_MAX = (1 << 32) - 1


def may_keep(url: str) -> bool:
    """Whether the URL holds nothing that looks like a secret."""
    kind = scheme(url)
    if kind == "file":
        return True
    authority = url.split("://", 1)[1].split("/", 1)[0]
    user = authority.rpartition("@")[0]
    if kind in ("http", "https"):
        return not user and "?" not in url
    return ":" not in user


@dataclass(slots=True, eq=False)
class RecordedReads:
    """What came up since the last one."""

    keys: array[int] = field(default_factory=lambda: array("Q"))
    infos: list[ObjectInfo] = field(default_factory=list)
    objects: array[int] = field(default_factory=lambda: array("I"))
    chunks: array[int] = field(default_factory=lambda: array("I"))
    traces: array[int] = field(default_factory=lambda: array("H"))
    ticks: array[int] = field(default_factory=lambda: array("I"))
    summary: RunSummary | None = None

    def pieces(self) -> list[bytes]:
        """It as pieces of a file. Takes milliseconds: for a thread."""
        found = []
        keys = np.frombuffer(self.keys, np.uint64) if self.keys else np.empty(0, np.uint64)
        for start in range(0, len(self.infos), runfile.OBJECTS_MAX):
            part = slice(start, start + runfile.OBJECTS_MAX)
            found.append(runfile.objects_piece(keys[part], ObjectRows.of(self.infos[part])))
        columns = [np.array(column) for column in (self.objects, self.chunks, self.traces, self.ticks)]
        for start in range(0, len(self.objects), runfile.READS_MAX):
            part = slice(start, start + runfile.READS_MAX)
            found.append(runfile.reads_piece(Reads(*(column[part] for column in columns))))
        if self.summary is not None:
            found.append(runfile.summary_piece(self.summary))
        return found


class Recorder:
    """Of one run. Times are in seconds since it began. Not for several threads."""

    def __init__(self, program: str, began: float, chunk_bytes: int) -> None:
        """`began`: in seconds since 1970."""
        self._program, self._began, self._chunk_bytes = program, began, chunk_bytes
        self._numbering = Numbering()
        self._batch = RecordedReads()
        self._last: list[deque[int] | None] = []
        self._trace_names: dict[str, int] = {}
        self._read_count = self._read_bytes = self._left_out = self._object_bytes = 0
        self._seconds = 0.0
        self.is_full = False  # no reads are kept any more

    @property
    def read_count(self) -> int:
        return self._read_count

    def begin_trace(self, name: str) -> int:
        """A new trace's number; `name` says what kind of reader it is. -1: there are too many."""
        known = name[:_NAME_MAX] if len(self._trace_names) < _NAMES_MAX or name in self._trace_names else "others"
        self._trace_names[known] = self._trace_names.get(known, 0) + 1
        if len(self._last) == TRACES_MAX:
            return -1
        self._last.append(deque(maxlen=_SAME_WITHIN))
        return len(self._last) - 1

    def end_trace(self, trace: int) -> None:
        if trace >= 0:
            self._last[trace] = None

    def read(self, trace: int, key: int, info: ObjectInfo, index: int, seconds: float) -> bool:
        """A chunk of an object, whose key is `key`, is asked for. Whether that is a new read."""
        last = self._last[trace] if trace >= 0 else None
        place = key ^ (index << 64)
        if last is not None:
            if place in last:
                return False
            last.append(place)
        self._seconds = max(self._seconds, seconds)
        self._read_bytes += max(0, min(self._chunk_bytes, info.size - index * self._chunk_bytes))
        if last is None or not self._note(trace, key, info, index, seconds):
            self._left_out += 1
        return True

    def _note(self, trace: int, key: int, info: ObjectInfo, index: int, seconds: float) -> bool:
        if self.is_full or self._read_count >= runfile.RUN_READS_MAX or not may_keep(info.url):
            return False
        if self._numbering.count >= runfile.RUN_OBJECTS_MAX and self._numbering.get(key) is None:
            return False
        number, is_new = self._numbering.number(key)
        batch = self._batch
        if is_new:
            batch.keys.append(key)
            batch.infos.append(info)
            self._object_bytes += info.size
        batch.objects.append(number)
        batch.chunks.append(index)
        batch.traces.append(trace)
        batch.ticks.append(min(_TICKS_MAX, int(seconds / _TICK_S)))
        self._read_count += 1
        return True

    def summary(self, seconds: float, endpoints: Mapping[str, EndpointSummary]) -> RunSummary:
        """The run in figures, when so many seconds have passed."""
        return RunSummary(
            began=self._began,
            seconds=seconds,
            program=self._program,
            chunk_bytes=self._chunk_bytes,
            trace_count=len(self._last),
            read_count=self._read_count,
            read_bytes=self._read_bytes,
            left_out=self._left_out,
            object_count=self._numbering.count,
            object_bytes=self._object_bytes,
            traces=dict(self._trace_names),
            endpoints={name: each for name, each in endpoints.items() if may_keep(_as_url(name))},
        )

    def take(self, seconds: float, endpoints: Mapping[str, EndpointSummary]) -> RecordedReads:
        """What came up since this was called last, with a summary."""
        batch, self._batch = self._batch, RecordedReads()
        batch.summary = self.summary(seconds, endpoints)
        return batch


def _as_url(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"https://{endpoint}"


_RECENT_MAX = 256
_PARTS = 256


class Numbering:
    """Keys are 64-bit, numbers begin at 0."""

    def __init__(self) -> None:
        self._parts = [_NumberingPart() for _ in range(_PARTS)]
        self.count = 0

    def number(self, key: int) -> tuple[int, bool]:
        """The key's number, and whether it was given just now."""
        part = self._parts[key % _PARTS]
        found = part.get(key)
        if found is not None:
            return found, False
        part.put(key, self.count)
        self.count += 1
        return self.count - 1, True

    def get(self, key: int) -> int | None:
        """The key's number, None where it has none."""
        return self._parts[key % _PARTS].get(key)


class _NumberingPart:
    __slots__ = ("_keys", "_numbers", "_recent")

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._keys = np.empty(0, np.uint64)  # sorted
        self._numbers = np.empty(0, np.uint32)  # of each

    def get(self, key: int) -> int | None:
        found = self._recent.get(key)
        if found is None and len(self._keys):
            at = int(self._keys.searchsorted(np.uint64(key)))
            if at < len(self._keys) and int(self._keys[at]) == key:
                found = int(self._numbers[at])
        return found

    def put(self, key: int, number: int) -> None:
        if len(self._recent) == _RECENT_MAX:
            self._merge()
        self._recent[key] = number

    def _merge(self) -> None:
        recent = sorted(self._recent.items())
        keys = np.array([key for key, _ in recent], np.uint64)
        places = self._keys.searchsorted(keys)
        self._keys = np.insert(self._keys, places, keys)
        self._numbers = np.insert(self._numbers, places, np.array([number for _, number in recent], np.uint32))
        self._recent.clear()
