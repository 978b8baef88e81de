"""The service in threads of this process, for where no process may be started.

It is the same server on the same socket, so this process's consumers connect to it as those of other processes do,
and a worker process finds it by the directory. It lives until its `Cache` is closed.
"""

from __future__ import annotations

import asyncio
import threading

from fastload.cpu_priority import take_long_slices
from fastload.errors import ServiceError
from fastload.lifecycle import keep_forever, reset_on_fork
from fastload.rendezvous import ServiceLocation
from fastload.service.host.logs import limited
from fastload.service.host.server import Server

_START_DEADLINE_S = 60.0


class InProcessService:
    """A running service. It gives the lock of `directory`, which the caller took, back when it ends."""

    def __init__(self, directory: ServiceLocation) -> None:
        """Start, and wait until consumers can connect; raises what stopped it from that, ServiceError at a deadline."""
        self._directory = directory
        self._server: Server | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="fastload-service", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the machine or a container allows no more
            directory.unlock()
            raise ServiceError(
                f"no thread can be started for the cache service of {directory.path}: {error}; allow it more of them "
                "(ulimit -u, or the container's pids limit)"
            ) from error
        if not self._ready.wait(_START_DEADLINE_S):
            self._stop()  # as soon as whatever hangs lets go of it
            raise ServiceError(f"the cache service for {directory.path} has not begun within {_START_DEADLINE_S:.0f} s")
        if self._error is not None:
            self._thread.join()
            raise self._error
        reset_on_fork(self, InProcessService._abandon)

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End it. May be called twice."""
        self._stop()
        self._thread.join()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop_from_thread()

    def _main(self) -> None:
        take_long_slices()  # and threads that are started from here
        try:
            # Only the service's own logger: the others are the application's too, whose handlers are to miss nothing.
            with limited("fastload.service"):
                asyncio.run(self._serve())
        except Exception as error:  # to be raised in the thread that waits for us
            self._error = error
        finally:
            self._directory.unlock()
            self._ready.set()

    def _is_ready(self) -> bool:
        self._ready.set()
        return True

    async def _serve(self) -> None:
        self._server = Server(self._directory, idle_s=None)
        if not await self._server.run(self._is_ready):
            raise ServiceError("reads or writes of the cache service did not end in time")

    def _abandon(self) -> None:
        """In a forked child: what is left of the threads shares descriptors with the parent's loop."""
        if self._server is not None:
            self._server.abandon()
        keep_forever(self)
