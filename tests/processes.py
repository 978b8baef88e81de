"""Finding and ending the processes of a test."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.patience import PATIENCE_S


def service_pids(directory: Path) -> list[int]:
    """The cache services of a directory."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "fastload.service" in words and f"--directory={directory}" in words:
                found.append(int(folder.name))
    return found


def kill_service(directory: Path) -> None:
    """kill -9, whatever it is doing, and wait until it has gone."""
    found: list[int] = []
    until(lambda: found.extend(service_pids(directory)) or found)  # the last may just have been killed
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # the starter ends by itself
            os.kill(pid, signal.SIGKILL)
    until(lambda: not set(found) & set(service_pids(directory)))


def until(ready: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait for something outside of this process."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Not so for a zombie, which waits for whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
