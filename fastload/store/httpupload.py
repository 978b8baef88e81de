"""The body of a PUT, sent out of the caller's memory; and the answer, which may come before all of it was sent.

What is large begins by asking (`Expect: 100-continue`): a store that refuses says so before the body is on its way, and
a connection that the server has closed meanwhile costs nothing. Later a refusal comes in the middle, after which a
server may read no more and reset the connection; so the answer is looked for while bytes are sent, and where sending
fails. What ends otherwise is cut off at once (RST), and nothing that the system still holds of it is sent: the memory
may be another's by then, and half a body makes no object.

Bytes of a file that is mapped (`filemap`) are sent by the system from where they lie, over plain HTTP. CPU-seconds a GB
of the sending process, a shared machine with two cores: sendfile 0.17-0.20; `send` of what was touched before
0.31-0.43, of what was not 0.35-0.58 (the same from 1 to 8 MiB a call; 0.41-0.57 with 256 KiB). Over TLS each record of
16 KiB is a call of OpenSSL, and encrypted and copied by it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Mapping

from fastload.store.filemap import place_of

# Bodies from this size on ask first. That takes a round trip.
_ASKS_BYTES = 1 << 20
# A server that says nothing to it is sent the body: not all know how to answer.
_ASKED_S = 2.0
# The longest for which a server may take nothing of a body. What was taken may lie in buffers on the way.
_STALLED_S = 60.0
# The longest body, and the longest wait for the answer after it: a server may have much to do with so much.
_BODY_S, _ANSWER_S = 900.0, 300.0
_STEP_BYTES = 4 << 20
_LINE_BYTES_MAX = 1 << 16
_GO_ON, _ANSWER = "go on", "answer"
# What a call of OpenSSL takes; and so many of them between two looks for an answer.
_RECORD_BYTES, _RECORDS = 16 << 10, 64


class Upload:
    """One PUT, over one connection or, where that was closed before anything of the body was sent, over another."""

    def __init__(self, body: memoryview, *, may_ask: bool) -> None:
        self._body = body
        self._asks = may_ask and len(body) >= _ASKS_BYTES
        self.asked_in_vain = False
        self.is_begun = False  # something large is on its way
        self.is_whole = False  # all of it was sent before the answer came

    def exchange(self, sock: socket.socket, target: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send it; the answer, of which the head was read. `sock` has a timeout."""
        asking = {"Expect": "100-continue"} if self._asks else {}
        head = _head(target, {**headers, "Content-Length": str(len(self._body)), **asking})
        response = http.client.HTTPResponse(sock, method="PUT")
        timeout_s = sock.gettimeout()
        try:
            sock.sendall(head)
            if not self._asks or self._may_go_on(sock, response):
                self.is_begun = self._asks
                self.is_whole = self._send(sock, response)
            sock.settimeout(_ANSWER_S)
            response.begin()
            sock.settimeout(timeout_s)
        except BaseException:
            response.close()
            _cut_off(sock)
            raise
        if not self.is_whole:
            response.will_close = True
            _cut_off(sock)
        return response

    def _may_go_on(self, sock: socket.socket, response: http.client.HTTPResponse) -> bool:
        """Whether the body is to be sent; the answer has come if not."""
        until = time.monotonic() + _ASKED_S
        while (left_s := until - time.monotonic()) > 0:
            if _is_readable(sock, left_s) and (come := _come(sock, response)):
                return come == _GO_ON
        self.asked_in_vain = True
        return True

    def _send(self, sock: socket.socket, response: http.client.HTTPResponse) -> bool:
        """Whether all of the body was sent; an answer has come if not."""
        poll = select.poll()
        poll.register(sock, select.POLLIN | select.POLLOUT)
        sock.settimeout(_STALLED_S)
        place = None if isinstance(sock, ssl.SSLSocket) else place_of(self._body)
        deadline = time.monotonic() + _BODY_S
        at = 0
        while at < len(self._body):
            found = poll.poll(_STALLED_S * 1000)
            if not found:
                raise TimeoutError(f"it took nothing for {_STALLED_S:g} s, after {at} of {len(self._body)} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took only {at} of {len(self._body)} bytes within {_BODY_S:g} s")
            if found[0][1] & ~select.POLLOUT and _come(sock, response) == _ANSWER:
                return False
            try:
                at += self._send_some(sock, at, place)
            except TimeoutError:
                raise
            except OSError:  # the answer may have come before the end
                if _come(sock, response) == _ANSWER:
                    return False
                raise
        return True

    def _send_some(self, sock: socket.socket, at: int, place: tuple[int, int] | None) -> int:
        if isinstance(sock, ssl.SSLSocket):
            sent = 0
            for _ in range(_RECORDS):
                sent += sock.send(self._body[at + sent : at + sent + _RECORD_BYTES])
                if at + sent == len(self._body):
                    break
            return sent
        if place is None:
            return sock.send(self._body[at : at + _STEP_BYTES])
        fd, start = place
        try:
            sent = os.sendfile(sock.fileno(), fd, start + at, min(_STEP_BYTES, len(self._body) - at))
        except BlockingIOError:
            return 0
        if not sent:
            raise OSError(f"the file that is sent has become shorter than {start + at} bytes")
        return sent


def _head(target: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"PUT {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header with a line break")
    return "\r\n".join(lines).encode("latin-1")


def _is_readable(sock: socket.socket, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


def _come(sock: socket.socket, response: http.client.HTTPResponse) -> str:
    """What has come: _ANSWER, of which nothing is taken, _GO_ON, which is read here, or nothing but what TLS says of
    itself. ConnectionResetError where the connection has ended.
    """
    come, is_readable = "", _is_readable(sock, 0)
    while True:
        timeout_s = sock.gettimeout()
        sock.settimeout(0.0)
        try:
            begins = response.fp.peek(1)
        except (ssl.SSLWantReadError, BlockingIOError):
            return come
        finally:
            sock.settimeout(timeout_s)
        if not begins:
            if is_readable:
                raise ConnectionResetError("it closed the connection without an answer")
            return come
        if not begins.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
            return _ANSWER
        while response.fp.readline(_LINE_BYTES_MAX).strip():
            pass
        come, is_readable = _GO_ON, False


def _cut_off(sock: socket.socket) -> None:
    """Once it is closed, nothing more of what was sent reaches the server."""
    with contextlib.suppress(OSError):  # it is closed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
