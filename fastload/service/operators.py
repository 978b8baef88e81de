"""Operators: connections that watch the node and steer its cache, and are no consumers.

They start no service, keep none alive, hold no lease and bring no credentials. A snapshot is made twice a second at
most, whatever the number of those who watch, and not at all while none does.

A service that a daemon runs has `Jobs`, which the daemon brings: the service knows no more of them than this.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastload import protocol, snapshot
from fastload.errors import FastloadError, ServiceError, to_wire
from fastload.service.resources import Resources
from fastload.snapshot import Snapshot

# Within this a snapshot is as good as new.
_FRESH_S = 0.5
# The shortest time between two that are sent to one operator.
_EVERY_LEAST_S = 0.5

Send = Callable[[protocol.Message], None]


class Jobs(Protocol):
    """A daemon's warming jobs. Called by the loop's thread only; all raise FastloadError for what cannot be done."""

    def describe(self) -> list[snapshot.Job]:
        """All of them, for a snapshot."""
        ...

    def troubles(self) -> list[str]:
        """What is wrong now, in a sentence each."""
        ...

    def submit(self, job: dict[str, Any], done: Callable[[str, BaseException | None], None]) -> None:
        """Take one more; `done` is called with its id once it is kept, or with the error."""
        ...

    def cancel(self, job_id: str) -> None:
        """End it."""
        ...

    def retry(self, job_id: str) -> None:
        """Run it again now."""
        ...


class Operator:
    """One operator's connection. Changed by the loop's thread only."""

    def __init__(self, name: str, pid: int, send: Send) -> None:
        self.name, self.pid, self.send = name, pid, send
        self.send_with: Callable[[protocol.Message, Sequence[int]], None] = lambda message, fds: send(message)
        self.leaves: list[Callable[[], None]] = []  # called once it has gone
        self.timer: asyncio.TimerHandle | None = None
        self.is_connected = True


class Operators:
    """Answers what operators ask for. Used by the loop's thread only."""

    def __init__(self, resources: Resources, make_snapshot: Callable[[], Snapshot]) -> None:
        self._loop, self._now, self._make_snapshot = resources.pools.loop, resources.now, make_snapshot
        self._latest: tuple[float, Snapshot] | None = None
        self.jobs: Jobs | None = None  # a daemon's, once it has brought them
        self.hand_over: Callable[[], None] = lambda: None  # ends the service
        self._handlers: dict[type[protocol.Message], Callable[[Operator, Any], None]] = {}

    def on(self, kind: type[protocol.Message], handler: Callable[[Operator, Any], None]) -> None:
        """Have messages of this kind answered by `handler`."""
        self._handlers[kind] = handler

    def connect(self, message: protocol.FromOperator, send: Send) -> Operator:
        """Register one; ServiceError where `message` is not its first."""
        if not isinstance(message, protocol.Observe):
            raise ServiceError(f"it began with {type(message).__name__}")
        return Operator(message.name, message.pid, send)

    def disconnect(self, operator: Operator) -> None:
        """It has gone."""
        operator.is_connected = False
        for leave in operator.leaves:
            leave()
        if operator.timer is not None:
            operator.timer.cancel()

    def receive(self, operator: Operator, message: protocol.FromOperator) -> None:
        """Answer, now or later; ServiceError for a message that makes no sense: it should be disconnected."""
        match message:
            case protocol.Watch():
                if operator.timer is not None:
                    operator.timer.cancel()
                self._show(operator, message)
            case protocol.HandOver():
                self._hand_over(operator, message)
            case protocol.SubmitJob() | protocol.CancelJob() | protocol.RetryJob():
                self._steer(operator, message)
            case _ if type(message) in self._handlers:
                self._handlers[type(message)](operator, message)
            case _:
                raise ServiceError(f"an operator sent {type(message).__name__}")

    def _show(self, operator: Operator, message: protocol.Watch) -> None:
        operator.timer = None
        try:
            snapshot = self._snapshot()
        except FastloadError as error:
            operator.send(protocol.RequestFailed(message.request, *to_wire(error)))
            return
        operator.send(protocol.Shown(message.request, snapshot))
        if message.every_s:
            wait_s = max(_EVERY_LEAST_S, message.every_s)
            operator.timer = self._loop.call_later(wait_s, self._show, operator, message)

    def _snapshot(self) -> Snapshot:
        now = self._now()
        if self._latest is None or now - self._latest[0] > _FRESH_S:
            self._latest = now, self._make_snapshot()
        return self._latest[1]

    # A daemon

    def _hand_over(self, operator: Operator, message: protocol.HandOver) -> None:
        if self.jobs is not None:
            error = ServiceError(f"a daemon serves this cache already (process {os.getpid()})")
            operator.send(protocol.RequestFailed(message.request, *to_wire(error)))
            return
        operator.send(protocol.Done(message.request, {}))
        self.hand_over()

    def _steer(self, operator: Operator, message: protocol.SubmitJob | protocol.CancelJob | protocol.RetryJob) -> None:
        def done(values: dict[str, Any], error: BaseException | None) -> None:
            self._latest = None
            if error is None:
                operator.send(protocol.Done(message.request, values))
            else:
                operator.send(protocol.RequestFailed(message.request, *to_wire(error)))

        try:
            if self.jobs is None:
                raise ServiceError("no daemon serves this cache, which has no jobs for that reason: `fastload daemon`")
            match message:
                case protocol.SubmitJob():
                    self.jobs.submit(message.job, lambda job_id, error: done({"id": job_id}, error))
                    return
                case protocol.CancelJob():
                    self.jobs.cancel(message.id)
                case protocol.RetryJob():
                    self.jobs.retry(message.id)
        except FastloadError as error:
            done({}, error)
        else:
            done({}, None)
