"""What a daemon keeps running for those who look at it: the page, a process of its own that watches as any other, and
metrics, in threads of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from fastload.daemon.config import Config, MetricsTable, PageTable, Table
from fastload.daemon.schedule import pause_s
from fastload.daemon.systemd import VARIABLES
from fastload.page.process import command
from fastload.redaction import redact

log = logging.getLogger("fastload.service")

# A view that was told to end is killed after that.
_END_S = 2.0
# One that lasted for so long is begun anew without the pauses that failures before it had.
_LASTED_S = 60.0

_AnyTable = TypeVar("_AnyTable", bound=Table)


class Views:
    """For the loop's thread."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop, troubles: dict[str, str]) -> None:
        """`troubles` is where it is said what is wrong now, by what it is about."""
        self._directory, self._loop, self._troubles = directory, loop, troubles
        self._shown: dict[str, Table | None] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def show(self, config: Config) -> None:
        """Have running what the configuration says, and nothing else."""
        self._keep("page", config.page, self._run_page)
        self._keep("metrics", config.metrics, self._serve_metrics)

    async def close(self) -> None:
        """End all of it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _keep(self, name: str, table: _AnyTable | None, run: Callable[[_AnyTable], Awaitable[str]]) -> None:
        if self._shown.get(name) == table:
            return
        self._shown[name] = table
        self._troubles.pop(name, None)
        before = self._tasks.pop(name, None)
        if before is not None:
            before.cancel()
        if table is not None or before is not None:
            self._tasks[name] = self._loop.create_task(self._run_again(name, table, run, before))

    async def _run_again(
        self,
        name: str,
        table: _AnyTable | None,
        run: Callable[[_AnyTable], Awaitable[str]],
        before: asyncio.Task[None] | None,
    ) -> None:
        """Once what ran before has ended, run it whenever it ends, after growing pauses."""
        if before is not None:
            await asyncio.wait([before])
        failures = 0
        while table is not None:
            began = self._loop.time()
            try:
                why = await run(table)
            except (OSError, ValueError) as error:  # no process, a line without an end; an address, an extra
                why = str(error)
            failures = 1 if self._loop.time() - began > _LASTED_S else failures + 1
            self._troubles[name] = f"{name}: {why or 'ended without a word'}"
            log.error("%s", self._troubles[name])
            await asyncio.sleep(pause_s(failures, random.random()))

    async def _serve_metrics(self, table: MetricsTable) -> str:
        from fastload.metrics import serve

        serving = await asyncio.to_thread(
            serve,
            self._directory,
            table.listen_at,
            textfile=table.textfile,
            textfile_every_s=table.textfile_every_s,
            allow_remote=True,  # the configuration says so
        )
        self._troubles.pop("metrics", None)
        log.info("metrics are served at %s", serving.address or table.textfile)
        try:
            await self._loop.create_future()  # until it is cancelled
        finally:
            # In a thread: it waits for answers that this loop gives.
            await asyncio.to_thread(serving.close)
        return ""

    async def _run_page(self, table: PageTable) -> str:
        """One page, to its end; the last line that it said."""
        process = await asyncio.create_subprocess_exec(
            *command(self._directory, listen_at=table.listen, hosts=table.hosts, ends_with_stdin=True),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment_of_child(os.environ),  # a service's, without credentials
            cwd="/",
            start_new_session=True,
        )
        line = ""
        try:
            assert process.stdout is not None
            async for data in process.stdout:
                line = redact(data.decode(errors="replace").strip())
                log.info("page: %s", line)
                if line.startswith("the page is at"):
                    self._troubles.pop("page", None)
            await process.wait()
        finally:
            if process.returncode is None:
                await _end(process)
        return line


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def environment_of_child(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process of the daemon's own, in which that finds this very package."""
    package = str(Path(__file__).resolve().parents[2])
    path = environ.get("PYTHONPATH")
    kept = {name: value for name, value in environ.items() if name not in VARIABLES}
    return {**kept, "PYTHONPATH": package if not path else f"{package}{os.pathsep}{path}"}
