"""The page's process: started as a child or in the background, told to end, and how it says that it is ready."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastload.cache.directory import opened
from fastload.config import default_cache_dir
from fastload.errors import ConfigError, FastloadError, ServiceError, from_wire, to_wire
from fastload.page.guard import Door
from fastload.page.listener import LISTEN, Place, Running, announce, listen, only_page, running
from fastload.service.host.launch import child_environment

log = logging.getLogger("fastload.page")

_START_S = 60.0
_LOG = "page.log"
# Connections at a time, streams included; above it, replies are 503.
_CONNECTIONS_MOST = 64
_END_S = 5


def command(
    directory: Path,
    *,
    listen_at: str = LISTEN,
    hosts: Sequence[str] = (),
    idle_s: float = math.inf,
    ends_with_stdin: bool = False,
) -> list[str]:
    """The command line of a page for a cache directory. It holds no secret: the process makes its token itself.

    `idle_s`: it ends when no browser was connected for so long. `ends_with_stdin`: it ends when its standard input
    does, for one whose parent may be killed.
    """
    words = [sys.executable, "-m", "fastload.page", f"--cache={os.path.abspath(directory)}"]
    if listen_at.startswith("unix:"):
        listen_at = f"unix:{os.path.abspath(listen_at.removeprefix('unix:'))}"
    words.append(f"--listen={listen_at}")
    words += [f"--host={host}" for host in hosts]
    if idle_s != math.inf:
        words.append(f"--idle-s={idle_s}")
    if ends_with_stdin:
        words.append("--ends-with-stdin")
    return words


def start(directory: Path, *, listen_at: str = LISTEN, hosts: Sequence[str] = (), idle_s: float = math.inf) -> Running:
    """The directory's page, started in the background where none runs: it outlives this process. Its error where it
    cannot start.
    """
    found = running(directory)
    if found is not None:
        return found
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as ready:
        with open(writing, "wb", buffering=0):
            words = [*command(directory, listen_at=listen_at, hosts=hosts, idle_s=idle_s), f"--ready-fd={writing}"]
            process = subprocess.Popen(
                [*words, "--detach"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[writing],
                env=child_environment(os.environ),  # without the user's credentials
                cwd="/",
            )
        process.wait()  # the parent of the one that serves
        if not select.select([ready], [], [], _START_S)[0]:
            raise ServiceError(f"the page of {directory} has not started in {_START_S:.0f} s")
        line = ready.read(1 << 16)
    if not line:
        raise ServiceError(f"the page of {directory} ended as it started; `python -m fastload.page` may say why")
    said, found = json.loads(line), running(directory)
    if found is None and "error" in said:  # else another one was just being started
        raise from_wire(*said["error"])
    if found is None:
        raise ServiceError(f"the page of {directory} ended as it started; {directory / _LOG} may say why")
    return found


def run(
    directory: Path,
    *,
    listen_at: str = LISTEN,
    hosts: Sequence[str] = (),
    idle_s: float = math.inf,
    ends_with_stdin: bool = False,
    on_ready: Callable[[Running], None] = lambda _: None,
) -> None:
    """Serve the page until SIGTERM or SIGINT, or as `command` says. Once in a process, in its main thread."""
    _check_extra()
    with only_page(directory) as file, contextlib.closing(listen(listen_at, hosts)) as place:
        door = Door(place.hosts)

        def ready() -> None:
            on_ready(announce(file, place, door.token))

        asyncio.run(_serve(directory, place, door, idle_s, ends_with_stdin, ready))


def _check_extra() -> None:
    try:
        import starlette
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the page needs {error.name}: pip install 'fastload[page]'") from error
    if tuple(map(int, re.findall(r"\d+", starlette.__version__)[:3])) < (1, 0, 1):
        raise ConfigError(
            f"the page needs starlette 1.0.1 or later, and {starlette.__version__} is installed: "
            "pip install -U 'fastload[page]'"
        )


async def _serve(
    directory: Path, place: Place, door: Door, idle_s: float, ends_with_stdin: bool, ready: Callable[[], None]
) -> None:
    import uvicorn

    from fastload.page.app import Board, Streams, application
    from fastload.page.watcher import Seen, Watcher

    loop = asyncio.get_running_loop()
    board = Board()
    streams = Streams(board, lambda: server.should_exit)
    config = uvicorn.Config(
        application(door, streams),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # not what others send, who could fill a disk with it
        access_log=False,  # addresses hold the token
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS_MOST,
        timeout_graceful_shutdown=_END_S,
    )
    server = uvicorn.Server(config)
    idle_since = loop.time()

    def end() -> None:
        server.should_exit = True
        board.wake()

    def post(seen: Seen) -> None:  # each second or so
        nonlocal idle_since
        board.post(seen)
        if streams.count:
            idle_since = loop.time()
        elif loop.time() - idle_since > idle_s:
            log.info("no browser was connected for %.0f s", idle_s)
            end()

    def on_seen(seen: Seen) -> None:
        loop.call_soon_threadsafe(post, seen)

    def read_stdin() -> None:
        if not os.read(0, 1 << 16):
            loop.remove_reader(0)
            end()

    # The server raises the signals that it took again when it has ended; these stay, and take them.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    if ends_with_stdin:
        loop.add_reader(0, read_stdin)
    watcher = Watcher(directory, on_seen)
    try:
        ready()
        await server.serve(sockets=[place.sock])
    finally:
        await asyncio.to_thread(watcher.stop)


def main(arguments: Sequence[str]) -> int:
    """`python -m fastload.page`; the exit status."""
    options = _parser().parse_args(arguments)
    directory = options.cache or default_cache_dir()
    try:
        _keep_log(directory if options.detach else None)
        run(
            directory,
            listen_at=options.listen,
            hosts=options.host,
            idle_s=options.idle_s,
            ends_with_stdin=options.ends_with_stdin,
            on_ready=lambda page: _say_ready(page, options.ready_fd),
        )
    except FastloadError as error:
        if options.ready_fd >= 0:
            _report(options.ready_fd, {"status": "error", "error": list(to_wire(error))})
        print(f"fastload: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastload.page",
        description="The page of a node's cache. `fastload status --open` starts it and prints its address.",
        epilog="example: python -m fastload.page --cache /nvme/fastload --listen 127.0.0.1:8090",
    )
    parser.add_argument("--cache", type=Path, help="the cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload")
    parser.add_argument("--listen", default=LISTEN, help="HOST:PORT or unix:PATH; default: %(default)s, any free port")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        help="another HOST[:PORT] by which browsers may call it, exactly as they send it; may be repeated",
    )
    parser.add_argument("--idle-s", type=float, default=math.inf, help="end when no browser came for so many seconds")
    parser.add_argument("--ends-with-stdin", action="store_true", help="end when the standard input does")
    parser.add_argument("--ready-fd", type=int, default=-1, help="a pipe on which to report how the start went")
    parser.add_argument("--detach", action="store_true", help="serve in a child, in the background")
    return parser


def _keep_log(directory: Path | None) -> None:
    """Log to stderr, or for one in the background to a file that begins anew."""
    handler: logging.Handler = logging.StreamHandler()
    if directory is not None:
        with contextlib.suppress(FileNotFoundError), opened(directory) as root:  # `run` says so
            handler = logging.FileHandler(root / _LOG, "w")
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def _say_ready(page: Running, ready_fd: int) -> None:
    if ready_fd >= 0:
        _report(ready_fd, {"status": "ready"})
    # The token is for the user's eyes only: not in a log, where output of a service goes.
    print(page.url if sys.stdout.isatty() else f"the page is at {page.listen}", flush=True)


def _report(fd: int, word: dict[str, object]) -> None:
    with open(fd, "wb") as pipe, contextlib.suppress(BrokenPipeError):  # the starter did not wait for it
        pipe.write(json.dumps(word).encode())
