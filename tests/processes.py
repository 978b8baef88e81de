"""Finding and ending the processes of a test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


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
    """kill -9, and wait until it has gone."""
    until(lambda: service_pids(directory))  # it may have been killed a moment ago, and the next is starting
    (pid,) = service_pids(directory)
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in service_pids(directory))


def until(ready: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for something outside of this process."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
