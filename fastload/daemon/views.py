"""What a daemon keeps running for those who look at it: the page, a process of its own that watches as any other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path

from fastload.daemon.config import Config, PageTable
from fastload.daemon.schedule import pause_s
from fastload.daemon.systemd import VARIABLES
from fastload.page.process import command
from fastload.redaction import redact

log = logging.getLogger("fastload.service")

# A view that was told to end is killed after that.
_END_S = 2.0
# One that lasted for so long is begun anew without the pauses that failures before it had.
_LASTED_S = 60.0


class Views:
    """For the loop's thread."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop, troubles: dict[str, str]) -> None:
        """`troubles` is where it is said what is wrong now, by what it is about."""
        self._directory, self._loop, self._troubles = directory, loop, troubles
        self._page: PageTable | None = None
        self._task: asyncio.Task[None] | None = None

    def show(self, config: Config) -> None:
        """Have running what the configuration says, and nothing else."""
        if config.page != self._page:
            self._page = config.page
            before, self._task = self._task, None
            self._troubles.pop("page", None)
            if before is not None:
                before.cancel()
            if self._page is not None:
                self._task = self._loop.create_task(self._keep_page(self._page, before))

    async def close(self) -> None:
        """End all of it."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_page(self, table: PageTable, before: asyncio.Task[None] | None) -> None:
        """Start the page again whenever it ends, after growing pauses."""
        if before is not None:
            await asyncio.wait([before])
        failures = 0
        while True:
            began = self._loop.time()
            try:
                last_line = await self._run_page(table)
            except (OSError, ValueError) as error:  # no process, or a line without an end
                last_line = str(error)
            failures = 1 if self._loop.time() - began > _LASTED_S else failures + 1
            self._troubles["page"] = f"the page has ended: {last_line or 'without a word'}"
            log.error("%s", self._troubles["page"])
            await asyncio.sleep(pause_s(failures, random.random()))

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
