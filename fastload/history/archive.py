"""The folder of runs, `history/` in a cache directory: one file a run, named by when it began, and a bound on all.

Names sort by time. When there is more than the bound, the oldest files go; a run that takes half of it alone is noted
no further. A file that cannot be read is passed over, and goes when its turn comes: nothing depends on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fastload.cache import syscalls
from fastload.cache.chunkfile import transfer
from fastload.cache.directory import LastingRoot
from fastload.errors import CacheError, ConfigError
from fastload.history import runfile
from fastload.history.runfile import Run, RunSummary

FOLDER = "history"
_ENDING = ".run"
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
# Even the smallest are a block each on disk, and all are looked at by `ls`.
RUNS_MAX = 200


@dataclass(frozen=True, slots=True)
class RunFile:
    """One run's file."""

    name: str
    path: Path
    size: int


class Archive:
    """Of one cache directory. Any process may look; one at a time, the service, writes."""

    def __init__(self, directory: Path, root: LastingRoot | None = None) -> None:
        """`root` is where the directory is reached, if not by its name (see `CacheDirectory.lasting_root`)."""
        self.folder = directory / FOLDER
        self._reached, self._place = root, (directory if root is None else root.path) / FOLDER

    def runs(self) -> list[RunFile]:
        """All that there are, the newest first. OSError as the system gives it."""
        try:
            entries = syscalls.scandir(self._place)
        except FileNotFoundError:
            return []
        found = []
        for entry in entries:
            name = entry.name.removesuffix(_ENDING)
            if entry.name.endswith(_ENDING) and _NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found.append(RunFile(name, Path(entry.path), syscalls.entry_stat(entry).st_size))
        return sorted(found, key=lambda each: each.name, reverse=True)

    def find(self, name: str) -> RunFile:
        """The run of this name, "latest", or one that only one begins with; `ConfigError` where there is none."""
        runs = self.runs()
        if name == "latest" and runs:
            return runs[0]
        matching = [run for run in runs if run.name == name] or [
            run for run in runs if name and run.name.startswith(name)
        ]
        if len(matching) == 1:
            return matching[0]
        what = f"{len(matching)} runs begin with" if matching else "there is no run"
        raise ConfigError(f"{what} {name!r} in {self.folder}; `fastload history ls` shows them")

    def summary(self, run: RunFile) -> RunSummary | None:
        """A run in figures; None where its file holds none."""
        return runfile.read_summary(run.path)

    def read(self, run: RunFile) -> Run:
        """All of a run; `CacheError` where its file is damaged."""
        return runfile.read(run.path)

    def remove(self, run: RunFile) -> None:
        with contextlib.suppress(FileNotFoundError):  # it is gone
            syscalls.unlink(run.path)

    def clear(self) -> int:
        """Forget all of them; how many bytes they took."""
        runs = self.runs()
        for run in runs:
            self.remove(run)
        return sum(run.size for run in runs)

    # For the service

    def new_name(self, began: float) -> str:
        """A name for a run that began then, in seconds since 1970."""
        return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(began))}-{os.urandom(4).hex()}"

    def append(self, name: str, pieces: list[bytes], after: int = 0) -> int | None:
        """Add pieces to a run's file, which has `after` bytes; 0: there is none yet, and it is made. Its bytes
        afterwards; None where it is not as it was left, since the run was removed. OSError as the system gives it.
        """
        path = self._place / (name + _ENDING)
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir(self._place, 0o700)
        try:
            fd = syscalls.open(path, os.O_WRONLY | (0 if after else os.O_CREAT))
        except FileNotFoundError:
            if after:
                return None
            raise
        try:
            end = syscalls.fstat(fd).st_size
            if end != after:
                return None
            content = b"".join([b"" if end else runfile.MAGIC, *pieces])
            transfer(syscalls.pwritev, fd, (memoryview(content),), "write", end)
            return end + len(content)
        finally:
            syscalls.close(fd)

    def prune(self, bytes_max: int, keep: frozenset[str] = frozenset()) -> None:
        """Remove the oldest until what is left fits; runs named in `keep` are still being written."""
        left = bytes_max
        for number, run in enumerate(self.runs()):
            left -= run.size
            if (left < 0 or number >= RUNS_MAX) and run.name not in keep:
                self.remove(run)


def read_all(archive: Archive, reads_max: int) -> list[Run]:
    """The newest runs, until their reads are so many; of the last one what it began with, since a job that reads it
    again
    begins there. Those that are damaged, or cannot be read, are left out.
    """
    found: list[Run] = []
    left = reads_max
    for run in archive.runs():
        try:
            read = archive.read(run)
        except (CacheError, OSError):  # as good as none; `fastload history show` says what is wrong
            continue
        if len(read.reads):
            found.append(replace(read, reads=read.reads.first(left)))
            left -= len(found[-1].reads)
        if not left:
            break
    return found
