"""Web servers that do what a healthy store never does, or what it is hard to make one do; on real sockets."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastload.store import StoreOptions

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


def answer(status: int, body: bytes, **more: str) -> Behaviour:
    """With that body, and headers more or other than a good answer's."""

    def behave(handler: Handler) -> None:
        handler.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Range": "bytes 0-4/5", "ETag": '"e"', **more}
        headers.setdefault("Last-Modified", "Tue, 01 Jan 2030 00:00:00 GMT")
        for name, value in headers.items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        if headers["Content-Length"] not in ("", str(len(body))):
            handler.close_connection = True

    return behave


def hang_up(handler: Handler) -> None:
    """Without a word."""
    handler.close_connection = True


good = answer(206, b"hello")


def certify(folder: Path) -> tuple[Path, Path]:
    """A key with its certificate for 127.0.0.1, and that of the authority behind it, in PEM.

    Two, since obstore takes no certificate of a server that is an authority itself.
    """
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=fastload"
    own = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE -CA authority.pem -CAkey authority.key"
    for step in (f"{new} -keyout authority.key -out authority.pem", f"{new} {own} -keyout key.pem -out server.pem"):
        subprocess.run(step.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "server.pem").read_text())
    return both, folder / "authority.pem"
