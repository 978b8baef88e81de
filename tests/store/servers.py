"""Web servers that do what a healthy store never does, or what it is hard to make one do; on real sockets."""

from __future__ import annotations

import http.client
import http.server
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastload.store import StoreOptions
from tests.patience import PATIENCE_S

Handler = http.server.BaseHTTPRequestHandler
Behaviour = Callable[[Handler], None]


@contextmanager
def server(*behaviours: Behaviour, certificate: Path | None = None) -> Iterator[StoreOptions]:
    """Answers request n as the nth of `behaviours` does, the last one for ever; over TLS with a certificate."""
    number = iter(range(1 << 30))

    class Serving(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            behaviours[min(next(number), len(behaviours) - 1)](self)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815  # http.server's names

        def log_message(self, *_: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serving)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        kind = "http" if certificate is None else "https"
        yield StoreOptions(
            endpoint_url=f"{kind}://127.0.0.1:{listening.server_port}", access_key_id="K", secret_access_key="S"
        )
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def answer(status: int, body: bytes, *again: tuple[str, str], **more: str) -> Behaviour:
    """With that body, headers other than a good answer's (`ETag=`, `Content_Range=`; "" for none), and some `again`."""
    headers = {"Content-Length": str(len(body)), "Content-Range": "bytes 0-4/5", "ETag": '"e"'}
    headers["Last-Modified"] = "Tue, 01 Jan 2030 00:00:00 GMT"
    headers |= {name.replace("_", "-"): value for name, value in more.items()}

    def behave(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in (*headers.items(), *again):
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
        if headers["Content-Length"] not in ("", str(len(body))):
            handler.close_connection = True

    return behave


def hang_up(handler: Handler) -> None:
    """Without a word."""
    handler.close_connection = True


good = answer(206, b"hello")


@contextmanager
def handed_out(folder: Path, token: str = "") -> Iterator[StoreOptions]:
    """Credentials (K, S and the token) as a container's platform hands them out."""
    file = folder / "authorization"
    file.write_text("let me in")
    word = {"AccessKeyId": "K", "SecretAccessKey": "S", "Token": token, "Expiration": "2100-01-01T00:00:00Z"}
    with server(answer(200, json.dumps(word).encode())) as options:
        place = ("container_credentials_full_uri", f"{options.endpoint_url}/role")
        yield StoreOptions(extra=(("container_authorization_token_file", str(file)), place))


def whole(data: bytes, etag: str = '"e"', **more: str) -> Behaviour:
    """A good server of one object: ranges, HEAD, If-Match; `more` headers than needed, or others."""

    def behave(handler: Handler) -> None:
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Match")
        if condition not in (None, etag):
            return answer(412, b"", Content_Range="")(handler)
        if wanted is None:
            return answer(200, data, ETag=etag, Content_Range="", **more)(handler)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last) + 1, len(data))
        told = f"bytes {start}-{end - 1}/{len(data)}"
        return answer(206, data[start:end], **{"ETag": etag, "Content_Range": told, **more})(handler)

    return behave


@dataclass
class Liar:
    """Answers the first reads (not: second looks, by HEAD or for the first byte alone) by a lie, `lies` times, and all
    else truly. Remembers the connections: those that lied, and all that were used after.
    """

    lie: Behaviour
    truth: Behaviour
    lies: int = 1
    lied_over: list[tuple[str, int]] = field(default_factory=list)
    used_after: list[tuple[str, int]] = field(default_factory=list)
    second_looks: int = 0

    def __call__(self, handler: Handler) -> None:
        is_read = handler.command == "GET" and handler.headers.get("Range") != "bytes=0-0"
        if self.lied_over:
            self.used_after.append(handler.client_address)
            self.second_looks += not is_read
        if is_read and self.lies:
            self.lies -= 1
            self.lied_over.append(handler.client_address)
            self.lie(handler)
        else:
            self.truth(handler)


@dataclass
class Relay:
    """Passes requests on to a real store, and treats the nth PUT as the nth of `faults` says: "refused" (503, and it is
    not passed on), "cut" (the connection ends before it is passed on), "lost" (it is passed on, and its answer is not),
    "slow" (its body is read after so many seconds), "" and all after (nothing).
    """

    endpoint: str
    faults: list[str] = field(default_factory=list)
    slow_s: float = 0.0
    puts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, handler: Handler) -> None:
        fault = ""
        if handler.command == "PUT":
            with self.lock:
                self.puts += 1
                fault = self.faults.pop(0) if self.faults else ""
        if fault == "slow":
            time.sleep(self.slow_s)
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if fault == "refused":
            return answer(503, b"<Error><Code>SlowDown</Code></Error>", Content_Range="", ETag="")(handler)
        if fault == "cut":
            return hang_up(handler)
        host, port = self.endpoint.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        if fault == "lost":
            return hang_up(handler)
        handler.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                handler.send_header(name, value)
        if reply.getheader("Content-Length") is None:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        return None
