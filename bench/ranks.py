"""The ranks of one node, over one cache: `python -m bench.ranks SETTINGS`, JSON in and out, as `bench.peers`.

`settings.ranks` processes read one epoch together, each its share, as started by a launcher that sets RANK and
WORLD_SIZE. They are forked from one that has imported everything and loaded the kernels, so that neither is in any
figure: both cost a rank the same whatever fastload does. The service is up and idle when they begin.

CPU-seconds are split by process, and within the ranks by what is done: by the threads that do it, and in those by the
methods in `_METHODS`. `rank` is all of them together.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fastload
from bench.data import Tally
from bench.peers import SETTLE_S, Epoch, job_of, samples_of
from bench.settings import Settings
from fastload.bench import measure
from fastload.bench.peers import fastload as ours

# What a rank would import, or load, at its first batch.
_PACKAGES = ("client", "decode", "formats", "pipeline", "plan", "store", "transport")
# By the beginning of a thread's name.
_THREADS = {
    "MainThread": "consumer",
    "fastload-feed": "plan",
    "fastload-decode": "gather",
    "fastload-consumer": "messages",
}
# What is counted by itself, in whichever thread it happens.
_METHODS = {
    "list": [("fastload.pipeline.source", "Source", "open")],
    "index": [("fastload.pipeline.shards", "ShardTable", "get")],
}
_MADV_POPULATE_WRITE = 23  # of mman.h
KINDS = ("consumer", "list", "index", "plan", "gather", "messages", "other")


@dataclass(frozen=True, slots=True)
class RankEpoch:
    """One rank's epoch, on the monotonic clock; `cpu_s` by kind."""

    began: float
    first_batch_s: float
    seconds: float
    samples: int
    bytes: int
    digest: int
    cpu_s: dict[str, float]


class Accounts:
    """CPU-seconds of this process by kind, from when it is made: by thread, and by method."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = defaultdict(float)  # by name of the thread
        self._of_methods: dict[str, float] = defaultdict(float)
        self._inside = threading.local()
        self._began = time.process_time()
        self._main_began = time.thread_time()
        run = threading.Thread.run
        ended = self._ended

        def counted(thread: threading.Thread) -> None:
            try:
                run(thread)
            finally:
                ended[thread.name] += time.thread_time()

        threading.Thread.run = counted  # type: ignore[method-assign, assignment]
        for kind, methods in _METHODS.items():
            for module, owner, name in methods:
                kept = getattr(importlib.import_module(module), owner)
                setattr(kept, name, self._of(kind, getattr(kept, name)))

    def _of(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            if getattr(self._inside, "is_method", False):
                return method(*args, **more)
            self._inside.is_method, began = True, time.thread_time()
            try:
                return method(*args, **more)
            finally:
                self._inside.is_method = False
                took = time.thread_time() - began
                self._of_methods[kind] += took
                self._ended[threading.current_thread().name] -= took

        return counted

    def so_far(self) -> dict[str, float]:
        """By kind."""
        threads = self._ended.copy()
        for thread in threading.enumerate():
            threads[thread.name] += _thread_cpu_s(thread)
        threads["MainThread"] -= self._main_began
        kinds = self._of_methods.copy()
        for name, cpu_s in threads.items():
            kinds[next((kind for start, kind in _THREADS.items() if name.startswith(start)), "other")] += cpu_s
        kinds["other"] += time.process_time() - self._began - sum(kinds.values())
        return {kind: kinds[kind] for kind in KINDS}


def _thread_cpu_s(thread: threading.Thread) -> float:
    try:
        return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:  # it has ended
        return 0.0


def run(settings: Settings) -> Epoch:
    """Read the data once; AssertionError unless all ranks together got each sample exactly once."""
    _import_all()
    gc.collect()
    gc.freeze()  # a collection in a rank would copy all of what the import made
    with _ranks(settings) as pipes:
        keeper = ours.Loader(job_of(settings))
        try:
            before = _cpu_s(keeper, settings)
            for pipe in pipes:
                pipe.send(None)
            ranks = [RankEpoch(**pipe.recv()) for pipe in pipes]
            time.sleep(SETTLE_S)
            after = _cpu_s(keeper, settings)
        finally:
            keeper.close()
    tally = Tally()
    tally.samples, tally.digest = sum(rank.samples for rank in ranks), sum(rank.digest for rank in ranks) & (2**64 - 1)
    settings.data_set.check(tally)
    began = min(rank.began for rank in ranks)
    kinds = {kind: sum(rank.cpu_s[kind] for rank in ranks) for kind in KINDS}
    used = {name: after[name] - before[name] for name in after} | kinds | {"rank": sum(kinds.values())}
    return Epoch(
        began=began,
        seconds=max(rank.began + rank.seconds for rank in ranks) - began,
        first_batch_s=max(rank.began + rank.first_batch_s for rank in ranks) - began,
        samples=tally.samples,
        bytes=sum(rank.bytes for rank in ranks),
        cpu_s=used | {"client": used["service"] + used["rank"]},
        service_cpu_s_before=before["service"],
    )


def _cpu_s(keeper: ours.Loader, settings: Settings) -> dict[str, float]:
    others = {name: measure.cpu_s([pid]) for name, pid in settings.processes.items()}
    return {"service": measure.cpu_s(keeper.processes()), **others}


def _import_all() -> None:
    from fastload.kernels import FIRST_BATCH, warm_up

    for name in fastload.__all__:
        getattr(fastload, name)
    for package in _PACKAGES:
        path = importlib.import_module(f"fastload.{package}").__path__
        for module in pkgutil.iter_modules(path, f"fastload.{package}."):
            if not module.name.rpartition(".")[2].startswith("_"):  # a library that is no module of Python's
                importlib.import_module(module.name)
    warm_up(*FIRST_BATCH)


@contextmanager
def _ranks(settings: Settings) -> Iterator[list[Connection]]:
    """Pipes to processes that begin when they are sent anything, and then answer with a `RankEpoch`."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for rank in range(settings.ranks):
            here, there = context.Pipe()
            processes.append(context.Process(target=_rank, args=(settings, rank, there), daemon=True))
            processes[-1].start()
            pipes.append(here)
            there.close()
        yield pipes
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def _rank(settings: Settings, rank: int, pipe: Connection) -> None:
    measure.die_with_parent()
    _unshare_memory()
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": settings.ranks, "RANK": rank, "WORLD_SIZE": settings.ranks}
    os.environ.update({name: str(value) for name, value in local.items()})
    pipe.recv()
    accounts, began = Accounts(), time.monotonic()
    peer = ours.Loader(job_of(settings), is_kept=False)
    tally, first_batch_s = Tally(), 0.0
    for batch in peer.epoch(0):
        first_batch_s = first_batch_s or time.monotonic() - began
        for key, jpg, label in samples_of(batch):
            tally.add(key, jpg, label)
    seconds = time.monotonic() - began
    cpu_s = accounts.so_far()
    pipe.send(asdict(RankEpoch(began, first_batch_s, seconds, tally.samples, tally.bytes, tally.digest, cpu_s)))
    peer.close()


def _unshare_memory() -> None:
    """Copy all pages that this process shares with the one that it was forked from, as it would one by one later."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        (first, end), access = (int(address, 16) for address in line.split()[0].split("-")), line.split()[1]
        if access.startswith("rw") and access.endswith("p"):
            madvise(first, end - first, _MADV_POPULATE_WRITE)  # fails where a part of it cannot be touched


def main() -> None:
    """Run what the argument says and print the epoch."""
    settings = Settings.from_json(sys.argv[1])
    measure.die_with_parent()
    print(json.dumps([asdict(run(settings))]))


if __name__ == "__main__":
    main()
