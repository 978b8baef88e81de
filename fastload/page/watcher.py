"""The page's one connection to the service: a thread that watches, and connects again when the service is replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from fastload.client.operator import Operator
from fastload.errors import FastloadError
from fastload.snapshot import Snapshot

_EVERY_S = 1.0
_RETRY_S = 1.0

# A snapshot, or why there is none.
Seen = Snapshot | str


class Watcher:
    """Calls `on_seen`, from its own thread, each second until `stop`."""

    def __init__(self, directory: Path, on_seen: Callable[[Seen], None]) -> None:
        self._directory, self._on_seen = directory, on_seen
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._operator: Operator | None = None
        self._thread = threading.Thread(target=self._run, name="fastload-page", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Call no more, and end the thread."""
        self._stopped.set()
        with self._lock:
            if self._operator is not None:
                self._operator.interrupt()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._watch()
            except FastloadError as error:
                self._say(str(error))
            self._stopped.wait(_RETRY_S)

    def _watch(self) -> None:
        with Operator.connect(self._directory, "page") as operator:
            try:
                with self._lock:
                    self._operator = operator
                for snapshot in operator.watch(_EVERY_S):
                    self._say(snapshot)
                    if self._stopped.is_set():
                        return
            finally:
                with self._lock:
                    self._operator = None
        self._say(f"the cache service of {self._directory} has ended")

    def _say(self, seen: Seen) -> None:
        if not self._stopped.is_set():
            self._on_seen(seen)
