"""A connection that watches a node's cache and steers it: no consumer, so it starts no service and keeps none alive.

with Operator.connect(directory, "status") as operator:
for snapshot in operator.watch(every_s=1.0):
...
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fastload import protocol
from fastload.cache.directory import socket_address
from fastload.client.handshake import check_peer, first_frame
from fastload.errors import CacheError, FastloadError, ServiceError, WaitTimeoutError, from_wire
from fastload.snapshot import Snapshot

_ANSWER_S = 15.0
# Where many files have to go first, or one more is read on a slow disk.
_REMOVAL_S = 300.0
_RETRY_S = 1.0
_Answer = TypeVar("_Answer", protocol.Shown, protocol.Done, protocol.Cleared, protocol.Verified, protocol.Lent)


class NotServedError(ServiceError):
    """No service runs for the directory."""


class Operator:
    """See the module's text. `connect` makes one. For one thread at a time."""

    def __init__(
        self, sock: socket.socket, where: str, frames: protocol.FrameReader, welcome: protocol.Observed
    ) -> None:
        self.service_id, self.service_pid, self.is_daemon = welcome.service_id, welcome.pid, welcome.is_daemon
        self._sock, self._where, self._frames = sock, where, frames
        self._messages: list[protocol.FromService] = []
        self._fds: list[int] = []
        self._requests = 0

    @classmethod
    def connect(cls, directory: Path, name: str) -> Operator:
        """Connect to the directory's service; NotServedError where there is none, CacheError where the directory is not
        this user's, ServiceError where the service does not answer or is of another version.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(directory) as address:
                sock.connect(address)
            check_peer(sock, str(directory))
            frames = protocol.FrameReader()
            observe = protocol.Observe(protocol.VERSION, os.getpid(), name)
            payload = first_frame(sock, observe, frames, [], str(directory), threading.Event(), _ANSWER_S)
            if payload is None:
                raise ConnectionError
            welcome = protocol.from_service(payload)
            if isinstance(welcome, protocol.Refused):
                raise ServiceError(f"{welcome.message} (cache {directory})")
            if not isinstance(welcome, protocol.Observed):
                raise ServiceError(f"the cache service at {directory} answered with {type(welcome).__name__}")
            return cls(sock, str(directory), frames, welcome)
        except (FileNotFoundError, ConnectionError) as error:
            sock.close()
            raise NotServedError(
                f"no cache service runs for {directory}; jobs start one, or `fastload daemon`"
            ) from error
        except OSError as error:
            sock.close()
            if isinstance(error, FastloadError):
                raise
            raise CacheError(
                f"the cache directory {directory} cannot be used: {error.strerror or error}; name another one "
                "(--cache, or FASTLOAD_CACHE), or mend its rights"
            ) from error
        except BaseException:
            sock.close()
            raise

    def watch(self, every_s: float) -> Iterator[Snapshot]:
        """What the node is and does: now, and then each `every_s` seconds. Ends when the service does."""
        request = self._new_request()
        self._send(protocol.Watch(request, every_s))
        while True:
            try:
                yield self._receive(request, protocol.Shown, every_s + _ANSWER_S).snapshot
            except NotServedError:
                return

    def snapshot(self) -> Snapshot:
        """What the node is and does now."""
        request = self._new_request()
        self._send(protocol.Watch(request, 0.0))
        return self._receive(request, protocol.Shown, _ANSWER_S).snapshot

    def hand_over(self) -> None:
        """Have the service end for a daemon that is to serve in its place; ServiceError where a daemon does already."""
        self._request(lambda number: protocol.HandOver(number))

    def submit(self, job: Mapping[str, Any]) -> str:
        """Have the daemon warm what a `[[data]]` table names; its id. ConfigError where the daemon cannot take it,
        ServiceError where none serves.
        """
        return str(self._request(lambda number: protocol.SubmitJob(number, dict(job)))["id"])

    def cancel_job(self, job_id: str) -> None:
        """End a job of the daemon; ConfigError where there is none of this id."""
        self._request(lambda number: protocol.CancelJob(number, job_id))

    def retry_job(self, job_id: str) -> None:
        """Run a job of the daemon again now; ConfigError where there is none of this id."""
        self._request(lambda number: protocol.RetryJob(number, job_id))

    def evict(self, what: Sequence[str]) -> dict[str, Any]:
        """Remove what is called so, by URL, prefix or data set: `freed_bytes`, and what stays: `in_use_bytes` and
        `pinned_bytes`.
        """
        return self._request(lambda number: protocol.Evict(number, list(what)), _REMOVAL_S)

    def unpin(self, what: Sequence[str]) -> dict[str, Any]:
        """End pins, by name, URL or prefix: `byte_count` of what is not pinned any more, and the `names` of pins."""
        return self._request(lambda number: protocol.Unpin(number, list(what)), _REMOVAL_S)

    def clear(self, *, history: bool = False, pins: bool = False) -> int:
        """Empty the cache: see `Cache.clear`."""
        request = self._new_request()
        self._send(protocol.Clear(request, history, pins))
        return self._receive(request, protocol.Cleared, _REMOVAL_S).byte_count

    def verify(self, what: Sequence[str], *, repair: bool) -> Iterator[protocol.Verified]:
        """Check what is called so on disk (nothing: all of it), and with `repair` remove what is damaged: how far it
        is, each second, the last of which has `finished`.
        """
        request = self._new_request()
        self._send(protocol.Verify(request, list(what), repair))
        while True:
            verified = self._receive(request, protocol.Verified, _REMOVAL_S)
            yield verified
            if verified.finished:
                return

    def borrow(self, attempt: str) -> list[tuple[int, list[tuple[int, int]], int]]:
        """The images that the service holds of a checkpoint's attempt: rank, where its segments lie, and a descriptor,
        which is the caller's to close. They may be read as long as this is connected.
        """
        request = self._new_request()
        self._send(protocol.Borrow(request, attempt))
        images = self._receive(request, protocol.Lent, _ANSWER_S).images
        fds, self._fds = self._fds, []
        if len(fds) != len(images):
            for fd in fds:
                os.close(fd)
            raise ServiceError(
                f"the cache service at {self._where} sent {len(fds)} descriptors for {len(images)} images"
            )
        return [(rank, segments, fd) for (rank, segments), fd in zip(images, fds, strict=True)]

    def _request(self, make: Callable[[int], protocol.FromOperator], deadline_s: float = _ANSWER_S) -> dict[str, Any]:
        """Send it, and wait for what came of it."""
        request = self._new_request()
        self._send(make(request))
        return self._receive(request, protocol.Done, deadline_s).values

    def interrupt(self) -> None:
        """End a wait of the thread that uses it, as if the service had ended. For any thread, before `close`."""
        with contextlib.suppress(OSError):  # the service has hung up already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection. May be called twice."""
        self._sock.close()

    def _new_request(self) -> int:
        self._requests += 1
        return self._requests

    def _send(self, message: protocol.FromOperator) -> None:
        self._sock.settimeout(_ANSWER_S)
        try:
            self._sock.sendall(protocol.frame(message))
        except TimeoutError as error:
            raise WaitTimeoutError(f"the cache service at {self._where} takes no message") from error
        except OSError as error:
            raise self.ended() from error

    def _receive(self, request: int, kind: type[_Answer], deadline_s: float) -> _Answer:
        """The answer to a request; its error where the service refuses."""
        deadline = time.monotonic() + deadline_s
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if isinstance(message, protocol.Refused):
                    raise ServiceError(f"{message.message} (cache {self._where})")
                if isinstance(message, protocol.RequestFailed) and message.request == request:
                    raise from_wire(message.name, message.message)
                if isinstance(message, kind) and message.request == request:
                    return message
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise WaitTimeoutError(f"the cache service at {self._where} has not answered in time; its log may say why")
        self._sock.settimeout(left_s)
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 18, protocol.FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            self._fds += fds
        except TimeoutError:
            return
        except OSError:  # reset
            data = b""
        if not data:
            raise self.ended()
        self._messages += [protocol.from_service(payload) for payload in self._frames.feed(data)]

    def ended(self) -> NotServedError:
        """The error of one whose service has gone."""
        return NotServedError(f"the cache service at {self._where} (process {self.service_pid}) has ended")

    def __enter__(self) -> Operator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def is_served(directory: Path) -> bool:
    """Whether a service runs for the directory. CacheError as `Operator.connect`."""
    try:
        Operator.connect(directory, "look").close()
    except NotServedError:
        return False
    return True


def follow(directory: Path, name: str, every_s: float = 1.0) -> Iterator[Snapshot | FastloadError]:
    """Snapshots, for as long as the caller takes them, from one service after the other. While none serves, or one does
    not answer, its error instead, each second. CacheError as `Operator.connect`.
    """
    while True:
        try:
            with Operator.connect(directory, name) as operator:
                yield from operator.watch(every_s)
            yield operator.ended()
        except (ServiceError, WaitTimeoutError) as error:
            yield error
        time.sleep(_RETRY_S)
