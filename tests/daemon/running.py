"""A real daemon of a test, which is ended or killed, and what it says."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fastload.client.operator import NotServedError, Operator
from fastload.snapshot import Job, Snapshot
from tests.processes import until
from tests.programs import Program

LIMITS = 'ram_bytes = "1MiB"\ndisk_bytes = "64MiB"\n'


class Daemon:
    """`fastload daemon` with a configuration; a context manager that ends it by SIGTERM and expects that to be well."""

    def __init__(
        self, directory: Path, config: str | None = "", env: Mapping[str, str] | None = None, prelude: str = ""
    ) -> None:
        """`prelude` is run in its process before it begins."""
        self.directory, self.config_path = directory, directory.with_name("fastload.toml")
        arguments: list[object] = ["daemon", f"--cache={directory}"]
        if config is not None:
            self.config_path.write_text(config)
            arguments.append(f"--config={self.config_path}")
        self.program = Program(f"{prelude}\nfrom fastload.cli import main; main()", *arguments, env=env)
        self.pid = self.program.pid
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.program.stderr))
        self._reader.start()

    def start(self) -> Daemon:
        """Wait until it serves."""
        until(lambda: self.serves() or self.program.returncode is not None)
        assert self.serves(), "".join(self.lines)
        return self

    def serves(self) -> bool:
        try:
            with Operator.connect(self.directory, "test") as operator:
                return operator.service_pid == self.pid
        except NotServedError:
            return False

    def snapshot(self) -> Snapshot:
        with Operator.connect(self.directory, "test") as operator:
            return operator.snapshot()

    def job(self, name: str) -> Job:
        return next(job for job in self.snapshot().jobs if name in (job.name, job.id))

    def wait_for(self, name: str, ready: Callable[[Job], bool]) -> Job:
        """The job, once it is like that."""
        found: list[Job] = []

        def look() -> bool:
            time.sleep(0.1)  # a snapshot is as old as that in any case
            found[:] = [self.job(name)]
            return ready(found[0])

        until(look)
        return found[0]

    def wait_done(self, name: str) -> Job:
        return self.wait_for(name, lambda job: job.state == "done")

    def reload(self, config: str) -> None:
        self.config_path.write_text(config)
        os.kill(self.pid, signal.SIGHUP)

    def messages(self) -> list[str]:
        """What it has logged, which is JSON."""
        return [json.loads(line)["message"] for line in self.lines]

    def kill(self) -> None:
        """kill -9, and wait until it has gone."""
        self.program.kill()
        self._end()

    def stop(self) -> int:
        """SIGTERM; how it ended."""
        if self.program.returncode is None:
            os.kill(self.pid, signal.SIGTERM)
        return self._end()

    def _end(self) -> int:
        status = self.program.wait()
        self._reader.join()
        for stream in (self.program.stdin, self.program.stdout, self.program.stderr):
            stream.close()
        return status

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.program.stderr.closed:
            status = self.stop()
            assert status == 0 or error is not None, "".join(self.lines)


def data_table(name: str, url: str, **more: Any) -> str:
    """A `[[data]]` table."""
    values = {"name": name, "urls": [url], **more}
    return "[[data]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)
