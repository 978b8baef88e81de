"""How a disk tier is doing: what it counts, what still works, and of what the user has been warned.

A disk fails in few ways that matter. *Full*: no writes for ten minutes, since room may be made; what is there is still
good. *Read-only*: no more writes at all. *One bad file*: that one is lost. *Read after read fails*: the disk is dead,
and asking it again costs each chunk its timeout. *No answer at all*: it is left alone until it answers, and for good
where that happens again and again. *We are short* (of descriptors, of memory): not the disk's fault, and over in a
moment. The user is warned of each once, in a sentence that says what happens now and what to do; training goes on in
all.

A call that does not return cannot notice that itself: its caller watches the time, and calls `stalled`
and `answered`.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastload.config import format_bytes

# What the process runs short of, not the disk.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)
# So many reads in a row that fail with an I/O error mean a dead disk, not a bad spot.
_READ_ERRORS_MAX = 8
# How long a full disk is not written to: a service lives for weeks, and asking costs a write that fails.
_FULL_S = 600.0
# So many stalls, each of which has cost a reader the deadline, are enough.
_STALLS_MAX = 3


@dataclass(slots=True)
class DiskCounters:
    """What the tier did since it was opened."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    refused: int = 0  # writes that found no room in the quota or on the file system, or no disk
    damaged: int = 0  # files put out of use: at the scan by their size, on reading by their checksums
    errors: int = 0  # system calls that failed for a reason that should not be
    swept: int = 0  # temp files of dead writers
    stalls: int = 0  # times that it did not answer in time


class Health:
    """The state of the tier in `directory`; safe to use from several threads.

    `on_trouble` gets each kind of trouble once, from the thread that met it.
    """

    def __init__(
        self, directory: Path, on_trouble: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._readable = False
        self._writable = False
        self._stalled = False
        self._full_until_s = -math.inf
        self._directory, self._clock = directory, clock
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._counters = DiskCounters()
        self._told: set[str] = set()
        self._read_errors = 0  # in a row
        self._stall_count = 0

    @property
    def readable(self) -> bool:
        """Whether chunks are looked for there at all."""
        return self._readable and not self._stalled

    @property
    def writable(self) -> bool:
        return self._writable and not self._stalled and self._clock() >= self._full_until_s

    @property
    def off(self) -> bool:
        """Switched off or given up, for more than a stall."""
        return not self._readable

    def switch(self, on: bool) -> None:
        """On or off, with a clean slate: a problem that comes up again is warned of again. A stall goes on until it is
        answered.
        """
        with self._lock:
            self._readable = self._writable = on
            self._told.clear()
            self._read_errors = self._stall_count = 0
            self._full_until_s = -math.inf

    def stalled(self, seconds: float) -> None:
        """An operation has not returned for so long: the tier is left alone until `answered`."""
        self.count(stalls=1)
        with self._lock:
            self._stalled = True
            self._stall_count += 1
        self._tell(
            "stalled",
            f"the disk cache {self._directory} has not answered for {seconds:g} s; until it does, what it holds is "
            "fetched again and nothing is written: check the disk",
        )

    def answered(self) -> None:
        """The operations that hung have returned."""
        with self._lock:
            self._stalled = False
            dead = self._stall_count >= _STALLS_MAX
            if dead:
                self._readable = self._writable = False
        if dead:
            self._tell(
                "dead",
                f"the disk cache {self._directory} is not used any more in this run, as it stalled "
                f"{_STALLS_MAX} times; check the disk",
            )

    def counters(self) -> dict[str, int]:
        """A copy of the `DiskCounters`."""
        with self._lock:
            return asdict(self._counters)

    def count(self, **amounts: int) -> None:
        """Add to the counters of these names."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    def read_well(self, byte_count: int) -> None:
        """A read gave verified data."""
        self.count(reads=1, read_bytes=byte_count)
        self._read_errors = 0

    def read_damaged(self, path: Path, why: str) -> None:
        """A file was not what was written there."""
        self.count(damaged=1)
        self._tell(
            "damaged",
            f"{path} in the disk cache was damaged ({why}); it was removed and its data is fetched again. "
            "If this comes back, suspect the disk",
        )

    def read_failed(self, path: Path, error: OSError) -> bool:
        """A read failed; whether the file is to blame, and should be given up."""
        self.count(errors=1)
        if error.errno in _SHORTAGES:
            return False
        with self._lock:
            self._read_errors += 1
            dead = self._read_errors >= _READ_ERRORS_MAX
            if dead:
                self._readable = self._writable = False
        self._tell("read", f"reading {path} in the disk cache failed ({error}); its data is fetched again")
        if dead:
            self._tell(
                "dead",
                f"the disk cache {self._directory} is not used any more in this run, as "
                f"{_READ_ERRORS_MAX} reads in a row failed ({error}); check the disk",
            )
        return True

    def write_failed(self, error: OSError) -> None:
        """A write, or making or removing a file, failed."""
        self.count(errors=1)
        # A file that vanished is not a failing disk: a user empties the directory, or swept our temp file.
        if error.errno in _SHORTAGES or error.errno == errno.ENOENT:
            self._tell(
                "skipped",
                f"a write to the disk cache {self._directory} failed ({error}) and was left out",
            )
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._full_until_s = self._clock() + _FULL_S
            self._tell(
                "full",
                f"the disk cache {self._directory} is full ({error}); what it holds is still used, the rest is "
                f"fetched again, and writing is tried again every {_FULL_S / 60:g} minutes: free some space there, "
                "or lower disk_bytes",
            )
            return
        self._writable = False
        self._tell(
            "write",
            f"the disk cache {self._directory} takes no more data in this run ({error}); what it holds is "
            "still used, the rest is fetched again: check the disk and its rights",
        )

    def scan_failed(self, error: OSError, times: int) -> None:
        """Not all of the directory could be listed.

        What was missed may fill any part of the quota, so there are no more writes.
        """
        self.count(errors=times)
        self._writable = False
        self._tell(
            "scan",
            f"the disk cache {self._directory} could not be listed in full ({error}); what was found is "
            "used, and nothing is written in this run: check the disk and its rights",
        )

    def margin_reached(self, free_bytes: int, margin_bytes: int) -> None:
        """The file system has no room for a write besides the margin."""
        self._tell(
            "margin",
            f"the file system of the disk cache {self._directory} has {format_bytes(free_bytes)} left, of "
            f"which {format_bytes(margin_bytes)} are left alone; nothing more is written until there is "
            "room: free some, or lower disk_bytes",
        )

    def _tell(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._told:
                return
            self._told.add(kind)
        self._on_trouble(message)
