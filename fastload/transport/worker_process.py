"""Worker processes: their heap, whether their trainer is alive, and how they ended.

**Heap.** A worker keeps the memory that a sample needed for the next one. glibc takes memory for a large array from the
kernel and returns it when the array is freed, so a worker that makes batches of tens of megabytes pays for fresh pages
in every one of them, which takes longer than filling them (batches of 38 MB, made by copying: 37 ms of CPU time each,
and 22 ms with this). So a worker's large arrays come from its heap, which retains some freed memory. That is a setting
of the C library for the whole process: hence not for threads, whose process is the user's.

Python's garbage collector runs whenever some hundreds of objects were made, as a batch of tensors is, and now and then
scans all objects: with torch imported, and the user's data set, hundreds of thousands, which it also writes to, so that
a forked worker gets a copy of each page. Objects that a worker started with live about as long as the worker, so the
collector skips them (taking 1024 small tensors: 0.67 ms, and 0.67 to 1.2 without this). Newer objects are collected as
ever.

**Watchdog.** torch's workers check whether their parent is alive. The parent of one that came from a fork server is the
server, which may outlive a trainer that was killed, or be killed itself. Such a worker has the end of a pipe that
closes with the trainer; other workers cannot rely on one, as processes forked after them hold its other end.

**End.** `how_it_ended` describes the exit of a worker and what may help: one text for all loaders.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import select
import signal
import sys
from multiprocessing.context import ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that some releases accept: half of a heap of 64 MiB.
_MMAP_THRESHOLD_BYTES_MAX = 32 << 20
# Settings of the user, which take precedence.
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def freeze_existing_objects() -> None:
    """Have the collector scan only objects that are made from now on."""
    gc.freeze()


def keep_freed_memory(byte_count: int) -> bool:
    """Keep up to so many freed bytes in the heap. False where the C library cannot, or the user has set it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _SETTINGS):
        return False
    kept = min(byte_count, (1 << 31) - 1)
    takes_all = mallopt(_M_MMAP_THRESHOLD, kept) or mallopt(_M_MMAP_THRESHOLD, min(kept, _MMAP_THRESHOLD_BYTES_MAX))
    return bool(mallopt(_M_TRIM_THRESHOLD, kept) and takes_all)


class Watchdog:
    """Replaces torch's `ManagerWatchdog`. Made in the worker, as early as possible."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._pipe: select.poll | None = None
        trainer = multiprocessing.parent_process()
        if trainer is not None and trainer.pid != self._parent:
            self._pipe = select.poll()
            self._pipe.register(trainer.sentinel, select.POLLIN)

    def is_alive(self) -> bool:
        return os.getppid() == self._parent if self._pipe is None else not self._pipe.poll(0)


def watchdog_of(process: int) -> Watchdog | None:
    """A watchdog of that process, if it has started this one, itself or by a fork server; otherwise None."""
    by_server = multiprocessing.parent_process()
    return Watchdog() if process in (os.getppid(), by_server.pid if by_server is not None else None) else None


HOW_TO_SEND = (
    "workers that are spawned are sent the data set and its functions, so define these at the top level of a module "
    '(no lambda, and no function within another); or give workers="thread", or multiprocessing_context="fork"'
)


def is_unsendable(error: BaseException) -> bool:
    """Whether a process could not be started because its arguments cannot be pickled."""
    if isinstance(error, pickle.PicklingError):
        return True
    return isinstance(error, AttributeError | TypeError) and "pickle" in str(error).lower()


def how_it_ended(process: BaseProcess, code_of: str) -> str:
    """How the process ended, as the rest of a sentence about it; `code_of` names the code that it ran."""
    exit_code = process.exitcode or 0
    if exit_code == 1 and not _is_forked(process) and not _is_in_a_file(sys.modules["__main__"]):
        return (
            "ended with status 1: workers that are spawned read your script again, and this one is in no file (it came "
            'from stdin, from -c or from a prompt); put it into a file, or give multiprocessing_context="fork" or '
            'workers="thread"'
        )
    if exit_code == 1:
        return (
            f"ended with status 1; does {code_of} call sys.exit()? Or are processes spawned, and what your script does "
            'is not under `if __name__ == "__main__":`, so that each does it again? What it printed says more'
        )
    if exit_code >= 0:
        return f"ended with status {exit_code}; does {code_of} call os._exit() or sys.exit()?"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    cure = {
        "SIGKILL": "killed, as when memory runs out: lower num_workers, prefetch_factor or batch_size",
        "SIGBUS": "shared memory ran out: raise the container's memory, or lower num_workers or batch_size",
        "SIGSEGV": f'crashed in compiled code that {code_of} calls: try multiprocessing_context="spawn"',
    }.get(name, "another process sent it that signal")
    return f"was ended by {name} ({cure})"


def _is_forked(process: BaseProcess) -> bool:
    """Whether it inherited the memory of its parent, and with it the script."""
    if isinstance(process, multiprocessing.Process):  # one of the default context
        return multiprocessing.get_start_method() == "fork"
    return isinstance(process, ForkProcess)


def _is_in_a_file(main: ModuleType) -> bool:
    """Whether another process can read the script that this one runs: from stdin, `__file__` is "<stdin>"."""
    file = getattr(main, "__file__", None)
    return file is not None and Path(file).exists()
