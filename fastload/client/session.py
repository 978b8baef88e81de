"""A consumer's side of the conversation: what is said, what is heard, and how it goes on with another service.

`Session` holds everything that a new service has to be told (objects, plan, wants, requests under way), so a service
that dies costs its consumers a pause: the channel's thread connects again, which starts another service, and
`_tell_everything` repeats it all. Requests can be repeated, so those under way are simply sent again. What was
granted before stays readable: the dead service's arena lives as long as it is mapped here.

Everything that is sent is sent under the lock, together with the change of state that it speaks of; that keeps both
sides' views of leases the same. The lock is never held while waiting for an answer.

A fork is safe: the child drops the parent's socket and leases, and makes its own connection at its first call, with the
same objects and plan.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastload import callers, errors, protocol
from fastload.cache.tempfiles import is_running
from fastload.client.connection import Channel
from fastload.client.handshake import Welcomed
from fastload.client.leases import LeaseTable, MappedArena
from fastload.errors import FastloadError, ServiceError
from fastload.lifecycle import reset_on_fork
from fastload.protocol import ObjectRows, Progress
from fastload.redaction import redact
from fastload.rendezvous import peer_pid
from fastload.store import StoreOptions, options
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from fastload.waiting import Reason, Waits, wait

Int64 = npt.NDArray[np.int64]

# A service that is started again and again without ever granting a chunk, or lasting for a while, is not going to. One
# that lives and ends the conversation each time will do so again, whatever it grants before; only lasting counts then.
_RESTARTS_MAX = 5
_LASTED_S = 60.0


# What is asked for, for whoever waits and for the error where it takes too long.
_WHAT_FOR: dict[type[protocol.Message], str] = {
    protocol.Clear: "to empty the cache",
    protocol.GetCounts: "to say how many samples shards hold",
    protocol.GetIndexes: "for the indexes of shards",
    protocol.Open: "to find an object",
    protocol.Resolve: "to list the shards",
    protocol.Stats: "for its figures",
}


class WaitInterruptedError(ServiceError):
    """A wait was ended by `Consumer.interrupted`; whoever did that knows, and nobody else sees it."""


class Connector(Protocol):
    """What a consumer needs of a `Cache`."""

    def connect(self, hello: protocol.Hello, stop: threading.Event, avoid: str = "") -> Welcomed:
        """A connection to the directory's service, which is started where there is none; or, where it cannot be reached
        or `avoid` says why it should not be, to another one that stands in for it.
        """
        ...

    def warn(self, message: str) -> bool:
        """Whether `message` has yet to be raised as a warning in this process."""
        ...

    @property
    def reading(self) -> str:
        """Where to read why something takes long, for who waits."""
        ...


@dataclass(slots=True, eq=False)
class _Request:
    message: protocol.Message
    parts: list[protocol.Message] = field(default_factory=list)
    done: bool = False
    error: FastloadError | None = None


class Session:
    """See the module's text. Its users hold `_changed` for all that is not said to take it."""

    def __init__(
        self, cache: Connector, storage_options: Mapping[str, Any] | None, name: str, waits: Waits | None
    ) -> None:
        self.name = redact(name)
        self.chunk_bytes = 0
        self._cache, self._more = cache, cache.reading
        self._storage_options = options.checked(storage_options)
        self._waits = waits
        self._objects: Sequence[ObjectInfo] = ObjectTable.of([])
        self._first_chunk: Int64 = np.zeros(1, np.int64)
        self._plan: protocol.SetPlan | None = None
        self._keep: protocol.Keep | None = None
        self._report: dict[str, float] = {}
        self._store_wire = self._read_store_options()
        self._begin()
        reset_on_fork(self, Session._forget_after_fork)
        self._connect()
        try:
            self._warn()
        except BaseException:  # where warnings are errors
            self.close()
            raise

    def _begin(self) -> None:
        """Everything that belongs to this process's connection."""
        self._changed = threading.Condition(threading.Lock())
        self._connecting = threading.Lock()
        self._table = LeaseTable()
        self._requests: dict[int, _Request] = {}
        self._request_serial = 0
        self._troubles: list[str] = []
        self._progress: Progress | None = None
        self._arena: MappedArena | None = None
        self._buffer_count = 0
        self._service_id = b""
        self._service_pid = 0
        self._beside = ""
        self._cut_off = False
        self._was_refused = False  # the connection before this one ended, and its service did not
        self._restarts = 0
        self._connected_s = 0.0
        self._interruptions = 0
        self._ended: FastloadError | None = None
        self._channel: Channel | None = None

    # Life

    @property
    def is_ended(self) -> bool:
        """Whether it was closed, or ended by an error: every call raises that."""
        return self._ended is not None

    @property
    def beside(self) -> str:
        """Why its service is not the directory's own, but stands in for that; "" where it is."""
        return self._beside

    def close(self) -> None:
        """Let go of everything. Waiting callers get a ServiceError. May be called twice."""
        with self._changed:
            channel, self._channel = self._channel, None
            if self._ended is None:
                self._ended = ServiceError(
                    "this connection to the cache was closed (by close(), or the end of a with block); iterate anew"
                )
            self._table.clear()
            if self._arena is not None:
                self._arena.view.close()
            self._changed.notify_all()
        if channel is not None:
            channel.close()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """For the length of the block nobody waits: calls that would, and those that do, raise WaitInterruptedError.

        For ending the threads that use this consumer without ending the consumer.
        """
        with self._changed:
            self._interruptions += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._interruptions -= 1

    @property
    def is_interrupted(self) -> bool:
        """Whether `interrupted` is entered: what waits for others with this consumer gives up as well."""
        return self._interruptions > 0

    # Saying

    def _enter(self) -> None:
        """Before a call: connect where a fork took the connection, raise what ended us, warn of what came up."""
        if self._channel is None and self._ended is None:
            with self._connecting:  # one thread of the child does, for all
                if self._channel is None and self._ended is None:
                    self._connect()
        self._warn()
        if self._ended is not None:
            raise self._ended

    def _warn(self) -> None:
        while self._troubles:
            with self._changed:
                message = self._troubles.pop(0) if self._troubles else ""  # another thread was quicker
            if message and self._cache.warn(message):
                callers.warn(message, RuntimeWarning)

    def _ask_for(self, chunks: Iterable[int], *, urgent: bool) -> None:
        ask, serial = self._table.to_ask(chunks, urgent=urgent)
        if ask:
            self._send(protocol.Want(ask, serial, urgent))

    def _ask_service(
        self, make: Callable[[int], protocol.Message], reason: Reason, deadline_s: float
    ) -> list[protocol.Message]:
        self._enter()
        with self._changed:
            self._request_serial += 1
            number = self._request_serial
            request = self._requests[number] = _Request(make(number))
            try:
                self._send(request.message)
                what = f"the cache service {_WHAT_FOR.get(type(request.message), 'to answer')}"
                self._wait(lambda: request.done, reason, what, deadline_s)
            finally:
                del self._requests[number]
        if request.error is not None:
            raise request.error
        return request.parts

    def _wait(self, ready: Callable[[], bool], reason: Reason, what: str, deadline_s: float) -> None:
        """Wait under the lock until `ready()`; raises what ended the consumer or the wait meanwhile."""
        wait(
            self._changed,
            lambda: self._ended is not None or self.is_interrupted or ready(),
            reason,
            what=what,
            waits=self._waits,
            deadline_s=deadline_s,
            more=self._more,
        )
        if self._ended is not None:
            raise self._ended
        if self.is_interrupted and not ready():
            raise WaitInterruptedError(f"interrupted while waiting for {what}")

    def _send(self, message: protocol.Message) -> None:
        # Without a connection nothing is lost: the next one is told everything.
        if self._channel is not None:
            self._channel.send(message)

    def _send_release(self, chunks: list[int]) -> None:
        if chunks:
            self._send(protocol.Release(chunks))

    # Hearing: called by the channel's thread

    def _on_message(self, message: protocol.FromService) -> None:
        with self._changed:
            self._take(message)
            self._changed.notify_all()

    def _take(self, message: protocol.FromService) -> None:
        match message:
            case protocol.Grants():
                self._take_grants(message)
            case protocol.Recall():
                released, pinned = self._table.recall(message.chunks)
                self._send_release(released)
                if pinned:
                    self._send(protocol.Pinned(pinned))
            case protocol.Failed():
                self._take_failed(message)
            case protocol.Progress():
                if not (message.error_name == "AccessDeniedError" and self._renew_credentials()):
                    self._progress = message
            case protocol.Trouble():
                self._troubles.append(message.message)
            case protocol.RequestFailed():
                self._take_request_failed(message)
            case protocol.Indexes():
                _check_lengths(message, message.objects, message.data)
                self._take_part(message)
            case protocol.Resolved() | protocol.Counts() | protocol.Cleared() | protocol.StatsReply():
                self._take_part(message)
            case protocol.Pong():
                pass
            case protocol.Refused():
                raise protocol.ConversationError(message.message)
            case _:
                raise protocol.ConversationError(f"an unexpected {type(message).__name__} message")

    def _take_grants(self, message: protocol.Grants) -> None:
        assert self._arena is not None
        _check_lengths(message, message.chunks, message.serials, message.buffers, message.sources)
        if message.buffers and not 0 <= min(message.buffers) <= max(message.buffers) < self._buffer_count:
            raise protocol.ConversationError(f"buffers {message.buffers} are granted of {self._buffer_count}")
        if message.sources and not 0 <= min(message.sources) <= max(message.sources) < len(protocol.SOURCES):
            raise protocol.ConversationError(f"sources {message.sources} are granted of {len(protocol.SOURCES)}")
        if not self._was_refused:
            self._restarts = 0
        fields = zip(message.chunks, message.serials, message.buffers, message.sources, strict=True)
        for chunk, serial, buffer, source in fields:
            self._table.grant(chunk, serial, self._arena, buffer, source)

    def _take_failed(self, message: protocol.Failed) -> None:
        _check_lengths(message, message.chunks, message.serials)
        if message.name == "AccessDeniedError" and self._renew_credentials():
            self._tell_wants(self._table.ask_again())
            return
        for chunk, serial in zip(message.chunks, message.serials, strict=True):
            self._table.fail(chunk, serial, errors.from_wire(message.name, message.message))

    def _take_request_failed(self, message: protocol.RequestFailed) -> None:
        request = self._requests.get(message.request)
        if request is None:
            return
        if message.name == "AccessDeniedError" and self._renew_credentials():
            request.parts.clear()
            self._send(request.message)
            return
        request.error = errors.from_wire(message.name, message.message)
        request.done = True

    def _take_part(
        self,
        message: protocol.Resolved
        | protocol.Opened
        | protocol.Indexes
        | protocol.Counts
        | protocol.Cleared
        | protocol.StatsReply,
    ) -> None:
        request = self._requests.get(message.request)
        if request is not None and not request.done:
            request.parts.append(message)
            request.done = message.last if isinstance(message, protocol.Resolved | protocol.Indexes) else True

    def _renew_credentials(self) -> bool:
        """Read the environment again; True where that changed anything, which the service has then been told."""
        try:
            wire = self._read_store_options()
        except FastloadError:  # what is there now cannot be read: the denial stands
            return False
        if wire == self._store_wire:
            return False
        self._store_wire = wire
        self._send(protocol.Credentials(wire))
        return True

    def _read_store_options(self) -> dict[str, Any]:
        return StoreOptions.from_environment(self._storage_options).to_wire()

    # The connection

    def _connect(self) -> None:
        channel = Channel(
            self._open,
            self._on_connected,
            self._on_lost,
            self._on_quiet,
            self._on_message,
            self._on_ended,
            self.name,
        )
        channel.start()

    def _open(self, stop: threading.Event) -> Welcomed:
        program = os.path.basename(sys.argv[0])[:255] if getattr(sys, "argv", None) else ""
        hello = protocol.Hello(
            protocol.VERSION, os.getpid(), self.name, self._store_wire, group=os.getpgrp(), program=program
        )
        avoid = f"it ended {self._restarts} times in a row without serving anything; see its log"
        return self._cache.connect(hello, stop, avoid if self._restarts > _RESTARTS_MAX else "")

    def _on_connected(self, channel: Channel, connection: Welcomed) -> None:
        """A service has welcomed us: map what it has, and tell it everything."""
        welcome = connection.welcome
        with self._changed:
            if self._ended is not None:  # closed while connecting
                connection.close()
                raise self._ended
            if self._arena is not None:
                self._leave(welcome.service_id)
            self._service_id, self._service_pid = welcome.service_id, peer_pid(connection.sock)
            self._beside = connection.beside
            self.chunk_bytes, self._buffer_count = welcome.chunk_bytes, welcome.buffer_count
            self._arena = MappedArena(connection.view, welcome.chunk_bytes)
            self._troubles += welcome.troubles + connection.troubles
            self._connected_s = time.monotonic()
            self._channel = channel
            channel.adopt(connection)
            self._tell_everything()
            self._changed.notify_all()

    def _leave(self, service_id: bytes) -> None:
        """The service that we had has gone, and there is another one.

        What was leased is still good where the old one has ended. One that lives has taken the leases back.
        """
        assert self._arena is not None
        lives = self._cut_off and (self._service_pid == 0 or is_running(self._service_pid))
        self._was_refused = lives or service_id == self._service_id
        self._table.leave(self._arena, lost=self._was_refused)

    def _on_lost(self, silent: socket.socket | None, cut_off: bool) -> None:
        """The connection broke, which is nobody's fault until it keeps happening."""
        with self._changed:
            self._cut_off = cut_off
            if silent is not None:
                self._part(silent)
            if time.monotonic() - self._connected_s > _LASTED_S:
                self._restarts = 0
            self._restarts += 1
            if self._restarts > 2 * _RESTARTS_MAX:
                raise ServiceError(
                    f"cache services ended {self._restarts} times in a row without serving anything; see their log"
                )

    def _part(self, silent: socket.socket) -> None:
        """Leave a service that says nothing, and may go on at any time: it finds our socket open as long as somebody
        reads what it leased to us, and that we want nothing more.
        """
        arena, self._arena = self._arena, None
        self._was_refused = False
        assert arena is not None
        assert self._channel is not None
        left = self._table.leave(arena, lost=False, link=silent)
        if arena.link is not None and left:
            self._channel.part(silent, protocol.Release(left))

    def _on_quiet(self) -> None:
        """Nothing has come for a while: the answer to this would."""
        with self._changed:
            self._send(protocol.Ping())

    def _on_ended(self, error: FastloadError) -> None:
        """There will be no other connection."""
        with self._changed:
            if self._ended is None:
                self._ended = error
            self._changed.notify_all()

    def _tell_everything(self) -> None:
        if len(self._objects):
            self._tell_objects()
        if self._keep is not None:
            self._send(self._keep)
        if self._plan is not None:
            self._send(self._plan)
        self._tell_wants(self._table.ask_again())
        for request in self._requests.values():
            if not request.done:  # an answer that is complete is about to be taken by the thread that asked
                request.parts.clear()
                self._send(request.message)
        if self._report:
            self._send(protocol.Report(self._report))

    def _tell_objects(self) -> None:
        step = protocol.OBJECTS_PER_PIECE
        for start in range(0, max(1, len(self._objects)), step):
            rows = ObjectRows.of(self._objects[start : start + step])
            self._send(protocol.Attach(start == 0, start + step >= len(self._objects), rows))

    def _tell_wants(self, wants: list[tuple[list[int], int, bool]]) -> None:
        for chunks, serial, urgent in wants:
            self._send(protocol.Want(chunks, serial, urgent))

    def _forget_after_fork(self) -> None:
        """In a forked child: the socket and the leases are the parent's."""
        channel, arena, ended = self._channel, self._arena, self._ended
        if channel is not None:
            channel.abandon()
        if arena is not None:
            arena.view.close()
        self._table.hang_up()
        self._begin()
        self._ended = ended


def _check_lengths(message: protocol.Message, *columns: Sized) -> None:
    if len({len(column) for column in columns}) > 1:
        raise protocol.ConversationError(f"the lists of a {type(message).__name__} message differ in length")


def chunk_starts(sizes: Sequence[int] | Int64, chunk_bytes: int) -> Int64:
    """int64[n + 1]: the number of each object's first chunk, and last how many chunks there are."""
    counts = -(-np.asarray(sizes, np.int64) // chunk_bytes)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
