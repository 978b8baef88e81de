"""The thread that hears the service: whatever ends it, whoever waits is told."""

from __future__ import annotations

import socket
import threading
from typing import Any, cast

import pytest

from fastload import protocol
from fastload.client.connection import Channel
from fastload.client.handshake import Welcomed
from fastload.errors import FastloadError, ServiceError
from tests.patience import PATIENCE_S


def test_it_may_be_closed_before_it_has_begun_to_read() -> None:
    """By another thread, as soon as there is a connection."""
    ours, theirs = socket.socketpair()
    connection = Welcomed(ours, cast(Any, None), cast(Any, None), protocol.FrameReader())

    def connected(channel: Channel, found: Welcomed) -> None:
        channel.adopt(found)
        channel.close()

    channel = Channel(
        lambda stop: connection, connected, lambda *_: None, lambda: None, lambda _: None, lambda _: None, "test"
    )
    channel.start()
    channel._thread.join(PATIENCE_S)
    assert ours.fileno() == -1
    theirs.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_while_a_message_is_taken_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    ended: list[FastloadError] = []
    told = threading.Event()

    def end(error: FastloadError) -> None:
        ended.append(error)
        told.set()

    def take(message: protocol.FromService) -> None:
        raise ZeroDivisionError("a defect")

    connection = Welcomed(ours, cast(Any, None), cast(Any, None), protocol.FrameReader())
    channel = Channel(
        lambda stop: connection,
        lambda channel, found: channel.adopt(found),
        lambda silent, cut_off: None,
        lambda: None,
        take,
        end,
        "test",
    )
    channel.start()
    theirs.sendall(protocol.frame(protocol.RequestFailed(1, "ServiceError", "no")))
    assert told.wait(PATIENCE_S)
    channel._thread.join(PATIENCE_S)
    theirs.close()
    assert isinstance(ended[0], ServiceError)
    assert "ZeroDivisionError('a defect')" in str(ended[0])
