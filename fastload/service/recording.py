"""Keeping history: what consumers read goes into the run that they belong to, and what was learnt goes with it.

Consumers of one process group are one run: the ranks of a job, and its worker processes, which come and go with each
epoch. It ends when none of them has been connected for a minute. What came up is written every half minute, a
second after a consumer went, and before a place in it is looked for; in a thread, since it is packed for that.

When the folder cannot be written to, nothing is kept for ten minutes, and nothing more of the runs that go on by then,
with a word in the service's log: history is a help, no part of the cache. What was read of it serves on. A run that is
forgotten while it goes on (`fastload history rm`, `Cache.clear(history=True)`) is not kept on: its objects are numbered
in what is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from fastload import protocol
from fastload.history import archive as archives
from fastload.history.archive import Archive
from fastload.history.library import Library
from fastload.history.record import RecordedReads, Recorder
from fastload.history.runfile import EndpointSummary
from fastload.service.fetching.request_limit import Endpoints, Learnt
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState, ObjectEntry

log = logging.getLogger("fastload.service")

_WRITE_EVERY_S = 30.0
# What a consumer leaves behind is written so long after it went.
WRITE_AFTER_S = 1.0
_RUN_ENDS_S = 60.0
# Reads of earlier runs that are kept in reach: 44 bytes each, and their objects.
_LIBRARY_READS_MAX = 1 << 21
# Runs whose endpoints are looked at for a start: small jobs between large ones measure nothing.
_LEARNT_RUNS = 32
# A write that takes longer will not end: nothing more is gathered for it.
_HANGS_S = 60.0
# A daemon lives for weeks, in which a full disk is made room on.
_TRY_AGAIN_S = 600.0
# Reading the history may take so much of a processor's time, where it takes longer than a moment.
_LOAD_SHARE, _MOMENT_S = 0.05, 0.1


@dataclass(slots=True, eq=False)
class _LiveRun:
    name: str
    began_s: float
    recorder: Recorder
    reader_count: int = 0  # its consumers that are connected
    left_s: float = 0.0  # when the last of them went
    written_count: int = 0  # reads that are in the file
    file_bytes: int = 0  # known to the pool's thread only

    def forget(self) -> None:
        """Stop keeping it."""
        self.recorder.is_full = True
        self.recorder.take(0.0, {})
        self.written_count = self.recorder.read_count


class Recording:
    """Used by the loop's thread only, except for what it gives to its pool."""

    def __init__(self, resources: Resources, endpoints: Endpoints) -> None:
        """Without an archive, or with `history_bytes=0`, nothing is kept, and nothing known. `endpoints` gets what
        earlier runs learnt, and what is learnt there goes with this run.
        """
        self._is_lost, self._loop = resources.is_lost, resources.pools.loop
        self._now, self._wall = resources.now, resources.wall
        self._bytes_max, self._chunk_bytes = resources.limits.history_bytes, resources.limits.chunk_bytes
        self._there = resources.history  # to be cleared, also where it is not used
        self._used = resources.history if self._bytes_max else None
        self._endpoints = endpoints
        self._given_up_until_s = float("-inf")
        self._pool = resources.pools.make("history", 1)  # one thread: pieces are written in their order
        self._pool.finishes = True
        self._runs: dict[int, _LiveRun] = {}  # by process group
        self._traces: dict[ConsumerState, tuple[_LiveRun, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._version = 0  # of what is on disk, when the pool has done what it was given
        self._loaded_version = -1
        self._is_loading = False
        self._clear_count = 0
        self._load_again_s = float("-inf")
        if self._archive is not None:
            self._pool.submit(learnt_by_runs, self._archive, done=self._learnt)

    @property
    def _archive(self) -> Archive | None:
        """Where to write and read now, if anywhere."""
        return self._used if self._now() >= self._given_up_until_s else None

    def _learnt(self, known: dict[str, EndpointSummary] | None, error: BaseException | None) -> None:
        if error is not None:
            self._give_up(error)
        self._endpoints.known = {name: _of_summary(each) for name, each in (known or {}).items()}

    # Recording

    def connect(self, consumer: ConsumerState, hello: protocol.Hello) -> None:
        """A consumer has come."""
        if self._used is None:
            return
        run = self._runs.get(hello.group)
        if run is None:
            began = self._wall()
            recorder = Recorder(hello.program, began, self._chunk_bytes)
            run = self._runs[hello.group] = _LiveRun(self._used.new_name(began), self._now(), recorder)
            if self._archive is None:
                run.forget()
        run.reader_count += 1
        self._traces[consumer] = run, run.recorder.begin_trace(hello.name)
        self._wait()

    def read(self, consumer: ConsumerState, entry: ObjectEntry, index: int) -> bool:
        """A consumer wants a chunk of an object. Whether that is a new read."""
        at = self._traces.get(consumer)
        if at is None:
            return False
        run, trace = at
        began_s, whole = self._now() - run.began_s, entry.info.whole
        return run.recorder.read(trace, entry.history_key, whole, entry.in_object(index), began_s)

    def disconnect(self, consumer: ConsumerState) -> None:
        """End the trace of a consumer that has gone."""
        at = self._traces.pop(consumer, None)
        if at is None:
            return
        run, trace = at
        run.recorder.end_trace(trace)
        run.reader_count -= 1
        run.left_s = self._now()
        # Not at once: a job that ends may take its cache's directory along, and would meet a file that comes into it.
        self._wait(WRITE_AFTER_S)

    def close(self) -> None:
        """Write what there is; the pool does so before it ends."""
        if self._timer is not None:
            self._timer.cancel()
        for run in self._runs.values():
            self._write(run)

    def _wait(self, seconds: float = _WRITE_EVERY_S) -> None:
        due_s = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() > due_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Write what came up, and end the runs that no longer have consumers."""
        self._timer = None
        for group, run in list(self._runs.items()):
            self._write(run)
            if not run.reader_count and self._now() - run.left_s > _RUN_ENDS_S:
                del self._runs[group]
        if self._runs:
            self._wait()

    def _write(self, run: _LiveRun) -> None:
        if self._archive is None or run.recorder.read_count == run.written_count:
            return
        if any(task.began and self._now() - task.began > _HANGS_S for task in self._pool.under_way):
            self._give_up(TimeoutError(f"the disk has not answered for {_HANGS_S:.0f} s"))
            return
        run.written_count = run.recorder.read_count
        learnt = {name: _summary(*each) for name, each in self._endpoints.learnt().items()}
        batch = run.recorder.take(self._now() - run.began_s, learnt)
        keep = frozenset(each.name for each in self._runs.values())

        def done(size: int | None, error: BaseException | None) -> None:
            if error is not None:
                self._give_up(error)
                return
            if size is None:
                run.forget()
            elif size > self._bytes_max // 2:
                run.recorder.is_full = True

        self._version += 1
        self._pool.submit(_append, self._archive, run, batch, self._bytes_max, keep, self._is_lost, done=done)

    def _give_up(self, error: BaseException | None) -> None:
        """Keep nothing for a while. Runs go on as they are: what their readers ask for is a new read or not, as
        before.
        """
        if self._archive is not None:
            minutes = round(_TRY_AGAIN_S / 60)
            log.warning("no history is kept for %d minutes: %s: %s", minutes, self._archive.folder, error)
            self._given_up_until_s = self._now() + _TRY_AGAIN_S
        for run in self._runs.values():
            run.forget()

    # For predictions

    def load(self, done: Callable[[Library], None]) -> None:
        """Read what earlier runs, and this one so far, have read; `done(library)` follows if that has changed."""
        for run in list(self._runs.values()):
            self._write(run)
        if self._archive is None or self._is_loading or self._loaded_version == self._version:
            return
        began_s = self._now()
        if began_s < self._load_again_s:
            return
        self._is_loading, self._loaded_version = True, self._version
        clear_count = self._clear_count

        def loaded(library: Library | None, error: BaseException | None) -> None:
            self._is_loading = False
            took_s = self._now() - began_s
            self._load_again_s = self._now() + max(0.0, took_s - _MOMENT_S) / _LOAD_SHARE
            if library is None:
                self._give_up(error)
            elif len(library) and clear_count == self._clear_count:
                done(library)

        self._pool.submit(_read, self._archive, self._chunk_bytes, done=loaded)

    def clear(self, done: Callable[[int, BaseException | None], None]) -> None:
        """Forget everything; `done` gets the number of bytes that it took."""
        if self._there is None:
            done(0, None)
            return
        for run in self._runs.values():
            run.forget()
        self._endpoints.known = {}
        self._clear_count += 1

        def cleared(byte_count: int | None, error: BaseException | None) -> None:
            self._version += 1
            done(byte_count or 0, error)

        self._pool.submit(self._there.clear, done=cleared)


def _of_summary(found: EndpointSummary) -> Learnt:
    first_byte_s = None if found.first_byte_s < 0 else found.first_byte_s
    return Learnt(found.limit, found.bytes_per_s, first_byte_s, found.connection_bytes_per_s, found.throttled_at)


def _summary(learnt: Learnt, request_count: int) -> EndpointSummary:
    first_byte_s = -1.0 if learnt.first_byte_s is None else learnt.first_byte_s
    return EndpointSummary(
        limit=learnt.limit,
        bytes_per_s=learnt.bytes_per_s,
        first_byte_s=first_byte_s,
        connection_bytes_per_s=learnt.connection_bytes_per_s,
        throttled_at=learnt.throttled_at,
        request_count=request_count,
    )


def _append(
    archive: Archive,
    run: _LiveRun,
    batch: RecordedReads,
    bytes_max: int,
    keep: frozenset[str],
    is_lost: Callable[[], bool],
) -> int | None:
    """In a thread."""
    if is_lost():
        return None
    size = archive.append(run.name, batch.pieces(), run.file_bytes)
    if size is not None:
        run.file_bytes = size
    archive.prune(bytes_max, keep)
    return size


def _read(archive: Archive, chunk_bytes: int) -> Library:
    """In a thread."""
    return Library(archives.read_all(archive, _LIBRARY_READS_MAX), chunk_bytes)


def learnt_by_runs(archive: Archive) -> dict[str, EndpointSummary]:
    """In a thread: what the newest run that measured an endpoint learnt of it."""
    known: dict[str, EndpointSummary] = {}
    for run in archive.runs()[:_LEARNT_RUNS]:
        try:
            summary = archive.summary(run)
        except OSError:  # removed meanwhile, or another user's: as good as none
            continue
        if summary is not None:
            known = {name: each for name, each in summary.endpoints.items() if each.bytes_per_s > 0} | known
    return known
