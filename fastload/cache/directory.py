"""The directory of a cache: whose it is, what may be in it, and who serves it.

    cache.json     the limits, which belong to the directory and not to a process (see `limits`)
    lock           flock: its holder is the service
    socket         where the service listens
    service.log    what it has to say
    chunks/ index/ the disk tier (see `disk`)
    catalog.sqlite which objects these are of, and what is pinned (see `catalog`)
    checkpoints/   what is on its way to a store (see `fastload.service.saving`)
    history/       what earlier runs read (see `fastload.history`)
    page.json      flock: its holder is the page (see `fastload.page`); where it is, and its token

A cache hands out bytes that later become batches, so who may write here may poison a training run, and who
may read here may read what only the bucket's credentials should show. The directory is made 0700, and one
that belongs to another user or that others may write to is refused.

Others may be able to write to a folder above it, and so to put another directory in its place at any moment. So a name
is followed once: the directory is opened, what was opened is checked, and all that is in it is reached through that
descriptor (`opened`), by the service for as long as it holds the lock. What the name leads to by then is checked
when it is followed again.

Election: the lock is a flock, so it ends with its holder, however that ends. A forked child would inherit the
descriptor and keep the lock alive past its holder's death; so a child closes it first thing. Closing does not
unlock for the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from fastload.cache import limits, syscalls, tempfiles
from fastload.config import CacheLimits
from fastload.errors import CacheError
from fastload.lifecycle import on_drop, reset_on_fork

# Where an open directory has a name that cannot be made to lead elsewhere. It is short enough for a socket's address,
# too.
_DESCRIPTORS = Path("/proc/self/fd")
_HAS_DESCRIPTORS = _DESCRIPTORS.is_dir()
# Consumers that connect at one time.
BACKLOG = 128
# Opening it again where it was emptied or removed under way.
_OPEN_TRIES = 5


class CacheDirectory:
    """An opened cache directory: checked, with its limits read. `open` makes one."""

    def __init__(self, path: Path, settled: CacheLimits, warnings: tuple[str, ...]) -> None:
        self.path = path
        self.limits = settled
        self.warnings = warnings
        self._lock_fd = self._fd = -1
        self._limits_seen: tuple[int, ...] = ()  # the file that was found to have chunks of this size

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
        checkpoint_ram_bytes: int | None = None,
        checkpoint_disk_bytes: int | None = None,
        otherwise: CacheLimits | None = None,
    ) -> CacheDirectory:
        """Make the directory if need be, check whose it is, and settle its limits.

        A limit that is None is the directory's; in a new or emptied directory, that of `otherwise`, or the default.
        What the caller should pass on to the user is in `.warnings`. CacheError where the directory cannot be used,
        ConfigError where the limits cannot.

        `otherwise` is also for a job that has begun already: its `chunk_bytes` holds in any case, and is not
        written down.
        """
        place = Path(os.path.abspath(path))
        given = {
            "ram_bytes": ram_bytes,
            "disk_bytes": disk_bytes,
            "chunk_bytes": chunk_bytes,
            "disk_write_bytes_per_s": disk_write_bytes_per_s,
            "requests_in_flight": requests_in_flight,
            "history_bytes": history_bytes,
            "checkpoint_ram_bytes": checkpoint_ram_bytes,
            "checkpoint_disk_bytes": checkpoint_disk_bytes,
        }
        explicit = {name: value for name, value in given.items() if value is not None}
        return cls(place, *_settle(place, explicit, otherwise))

    def renewed(self) -> CacheDirectory:
        """The same directory, made again with these limits where it was removed or emptied; raises as `open`."""
        return CacheDirectory.open(self.path, otherwise=self.limits)

    def has_other_chunks(self) -> bool:
        """Whether what is at the path by now says another `chunk_bytes`; not where nothing can be read there."""
        try:
            status = syscalls.stat(limits.path_of(self.path))
            seen = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
            if seen == self._limits_seen:  # the file is only ever replaced whole, and reading it takes far longer
                return False
            stored = limits.stored(self.path)
        except (OSError, CacheError):  # the next connection raises it
            return False
        if stored is not None and stored.chunk_bytes != self.limits.chunk_bytes:
            return True
        self._limits_seen = seen
        return False

    @property
    def root(self) -> Path:
        """Where the holder of the lock reaches the directory: under a name that stays its own whatever becomes of its
        path. Without the lock that is the path.
        """
        return self.path if self._fd < 0 else _name_of(self._fd, self.path)

    def lasting_root(self) -> LastingRoot | None:
        """The same for calls that may still be under way when the lock has been given back; None without it."""
        return None if self._fd < 0 else LastingRoot(os.dup(self._fd), self.path)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """The same for who has no lock, valid within the block.

        CacheError where the directory is not ours, OSError as the system gives it.
        """
        if self._fd >= 0:
            yield self.root
            return
        with opened(self.path) as root:
            yield root

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

    @contextlib.contextmanager
    def socket_address(self) -> Iterator[str]:
        """The socket's path in a form that fits a Unix address, whatever its length, and that leads into a directory
        which was checked; valid within the block. Raises as `opened`.
        """
        with self.opened() as root:
            yield str(root / self.socket_path.name)

    def try_lock(self) -> bool:
        """Become the directory's service, if there is none; whether this object holds the lock. Never blocks."""
        if self._lock_fd >= 0:
            return True
        try:
            self._fd = _open_checked(self.path)
            reset_on_fork(self, CacheDirectory.unlock)
            self._lock_fd = syscalls.open(self.root / self.lock_path.name, os.O_RDWR | os.O_CREAT)
            locked = _lock(self._lock_fd, self.lock_path)
        except FileNotFoundError:  # removed meanwhile: who looks again makes it again
            locked = False
        except OSError as error:
            self.unlock()
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"cannot lock {self.lock_path}: {error.strerror or error}; "
                "the cache needs a directory of your own on a local disk"
            ) from error
        if not locked:
            self.unlock()
        return locked

    def listen(self) -> socket.socket:
        """The socket at which consumers find the service, which holds the lock. OSError as the system gives it."""
        self.remove_socket()  # left by a service that was killed
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self.socket_address() as address:
                sock.bind(address)
                os.chmod(address, 0o600)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def remove_socket(self) -> None:
        """Leave the place clean; the lock is still held."""
        with contextlib.suppress(FileNotFoundError):  # the directory was emptied
            syscalls.unlink(self.root / self.socket_path.name)

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
        fds, self._lock_fd, self._fd = (self._lock_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                syscalls.close(fd)


class LastingRoot:
    """A name of an open directory that leads there until this is closed or collected: a descriptor that
    is closed may be another directory's at once, and what hangs in a disk would go on there.
    """

    def __init__(self, fd: int, path: Path) -> None:
        """`fd` is ours to close."""
        self.path = _name_of(fd, path)
        self.close = on_drop(self, os.close, fd)


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """The address at which the service of an existing directory listens; as `CacheDirectory.socket_address`."""
    with opened(path) as root:
        yield str(root / "socket")


def _lock(fd: int, path: Path) -> bool:
    """Whether `fd` is now locked and still the file at `path` (the directory may have been emptied)."""
    try:
        syscalls.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(syscalls.fstat(fd), syscalls.stat(path))
    except FileNotFoundError:
        return False


def _settle(path: Path, explicit: dict[str, int], otherwise: CacheLimits | None) -> tuple[CacheLimits, tuple[str, ...]]:
    """See `open`."""
    for tries_left in reversed(range(_OPEN_TRIES)):
        try:
            _make(path)
            with opened(path) as root:
                _sweep(root)
                return limits.settle(path, root, explicit, otherwise)
        except CacheError:
            raise
        except OSError as error:
            if isinstance(error, FileNotFoundError) and tries_left:  # removed meanwhile
                continue
            raise CacheError(
                f"the cache directory {path} cannot be used: {error.strerror or error}; "
                "name another one (Cache(directory), or FASTLOAD_CACHE), or mend its rights"
            ) from error
    raise AssertionError("unreachable")


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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Where an existing directory is reached, within the block; CacheError where it is not ours, OSError else."""
    fd = _open_checked(path)
    try:
        yield _name_of(fd, path)
    finally:
        syscalls.close(fd)


def _name_of(fd: int, path: Path) -> Path:
    """A name of the open directory. Without /proc that is its path, which others may lead elsewhere."""
    return _DESCRIPTORS / str(fd) if _HAS_DESCRIPTORS else path


def _open_checked(path: Path) -> int:
    """A descriptor of the directory, which is ours alone to write to; CacheError where it is not."""
    try:
        fd = syscalls.open_directory(path)
    except PermissionError:
        _check_owner(syscalls.stat(os.path.realpath(path)), path)  # names both users, where it is another's
        raise
    try:
        _check_owner(syscalls.fstat(fd), path)
    except BaseException:
        syscalls.close(fd)
        raise
    return fd


def _check_owner(status: os.stat_result, path: Path) -> None:
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
        if tempfiles.is_stale(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                syscalls.unlink(entry.path)
