"""Every system call of the cache, in one place.

The cache has to stay right whichever of its system calls fails: a full disk, a dying one, a file system gone
read-only. So all of them go through this module, called as `syscalls.name(...)`, and a test replaces the
functions here to make the Nth call fail. Each is the plain call, with the flags that every one of its callers
wants.
"""

from __future__ import annotations

import fcntl
import mmap as _mmap
import os
from collections.abc import Sequence
from pathlib import Path

# Absent from Python 3.11's modules; the values are the kernel's (fcntl.h).
F_SEAL_FUTURE_WRITE = 0x10
MAP_NORESERVE = 0x4000  # mman.h


def open(path: Path | str, flags: int, mode: int = 0o600) -> int:  # noqa: A001 - named after the call
    """The system call open, with no symbolic link as the last part, never inherited by a program."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)


def open_directory(path: Path | str) -> int:
    """The system call open of a directory, through symbolic links: a cache may have been put elsewhere."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def close(fd: int) -> None:
    os.close(fd)


def fstat(fd: int) -> os.stat_result:
    return os.fstat(fd)


def stat(path: Path | str) -> os.stat_result:
    """The system call lstat."""
    return os.lstat(path)


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """The system call preadv; may read less than asked."""
    return os.preadv(fd, buffers, offset)


def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """The system call pwritev; may write less than asked."""
    return os.pwritev(fd, buffers, offset)


def fsync(fd: int) -> None:
    os.fsync(fd)


def ftruncate(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def rename(source: Path | str, target: Path | str) -> None:
    """The system call rename, over a target that may exist."""
    os.rename(source, target)


def link(source: Path | str, target: Path | str) -> None:
    """The system call link: unlike `rename`, FileExistsError where the target exists."""
    os.link(source, target)


def unlink(path: Path | str) -> None:
    os.unlink(path)


def mkdir(path: Path | str, mode: int = 0o700) -> None:
    os.mkdir(path, mode)


def scandir(path: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a directory, all of them, with the directory closed again."""
    with os.scandir(path) as entries:
        return list(entries)


def entry_stat(entry: os.DirEntry[str]) -> os.stat_result:
    """The system call lstat on a directory's entry."""
    return entry.stat(follow_symlinks=False)


def statvfs(path: Path | str) -> os.statvfs_result:
    return os.statvfs(path)


def flock(fd: int, operation: int) -> None:
    fcntl.flock(fd, operation)


def geteuid() -> int:
    return os.geteuid()


def memfd_create(name: str) -> int:
    """The system call memfd_create, sealable, never inherited by a program."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def add_seals(fd: int, seals: int) -> None:
    """The system call fcntl with F_ADD_SEALS."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def get_seals(fd: int) -> int:
    """The system call fcntl with F_GET_SEALS."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def mmap_shared(fd: int, size: int, *, writable: bool) -> _mmap.mmap:
    """The system call mmap of a file, shared, from its start."""
    prot = _mmap.PROT_READ | (_mmap.PROT_WRITE if writable else 0)
    return _mmap.mmap(fd, size, flags=_mmap.MAP_SHARED, prot=prot)


def mmap_private(fd: int, size: int) -> _mmap.mmap:
    """The system call mmap of a file, from its start: what is written is this process's own, page by page."""
    flags = _mmap.MAP_PRIVATE | MAP_NORESERVE
    return _mmap.mmap(fd, size, flags=flags, prot=_mmap.PROT_READ | _mmap.PROT_WRITE)


def mmap_scratch(size: int) -> _mmap.mmap:
    """The system call mmap of private memory: zeroed and page-aligned, as direct I/O wants it."""
    return _mmap.mmap(-1, size, flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS)


def read_file(path: Path | str) -> bytes:
    return Path(path).read_bytes()
