"""The thread that hears the service: whatever ends it, threads that wait get an error."""

from __future__ import annotations

import socket
import threading
from typing import Any, cast

import pytest

from fastload import protocol
from fastload.client.connection import Connection, ConnectionEvents
from fastload.client.handshake import Welcomed
from fastload.errors import FastloadError, ServiceError
from tests.patience import PATIENCE_S


def events(ours: socket.socket, **others: Any) -> ConnectionEvents:
    """A service at the other end of `ours`; what happens leads to nothing unless `others` say what."""
    welcome = protocol.Welcome(protocol.VERSION, b"id", 1, 1 << 16, 2, [])
    found = Welcomed(ours, welcome, cast(Any, None), protocol.FrameReader())
    defaults = {
        "connect": lambda stop, avoid: found,
        "connected": Connection.adopt,
        "lost": lambda silent: None,
        "message": lambda message: None,
        "ended": lambda error: None,
    }
    return ConnectionEvents(**{**defaults, **others})


def test_it_may_be_closed_before_it_has_begun_to_read() -> None:
    """By another thread, as soon as there is a connection."""
    ours, theirs = socket.socketpair()

    def connected(connection: Connection, found: Welcomed) -> None:
        connection.adopt(found)
        connection.close()

    connection = Connection(events(ours, connected=connected), threading.Condition(), "test")
    connection.start()
    connection._thread.join(PATIENCE_S)
    assert ours.fileno() == -1
    theirs.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_while_a_message_is_taken_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    ended: list[FastloadError] = []
    has_ended = threading.Event()

    def end(error: FastloadError) -> None:
        ended.append(error)
        has_ended.set()

    def take(message: protocol.FromService) -> None:
        raise ZeroDivisionError("a defect")

    connection = Connection(events(ours, message=take, ended=end), threading.Condition(), "test")
    connection.start()
    theirs.sendall(protocol.frame(protocol.RequestFailed(1, "ServiceError", "no")))
    assert has_ended.wait(PATIENCE_S)
    connection._thread.join(PATIENCE_S)
    theirs.close()
    assert isinstance(ended[0], ServiceError)
    assert "ZeroDivisionError('a defect')" in str(ended[0])


def test_there_is_no_room_where_nothing_is_read() -> None:
    """What may be left out is not sent then, so that it holds up no thread that needs the lock."""
    ours, theirs = socket.socketpair()
    connection = Connection(events(ours), threading.Condition(), "test")
    assert not connection.has_room
    connection.start()
    assert connection.has_room
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(1 << 16))
    except BlockingIOError:
        assert not connection.has_room
    ours.setblocking(True)
    connection.close()  # first, or it connects anew where the other end has gone
    theirs.close()
