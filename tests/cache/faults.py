"""Making system calls of the cache fail, the Nth of all or of some names, move less than was asked, or be the last."""

from __future__ import annotations

import errno
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from fastload.cache import syscalls

# What cannot fail: a number that the process knows.
_SURE = {"geteuid"}
CALLS = frozenset(
    name
    for name, value in vars(syscalls).items()
    if callable(value) and getattr(value, "__module__", "") == syscalls.__name__ and name not in _SURE
)


@dataclass
class Calls:
    """The calls made within the block, in order; `failed` says whether one of them was made to fail."""

    names: list[str] = field(default_factory=list)
    failed: bool = False


@contextmanager
def failing(
    nth: int | None = None, number: int = errno.EIO, only: frozenset[str] = CALLS, times: int = 1
) -> Iterator[Calls]:
    """Count calls; of those in `only`, the `nth` (from 0) and `times` - 1 after it fail with `number`."""
    calls = Calls()
    counted = 0

    def fault(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            calls.names.append(name)
            if name in only:
                counted += 1
                if nth is not None and nth < counted <= nth + times:
                    calls.failed = True
                    if name == "close":  # the kernel closes even where it reports an error
                        call(*args, **kwargs)
                    raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(syscalls, name, fault(name, getattr(syscalls, name)))
        yield calls


CRASHED = 99


def crashed(act: Callable[[], object], nth: int, only: frozenset[str] = CALLS, *, half: bool = False) -> bool:
    """Run `act` in a child that is gone at the `nth` (from 0) call of those in `only`; whether it came to that.

    The call is not made; with `half`, a write writes half of its first buffer before. Nothing that `act` has in
    `finally` runs, as with kill -9.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: the child has no use for them
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with _replaced(nth, only, lambda call, *arguments: _crash(call, half, *arguments)):
                act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, CRASHED)
    return status == CRASHED


def _crash(call: Callable[..., Any], half: bool, *arguments: Any) -> None:
    if half:
        fd, buffers, offset = arguments
        call(fd, [buffers[0][: len(buffers[0]) // 2]], offset)
    os._exit(CRASHED)


@contextmanager
def short(nth: int) -> Iterator[None]:
    """The `nth` of reads and writes moves half of its first buffer."""
    with _replaced(
        nth,
        frozenset({"preadv", "pwritev"}),
        lambda call, fd, buffers, offset: call(fd, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset),
    ):
        yield


@contextmanager
def _replaced(nth: int, only: frozenset[str], instead: Callable[..., Any]) -> Iterator[None]:
    """The `nth` call of those in `only` is `instead(call, *arguments)`."""
    number = count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            return instead(call, *arguments) if next(number) == nth else call(*arguments, **options)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in only:
            patch.setattr(syscalls, name, counted(getattr(syscalls, name)))
        yield


@contextmanager
def no_direct_io(at: str) -> Iterator[None]:
    """A file system that refuses direct I/O: at "open", or at the first "transfer"."""
    open_file, close = syscalls.open, syscalls.close
    direct: set[int] = set()

    def opened(path: Any, flags: int, mode: int = 0o600) -> int:
        fd = open_file(path, flags, mode)  # some kernels make the file before they refuse the flag
        if flags & os.O_DIRECT and at == "open":
            close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def closed(fd: int) -> None:
        direct.discard(fd)
        close(fd)

    def refused(call: Callable[..., int]) -> Callable[..., int]:
        def made(fd: int, *args: Any) -> int:
            if fd in direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(fd, *args)

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "open", opened)
        patch.setattr(syscalls, "close", closed)
        patch.setattr(syscalls, "preadv", refused(syscalls.preadv))
        patch.setattr(syscalls, "pwritev", refused(syscalls.pwritev))
        yield


@contextmanager
def moving_at_most(byte_count: int) -> Iterator[None]:
    """Reads and writes that move `byte_count` bytes at a time, of the first buffer."""

    def short(call: Callable[..., int]) -> Callable[..., int]:
        return lambda fd, buffers, offset: call(fd, [buffers[0][:byte_count]], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "preadv", short(syscalls.preadv))
        patch.setattr(syscalls, "pwritev", short(syscalls.pwritev))
        yield
