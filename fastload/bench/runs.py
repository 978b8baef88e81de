"""One run of fastload over the data, in a process of its own: `python -m fastload.bench.runs`, JSON in and out.

A short epoch of cached data says little, so those after the first are read again until they have taken some seconds
together, and count as one. The clock of an epoch starts with everything imported and the service up. CPU-seconds are
those of this process, its workers and the cache service; where data was fetched until a second after the last batch, so
that what is still being written to the disk tier is in them. Memory is anonymous and shared memory of the same
processes at its peak, the arena included.

After its epochs a run may be asked how fast its consumer may be (`steps_s`): each step is tried for some seconds, after
what had been fetched ahead was used up.

The ranks of a node are processes that begin each epoch together and share it. The first one counts the service.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec

from fastload.bench import measure
from fastload.bench.digests import Column, add_batch, merged
from fastload.bench.passes import Pass, Step, replay, step
from fastload.bench.process import Words, answers, asked, imported, serve
from fastload.timing.activity import CAUSES

_SETTLE_S = 1.0
_ENOUGH_S, _AGAIN_MAX = 2.5, 12
# Over ranks, of which the first one counts the service.
_SUMS = {"batches", "samples", "repeats", "cpu_s", "service_cpu_s", "peak_memory_bytes", "wakeups", "page_faults"}


class Settings(msgspec.Struct, kw_only=True):
    """What a run reads, and with which cache."""

    urls: list[str]
    byte_count: int  # of the shards
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
    functions: list[str] = []  # `module:name` of what is mapped over the samples
    digests: bool = False  # whether the columns of an epoch are wanted, after all else
    replays: bool = False  # whether its batches are to be replayed from memory
    rank: int = 0
    world_size: int = 1
    meeting: str = ""  # a folder in which ranks wait for each other


class Epoch(Pass):
    """What one epoch took, of several ranks that of all together. `source_bytes` is by tier: ram, disk, remote."""

    repeats: int
    source_bytes: dict[str, int]
    fetched_bytes: int  # by the node
    requests: int
    refused: int  # by the store, of these
    stalls_s: dict[str, float]  # the trainer's waits by cause; with its own work they add up to `seconds`
    service_cpu_s: float
    bound_by: str
    verdict: str
    wakeups: int  # of threads of all processes
    page_faults: int
    readings: int = 1  # that are merged into this one
    ranks_per_s: list[float] = msgspec.field(
        default_factory=list
    )  # samples a second of each rank, where there are several


class Outcome(msgspec.Struct, kw_only=True):
    """What a run says."""

    epochs: list[Epoch] = []
    steps: list[Step] = []
    values: list[bytes] = []
    columns: dict[str, Column] = {}
    replayed: Pass | None = None


def run(settings: Settings, timeout_s: float, ranks: int = 1) -> Outcome:
    """Run it in a process of its own, or in one for each of the node's ranks. Raises what failed in there,
    WorkerError where one died, WaitTimeoutError where they take too long.
    """
    words = Words(f"a run over {settings.directory}", "raise --for", "its error is above")
    with ExitStack() as stack:
        meeting = stack.enter_context(tempfile.TemporaryDirectory(dir=Path(settings.directory).parent))
        processes = []
        for rank in range(ranks):
            environment = {"FASTLOAD_IDLE_S": "0.5"}
            if ranks > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            own = msgspec.structs.replace(settings, rank=rank, world_size=ranks, meeting=meeting)
            processes.append(stack.enter_context(asked("fastload.bench.runs", own, words, environment)))
        return _joint(answers(processes, Outcome, timeout_s), settings.byte_count)


def _joint(outcomes: Sequence[Outcome], byte_count: int) -> Outcome:
    """What the ranks did together: an epoch takes as long as its slowest rank."""
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    return Outcome(
        epochs=[_joint_epoch(each, byte_count) for each in zip(*(outcome.epochs for outcome in outcomes), strict=True)],
        steps=[
            Step(
                step_s=each[0].step_s,
                batches=sum(step.batches for step in each),
                utilisation=min(step.utilisation for step in each),
            )
            for each in zip(*(outcome.steps for outcome in outcomes), strict=True)
        ],
        values=first.values,
        columns=merged([outcome.columns for outcome in outcomes]),
        replayed=first.replayed,
    )


def _joint_epoch(ranks: Sequence[Epoch], byte_count: int) -> Epoch:
    slowest = max(ranks, key=lambda each: each.seconds)
    values: dict[str, Any] = {}
    for name in Epoch.__struct_fields__:
        found = [getattr(each, name) for each in ranks]
        if name in ("note", "bound_by", "verdict"):
            values[name] = getattr(slowest, name)
        elif name == "ranks_per_s":
            values[name] = [each.samples / each.seconds for each in ranks]
        elif name == "source_bytes":
            # Ranks that share a shard each count its chunks, and the data is read once for all of them.
            total = sum(sum(each.values()) for each in found)
            share = min(1.0, byte_count * slowest.readings / total) if total else 1.0
            values[name] = {tier: int(share * sum(each[tier] for each in found)) for tier in found[0]}
        elif name == "stalls_s":
            values[name] = {cause: statistics.fmean(each[cause] for each in found) for cause in found[0]}
        elif name == "wait_p50_s":
            values[name] = statistics.median(found)
        elif name in _SUMS:
            values[name] = sum(found)
        else:  # what is the node's, or the slowest rank's
            values[name] = max(found)
    return Epoch(**values)


def decoders(specs: dict[str, str]) -> dict[str, Any]:
    """The decoders that `--decode COLUMN=NAME[:ARGUMENT]` names; ConfigError for what is none."""
    from fastload import decode
    from fastload.errors import ConfigError

    known = {
        "image": lambda argument: decode.image(int(argument or 224)),
        "integer": lambda argument: decode.integer(),
        "number": lambda argument: decode.number(),
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


def _work(settings: Settings) -> Outcome:
    outcome = Outcome()
    _Run(settings).fill(outcome)
    return outcome


class _Run:
    def __init__(self, settings: Settings) -> None:
        import fastload
        from fastload.client.cache import handle_of

        self._settings = settings
        self._epochs = self._refused = 0
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
            for target in settings.functions:
                dataset = dataset.map(imported("--map", target))
            loader = self._loader_class(dataset, batch_size=settings.batch_size, num_workers=settings.workers)
            try:
                loader.set_epoch(settings.first_epoch)
                for number in range(settings.epochs):
                    outcome.epochs.append(self._epoch(loader, began))
                    began = 0.0
                    if number or not settings.first_is_single:
                        self._read_again(loader, outcome.epochs)
                for number, step_s in enumerate(settings.steps_s):
                    self._meet(f"step-{number}")
                    with closing(_endless(loader)) as batches:
                        outcome.steps.append(step(batches, step_s, settings.step_for_s))
                if settings.digests:
                    for batch in loader:
                        add_batch(outcome.columns, batch)
                if settings.replays:
                    outcome.replayed = replay(loader, lambda: measure.cpu_s(self._pids()))
            finally:
                loader.close()
            if settings.sample_column:
                outcome.values = self._values(settings.sample_column)
        finally:
            self._keeper.close()
            self._cache.close()

    def _service(self) -> list[int]:
        """The cache service, which the first of the node's ranks counts."""
        return measure.find_processes("fastload.service", self._settings.directory) if not self._settings.rank else []

    def _meet(self, where: str, word: str = "") -> str:
        """Wait for all ranks; the word of the first one."""
        settings = self._settings
        if settings.world_size == 1:
            return word
        mine = Path(settings.meeting) / f"{where}-{settings.rank}"
        mine.with_suffix(".new").write_text(word)
        mine.with_suffix(".new").rename(mine)
        others = [Path(settings.meeting) / f"{where}-{rank}" for rank in range(settings.world_size)]
        while not all(each.exists() for each in others):  # one that fails ends us all
            time.sleep(0.002)
        return others[0].read_text()

    def _pids(self) -> list[int]:
        return [os.getpid(), *self._service()]

    def _epoch(self, loader: Any, began: float) -> Epoch:
        self._epochs += 1
        self._meet(f"epoch-{self._epochs}")
        began = began if self._settings.world_size == 1 else 0.0
        before, service_before = measure.cpu_s(self._pids()), measure.cpu_s(self._service())
        wakeups, page_faults = measure.wakeups(self._pids()), measure.page_faults(self._pids())
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
            refused=self._newly_refused(stats),
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
            wakeups=measure.wakeups(self._pids()) - wakeups,
            page_faults=measure.page_faults(self._pids()) - page_faults,
            bound_by=stats["bound_by"],
            verdict=stats["verdict"],
        )

    def _newly_refused(self, stats: dict[str, Any]) -> int:
        before, self._refused = self._refused, int(stats["node"]["throttled_requests"])
        return self._refused - before

    def _read_again(self, loader: Any, epochs: list[Epoch]) -> None:
        """Merge more readings into the last one, until it is long enough for the first rank."""
        for _ in range(_AGAIN_MAX):
            if self._meet(f"again-{self._epochs}", "enough" if epochs[-1].seconds >= _ENOUGH_S else "") == "enough":
                return
            epochs[-1] = _merged(epochs[-1], self._epoch(loader, 0.0))

    def _values(self, column: str) -> list[bytes]:
        """Stored values of one column, of some hundred samples."""
        from fastload.decode import raw

        undecoded = {column: raw()}  # formats with types have decoders of their own
        how = {name: value for name, value in self._settings.dataset.items() if name == "format"}
        dataset = self._dataset_class(
            self._settings.urls, decode=undecoded, cache=self._cache, shuffle=False, as_tuple=True, **how
        )
        loader = self._loader_class(dataset, batch_size=256, num_workers=0)
        try:
            (values,) = next(iter(loader))
            stored = [bytes(memoryview(value)) for value in values if value is not None]
            return [value for value in stored if value]  # nothing is what samples have that lack the column
        finally:
            loader.close()


def _merged(one: Epoch, two: Epoch) -> Epoch:
    """Both as one epoch of both lengths; the percentiles are the worse of both."""
    values: dict[str, Any] = {}
    for name in Epoch.__struct_fields__:
        a, b = getattr(one, name), getattr(two, name)
        if isinstance(a, str | list):
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
    sys.exit(serve(Settings, _work))
