"""Kernels: free functions over arrays, compiled by numba, run without the GIL.

Import what you need from its module (`fastload.kernels.gather`, ...); this page does not, since numba takes 0.2 s
to import. Compiling the kernels of the tar index takes two to three seconds the first time on a machine and a third of
one from the cache on disk, so whoever knows that they will be needed says so early:

    compilation = compile_in_background("tarindex", "gather")     # while the first bytes are on their way
    ...
    compilation.join()

The thread is joined by whoever started it, by the interpreter's end, and before any fork: a child that is
forked in the middle of a compilation would inherit numba's lock held by a thread that it does not have.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref

__all__ = ["Compilation", "compile_in_background", "warm_up"]


def warm_up(*modules: str) -> int:
    """Import these modules of `fastload.kernels` and compile all that they define; returns the number of
    kernels.

    Also run when an image is built, so that jobs find everything in numba's cache.
    """
    from fastload.kernels.jit import Kernel

    count = 0
    for name in modules:
        module = importlib.import_module(f"{__name__}.{name}")
        for member in list(vars(module).values()):
            if isinstance(member, Kernel):
                member.prepare()
                count += 1
    return count


class Compilation:
    """A compilation that runs in a thread of its own."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fastload-compile", daemon=False)
        self._thread.start()

    def _run(self) -> None:
        try:
            warm_up(*self._modules)
        except Exception as error:  # handed on by `join`
            self._error = error

    @property
    def done(self) -> bool:
        """Whether `join` would return at once."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end and raise what went wrong. May be called twice, and by any thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error


_running: weakref.WeakSet[Compilation] = weakref.WeakSet()


def compile_in_background(*modules: str) -> Compilation:
    """Start `warm_up(*modules)` in a thread. Who calls a kernel meanwhile waits for the compiler."""
    compilation = Compilation(modules)
    _running.add(compilation)
    return compilation


def _finish_before_fork() -> None:
    for compilation in list(_running):
        if compilation._thread is not threading.current_thread():
            compilation._thread.join()


os.register_at_fork(before=_finish_before_fork)
