"""`fastload daemon`: takes a directory over, serves it, and runs the jobs of its configuration."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

from fastload.cache import CacheDirectory
from fastload.client.operator import NotServedError, Operator
from fastload.config import default_cache_dir
from fastload.cpu_priority import take_long_slices
from fastload.daemon.config import Config
from fastload.daemon.supervisor import Source, Supervisor
from fastload.errors import CacheError, ServiceError
from fastload.service.host.launch import clean_environment
from fastload.service.host.logs import log_to_stderr
from fastload.service.host.server import Server

log = logging.getLogger("fastload.service")

# A service that hands over has ended by then: it waits five seconds for reads and writes under way.
_HAND_OVER_S = 30.0
_LOOK_AGAIN_S = 0.01


def run(directory: Path | None, config_path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. `directory` goes before the configuration's; without either it is the default.

    ConfigError, CacheError or ServiceError where that cannot begin. The process's environment is a service's from then
    on: credentials in it are for children and listings of jobs that name "env".
    """
    early: list[int] = []  # SIGHUP that came before it serves, and would end it
    signal.signal(signal.SIGHUP, lambda number, frame: early.append(number))
    environ = dict(os.environ)
    source = Source(None if config_path is None else config_path.absolute(), environ)
    config = source.read()
    log_to_stderr()
    place = directory or (Path(config.cache).expanduser() if config.cache else default_cache_dir())
    limits = config.limits
    opened = CacheDirectory.open(place, ram_bytes=limits.get("ram_bytes"), disk_bytes=limits.get("disk_bytes"))
    clean_environment()
    take_long_slices()
    _take_over(opened)
    try:
        ended = asyncio.run(_serve(opened, source, config, early))
    finally:
        opened.unlock()
    log.info("ended")
    if not ended:
        # A read that hangs in a dead disk or socket cannot be ended from here; nothing depends on it any more.
        os._exit(0)


def _take_over(directory: CacheDirectory) -> None:
    """Get the directory's lock, from a service that a job started if need be; ServiceError where a daemon has it."""
    deadline = time.monotonic() + _HAND_OVER_S
    while not directory.try_lock():
        if time.monotonic() > deadline:
            raise CacheError(
                f"the cache {directory.path} is held by a service that does not hand over within {_HAND_OVER_S:.0f} s; "
                f"its log may say why: {directory.log_path}"
            )
        try:
            with Operator.connect(directory.path, "daemon") as operator:
                if operator.is_daemon:
                    raise ServiceError(
                        f"a daemon serves {directory.path} already (process {operator.service_pid}); end that, or name "
                        "another cache directory"
                    )
                log.info("process %d serves %s, and hands over", operator.service_pid, directory.path)
                operator.hand_over()
        except NotServedError:  # it is about to serve, or has just ended
            pass
        time.sleep(_LOOK_AGAIN_S)


async def _serve(directory: CacheDirectory, source: Source, config: Config, early: list[int]) -> bool:
    loop = asyncio.get_running_loop()
    server = Server(directory, None)
    supervisor = Supervisor(server, directory, source, config)

    def stop() -> None:
        stopping.append(loop.create_task(supervisor.stop()))

    stopping: list[asyncio.Task[None]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, supervisor.reload)
    if early:
        supervisor.reload()

    def ready() -> bool:
        for warning in directory.warnings:
            log.warning("%s", warning)
        log.info("serving %s with %s as a daemon", directory.path, directory.limits)
        supervisor.begin()
        return True

    ended = await server.run(ready)
    if not stopping:
        raise CacheError(f"the cache directory {directory.path} was removed or emptied; start the daemon again")
    return ended
