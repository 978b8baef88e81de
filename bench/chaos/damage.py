"""What is done to processes and to the cache directory from outside."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on descendants whose parent has ended are children of this process, so that none gets out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def parents() -> dict[int, tuple[int, str]]:
    """Each process's parent and state."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            found[int(name)] = (int(fields[1]), fields[0])
    return found


def descendants(pid: int) -> set[int]:
    """All processes below `pid` that have not ended."""
    table = parents()
    below, found = {pid}, set[int]()
    while below:
        below = {child for child, (parent, state) in table.items() if parent in below and state != "Z"}
        found |= below
    return found


def command_of(pid: int) -> str:
    """Its command line; nothing where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def services(directory: Path) -> list[int]:
    """Ours that serve, or begin to serve, the directory."""
    found = []
    for pid in sorted(descendants(os.getpid())):
        words = command_of(pid).split()
        if "fastload.service" in words and f"--directory={directory}" in words:
            found.append(pid)
    return found


def send(pid: int, number: signal.Signals) -> bool:
    """Whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def reap() -> None:
    """Take note of orphans that have ended, which have no other parent that waits; children of `subprocess` and
    `multiprocessing` are left to these.
    """
    for pid, (parent, state) in parents().items():
        if parent == os.getpid() and state == "Z" and pid not in _own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


_own: set[int] = set()


def keep(pid: int | None) -> None:
    """`pid` is waited for by its parent."""
    assert pid is not None
    _own.add(pid)


class Disk:
    """The cache directory, and what makes its system calls fail. On a disk of its own, `ballast` is a file there."""

    def __init__(self, directory: Path, trouble: Path, ballast: Path | None = None) -> None:
        self.directory, self._trouble, self._ballast = directory, trouble, ballast

    @property
    def failed_calls(self) -> int:
        """How many of the service's system calls were made to fail."""
        hits = Path(f"{self._trouble}.hits")
        return hits.stat().st_size if hits.exists() else 0

    def fill(self) -> None:
        """No room is left from now on: really, or as far as system calls go."""
        if self._ballast is None:
            self.fail(errno.ENOSPC, 1000)
            return
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def fail(self, number: int, per_mille: int, delay_s: float = 0.0) -> None:
        """So many of a thousand of the service's system calls on files fail from now on, or take as long."""
        new = self._trouble.with_suffix(".new")
        new.write_text(f"{number} {per_mille} {delay_s}")
        os.replace(new, self._trouble)

    def recover(self) -> None:
        """None fails any more."""
        self._trouble.unlink(missing_ok=True)
        if self._ballast is not None:
            self._ballast.unlink(missing_ok=True)

    def files(self, pattern: str) -> list[Path]:
        """Those whose path in the directory fits, in order."""
        return sorted(path for path in self._walk() if path.relative_to(self.directory).match(pattern))

    def _walk(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.directory):
            for name in names:
                yield Path(folder) / name

    def flip(self, path: Path, draw: float) -> bool:
        """A bit of a file; whether it was there."""
        try:
            with path.open("r+b") as file:
                at = int(draw * os.fstat(file.fileno()).st_size)
                file.seek(at)
                byte = file.read(1)
                if not byte:
                    return False
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << int(draw * 1e6) % 8]))
        except OSError:
            return False
        return True

    def cut(self, path: Path, draw: float) -> bool:
        """A file's end."""
        try:
            os.truncate(path, int(draw * path.stat().st_size))
        except OSError:
            return False
        return True

    def remove(self, path: Path) -> bool:
        """A file."""
        try:
            path.unlink()
        except OSError:
            return False
        return True

    def empty(self) -> None:
        """All that is in the directory."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def vanish(self) -> None:
        """The directory itself, as `rm -rf` does it: again where something was put in meanwhile."""
        for _ in range(100):
            try:
                shutil.rmtree(self.directory)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise


def open_files(pid: int) -> int:
    """How many descriptors a process has; 0 where it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
