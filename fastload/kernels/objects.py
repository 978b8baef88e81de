"""Object files with compiled kernels: where they lie, which are trusted, and how processes share them.

    FOLDER/tarindex-8d1c2a....x86-64-v3.o       a module of kernels, all that its code depends on, a level of processor

There are two folders: one in the installation, as good as the code beside it, and one of the user's,
`$FASTLOAD_KERNELS` or `~/.cache/fastload-kernels`. There is no index: a file's name says exactly what is in it, it is
written under another name and renamed when it is whole, and it begins with a checksum. So processes that begin at once
cannot mix anything up. Of those that lack a file, one compiles it while the others wait for its lock, which the system
releases when a process ends; they wait up to a minute, and then compile for themselves.

An object file is code, and is run. So no other user may have been able to write it:

- folder and file must belong to this user or to root, and must not be writable for group or others;
- another user's are trusted only in the folder that `$FASTLOAD_KERNELS` names, since it was named deliberately, and
  only where that user and root alone can have put another folder in its place. That is the case of an image which one
  user builds (`fastload compile --to FOLDER`) and another runs.

What is trusted is what was checked: a file is opened relative to the open folder, without following links, and it is
the open file that is checked and read. Where nothing can be kept, kernels are compiled in each process anew, and a line
in the log says so, and what to do about it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "INSTALLED",
    "VARIABLE",
    "UntrustedError",
    "alone",
    "find",
    "find_in",
    "is_first_to_compile",
    "keep",
    "say_not_kept",
    "users_folder",
    "why_not_installed",
    "writable_folder",
    "write",
]

INSTALLED = Path(__file__).parent / "compiled"

VARIABLE = "FASTLOAD_KERNELS"
_CURE = f"set {VARIABLE} to a folder of yours, or to one that `fastload compile --to FOLDER` has filled"

_DIGEST_BYTES = 16
_CODE_BYTES_MAX = 64 << 20
# Of one module and level: other versions of fastload, and of its source while one works on that.
_KEPT_MAX = 8
_TEMP = ".tmp"
_TEMP_AGE_S_MAX = 3600.0

# How long to wait for another process that compiles the same; all kernels together take some seconds.
_ALONE_S_MAX = 60.0
_LOOK_AGAIN_S = 0.02
_PATIENCE_S = 20.0
# What was compiled since then is of this job, and was announced.
_JUST_NOW_S = 60.0

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0

_log = logging.getLogger("fastload.kernels")


class UntrustedError(Exception):
    """A folder or file that others may have written, or whose owner is unknown."""


def users_folder() -> Path:
    """Where this user's object files are; it need not exist. UntrustedError where there is no place for one."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache").absolute() / "fastload-kernels"
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise UntrustedError(f"no home directory ({error})") from error


def find(name: str) -> bytes | None:
    """The object of this name, or None where there is none that is whole and trusted."""
    with contextlib.suppress(FileNotFoundError):
        code = _whole((INSTALLED / name).read_bytes())
        if code is not None:
            return code
    with contextlib.ExitStack() as stack:
        try:
            folder = users_folder()
            fd = stack.enter_context(_opened(folder))
        except (OSError, UntrustedError):  # there is none, or `keep` will say what is wrong with it
            return None
        try:
            return _read(folder, fd, name)
        except (OSError, UntrustedError) as error:
            _say_once(f"kernels are compiled anew, since those that were kept cannot be used: {_words(error)}")
            return None


def why_not_installed(name: str) -> str:
    """Why the installation has no object of this name that can be used."""
    names = os.listdir(INSTALLED) if INSTALLED.is_dir() else []
    level = _series(name)[1]
    found = {_series(each) for each in names}
    if name in names:
        return f"{INSTALLED / name} is damaged"
    if not found:
        return f"pip has not installed it ({INSTALLED} has none)"
    if level not in (of for _, of in found):
        return f"it was installed for other processors than this one, which is of level {level}"
    return "its source has changed since it was installed"


def find_in(folder: Path, name: str) -> bytes | None:
    """The object of this name in a folder. OSError or UntrustedError where it cannot be read or trusted."""
    with contextlib.suppress(FileNotFoundError), _opened(folder) as fd:
        return _read(folder, fd, name)
    return None


def _read(folder: Path, fd: int, name: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), _opened(folder / name, fd) as file:
        if os.fstat(file).st_size > _CODE_BYTES_MAX:
            raise UntrustedError(f"{folder / name} is larger than any kernels are")
        with open(file, "rb", closefd=False) as reading:
            return _whole(reading.read())
    return None


def keep(name: str, code: bytes) -> None:
    """Keep an object in the user's folder, where that is possible."""
    try:
        write(users_folder(), name, code)
    except (OSError, UntrustedError) as error:
        say_not_kept(error)


def write(folder: Path, name: str, code: bytes, *, is_public: bool = False) -> None:
    """Put an object into a folder, made where there is none: for this user alone, or for all to read."""
    _make(folder, 0o755 if is_public else 0o700)
    with _opened(folder) as fd:
        readers = stat.S_IMODE(os.fstat(fd).st_mode) & 0o444
        _publish(fd, name, hashlib.blake2b(code, digest_size=_DIGEST_BYTES).digest() + code, readers | stat.S_IWUSR)
        _drop_old(fd, name)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time, of those that share the user's folder; but not for ever."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, UntrustedError):  # nothing is kept there, or there are no locks: why wait
            folder = users_folder()
            _make(folder, 0o700)
            fd = stack.enter_context(_opened(folder))
            began = time.monotonic()
            while not _try_lock(fd) and time.monotonic() < began + _ALONE_S_MAX:
                if time.monotonic() > began + _PATIENCE_S:
                    _say_once(f"waiting for another process that compiles kernels (it has locked {folder})")
                time.sleep(_LOOK_AGAIN_S)
        yield


def writable_folder(name: str) -> Path | None:
    """A folder of this name in the user's, made where there is none, to which no other user can write; None where this
    user cannot, either.
    """
    try:
        folder = users_folder() / name
        if not folder.is_dir():
            _make(folder.parent, 0o700)
            _make(folder, 0o700)
            _drop_old_folders(folder)
        with _opened(folder.parent), _opened(folder):
            return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, UntrustedError) as error:
        say_not_kept(error)
        return None


def is_first_to_compile() -> bool:
    """Whether this process, which is `alone`, has to say that it compiles: of the processes of a job, which begin at
    once and take turns, one does. Where nothing can be kept, each compiles all, and says so.
    """
    try:
        with _opened(users_folder()) as fd, os.scandir(fd) as entries:
            latest = max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=0.0)
    except (OSError, UntrustedError):
        return True
    return time.time() - latest > _JUST_NOW_S


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(folder: Path, mode: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode)
        folder.chmod(mode)  # whatever the umask


@contextlib.contextmanager
def _opened(path: Path, folder: int | None = None) -> Iterator[int]:
    """A descriptor for reading a folder, or a file in an open one, that has been checked."""
    if folder is None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    else:
        fd = os.open(path.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        _check(path, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _check(path: Path, status: os.stat_result) -> None:
    if status.st_mode & _OTHERS_WRITE:
        raise UntrustedError(f"others can write {path} (if none has: chmod -R go-w {path})")
    if status.st_uid in (os.geteuid(), _ROOT):
        return
    if not os.environ.get(VARIABLE):
        raise UntrustedError(f"{path} belongs to user {status.st_uid}")
    for parent in path.resolve().parents:
        above = parent.stat()
        if above.st_uid not in (os.geteuid(), _ROOT, status.st_uid):
            raise UntrustedError(f"{path} belongs to user {status.st_uid}, and {parent} to user {above.st_uid}")
        if above.st_mode & _OTHERS_WRITE and not above.st_mode & stat.S_ISVTX:
            raise UntrustedError(f"{path} belongs to user {status.st_uid}, and others can write {parent}")


def _whole(data: bytes) -> bytes | None:
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.blake2b(code, digest_size=_DIGEST_BYTES).digest() == digest:
        return code
    _say_once("kernels are compiled anew, since a file of those that were kept is damaged")
    return None


def _publish(folder: int, name: str, data: bytes, mode: int) -> None:
    temp = f"{name}.{os.getpid()}-{os.urandom(4).hex()}{_TEMP}"
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, mode)
        os.rename(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp, dir_fd=folder)
        raise


def _drop_old(folder: int, name: str) -> None:
    """Remove the oldest of a module's objects for a level, where there are too many, and what killed writers left."""
    now, found = time.time(), []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                age_s = now - entry.stat(follow_symlinks=False).st_mtime
                if _series(entry.name) == _series(name):
                    found.append((age_s, entry.name))
                elif entry.name.endswith(_TEMP) and age_s > _TEMP_AGE_S_MAX:
                    os.unlink(entry.name, dir_fd=folder)
    for _, old in sorted(found)[_KEPT_MAX:]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old, dir_fd=folder)


def _drop_old_folders(latest: Path) -> None:
    """Remove the oldest of the folders with names like this one's, where there are too many."""
    found = sorted(latest.parent.glob(f"{latest.name.partition('-')[0]}-*"), key=lambda path: -path.stat().st_mtime)
    for path in found[_KEPT_MAX:]:
        shutil.rmtree(path, ignore_errors=True)  # another process may remove it, too


def _series(name: str) -> tuple[str, str]:
    """An object's module and level."""
    start, _, level = name.partition(".")
    return start.rpartition("-")[0], level.removesuffix(".o")


def say_not_kept(error: Exception) -> None:
    """Log, once in a process, that kernels cannot be kept, and why."""
    _say_once(f"kernels are compiled in every process anew, since they cannot be kept: {_words(error)}; {_CURE}")


def _words(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)
