"""A way to the real store that can be shut: requests are passed on, or answered with an error, by method and path."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.conftest import Bucket

_ERRORS = {503: "SlowDown", 403: "AccessDenied", 404: "NoSuchBucket"}


class Gate:
    """`refuses` says which requests are answered with `status`; `seen` are those that were passed on: method, path, and
    bytes that the store sent.
    """

    def __init__(self, store_url: str) -> None:
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.seen: list[tuple[str, str, int]] = []
        self.refused = threading.Event()
        self.status = 503
        self._store = urlsplit(store_url).netloc
        self._connections: list[socket.socket] = []
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # of a client that is killed: the store would wait for the rest
                    self.close_connection = True
                    return
                if gate.refuses(self.command, self.path):
                    gate.refused.set()
                    code = _ERRORS[gate.status]
                    error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
                    self._answer(gate.status, [], error.encode())
                    return
                store = http.client.HTTPConnection(gate._store)
                try:
                    store.connect()
                    gate._connections.append(store.sock)
                    store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        store.putheader(name, value)
                    store.endheaders(body)
                    answer = store.getresponse()
                    data = answer.read()
                    gate.seen.append((self.command, urlsplit(self.path).path, len(data)))
                    self._answer(answer.status, answer.getheaders(), data)
                finally:
                    store.close()

            def handle(self) -> None:
                gate._connections.append(self.connection)
                with contextlib.suppress(ConnectionError):  # a client that is killed
                    super().handle()

            def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                own = {"connection", "transfer-encoding", "content-length"}
                for name, value in headers:
                    if name.lower() not in own or (self.command == "HEAD" and name.lower() == "content-length"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def shut(self, name: str = "", status: int = 503) -> None:
        """Refuse writes of objects with `name` in their path."""
        self.refused.clear()
        self.status = status
        self.refuses = lambda method, path: method == "PUT" and name in path

    def open(self) -> None:
        self.refuses = lambda method, path: False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # which a client may keep for its next request, or the store not answer
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


@contextmanager
def gate_to(s3: Bucket) -> Iterator[Gate]:
    gate = Gate(s3.server.endpoint_url)
    try:
        yield gate
    finally:
        gate.close()
