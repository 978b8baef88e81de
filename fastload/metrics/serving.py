"""Where metrics are to be had: an HTTP server on this machine, a Unix socket, or a file for node_exporter.

The server answers GET and HEAD on /metrics, /healthz and /readyz. It is for this machine: a port on 127.0.0.1 is open
to all of its users and to web pages in their browsers, so a request that names another host is refused, and names of
data sets are all that it gives away. A Unix socket is open to this user alone. Other addresses have to be wanted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import socketserver
import stat
import sys
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastload.client.cache import AnyCache, Cache, Handle
from fastload.client.operator import Operator
from fastload.config import default_cache_dir, format_bytes
from fastload.errors import ConfigError, FastloadError
from fastload.lifecycle import Ending, end_at_exit, reset_on_fork
from fastload.metrics.collector import Collector
from fastload.snapshot import Snapshot

if TYPE_CHECKING:
    from prometheus_client.core import CollectorRegistry

LISTEN = "127.0.0.1:9432"
_REQUESTS_MAX = 16  # at a time
_REQUEST_S = 10.0  # for a client to send its request, and to take the answer
_LOOK_UP_S = 0.5  # how often the server sees that it is to end

log = logging.getLogger(__name__)
end_at_exit()


def serve(
    cache: AnyCache = None,
    listen: str | None = LISTEN,
    *,
    textfile: str | os.PathLike[str] | None = None,
    textfile_every_s: float = 15.0,
    allow_remote: bool = False,
) -> Serving:
    """Serve metrics of a cache, by default this user's, from threads of this process until `close()`.

    `listen`: "HOST:PORT" of this machine (port 0: any that is free), "unix:PATH", or None. An address that other
    machines reach needs `allow_remote=True`. `textfile`: a file, named *.prom, that is replaced each so many seconds,
    for node_exporter. ConfigError where one of them cannot be had, or prometheus-client is not installed.
    """
    if find_spec("prometheus_client") is None:
        raise ConfigError("metrics need prometheus-client; pip install 'fastload[metrics]'")
    if listen is None and textfile is None:
        raise ConfigError("listen=None and textfile=None: name where metrics are to be had")
    directory = _directory_of(cache)
    file = None if textfile is None else _checked_textfile(textfile, textfile_every_s)
    server = None if listen is None else _listening(listen, allow_remote, directory)
    return Serving(directory, server, file, textfile_every_s)


class Serving:
    """Metrics that are served; also a context manager. `address` is where, as `listen` is written, with its port."""

    def __init__(self, directory: Path, server: _Server | None, textfile: Path | None, textfile_every_s: float) -> None:
        self.address = None if server is None else server.address
        has_ended = threading.Event()
        threads = []
        if server is not None:
            threads.append(threading.Thread(target=server.serve_forever, args=(_LOOK_UP_S,), name="fastload-metrics"))
            reset_on_fork(server, _Server.forget)
        if textfile is not None:
            arguments = directory, textfile, textfile_every_s, has_ended
            threads.append(threading.Thread(target=_write_each, args=arguments, name="fastload-textfile"))
        for thread in threads:
            thread.daemon = True
            thread.start()
        self._end = Ending(self, _end, server, textfile, has_ended, threads, waits=True, at_exit=True)

    def close(self) -> None:
        """Serve no more, and remove socket and file: what they say would be of the past. May be called twice."""
        self._end()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(
    server: _Server | None, textfile: Path | None, has_ended: threading.Event, threads: list[threading.Thread]
) -> None:
    has_ended.set()
    if server is not None:
        server.shutdown()
        server.close()
    for thread in threads:
        thread.join()
    if textfile is not None:
        textfile.unlink(missing_ok=True)


def _directory_of(cache: AnyCache) -> Path:
    if isinstance(cache, Cache | Handle):
        return cache.directory
    return Handle.path_of(default_cache_dir() if cache is None else cache)


def _snapshot_of(directory: Path) -> Snapshot:
    """Of the service that runs now; the errors of `Operator.connect`."""
    with Operator.connect(directory, "metrics") as operator:
        return operator.snapshot()


def _registry(directory: Path) -> CollectorRegistry:
    from prometheus_client.core import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(lambda: _snapshot_of(directory)))
    return registry


# The file


def _checked_textfile(textfile: str | os.PathLike[str], every_s: float) -> Path:
    path = Path(os.path.abspath(textfile))
    if path.suffix != ".prom":
        raise ConfigError(f"textfile={str(textfile)!r}: node_exporter reads files that are named *.prom only")
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise ConfigError(
            f"textfile={str(textfile)!r} cannot be written; give a file in a directory that this user may write to"
        )
    if not 1 <= every_s <= 3600:
        raise ConfigError(f"textfile_every_s={every_s!r} must be between 1 and 3600 seconds")
    return path


def _write_each(directory: Path, path: Path, every_s: float, has_ended: threading.Event) -> None:
    from prometheus_client.exposition import write_to_textfile

    registry, said = _registry(directory), ""
    while True:
        try:
            write_to_textfile(str(path), registry)  # beside it, and then renamed
            said = ""
        except OSError as error:
            if str(error) != said:  # once, as long as it lasts
                log.warning("metrics cannot be written to %s: %s", path, error)
            said = str(error)
        if has_ended.wait(every_s):
            return


# The server


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers at a socket that listens."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, place: _Place, directory: Path) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self._place, self.directory = sock, place, directory
        self.registry = _registry(directory)
        self._free = threading.Semaphore(_REQUESTS_MAX)
        port = 0 if place.socket_path is not None else sock.getsockname()[1]
        self.address = f"unix:{place.socket_path}" if place.socket_path is not None else f"{place.shown_host}:{port}"
        self.hosts = None
        if place.is_local and place.socket_path is None:
            self.hosts = {f"{host}:{port}" for host in ("127.0.0.1", "[::1]", "localhost", place.shown_host)}

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread. There are few: a request that comes while all are busy is not answered."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # else the client has gone, or said nothing for too long
            log.warning("a request for metrics was not answered", exc_info=error)

    def close(self) -> None:
        """Listen no more."""
        self.server_close()
        if self._place.socket_path is not None:
            self._place.socket_path.unlink(missing_ok=True)

    def forget(self) -> None:
        """In a forked process: its parent listens."""
        self.socket.close()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = _REQUEST_S
    server_version, sys_version = "fastload", ""

    def do_GET(self) -> None:
        if self.server.hosts is not None and self.headers.get("Host", "").lower() not in self.server.hosts:
            self._answer(403, "this is served to this machine only, under the address that it listens at\n")
            return
        path, _, query = self.path.partition("?")
        match path:
            case "/metrics":
                self._metrics()
            case "/healthz":
                self._answer(*self._state(lambda snapshot: (True, "ok")))
            case "/readyz":
                names = urllib.parse.parse_qs(query, keep_blank_values=True).get("data", [])
                self._answer(*self._state(lambda snapshot: readiness(snapshot, names)))
            case _:
                self._answer(404, "there are /metrics, /healthz and /readyz\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _metrics(self) -> None:
        """In the form of OpenMetrics where that is wanted. The library's own choice fails on headers that are none."""
        from prometheus_client import generate_latest
        from prometheus_client.openmetrics import exposition as openmetrics

        if "application/openmetrics-text" in self.headers.get("Accept", ""):
            self._send(200, openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(self.server.registry))
        else:
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self.server.registry))

    def _state(self, judge: Callable[[Snapshot], tuple[bool, str]]) -> tuple[int, str]:
        try:
            is_well, says = judge(_snapshot_of(self.server.directory))
        except (FastloadError, OSError) as error:
            is_well, says = False, str(error)
        return (200 if is_well else 503), f"{says}\n"

    def _answer(self, code: int, text: str) -> None:
        self._send(code, "text/plain; charset=utf-8", text.encode("utf-8", "backslashreplace"))

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Scrapes are no news."""


def readiness(snapshot: Snapshot, names: Sequence[str]) -> tuple[bool, str]:
    """Whether the data sets of these names are warmed, and what to say; without a name, whether the service answers."""
    for name in names:
        jobs = [job for job in snapshot.jobs if job.name == name]
        if not jobs:
            known = ", ".join(sorted({job.name for job in snapshot.jobs})) or "none"
            return False, f"no job warms {name!r}; those that are warmed: {known}"
        for job in jobs:
            if not job.is_ready:
                held = f"{format_bytes(job.held_bytes)} of {format_bytes(job.total_bytes)} held"
                return False, f"{name}: {job.state}, {held}" + (f", {job.error}" if job.error else "")
    return True, "ok"


class _Place(NamedTuple):
    """Where to listen: at a socket's path, or a host and port."""

    socket_path: Path | None
    host: str
    port: int
    is_local: bool

    @property
    def shown_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def _place(listen: str, allow_remote: bool) -> _Place:
    """What is written as `listen`; ConfigError where it is no such thing, or not of this machine."""
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if not path:
            raise ConfigError(f"listen={listen!r} names no socket; write it as unix:/run/user/1000/fastload.sock")
        return _Place(Path(os.path.abspath(path)), "", 0, is_local=True)
    host, mark, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not mark or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"listen={listen!r} is no address with a port, such as {LISTEN}, nor unix:PATH")
    if not address.is_loopback and not allow_remote:
        raise ConfigError(
            f"listen={listen!r} can be reached from other machines, which would see the names of data sets; "
            f"listen at {LISTEN}, or say allow_remote=True"
        )
    return _Place(None, str(address), int(port), address.is_loopback)


def _listening(listen: str, allow_remote: bool, directory: Path) -> _Server:
    place = _place(listen, allow_remote)
    family = (
        socket.AF_UNIX if place.socket_path is not None else socket.AF_INET6 if ":" in place.host else socket.AF_INET
    )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if place.socket_path is not None:
            _bind_path(sock, place.socket_path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((place.host, place.port))
        sock.listen(_REQUESTS_MAX)
        return _Server(sock, place, directory)
    except OSError as error:
        sock.close()
        raise ConfigError(f"listen={listen!r}: {error.strerror or error}; name another address or port") from error


def _bind_path(sock: socket.socket, path: Path) -> None:
    """For this user alone. A socket that a process left which was killed is in nobody's way."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _is_listened_at(path):
            path.unlink()
    sock.bind(str(path))
    path.chmod(0o600)  # before it listens


def _is_listened_at(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True
