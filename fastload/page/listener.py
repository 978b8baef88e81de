"""Where the page listens, and the file in the cache directory that says so.

The file, `page.json`, holds the address and the token. It is in a directory of mode 0700 and is 0600 itself. The page
holds a lock on it as long as it runs: what a dead page left there must not be trusted, since another user may have its
port by now and would be sent the token.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from fastload.cache.directory import opened
from fastload.errors import CacheError, ConfigError, ServiceError

LISTEN = "127.0.0.1:0"
_FILE = "page.json"
# The port that people forward to a Unix socket, which browsers then send in `Host`.
FORWARDED_PORT = 8090
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\[\]:/]+):(?P<port>\d{1,5})")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# A reader that takes nothing for so long is disconnected by the kernel; what waits for it is little.
_STALLED_MS = 30_000
_SEND_BUFFER_BYTES = 256 << 10
# `running` holds the lock for a moment.
_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.05
# One that has the lock says at once where it listens.
_STARTING_S = 30.0


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A page that runs: what the file says."""

    pid: int
    listen: str  # "127.0.0.1:41235", or "unix:/path"
    host: str  # and how browsers call it
    token: str

    @property
    def url(self) -> str:
        """The address with the token, for the browser."""
        return f"http://{self.host}/?token={quote(self.token)}"


@dataclass(frozen=True)
class Place:
    """Where to listen, and by which names browsers may call it."""

    listen: str
    host: str  # the one to print
    hosts: frozenset[str]
    sock: socket.socket

    def close(self) -> None:
        """Listen no more. A Unix socket leaves the file system."""
        self.sock.close()
        if self.listen.startswith("unix:"):
            Path(self.listen.removeprefix("unix:")).unlink(missing_ok=True)


def listen(text: str, hosts: Sequence[str]) -> Place:
    """Listen at "HOST:PORT" or "unix:PATH". Addresses that other machines reach need `hosts`, and nothing else does."""
    given = [host.lower() for host in hosts]
    if text.startswith("unix:"):
        path = os.path.abspath(text.removeprefix("unix:"))
        names = {f"{name}:{FORWARDED_PORT}" for name in _LOOPBACK_NAMES}
        host = given[0] if given else f"localhost:{FORWARDED_PORT}"
        return Place(f"unix:{path}", host, frozenset({*given, *names}), _listen_unix(path))
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"listen={text!r} must be HOST:PORT such as '127.0.0.1:8090', or unix:PATH")
    host = match["host"]
    is_local = _is_loopback(host)
    if not is_local and not given:
        raise ConfigError(
            f"listen={text!r} is reached by other machines; say by which names browsers may call it, such as "
            f"--host={socket.gethostname()}:{match['port']}, or listen at 127.0.0.1"
        )
    sock = _listen_tcp(host.strip("[]"), int(match["port"]), text)
    port = sock.getsockname()[1]
    names = {f"{name}:{port}" for name in {*_LOOPBACK_NAMES, host}} if is_local else set()
    return Place(f"{host}:{port}", given[0] if given else f"{host}:{port}", frozenset({*given, *names}), sock)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may mean anything
        return False


def _listen_tcp(host: str, port: int, text: str) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Sockets that are accepted inherit both.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
            sock.bind(address)
            sock.listen()
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ServiceError(f"cannot listen at {text}: {error.strerror or error}; name another port") from error
    return sock


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # from the moment that it is there, only for this user
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen()
    except OSError as error:
        sock.close()
        raise ServiceError(f"cannot listen at unix:{path}: {error.strerror or error}; name another path") from error
    finally:
        os.umask(mask)
    return sock


def _remove_stale(path: str) -> None:
    """A socket at which nothing listens any more. Nothing else is removed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def running(directory: Path) -> Running | None:
    """The directory's page, if one runs; one that is just starting is waited for. CacheError where the directory is not
    ours.
    """
    try:
        fd = _open(directory, os.O_RDONLY)
    except FileNotFoundError:  # no directory, or no page has ever run
        return None
    with open(fd, "rb") as file:
        deadline = time.monotonic() + _STARTING_S
        while not _lock(fd, fcntl.LOCK_SH):  # else it was left by one that has ended
            file.seek(0)
            try:
                return msgspec.json.decode(file.read(), type=Running)
            except msgspec.DecodeError as error:  # it is just starting
                if time.monotonic() > deadline:
                    raise ServiceError(f"the page of {directory} does not come to listen") from error
                time.sleep(_LOCK_PAUSE_S)
        return None


@contextlib.contextmanager
def only_page(directory: Path) -> Iterator[int]:
    """Be the directory's page within the block, with the file for `announce`. ServiceError where there is one,
    CacheError where there is no directory.
    """
    try:
        fd = _open(directory, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError as error:
        raise CacheError(f"there is no cache directory {directory}; jobs make it, or `fastload daemon`") from error
    try:
        if not any(_lock_patiently(fd) for _ in range(_LOCK_TRIES)):
            raise ServiceError(f"{directory} has a page already; `fastload status --open` prints its address")
        os.ftruncate(fd, 0)
        yield fd
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def announce(fd: int, place: Place, token: str) -> Running:
    """Say in the file where the page is."""
    said = Running(pid=os.getpid(), listen=place.listen, host=place.host, token=token)
    os.write(fd, msgspec.json.encode(said))
    return said


def _open(directory: Path, flags: int) -> int:
    try:
        with opened(directory) as root:
            return os.open(root / _FILE, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (CacheError, FileNotFoundError):
        raise
    except OSError as error:
        raise CacheError(f"cannot open {directory / _FILE}: {error.strerror or error}") from error


def _lock_patiently(fd: int) -> bool:
    if _lock(fd, fcntl.LOCK_EX):
        return True
    time.sleep(_LOCK_PAUSE_S)
    return False


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
