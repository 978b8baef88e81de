"""One run of fastload over the data, in a process of its own: `python -m fastload.bench.runs`, JSON in and out.

A short epoch of cached data says little, so those after the first are read again until they have taken some seconds
together, and count as one. The clock of an epoch starts with everything imported and the service up. CPU-seconds are
those of this process, its workers and the cache service; where data was fetched until a second after the last batch, so
that what is still being written to the disk tier is in them. Memory is anonymous and shared memory of the same
processes at its peak, the arena included.

After its epochs a run may be asked how fast its consumer may be (`steps_s`): each step is tried for some seconds, after
what had been fetched ahead was used up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import msgspec

from fastload.activity import CAUSES
from fastload.bench import measure
from fastload.errors import FastloadError, WorkerError, from_wire, to_wire

_SETTLE_S = 1.0
_ENOUGH_S, _AGAIN_MAX = 2.5, 12


class Settings(msgspec.Struct, kw_only=True):
    """What a run reads, and with which cache."""

    urls: list[str]
    dataset: dict[str, Any]  # arguments of StreamingDataset, but `decode`
    decode: dict[str, str]  # column -> "image:224", "integer", "text", ...
    batch_size: int
    workers: int
    directory: str
    ram_bytes: int
    disk_bytes: int
    epochs: int
    first_epoch: int = 0
    first_is_single: bool = True
    steps_s: list[float] = []  # a consumer's time a batch, to be tried after the epochs
    step_for_s: float = 4.0
    sample_column: str = ""  # whose values are wanted for the decoder's limit
    rank: int = 0
    world_size: int = 1


class Epoch(msgspec.Struct, kw_only=True):
    """What one epoch took. `source_bytes` is by tier: ram, disk, remote."""

    seconds: float
    first_batch_s: float
    batches: int
    samples: int
    repeats: int
    source_bytes: dict[str, int]
    fetched_bytes: int
    requests: int
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    stalls_s: dict[str, float]  # the trainer's waits by cause; with its own work they add up to `seconds`
    cpu_s: float
    service_cpu_s: float
    peak_memory_bytes: int
    bound_by: str
    verdict: str


class Step(msgspec.Struct, kw_only=True):
    """A consumer that takes a batch every `step_s`: how much of its time it worked."""

    step_s: float
    batches: int
    utilisation: float


class Outcome(msgspec.Struct, kw_only=True):
    """What a run says; `error` is a name and a message, where it failed."""

    epochs: list[Epoch] = []
    steps: list[Step] = []
    values: list[bytes] = []
    error: list[str] = []


def run(settings: Settings, timeout_s: float) -> Outcome:
    """Run it in a process of its own. Raises what failed in there, WorkerError where it died or takes too long."""
    command = [sys.executable, "-m", "fastload.bench.runs"]
    environment = {**os.environ, "FASTLOAD_IDLE_S": "0.5"}
    if settings.world_size > 1:
        environment |= {"RANK": str(settings.rank), "WORLD_SIZE": str(settings.world_size)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        answer, _ = process.communicate(msgspec.json.encode(settings), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise WorkerError(
            f"a run over {settings.directory} has not ended after {timeout_s:.0f} s; raise --for"
        ) from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    try:
        outcome = msgspec.msgpack.decode(answer, type=Outcome)
    except msgspec.MsgspecError:
        raise WorkerError(
            f"a run over {settings.directory} ended with status {process.returncode}; its error is above"
        ) from None
    if outcome.error:
        name, message = outcome.error
        raise from_wire(name, message)
    return outcome


def decoders(specs: dict[str, str]) -> dict[str, Any]:
    """The decoders that `--decode COLUMN=NAME[:ARGUMENT]` names; ConfigError for what is none."""
    from fastload import decode
    from fastload.errors import ConfigError

    known = {
        "image": lambda argument: decode.image(int(argument or 224)),
        "integer": lambda argument: decode.integer(),
        "text": lambda argument: decode.text(),
        "array": lambda argument: decode.array(),
        "json": lambda argument: decode.json(),
    }
    made = {}
    for column, spec in specs.items():
        name, _, argument = spec.partition(":")
        if name not in known:
            raise ConfigError(f"--decode {column}={spec}: no decoder is called {name!r}; there are {', '.join(known)}")
        if argument and not (name == "image" and argument.isdecimal()):
            raise ConfigError(f"--decode {column}={spec}: only an image takes a size, such as {column}=image:224")
        made[column] = known[name](argument)
    return made


def _main() -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    measure.die_with_parent()
    outcome = Outcome()
    try:
        _Run(settings).fill(outcome)
    except FastloadError as error:
        outcome.error = list(to_wire(error))
    sys.stdout.buffer.write(msgspec.msgpack.encode(outcome))
    return 0


class _Run:
    def __init__(self, settings: Settings) -> None:
        import fastload
        from fastload.client.cache import handle_of

        self._settings = settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that limits of this directory change is meant
            self._cache = fastload.Cache(
                settings.directory, ram_bytes=settings.ram_bytes, disk_bytes=settings.disk_bytes, history_bytes=0
            )
        # Starts the service and keeps it until the end: its start is no part of an epoch.
        self._keeper = handle_of(self._cache).consumer(name="keeper")
        self._dataset_class, self._loader_class = fastload.StreamingDataset, fastload.DataLoader
        measure.wait_until_idle(self._service())

    def fill(self, outcome: Outcome) -> None:
        """Do what the settings say."""
        settings = self._settings
        try:
            began = time.monotonic()
            dataset = self._dataset_class(
                settings.urls, decode=decoders(settings.decode), cache=self._cache, **settings.dataset
            )
            loader = self._loader_class(dataset, batch_size=settings.batch_size, num_workers=settings.workers)
            try:
                loader.set_epoch(settings.first_epoch)
                for number in range(settings.epochs):
                    outcome.epochs.append(self._epoch(loader, began))
                    began = 0.0
                    if number or not settings.first_is_single:
                        self._read_again(loader, outcome.epochs)
                for step_s in settings.steps_s:
                    outcome.steps.append(self._step(loader, step_s))
            finally:
                loader.close()
            if settings.sample_column:
                outcome.values = self._values(settings.sample_column)
        finally:
            self._keeper.close()
            self._cache.close()

    def _service(self) -> list[int]:
        return measure.find_processes("fastload.service", self._settings.directory)

    def _pids(self) -> list[int]:
        return [os.getpid(), *self._service()]

    def _epoch(self, loader: Any, began: float) -> Epoch:
        before, service_before = measure.cpu_s(self._pids()), measure.cpu_s(self._service())
        with measure.PeakMemory(self._pids) as memory:
            began = began or time.monotonic()
            first_s = 0.0
            for _ in loader:
                first_s = first_s or time.monotonic() - began
            seconds = time.monotonic() - began
            stats = loader.stats()
            if stats["fetched_bytes"]:
                time.sleep(_SETTLE_S)  # what came is still being written to the disk tier
        return Epoch(
            seconds=seconds,
            first_batch_s=first_s,
            batches=stats["batches"],
            samples=stats["samples"],
            repeats=stats["repeats"],
            source_bytes={source: stats[f"{source}_bytes"] for source in ("ram", "disk", "remote")},
            fetched_bytes=stats["fetched_bytes"],
            requests=stats["requests"],
            wait_p50_s=stats["wait_batch_p50_s"],
            wait_p99_s=stats["wait_batch_p99_s"],
            wait_max_s=stats["wait_batch_max_s"],
            stalls_s={cause: stats[f"stall_{cause}_s"] for cause in CAUSES},
            cpu_s=measure.cpu_s(self._pids()) - before,
            service_cpu_s=measure.cpu_s(self._service()) - service_before,
            peak_memory_bytes=memory.peak_bytes,
            bound_by=stats["bound_by"],
            verdict=stats["verdict"],
        )

    def _read_again(self, loader: Any, epochs: list[Epoch]) -> None:
        """Merge more readings into the last one, until it is long enough."""
        for _ in range(_AGAIN_MAX):
            if epochs[-1].seconds >= _ENOUGH_S:
                return
            epochs[-1] = _merged(epochs[-1], self._epoch(loader, 0.0))

    def _step(self, loader: Any, step_s: float) -> Step:
        """A consumer that works `step_s` on each batch: what share of its time that is, once nothing is in reserve."""
        batches = _endless(loader)
        self._use_up(batches)
        began, count = time.monotonic(), 0
        while time.monotonic() - began < self._settings.step_for_s:
            next(batches)
            time.sleep(step_s)
            count += 1
        elapsed = time.monotonic() - began
        batches.close()
        return Step(step_s=step_s, batches=count, utilisation=min(1.0, count * step_s / elapsed))

    def _use_up(self, batches: Iterator[Any]) -> None:
        """Take batches without work until one is waited for, since what is ready would flatter the first steps."""
        until = time.monotonic() + self._settings.step_for_s / 2
        fastest = float("inf")
        while time.monotonic() < until:
            began = time.monotonic()
            next(batches)
            took = time.monotonic() - began
            if took > 10 * max(fastest, 1e-3):
                return
            fastest = min(fastest, took)

    def _values(self, column: str) -> list[bytes]:
        """Stored values of one column, of some hundred samples."""
        dataset = self._dataset_class(self._settings.urls, columns=[column], cache=self._cache, shuffle=False)
        loader = self._loader_class(dataset, batch_size=256, num_workers=0)
        try:
            batch = next(iter(loader))
            return [bytes(memoryview(value)) for value in batch[column]]
        finally:
            loader.close()


def _merged(one: Epoch, two: Epoch) -> Epoch:
    """Both as one epoch of both lengths; the percentiles are the worse of both."""
    values: dict[str, Any] = {}
    for name in Epoch.__struct_fields__:
        a, b = getattr(one, name), getattr(two, name)
        if isinstance(a, str):
            values[name] = b
        elif isinstance(a, dict):
            values[name] = {key: a[key] + b[key] for key in a}
        elif name == "first_batch_s":
            values[name] = a
        elif name.startswith(("wait_", "peak_")):
            values[name] = max(a, b)
        else:
            values[name] = a + b
    return Epoch(**values)


def _endless(loader: Any) -> Any:
    """The batches of one epoch after the other."""
    while True:
        yield from loader


if __name__ == "__main__":
    sys.exit(_main())
