"""A loader tells the service each second how its epoch goes, in a thread of its own, as long as it iterates.

So the trainer's thread does nothing for it, and is held up by nothing: a service that reads nothing is left out
(`Consumer.report`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

EVERY_S = 1.0


class Reporter:
    """Calls `send(**report())` each second until it is stopped, and once then."""

    def __init__(self, report: Callable[[], dict[str, Any]], send: Callable[..., None]) -> None:
        self._report, self._send = report, send
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastload-report", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send the last one. Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self._send(**self._report())
        self._send(**self._report())
