"""What a daemon says to the init system that started it: that it serves, reloads, stops, and is alive (sd_notify)."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger("fastload.service")

# Variables that are for one process, and not for its children.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Notifier:
    """Sends notices to `$NOTIFY_SOCKET`; does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(environ) if self._address else None

    def ready(self, status: str) -> None:
        """It serves, or has reloaded."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def status(self, status: str) -> None:
        """A line for people."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """It reads its configuration again; `ready` says when that is done."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """To be called more often than each `watchdog_s` seconds."""
        self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(text.encode(), address)
        except OSError as error:
            log.warning("the init system cannot be notified at %s: %s", self._address, error)


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Within how many seconds it must say that it is alive; None: it need not."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6
