"""Ranges of what is in packed objects.

A packed object can only be read from its start. So the first range that is asked for begins a *run*: the packed bytes
go through a child process (`unpacking_children`), which writes what comes out to a file without a name in the cache
directory. All ranges wait until the run has passed them and are read from that file: a node fetches and unpacks an
object once, however many of its ranks want it. A file goes when all of it has been read, or by LRU when there are too
many; what is asked for after that begins another run.

An object may also be unpacked to measure it (`unpacked_sizes`), before it is known how large it is. What comes out is
kept like that of a run where there is room for it without giving up another file, and else only counted.

What waits here is no request to a store, so neither limits of requests nor second ones concern it (see `fetches`). The
run's own requests are watched as all are, and have deadlines, so a wait ends.

Used by threads of the pools; all state is under one lock.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastload.errors import CacheError, FastloadError
from fastload.service.unpacking_children import LOOK_EVERY_S, SILENT_S, Children, Read, wrong_size
from fastload.store import watch
from fastload.store.types import ObjectInfo

log = logging.getLogger("fastload.service")

FILES_BYTES_MAX = 2 << 30
"""Unpacked bytes in files, at most; one object may be larger."""

# Of these, what was measured may fill half. Until it is known, room is held for so many times the packed bytes, and for
# no less than that.
_MEASURED_SHARE, _EXPECTED_RATIO, _HELD_BYTES_MIN = 2, 16, 32 << 20
_END_S = 10.0


@dataclass(eq=False)
class _Run:
    """What is in an object, as far as it is unpacked. Guarded by the lock of `Unpacking`."""

    key: str
    info: ObjectInfo
    file: int
    byte_count: int = 0
    is_over: bool = False
    error: FastloadError | None = None
    readers: int = 0
    served: dict[int, int] = field(default_factory=dict)  # lengths of ranges that were read, by where they begin


class Unpacking:
    """See the module's text."""

    def __init__(self, read: Read, make_file: Callable[[int], int], *, silent_s: float = SILENT_S) -> None:
        """`make_file(size)` gives the descriptor of an empty file without a name that has room for so many bytes."""
        self._make_file = make_file
        self.children = Children(read, silent_s)
        self._changed = threading.Condition()
        self._runs: OrderedDict[tuple[str, ObjectInfo], _Run] = OrderedDict()  # the one used last is the last
        self._held_bytes = 0  # room that is held for what is being measured
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        self.run_count = 0

    # Ranges

    def read_into(
        self, key: str, info: ObjectInfo, start: int, out: memoryview, watches: Callable[[], watch.Watch]
    ) -> None:
        """Fill `out` with unpacked bytes from `start`. `watches` makes a watch for each request to the store.
        ShardError for what cannot be unpacked, and the store's errors.
        """
        run = self._use(key, info, watches)
        try:
            self._wait_for(run, start + len(out))
            got = 0
            while got < len(out):
                count = os.preadv(run.file, [out[got:]], start + got)
                if not count:
                    raise CacheError(f"{info.url}: the file with its unpacked bytes was cut short; try again")
                got += count
        finally:
            self._leave(run, start, len(out))

    def _use(self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]) -> _Run:
        with self._changed:
            while True:
                self.children.check_open(info)
                run = self._runs.get((key, info))
                if run is not None:
                    break
                if self._make_room(info.size):
                    run = self._begin(key, info, watches)
                    break
                self._wait_a_little()
            self._runs.move_to_end((key, info))
            run.readers += 1
            return run

    def _begin(self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]) -> _Run:
        run = self._runs[key, info] = _Run(key, info, self._make_file(info.size))
        self.run_count += 1
        self._start(lambda: self._carry_out(run, watches))
        return run

    def _start(self, function: Callable[[], None]) -> None:
        """In a thread that is waited for at the end."""

        def carry_out() -> None:
            try:
                function()
            finally:
                with self._changed:
                    self._threads.discard(thread)

        thread = threading.Thread(target=carry_out, name="fastload-unpack", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _used_bytes(self) -> int:
        return self._held_bytes + sum(run.info.size for run in self._runs.values())

    def _make_room(self, byte_count: int) -> bool:
        """Let go of files that nothing reads; whether there is room for another one."""
        for place, run in list(self._runs.items()):
            if self._used_bytes() + byte_count <= FILES_BYTES_MAX:
                return True
            if run.is_over and not run.readers:
                self._drop(place)
        return not self._runs

    def _drop(self, place: tuple[str, ObjectInfo]) -> None:
        run = self._runs.pop(place)
        os.close(run.file)

    def _wait_for(self, run: _Run, end: int) -> None:
        with self._changed:
            # The last bytes are not given out before what follows them has been checked.
            while not (run.is_over if end == run.info.size else run.byte_count >= end) and run.error is None:
                self.children.check_open(run.info)
                self._wait_a_little()
            if run.error is not None:
                raise type(run.error)(str(run.error))

    def _wait_a_little(self) -> None:
        if watch.cancelled():
            raise watch.given_up()
        self._changed.wait(LOOK_EVERY_S)

    def _leave(self, run: _Run, start: int, length: int) -> None:
        with self._changed:
            run.readers -= 1
            if run.byte_count >= start + length:
                run.served[start] = length
            self._let_go(run)

    def _let_go(self, run: _Run) -> None:
        """Of a run that is over and failed, or of which all has been read."""
        is_of_no_use = run.error is not None or sum(run.served.values()) >= run.info.size or self._is_closed
        place = run.key, run.info
        if run.is_over and not run.readers and is_of_no_use and self._runs.get(place) is run:
            self._drop(place)
        self._changed.notify_all()

    # Runs

    def _carry_out(self, run: _Run, watches: Callable[[], watch.Watch]) -> None:
        """In a thread of its own."""

        def progress(byte_count: int) -> None:
            with self._changed:
                run.byte_count = max(run.byte_count, byte_count)
                self._changed.notify_all()

        info, error = run.info, None
        try:
            part = self.children.part_of(run.key, info.stored, watches)
            found = self.children.unpack(info.stored, info.packing, part, run.file, size=info.size, progress=progress)
            if found != info.size:
                raise wrong_size(info, info.size, found)
        except FastloadError as caught:
            error = caught
        except Exception as caught:  # those who wait get it: there is nobody else here
            error = CacheError(f"{info.url} cannot be unpacked: {type(caught).__name__}: {caught}")
            log.exception("unpacking %s", info.url)
        with self._changed:
            run.is_over, run.error = True, error
            self._let_go(run)

    # Measuring

    def measure(self, key: str, info: ObjectInfo, packing: str) -> int:
        """How many bytes a stored object has unpacked. ShardError, and the store's errors."""
        kept_max = self._hold(info)
        file: int | None = None
        try:
            file = self._make_file(0) if kept_max else None
            part = self.children.part_of(key, info, lambda: watch.Watch(lambda attempt: None))
            size = self.children.unpack(info, packing, part, file, kept_max=kept_max)
            if file is not None and size and os.fstat(file).st_size == size:
                file = self._kept(key, inside(info, size, packing), file)
            return size
        finally:
            if file is not None:
                os.close(file)
            with self._changed:
                self._held_bytes -= kept_max
                self._changed.notify_all()

    def _hold(self, info: ObjectInfo) -> int:
        """Room for what is in an object; 0 where there is too little."""
        with self._changed:
            room = FILES_BYTES_MAX // _MEASURED_SHARE - self._used_bytes()
            held = min(room, max(_EXPECTED_RATIO * info.size, _HELD_BYTES_MIN)) if room >= info.size else 0
            self._held_bytes += held
            return held

    def _kept(self, key: str, info: ObjectInfo, file: int) -> int | None:
        """Keep a file for those who read the object next; gives it back where it is of no use."""
        with self._changed:
            if self._is_closed or (key, info) in self._runs:
                return file
            self._runs[key, info] = _Run(key, info, file, info.size, is_over=True)
            return None

    # The end

    def close(self) -> None:
        """End all that is under way; who waits gets an error. Idempotent."""
        with self._changed:
            self._is_closed = True
            threads = list(self._threads)
            for run in list(self._runs.values()):
                self._let_go(run)
        self.children.close()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def inside(info: ObjectInfo, size: int, packing: str) -> ObjectInfo:
    """What is in a stored object that is packed so."""
    return ObjectInfo(info.url, size, info.etag, info.mtime_ns, 0, info.size, packing)


def memory_file(size: int) -> int:
    """A file in memory."""
    return os.memfd_create("fastload-unpacked", os.MFD_CLOEXEC)


def files_in(folder: Path) -> Callable[[int], int]:
    """Makes files without a name in a folder; in memory where that has no room, which costs memory and no job."""

    def make(size: int) -> int:
        try:
            file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            return instead(size, error)
        try:
            os.posix_fallocate(file, 0, max(1, size))
        except OSError as error:
            os.close(file)
            return instead(size, error)
        return file

    def instead(size: int, error: OSError) -> int:
        log.warning("%d unpacked bytes are kept in memory, since the cache directory takes no file: %s", size, error)
        return memory_file(size)

    return make
