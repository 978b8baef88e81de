"""How often each thread of this process takes the GIL, from a library that is loaded before libc (see `gil.c`).

environment = gil.environment(folder)        # compiles it; None where there is no C compiler
subprocess.run([...], env=environment)       # and in that process, first of all:
counter = gil.Counter()
counter.threads()
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("gil.c")
_THREADS_MAX, _PLACES_MAX, _DEPTH = 4096, 8192, 4  # as in gil.c
_WAITS_MAX = 1 << 18
_NAME = "FASTLOAD_BENCH_GIL"


class Thread(ctypes.Structure):
    """The figures of one thread; `struct thread` of gil.c."""

    _fields_ = (
        ("id", ctypes.c_int64),
        ("taken", ctypes.c_int64),
        ("wait_ns_max", ctypes.c_int64),
        ("hold_ns_max", ctypes.c_int64),
        ("work_ns_max", ctypes.c_int64),
    )
    id: int
    taken: int
    wait_ns_max: int
    hold_ns_max: int
    work_ns_max: int


class Place(ctypes.Structure):
    """Where the GIL was let go, and how often; `struct place` of gil.c."""

    _fields_ = (
        ("code", ctypes.c_void_p * _DEPTH),
        ("line", ctypes.c_int32 * _DEPTH),
        ("thread_id", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("work_ns_max", ctypes.c_int64),
    )
    thread_id: int
    count: int
    work_ns_max: int

    def __str__(self) -> str:
        frames = []
        for address, line in zip(self.code, self.line, strict=True):
            if address:
                code = ctypes.cast(address, ctypes.py_object).value
                frames.append(f"{'/'.join(Path(code.co_filename).parts[-2:])}:{line} {code.co_name}")
        return " < ".join(frames)


def environment(folder: Path) -> dict[str, str] | None:
    """The environment of a process that counts; the library is compiled into `folder`. None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "gil.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library), _NAME: str(library)}


def is_there() -> bool:
    """Whether this process counts."""
    return _NAME in os.environ


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a thread: how often it took the GIL, its longest wait for it and longest hold of it in milliseconds, and the
    most processor time that a hold took, which is less where the machine was busy with something else meanwhile.
    """

    taken: int
    wait_ms_max: float
    hold_ms_max: float
    work_ms_max: float


class Counter:
    """Counts from now on. To be made while there is no other thread, in a process with `environment`'s."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[_NAME])
        self._library.gil_recorded.restype = ctypes.c_int64
        os.environ.pop("LD_PRELOAD", None)  # the processes that this one starts are not meant
        assert threading.active_count() == 1, "threads that are there already might have the GIL or not"
        self._threads = (Thread * _THREADS_MAX)()
        self._library.gil_find()
        self._check()

    def threads(self) -> dict[int, Figures]:
        """The figures of each thread that has taken the GIL, by its native id."""
        count = self._library.gil_threads(self._threads)
        return {
            each.id: Figures(each.taken, *(ns / 1e6 for ns in (each.wait_ns_max, each.hold_ns_max, each.work_ns_max)))
            for each in self._threads[:count]
        }

    def forget_longest(self) -> None:
        """Longest times begin anew."""
        self._library.gil_forget_longest()

    @contextmanager
    def waits_ms(self) -> Iterator[list[float]]:
        """Fills the list with how long this thread waits for the GIL, each time that it does, while the block runs."""
        found: list[float] = []
        room = (ctypes.c_int64 * _WAITS_MAX)()
        self._library.gil_record(room, ctypes.c_int64(_WAITS_MAX))
        try:
            yield found
        finally:
            count = min(_WAITS_MAX, self._library.gil_recorded())
            found += [ns / 1e6 for ns in room[:count]]

    @contextmanager
    def watched(self) -> Iterator[list[Place]]:
        """Fills the list with the places where the GIL was let go while the block ran. Costs microseconds each."""
        if sys.version_info[:2] != (3, 11):
            raise SystemExit("where the GIL is let go can only be seen with CPython 3.11")
        found: list[Place] = []
        gc.disable()
        self._library.gil_watch(1)
        try:
            yield found
        finally:
            places = (Place * _PLACES_MAX)()
            found += places[: self._library.gil_places(places)]
            self._library.gil_watch(0)
            gc.enable()

    def _check(self) -> None:
        """AssertionError unless a call through ctypes counts as one."""
        own = threading.get_native_id()
        before = self.threads()[own].taken
        for _ in range(100):
            self._library.gil_nothing()
        taken = self.threads()[own].taken - before
        assert taken == 101, f"100 calls that let go of the GIL, and one to ask, counted as {taken}"
