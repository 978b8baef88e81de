"""Where runs take place: a store that holds the data, a proxy in front of it, a folder for caches, runner processes.

`Stage` starts `weed mini` and uploads the data once. Each call of `run` has a proxy and (by default) an
empty cache folder of its own, starts the runner processes, watches their memory, and says for each epoch what they,
the server and the proxy took.

    python -m bench.stage --cap 200 fastload bench s3://bench/ --decode jpg=image:224

runs a command of your own beside such a store, which its environment leads to, and ends with its status.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.data import DataSet, default_folder, prepare, prepare_format
from bench.peers import Epoch
from bench.proxy import Profile, Proxy
from bench.settings import Settings
from fastload.bench import measure
from fastload.demo.weed import WeedServer

BUCKET = "bench"
# Runners side by side begin this long after they were started: long enough to import everything.
START_TOGETHER_S = 8.0
SERVICE_ENDS_S = 30.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One epoch of one runner, and what passed the proxy meanwhile.

    `requests` are those answered, in order, with their times on the clock of `epoch.began`. `data_bytes` are those of
    the shards, headers included: all rates count them, so that they compare with the store's. `peak_memory_bytes` is
    that of the whole run, all its runners together; `ram_bytes` is what its arena may take of it.
    """

    system: str
    epoch: Epoch
    requests: list[dict[str, Any]]
    data_bytes: int
    peak_memory_bytes: int
    ram_bytes: int

    @property
    def remote_bytes(self) -> int:
        """Bytes of objects that came from the store."""
        return sum(request["body_bytes"] for request in self.requests)

    @property
    def mb_per_s(self) -> float:
        """Millions of bytes of shards that the consumer was through with, a second."""
        return self.data_bytes / self.epoch.seconds / 1e6

    def cpu_s_per_gb(self, process: str) -> float:
        """CPU-seconds of "client" (with its cache service), "server" or "proxy", a GB of shards."""
        return self.epoch.cpu_s[process] / (self.data_bytes / 1e9)

    def shards_before_first_batch(self) -> tuple[float, float]:
        """How many shards' worth of bytes had come when the first batch did, and how long after the first whole
        shard that was; seconds (from the epoch's start where no whole shard had come).
        """
        first_batch = self.epoch.began + self.epoch.first_batch_s
        came = sorted((r for r in self.requests if r["done"] <= first_batch), key=lambda r: float(r["done"]))
        left: Counter[str] = Counter()  # by shard; each byte comes once
        for request in self.requests:
            left[request["path"]] += request["body_bytes"]
        sizes = dict(left)
        shards, whole_at = 0.0, 0.0
        for request in came:
            path = request["path"]
            shards += request["body_bytes"] / max(1, sizes[path])
            left[path] -= request["body_bytes"]
            if not left[path]:
                whole_at = whole_at or request["done"]
        return shards, first_batch - (whole_at or self.epoch.began)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file; without the single requests."""
        return {
            "system": self.system,
            **asdict(self.epoch),
            "mb_per_s": self.mb_per_s,
            "client_cpu_s_per_gb": self.cpu_s_per_gb("client"),
            "remote_bytes": self.remote_bytes,
            "request_count": len(self.requests),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of `Stage.run` measured: for each runner its epochs, and the bytes of objects that all took."""

    system: str
    runners: list[list[Measured]]
    remote_bytes: int

    @property
    def epochs(self) -> list[Measured]:
        """Those of the first runner."""
        return self.runners[0]


class RunFailedError(RuntimeError):
    """A runner ended with an error, which it has printed."""


class Stage:
    """A store with `data_set` in it, also in the formats of `systems` where they have one of their own, and a place for
    caches, both under `folder`; a context manager.
    """

    def __init__(self, data_set: DataSet, folder: Path, systems: Sequence[str] = ()) -> None:
        self.data_set, self._folder = data_set, folder
        self._formats = [made for system in systems if (made := prepare_format(system, data_set))]
        self._stack = ExitStack()
        self._port = 0  # of the proxy in every run: caches of others are kept by URLs, with host and port

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            self._work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=self._folder)))
            self._weed = stack.enter_context(WeedServer(self._work / "store"))
            self._weed.make_bucket(BUCKET)
            for path in self.data_set.paths:
                self._weed.upload(path, f"s3://{BUCKET}/{path.name}")
            for prefix, folder in self._formats:
                for path in sorted(folder.iterdir()):
                    self._weed.upload(path, f"s3://{BUCKET}/{prefix}/{path.name}")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def served(self, profile: Profile) -> Iterator[tuple[dict[str, str], Proxy]]:
        """A proxy of `profile` in front of the store, and the environment with which a process finds it."""
        with Proxy(self._weed.endpoint_url, profile) as proxy:
            yield {**os.environ, **self._weed.environment(), "AWS_ENDPOINT_URL": proxy.url}, proxy

    def call(self, command: Sequence[str], profile: Profile) -> int:
        """The status of a command that finds the store, behind a proxy of `profile`, by its environment."""
        with self.served(profile) as (environment, _):
            return subprocess.run(command, env=environment, check=False).returncode

    def empty_folder(self) -> Path:
        """A new folder for caches; its user deletes it, or the stage does in the end."""
        return Path(tempfile.mkdtemp(prefix="cache-", dir=self._work))

    def run(self, system: str, profile: Profile, *, count: int = 1, folder: Path | None = None, **settings: Any) -> Run:
        """`count` runners of `system` at once, behind a proxy of `profile`.

        `folder` is kept; without one, an empty one serves the run. `settings` are those of `Settings`.
        """
        own_folder = folder or self.empty_folder()
        try:
            with Proxy(self._weed.endpoint_url, profile, self._port) as proxy:
                self._port = proxy.port
                return self._run(system, proxy, count, own_folder, settings)
        finally:
            if folder is None:
                shutil.rmtree(own_folder, ignore_errors=True)

    def _run(self, system: str, proxy: Proxy, count: int, folder: Path, more: dict[str, Any]) -> Run:
        assert self._weed.pid is not None
        processes = {"server": self._weed.pid, "proxy": proxy.pid}
        settings = Settings(system, self.data_set, BUCKET, str(folder), processes=processes, **more)
        if count > 1:
            settings = replace(settings, starts_at=time.monotonic() + START_TOGETHER_S)
        runners = [self._start(settings, proxy) for _ in range(count)]

        def clients() -> list[int]:
            return [runner.pid for runner in runners] + measure.find_processes("fastload.service", str(folder))

        try:
            with measure.PeakMemory(clients) as memory:
                outputs = [runner.communicate()[0] for runner in runners]
        finally:
            for runner in runners:  # those that Ctrl-C left running
                runner.kill()
                runner.wait()
        _wait_for_service(folder)
        if any(runner.returncode for runner in runners):
            raise RunFailedError(f"a run of {system} failed; its error is above")
        epochs = [[Epoch(**fields) for fields in json.loads(output.splitlines()[-1])] for output in outputs]
        log = [request for request in proxy.log() if is_object(request)]
        size = self.data_set.bytes
        measured = [
            [
                Measured(system, epoch, _during(log, epoch), size, memory.peak_bytes, settings.ram_bytes)
                for epoch in of_one
            ]
            for of_one in epochs
        ]
        return Run(system, measured, sum(request["body_bytes"] for request in log))

    def _start(self, settings: Settings, proxy: Proxy) -> subprocess.Popen[str]:
        environment = {**os.environ, **self._weed.environment(), "AWS_ENDPOINT_URL": proxy.url, "FASTLOAD_IDLE_S": "0"}
        runner = "bench.ranks" if settings.ranks else "bench.peers"
        return subprocess.Popen(
            [sys.executable, "-m", runner, settings.to_json()],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )


def _during(log: Sequence[dict[str, Any]], epoch: Epoch) -> list[dict[str, Any]]:
    """The requests that began within `epoch`."""
    return [request for request in log if epoch.began <= request["began"] <= epoch.began + epoch.seconds]


def _wait_for_service(folder: Path) -> None:
    """Wait until the cache service of `folder`, which ends with its last consumer, is gone."""
    deadline = time.monotonic() + SERVICE_ENDS_S
    while measure.find_processes("fastload.service", str(folder)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the cache service of {folder} still runs {SERVICE_ENDS_S:g} s after its last consumer")
        time.sleep(0.05)


def is_object(request: dict[str, Any]) -> bool:
    """Whether it asked for (a part of) an object, and not for a listing."""
    key: str = request["path"].partition("?")[0].removeprefix(f"/{BUCKET}").strip("/")
    return request["method"] == "GET" and key != ""


def main() -> int:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="bench.stage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=8, help="of 64 MB")
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--cap", type=float, help="MB/s")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    data_set = prepare(default_folder(), shard_count=options.shards)
    profile = Profile(options.delay_ms / 1e3, options.cap and options.cap * 1e6)
    with Stage(data_set, default_folder()) as stage:
        return stage.call(options.command, profile)


if __name__ == "__main__":
    sys.exit(main())
