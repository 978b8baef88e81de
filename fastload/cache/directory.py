"""The directory of a cache: whose it is, what may be in it, and who serves it.

    cache.json     the limits, which belong to the directory and not to a process (see `limits`)
    lock           flock: its holder is the service
    socket         where the service listens
    service.log    what it has to say
    chunks/ index/ the disk tier (see `disk`)
    history/       what earlier runs read (see `fastload.history`)

A cache hands out bytes that later become batches, so who may write here may poison a training run, and who
may read here may read what only the bucket's credentials should show. The directory is made 0700, and one
that belongs to somebody else or that others may write to is refused.

Election: the lock is a flock, so it ends with its holder, however that ends. A forked child would inherit the
descriptor and keep the lock alive past its holder's death; so a child closes it first thing. Closing does not
unlock for the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

from fastload.cache import limits, owner, syscalls
from fastload.config import CacheLimits
from fastload.errors import CacheError

# sockaddr_un holds 108 bytes, with the zero at the end.
_SOCKET_PATH_BYTES_MAX = 107


class CacheDirectory:
    """An opened cache directory: checked, with its limits read. `open` makes one."""

    def __init__(self, path: Path, settled: CacheLimits, warnings: tuple[str, ...]) -> None:
        self.path = path
        self.limits = settled
        self.warnings = warnings
        self._lock_fd = -1

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        ram_bytes: int | None = None,
        disk_bytes: int | None = None,
        chunk_bytes: int | None = None,
        disk_write_bytes_per_s: int | None = None,
        requests_in_flight: int | None = None,
        history_bytes: int | None = None,
    ) -> CacheDirectory:
        """Make the directory if need be, check whose it is, and settle its limits.

        A limit that is None is the directory's; in a new directory, the default. What the caller should pass
        on to the user is in `.warnings`. CacheError where the directory cannot be used, ConfigError where the
        limits cannot.
        """
        place = Path(os.path.abspath(path))
        given = {
            "ram_bytes": ram_bytes,
            "disk_bytes": disk_bytes,
            "chunk_bytes": chunk_bytes,
            "disk_write_bytes_per_s": disk_write_bytes_per_s,
            "requests_in_flight": requests_in_flight,
            "history_bytes": history_bytes,
        }
        explicit = {name: value for name, value in given.items() if value is not None}
        try:
            _make(place)
            _check_owner(place)
            _sweep(place)
            settled, warnings = limits.settle(place, explicit)
        except CacheError:
            raise
        except OSError as error:
            raise CacheError(
                f"the cache directory {place} cannot be used: {error.strerror or error}; "
                "name another one (Cache(directory), or FASTLOAD_CACHE), or mend its rights"
            ) from error
        return cls(place, settled, warnings)

    @property
    def socket_path(self) -> Path:
        """Where the service listens. For bind and connect use `socket_address`, which is never too long."""
        return self.path / "socket"

    @property
    def log_path(self) -> Path:
        """What the service writes to."""
        return self.path / "service.log"

    @property
    def lock_path(self) -> Path:
        """The file whose lock the service holds."""
        return self.path / "lock"

    @property
    def limits_path(self) -> Path:
        """Where the limits are kept."""
        return limits.path_of(self.path)

    @contextlib.contextmanager
    def socket_address(self) -> Iterator[str]:
        """The socket's path in a form that fits a Unix address, valid within the block.

        A path of more than 107 bytes is named through a descriptor of the directory, in /proc/self/fd.
        """
        if len(os.fsencode(self.socket_path)) <= _SOCKET_PATH_BYTES_MAX:
            yield str(self.socket_path)
            return
        fd = syscalls.open_directory(self.path)
        try:
            yield f"/proc/self/fd/{fd}/{self.socket_path.name}"
        finally:
            syscalls.close(fd)

    def try_lock(self) -> bool:
        """Become the directory's service, if nobody is; whether this object holds the lock. Never blocks."""
        if self._lock_fd >= 0:
            return True
        try:
            self._lock_fd = syscalls.open(self.lock_path, os.O_RDWR | os.O_CREAT)
            _lock_holders.add(self)
            locked = _lock(self._lock_fd, self.lock_path)
        except OSError as error:
            self.unlock()
            raise CacheError(
                f"cannot lock {self.lock_path}: {error.strerror or error}; "
                "the cache needs a directory of your own on a local disk"
            ) from error
        if not locked:
            self.unlock()
        return locked

    @property
    def is_lost(self) -> bool:
        """Whether this object holds the lock of a directory that was emptied or removed since, or is being removed.
        Another service may be at its path by now.
        """
        fd = self._lock_fd
        if fd < 0:
            return False
        try:
            return not os.path.samestat(syscalls.fstat(fd), syscalls.stat(self.lock_path))
        except OSError:  # it is gone, or cannot be looked at
            return True

    def unlock(self) -> None:
        """Give the lock back. May be called twice, and without it."""
        fd, self._lock_fd = self._lock_fd, -1
        _lock_holders.discard(self)
        if fd >= 0:
            syscalls.close(fd)


_lock_holders: weakref.WeakSet[CacheDirectory] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for directory in list(_lock_holders):
        directory.unlock()


os.register_at_fork(after_in_child=_let_go_in_child)


def _lock(fd: int, path: Path) -> bool:
    """Whether `fd` is now locked and still the file at `path` (somebody may have emptied the directory)."""
    try:
        syscalls.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(syscalls.fstat(fd), syscalls.stat(path))
    except FileNotFoundError:
        return False


def _make(path: Path) -> None:
    if not path.parent.exists():
        _make_parents(path.parent)
    with contextlib.suppress(FileExistsError):
        syscalls.mkdir(path, 0o700)


def _make_parents(path: Path) -> None:
    if not path.parent.exists():
        _make_parents(path.parent)
    with contextlib.suppress(FileExistsError):
        syscalls.mkdir(path, 0o777)  # as mkdir -p does; the user's umask decides


def _check_owner(path: Path) -> None:
    fd = syscalls.open_directory(path)
    try:
        status = syscalls.fstat(fd)
    finally:
        syscalls.close(fd)
    if status.st_uid != syscalls.geteuid():
        raise CacheError(
            f"the cache directory {path} belongs to user {status.st_uid}, and this process runs as user "
            f"{syscalls.geteuid()}; name a directory of your own (Cache(directory), or FASTLOAD_CACHE)"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"the cache directory {path} may be written by others (mode {mode:04o}), who could change what "
            f"is trained on; run chmod 700 {path}"
        )


def _sweep(path: Path) -> None:
    for entry in syscalls.scandir(path):
        if owner.is_stale(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                syscalls.unlink(entry.path)
