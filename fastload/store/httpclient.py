"""Ranged GETs over plain sockets, received straight into the caller's buffer, and PUTs out of it (see `httpupload`).

The store's CPU cost is the cost of moving bytes, and here they are moved once: from the socket into `out`, or over TLS
into OpenSSL's buffer of one record, decrypted there, and from that into `out`; always with the GIL released. Measured
by `bench.fetch` on two cores shared with the server (and, in these runs, with others), 8 MiB ranges, 8 at a time,
CPU-seconds a GB of the receiving process, medians of five runs in turn:

|                   | plain | TLS  | TLS, records of 4 KiB |
|-------------------|-------|------|-----------------------|
| this              | 0.26  | 0.91 | 1.54                  |
| http.client       | 0.25  | 1.02 | 1.81                  |
| urllib3, readinto | 0.40  | 1.25 |                       |
| obstore, stream   | 0.58  | 1.43 | 2.91                  |
| a bare socket     | 0.22  | 0.86 |                       |

urllib3's `readinto` reads bytes and copies them; around http.client's it comes to the same as http.client. With the
cores to themselves both ways take about a tenth less over TLS. A bare socket saves the parsing of headers only, for
which http.client's handling of odd answers is worth having.

What did not help: feeding OpenSSL through memory by large receives (half the system calls, two copies more: 0.89);
MSG_WAITALL a MiB a call (plain, 0.33 against 0.34) and a receive buffer of 4 MiB. SO_RCVLOWAT hangs at the end of a
body: a socket with a timeout is polled first, and never readable for less than the mark. TLS in the kernel could not be
tried (this one has no tls module), and OpenSSL's reading ahead cannot be turned on from Python.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from fastload.errors import StoreError, StoreUnavailableError
from fastload.store import watch
from fastload.store.answers import Refusal, is_doubtful, truncated, unreachable, unresolved
from fastload.store.httpupload import Upload
from fastload.store.proxies import Proxy
from fastload.store.replies import Reply, asked, bad_reply, check, checksum_of, size_told
from fastload.store.types import ObjectInfo

_CONNECT_S = 10.0
# The longest silence within an answer. A busy store may think for seconds, and is then retried anyway.
_SILENCE_S = 30.0
# The longest answer: one that drips must not hold its buffer for ever.
_ANSWER_S = 300.0
# Servers close idle connections after a minute or more; one that is younger is most likely alive.
_IDLE_S = 45.0
_BODY_MAX = 64 * 1024


@dataclass(slots=True)
class _Pooled:
    connection: http.client.HTTPConnection
    used_at: float = field(default_factory=time.monotonic)


class HttpClient:
    """Connections to one host, one per request in flight, kept for the next. Safe to use from several
    threads.
    """

    def __init__(self, base_url: str, root_certificate: str | None = None, proxy: Proxy | None = None) -> None:
        """`base_url` is scheme, host and port; `root_certificate` (PEM) is trusted beside the system's. A `proxy` is an
        http one.
        """
        assert proxy is None or proxy.is_http, "proxies of other kinds are not spoken to"
        parts = urllib.parse.urlsplit(base_url)
        self.endpoint = base_url
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self.host = parts.netloc.rpartition("@")[2]  # as it stands in the Host header
        self._proxy = proxy
        self._context = tls_context(root_certificate) if self._secure else None
        self._lock = threading.Lock()
        self._idle: list[_Pooled] = []
        self._closed = False
        self._may_ask = True  # before a large body is sent, whether it may be: not all servers answer that

    def get_range(self, info: ObjectInfo, target: str, headers: Mapping[str, str], start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of that version of the object from `start`.

        `target` is its path and query, encoded; `headers` must ask for that range. Raises what `Refusal.error` and
        `check` give, and `StoreUnavailableError` for a connection that fails or a body that ends early. After a reply
        that does not fit, the next request goes over a new connection.
        """
        with self._asked(info.url, target, headers) as (response, connection, reply):
            if reply.status >= 300 and reply.status != 304:
                body = response.read(_BODY_MAX).decode(errors="replace")
                raise Refusal.from_body(reply.status, body).error(info.url, self.endpoint)
            check(reply, info, start, len(out), self.endpoint)
            # Where nothing says how long the body is, or the connection ends with it, it is the response's to read.
            sock = connection.sock if response.length is not None else None
            got = _fill(response, sock, out)
            if got != len(out):
                raise truncated(info.url, got, len(out), start)
            if sock is None and response.read(1) != b"":
                came = f"{reply}, and a body that continues after them"
                raise bad_reply(info.url, self.endpoint, asked(info, start, len(out)), came)
            if self._secure:
                return
            checksum = checksum_of(response.getheaders(), reply.etag, is_whole=len(out) == info.size)
            if checksum is not None and not checksum.is_of(out):
                came = f"{reply}, whose bytes do not match the {checksum.algorithm} in its headers"
                raise bad_reply(info.url, self.endpoint, asked(info, start, len(out)), came)

    def first_byte(self, url: str, target: str, headers: Mapping[str, str]) -> Reply:
        """What the reply to a request for the object's first byte says: as a rule of what size it is, or else that the
        server serves no ranges. `headers` are sent besides. Errors as of `get_range`.
        """
        with self._asked(url, target, {"Range": "bytes=0-0", **headers}) as (response, _, reply):
            if reply.status >= 300 and reply.status not in (304, 416):
                body = response.read(_BODY_MAX).decode(errors="replace")
                raise Refusal.from_body(reply.status, body).error(url, self.endpoint)
            is_odd = size_told(reply) is None
            if is_odd and reply.status != 200:
                raise bad_reply(url, self.endpoint, "the first byte", str(reply))
            if is_odd or response.length is None:
                response.will_close = True
            else:
                response.read(_BODY_MAX)
            return reply

    def put(self, url: str, target: str, headers: Mapping[str, str], data: memoryview) -> Mapping[str, str]:
        """Store `data` at `target`, as of `get_range`; the headers of the answer, by their names in small letters."""
        upload = Upload(data, may_ask=self._may_ask)
        with self._asked(url, target, headers, upload) as (response, _, reply):
            body = response.read(_BODY_MAX)
            if reply.status >= 300:
                raise Refusal.from_body(reply.status, body.decode(errors="replace")).error(url, self.endpoint)
            if not upload.is_whole or reply.status not in (200, 201, 204):
                came = f"{reply}, and that before all was sent" if not upload.is_whole else str(reply)
                raise bad_reply(url, self.endpoint, "to write it", came)
            if response.read(1):
                response.will_close = True
            return {name.lower(): value for name, value in response.getheaders()}

    def renew(self) -> None:
        """What comes next goes over new connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for pooled in idle:
            pooled.connection.close()

    def close(self) -> None:
        """Close idle connections, and those in use as they come back."""
        with self._lock:
            self._closed = True
        self.renew()

    @contextlib.contextmanager
    def _asked(
        self, url: str, target: str, headers: Mapping[str, str], upload: Upload | None = None
    ) -> Iterator[tuple[http.client.HTTPResponse, http.client.HTTPConnection, Reply]]:
        """The reply, whose body is read within the block. Its connection is kept where the block ends without an error,
        and one whose reply is not to be trusted takes the idle ones along: they lead through the same machines.
        """
        response, connection = self._ask(url, target, headers, upload)
        keep = False
        try:
            yield response, connection, Reply.of(response.status, response.getheaders(), response.length)
            keep = not response.will_close
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, StoreError):
                if is_doubtful(error):
                    self.renew()
                raise
            raise self._failed(url, error) from error
        finally:
            watch.through(None)
            response.close()
            self._put_back(connection, keep)

    def _ask(
        self, url: str, target: str, headers: Mapping[str, str], upload: Upload | None
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        """Send the request and read the answer's head, on a kept connection if there is one."""
        kept = self._take()
        if kept is not None:
            try:
                return self._exchange(kept, target, headers, upload), kept
            except (OSError, http.client.HTTPException) as error:
                _close(kept)
                if upload is not None and upload.is_begun:
                    raise self._failed(url, error) from error
                # The server closed it while it lay idle: no failure of the store, and said nowhere.
            except BaseException:
                _close(kept)
                raise
        if watch.cancelled():
            raise watch.given_up()
        connection = self._connect()
        try:
            return self._exchange(connection, target, headers, upload), connection
        except (OSError, http.client.HTTPException) as error:
            _close(connection)
            raise self._failed(url, error) from error
        except BaseException:
            _close(connection)
            raise

    def _failed(self, url: str, error: Exception) -> StoreUnavailableError:
        if isinstance(error, socket.gaierror):
            proxy = self._proxy.host if self._proxy is not None else ""
            return unresolved(url, self.endpoint, for_now=error.errno == socket.EAI_AGAIN, proxy=proxy)
        return unreachable(url, self.endpoint, _reason(error))

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        target: str,
        headers: Mapping[str, str],
        upload: Upload | None,
    ) -> http.client.HTTPResponse:
        if connection.sock is None:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(_SILENCE_S)
        watch.through(connection.sock)
        headers = {"Host": self.host, **headers}
        if self._proxy is not None and not self._secure:
            target, headers = f"http://{self.host}{target}", {**headers, **self._proxy.headers}
        if upload is None:
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
        else:
            response = upload.exchange(connection.sock, target, headers)
            self._may_ask = self._may_ask and not upload.asked_in_vain
        watch.first_byte()
        return response

    def _connect(self) -> http.client.HTTPConnection:
        host, port = (self._proxy.host, self._proxy.port) if self._proxy else (self._host, self._port)
        if self._context is None:
            return http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
        connection = http.client.HTTPSConnection(host, port, timeout=_CONNECT_S, context=self._context)
        if self._proxy is not None:
            connection.set_tunnel(self._host, self._port, self._proxy.headers)
        return connection

    def _take(self) -> http.client.HTTPConnection | None:
        """The connection used last: it is the least likely to have been closed, and the others may age away. One that
        sends bytes without a request has been closed, or the reply before was longer than it said: what comes
        next would be taken for the answer.
        """
        with self._lock:
            old = self._aged()
            while (taken := self._idle.pop() if self._idle else None) is not None and _speaks(taken.connection.sock):
                old.append(taken)
        for pooled in old:
            pooled.connection.close()
        return taken.connection if taken is not None else None

    def _put_back(self, connection: http.client.HTTPConnection, keep: bool) -> None:
        with self._lock:
            old = self._aged()
            keep = keep and not self._closed
            if keep:
                self._idle.append(_Pooled(connection))
        for pooled in old:
            pooled.connection.close()
        if not keep:
            connection.close()

    def _aged(self) -> list[_Pooled]:
        """Those that have lain idle for too long, which leave the pool. Under the lock."""
        too_old = time.monotonic() - _IDLE_S
        count = next((at for at, pooled in enumerate(self._idle) if pooled.used_at >= too_old), len(self._idle))
        old, self._idle = self._idle[:count], self._idle[count:]
        return old


def _speaks(sock: socket.socket) -> bool:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _close(connection: http.client.HTTPConnection) -> None:
    """One whose request failed."""
    watch.through(None)
    connection.close()


def _fill(response: http.client.HTTPResponse, sock: socket.socket | None, out: memoryview) -> int:
    """Receive into `out` until it is full or the body ends; the bytes received. From `sock`, if it is known to hold the
    body of `response`, straight to their place.
    """
    deadline = time.monotonic() + _ANSWER_S
    got = 0
    if sock is not None:
        came_with_head = len(response.peek())
        if came_with_head > len(out):  # the body is longer than was said; what follows it is no reply
            response.will_close = True
        got = response.readinto(out[:came_with_head])
    receive = _receiver(response, sock)
    while (left := len(out) - got) > 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {got} of {len(out)} bytes came within {_ANSWER_S:g} s")
        count = receive(left, out[got:])
        if count == 0:
            break
        got += count
    return got


def _receiver(response: http.client.HTTPResponse, sock: socket.socket | None) -> Callable[[int, memoryview], int]:
    """What receives at most so many bytes into a buffer."""
    if sock is None:
        return lambda _, out: response.readinto(out)
    if isinstance(sock, ssl.SSLSocket):
        # Called for each record of 16 KiB. `recv_into` comes to the same by one more call of Python, http.client's
        # `readinto` by two.
        return cast(Callable[[int, memoryview], int], sock.read)
    return lambda _, out: sock.recv_into(out)


def tls_context(root_certificate: str | None) -> ssl.SSLContext:
    """Named one by one, since `ssl` by itself follows the variables of this process's environment."""
    file, folder = _authorities()
    return ssl.create_default_context(cafile=file, capath=folder, cadata=root_certificate)


def has_trusted_roots() -> bool:
    """Whether Python's OpenSSL knows of any certificates; builds that look in the wrong place have none."""
    file, folder = _authorities()
    return file is not None or (folder is not None and bool(os.listdir(folder)))


def _authorities() -> tuple[str | None, str | None]:
    """The machine's file and folder of certificates, where there are any."""
    paths = ssl.get_default_verify_paths()
    file, folder = paths.openssl_cafile, paths.openssl_capath
    return file if os.path.isfile(file) else None, folder if os.path.isdir(folder) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is not accepted ({error.verify_message}; root_certificate names another issuer)"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
