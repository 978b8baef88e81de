"""The service process: arguments, log, signals, and the report to the process that started it."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from fastload.cache import CacheDirectory
from fastload.config import CacheLimits
from fastload.cpu_priority import take_long_slices
from fastload.errors import FastloadError, to_wire
from fastload.rendezvous import ServiceLocation, StandIn
from fastload.service.host.launch import clean_environment
from fastload.service.host.logs import ServiceLog
from fastload.service.host.server import Server

log = logging.getLogger("fastload.service")


def main(arguments: Sequence[str]) -> int:
    """Run the service; the exit status. The process's environment is the service's from then on."""
    clean_environment()
    take_long_slices()  # and all threads of this process, which begin as the one that starts them
    options = _parser().parse_args(arguments)
    service_log = ServiceLog()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {os.getpid()} %(levelname)s %(message)s", handlers=[service_log]
    )
    starter = _Starter(options.ready_fd)
    try:
        limits = None if options.limits is None else CacheLimits(**json.loads(options.limits))
        directory = _place(Path(options.directory), limits, options.stand_in)
        if not directory.try_lock():
            starter.report({"status": "taken"})
            return 0
        service_log.keep_small(lambda: None if directory.is_lost else directory.root / directory.log_path.name)
        ended = asyncio.run(_serve(directory, options.idle_s, starter))
    except FastloadError as error:
        log.error("%s", error)
        starter.report({"status": "error", "error": list(to_wire(error))})
        return 1
    except FileNotFoundError:  # the directory was removed meanwhile: the starter makes it again
        log.exception("the directory was removed")
        starter.report({"status": "taken"})
        return 0
    directory.unlock()
    log.info("ended")
    if not ended:
        # A read that hangs in a dead disk or socket cannot be ended from here; nothing depends on it any more.
        os._exit(0)
    return 0


def _place(path: Path, limits: CacheLimits | None, stand_in: bool) -> ServiceLocation:
    if stand_in and limits is not None:
        return StandIn(path, limits)
    return CacheDirectory.open(path, otherwise=limits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastload.service", description="The cache service of a directory.")
    parser.add_argument("--directory", required=True, help="the cache directory")
    parser.add_argument("--limits", help="those of the job that starts this, for a directory that has none; as JSON")
    parser.add_argument("--stand-in", action="store_true", help="serve in place of the directory, and leave it alone")
    parser.add_argument("--idle-s", type=float, default=30.0, help="seconds to live after the last consumer")
    parser.add_argument("--ready-fd", type=int, default=-1, help="a pipe on which to report how the start went")
    parser.add_argument(
        "--detach", action="store_true", help="end the process that was started, and serve in a child of it"
    )
    return parser


async def _serve(directory: ServiceLocation, idle_s: float, starter: _Starter) -> bool:
    server = Server(directory, idle_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    # A job's terminal that is closed is no reason to end: other jobs have others.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def ready() -> bool:
        for warning in directory.warnings:
            log.warning("%s", warning)
        log.info("serving %s with %s", directory.path, directory.limits)
        return starter.report({"status": "ready"})

    return await server.run(ready)


class _Starter:
    """The pipe to the process that started this one; for one report."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if fd >= 0:
            os.set_inheritable(fd, False)

    def report(self, word: dict[str, object]) -> bool:
        """Whether it did not go away meanwhile."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return True
        try:
            os.write(fd, json.dumps(word).encode() + b"\n")
        except BrokenPipeError:
            return False
        finally:
            os.close(fd)
        return True
