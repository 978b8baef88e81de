"""A rank of a job: it reads one batch each time it is asked to, and says what was in it.

Ranks are forked from a fork server that has torch and fastload imported, as a node's ranks are started again and again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

import fastload

GLOBAL_BATCH = 12  # samples a step of a job, with any number of ranks
WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Rank:
    """One rank, as its job starts it. `kind`: which `workers` it has, or "torch" for torchdata's loader. `meeting`: a
    file by which the ranks of a process group find one another, or "" for ranks that only know their environment.
    `state`: where it goes on.
    """

    kind: str
    rank: int
    world_size: int
    urls: str
    cache: Mapping[str, Any]
    storage_options: Mapping[str, Any]
    seed: int
    meeting: str
    state: Mapping[str, Any] | None
    traces: str  # a file in which it writes, on SIGUSR1, what its threads do


@dataclass(frozen=True)
class Got:
    """A batch: its epoch (None where the loader does not say), the keys of its samples, a digest of each one's bytes;
    and the loader's state after it, where that was asked for. `held`: descriptors and threads of the process.
    """

    epoch: int | None
    keys: list[str]
    digests: list[bytes]
    state: dict[str, Any] | None
    held: tuple[int, int]


@dataclass(frozen=True)
class Failed:
    """What a rank says that cannot go on."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Ended:
    """The last word of a rank: what it has not given back."""

    left: list[str]


def digest_of(data: Any) -> bytes:
    """Of a sample's bytes."""
    return hashlib.blake2b(data, digest_size=8).digest()


def looked_at(samples: list[Any]) -> list[Any]:
    """A `collate_fn` for torchdata's loader: keys and digests. Workers of a rank that was killed would wait for ever
    for room in their queue to the rank, if what they send were large.
    """
    return [{"__key__": sample["__key__"], "bin": digest_of(sample["bin"])} for sample in samples]


def as_it_is(sample: Any) -> Any:
    """A function of the user's, so that samples go through worker processes."""
    return sample


def serve(connection: Connection, rank: Rank) -> None:
    """The process of a rank, until it is asked to end."""
    with open(rank.traces, "w") as traces:
        multiprocessing.set_start_method("fork", force=True)  # not that by which this process came to be
        faulthandler.register(signal.SIGUSR1, traces, all_threads=True)
        torch.set_num_threads(1)
        gc.freeze()  # what was imported stays
        warnings.simplefilter("ignore")  # of a cache in trouble, and of windows in small arenas
        os.environ.update(
            RANK=str(rank.rank),
            WORLD_SIZE=str(rank.world_size),
            LOCAL_RANK=str(rank.rank),
            LOCAL_WORLD_SIZE=str(rank.world_size),
            GLOO_SOCKET_IFNAME="lo",
        )
        with contextlib.suppress(EOFError, BrokenPipeError):
            try:
                if rank.meeting:
                    meeting = f"file://{rank.meeting}"
                    distributed.init_process_group(
                        "gloo", init_method=meeting, rank=rank.rank, world_size=rank.world_size
                    )
                before = _held()
                _read(connection, rank)
                connection.send(Ended(_left(before)))
                if rank.meeting:
                    distributed.destroy_process_group()
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                connection.send(Failed(type(error).__name__, str(error), traceback.format_exc()))


def _read(connection: Connection, rank: Rank) -> None:
    with fastload.Cache(**rank.cache) as cache:
        loader = _loader(rank, cache)
        if rank.state is not None:
            loader.load_state_dict(rank.state)
        try:
            for epoch, batch in _batches(loader):
                wants_state = connection.recv()
                if wants_state is None:
                    return
                names, data = columns_of(batch)
                state = loader.state_dict() if wants_state else None
                digests = data if rank.kind == "torch" else [digest_of(one) for one in data]
                connection.send(Got(epoch, names, digests, state, (len(os.listdir("/proc/self/fd")), _thread_count())))
                del batch, data
        finally:
            if isinstance(loader, fastload.DataLoader):
                loader.close()


def _batches(loader: Any) -> Iterator[tuple[int | None, Any]]:
    """Of one epoch after the other, each with the number of its epoch."""
    while True:
        for batch in loader:
            yield loader.stats()["epoch"] if isinstance(loader, fastload.DataLoader) else None, batch


def columns_of(batch: Any) -> tuple[list[str], list[Any]]:
    """The keys and bytes of a batch, which is a dict of columns or a list of samples."""
    if isinstance(batch, list):
        return [sample["__key__"] for sample in batch], [bytes(sample["bin"]) for sample in batch]
    return list(batch["__key__"]), [bytes(one) for one in batch["bin"]]


def _loader(rank: Rank, cache: fastload.Cache) -> Any:
    batch_size = GLOBAL_BATCH // rank.world_size
    dataset = fastload.StreamingDataset(
        rank.urls,
        batch_size=batch_size if rank.kind == "torch" else None,
        cache=cache,
        shuffle=True,
        seed=rank.seed,
        shuffle_window=WINDOW_BYTES,
        columns=["bin"],
        partitions=1,
        storage_options=dict(rank.storage_options),
    )
    if rank.kind == "torch":
        from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

        return StatefulDataLoader(dataset, batch_size, num_workers=2, collate_fn=looked_at)
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 2, "workers": rank.kind}
    if rank.kind == "process":
        dataset = dataset.map(as_it_is)
        options["collate_fn"] = list
    elif rank.kind == "side":
        dataset = dataset.map_batch(as_it_is)
    return fastload.DataLoader(dataset, **options)


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def _held() -> set[str]:
    """Threads, sockets and files that are in use."""
    found = {f"thread {thread.name}" for thread in threading.enumerate()}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith(("pipe:", "anon_inode:")):
                found.add(f"descriptor {name} -> {target}")
    for child in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"resource_tracker" not in command:  # multiprocessing keeps it for the life of the process
                found.add(f"process {child}: {command!r}")
    return found


def _left(before: set[str], patience_s: float = 10.0) -> list[str]:
    """What is held now and was not before, once nothing more goes away."""
    deadline = time.monotonic() + patience_s
    while (left := _held() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return sorted(left)
