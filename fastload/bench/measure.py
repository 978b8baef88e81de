"""What a run costs, read from /proc: CPU-seconds and memory of process trees, and the means to start from a cold cache.

CPU-seconds are those of a process, of its living descendants, and of the children that any of them has already waited
for: so programs that come and go (curl) are counted, once. Memory is what a job takes from the node for itself:
anonymous and shared pages, each divided among those who map it (`Pss_Anon` + `Pss_Shmem`), summed over the processes;
the page cache is not part of it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BLOCK_BYTES = 8 << 20


def descendants(pids: Iterable[int]) -> list[int]:
    """`pids` and everything below them, each once; those that are no more are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    found: dict[int, None] = {}
    waiting = [pid for pid in pids if _stat(pid)]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found[pid] = None
            waiting += children.get(pid, [])
    return list(found)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU-seconds so far, user and system, of `pids` and all below them."""
    ticks = 0
    for pid in descendants(pids):
        fields = _stat(pid)
        ticks += sum(int(value) for value in fields[11:15])
    return ticks / _TICKS_PER_S


def wakeups(pids: Iterable[int]) -> int:
    """How often threads of `pids` and all below them have waited for something so far. Of other processes those of
    threads that have ended are lacking.
    """
    count = 0
    for pid in descendants(pids):
        if pid == os.getpid():
            count += resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            continue
        for thread in _names(f"/proc/{pid}/task"):
            for line in _read(f"/proc/{pid}/task/{thread}/status").splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    count += int(line.split()[1])
    return count


def page_faults(pids: Iterable[int]) -> int:
    """How many pages of memory `pids` and all below them have touched for the first time so far."""
    return sum(int(fields[7]) + int(fields[8]) for fields in map(_stat, descendants(pids)) if fields)


def wait_until_idle(pids: Iterable[int], timeout_s: float = 30.0) -> None:
    """Wait until `pids` and all below them take (nearly) no CPU; TimeoutError where they go on for `timeout_s`."""
    pids, deadline = list(pids), time.monotonic() + timeout_s
    now = cpu_s(pids)
    while True:
        time.sleep(0.3)
        before, now = now, cpu_s(pids)
        if now - before <= 2 / _TICKS_PER_S:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} are still busy after {timeout_s:g} s")


def memory_bytes(pids: Iterable[int]) -> int:
    """Anonymous and shared memory of `pids` and all below them."""
    return sum(_own_memory_bytes(pid) for pid in descendants(pids))


def find_processes(*words: str) -> list[int]:
    """The processes whose command line has every one of `words` as a part."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            line = _read(f"/proc/{entry}/cmdline").replace("\0", " ")
            if all(word in line for word in words):
                found.append(int(entry))
    return found


class PeakMemory:
    """Looks at the memory of process trees twice a second while the block runs, which takes a percent or so of a core.

    `roots()` is asked each time, since processes come and go.
    """

    def __init__(self, roots: Callable[[], Iterable[int]], every_s: float = 0.5) -> None:
        self._roots, self._every_s = roots, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory")
        self.peak_bytes = 0

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.peak_bytes = max(self.peak_bytes, memory_bytes(self._roots()))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def drop_page_cache(paths: Iterable[Path]) -> None:
    """Make the next read of these files (of all files in these folders) come from the disk."""
    os.sync()  # dirty pages cannot be dropped
    for path in _files(paths):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def disk_bytes_per_s(folder: Path, threads: int = 4) -> float:
    """The rate at which `threads` threads read all files in `folder` with O_DIRECT, 8 MiB at a time: the disk's own."""
    files = _files([folder])
    began = time.monotonic()
    read = [0] * threads
    readers = [
        threading.Thread(target=_read_direct, args=(files[number::threads], read, number)) for number in range(threads)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(read) / (time.monotonic() - began)


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def _read_direct(files: list[Path], read: list[int], number: int) -> None:
    buffer = _aligned(_BLOCK_BYTES)
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            offset = 0
            while (count := os.preadv(fd, [buffer], offset)) > 0:
                offset += count
        finally:
            os.close(fd)
        read[number] += offset


def _aligned(byte_count: int) -> memoryview:
    """Memory that begins at a page, as O_DIRECT wants it."""
    import mmap

    return memoryview(mmap.mmap(-1, byte_count))


def _files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; nothing where there is no such process (any more)."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # it has ended
        return []


def _own_memory_bytes(pid: int) -> int:
    kilobytes = 0
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        name, _, value = line.partition(":")
        if name in ("Pss_Anon", "Pss_Shmem"):
            kilobytes += int(value.split()[0])
    return kilobytes << 10


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or belongs to another user
        return ""


def die_with_parent() -> None:
    """Be sent SIGTERM when the process that started this one ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, 15)


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes want a core all the time within the block, at this process's priority."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
