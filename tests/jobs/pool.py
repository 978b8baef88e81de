"""Rank processes for tests: a few that live long, so that torch and fastload are imported once.

They are forked from multiprocessing's fork server, which has imported all that a rank needs (see `tests.conftest`); a
rank that has died or hung is replaced in no time. A rank runs one function after the other and sends back what it
returns. All ranks use one store of torch.distributed, which lives here, as it lives in torchrun's agent: no rank's end
takes it away.

Nothing may hang: who is not done at the deadline is asked where it is, killed, and named in the failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from fastload.plan import Ranks
from tests.patience import PATIENCE_S

_GRACE_S = 60.0  # for the others, once a rank has failed
_ENDING_S = 60.0  # for threads of a rank to end after its work


@dataclass(frozen=True)
class Rank:
    """Where a rank stands, as a launcher would say it. `meets`: the name under which all ranks of a process group
    meet; None where there is only the environment.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    meets: str | None = None

    @property
    def node(self) -> int:
        return self.rank // self.local_world_size

    def place(self) -> Ranks:
        """The same for the plan."""
        return Ranks(self.rank, self.world_size, self.rank % self.local_world_size, self.local_world_size)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.rank % self.local_world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }


@dataclass(frozen=True)
class Failed:
    """What a rank answers whose function raised."""

    kind: str
    message: str
    trace: str


class RankError(AssertionError):
    """Ranks failed, hung or died; the message says which and how."""


class RankPool:
    """Up to `size` ranks. `run` is for one thread; `close` ends them all."""

    def __init__(self, size: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._runs = 0
        self._ranks = [self._fork() for _ in range(size)]

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        ranks: Sequence[Rank],
        *arguments: Any,
        deadline_s: float = PATIENCE_S,
    ) -> list[Any]:
        """`function(rank, *arguments)` in every rank at the same time; what each returns, or `Failed`.

        `RankError`, naming the case, where one hangs or dies, or where one leaves a thread behind.
        """
        started = self.start(name, function, ranks, *arguments)
        return started.answers(deadline_s)

    def start(self, name: str, function: Callable[..., Any], ranks: Sequence[Rank], *arguments: Any) -> Started:
        """The same without waiting; `answers` must follow, or `forget`."""
        assert len(ranks) <= len(self._ranks), f"{len(ranks)} ranks, and a pool of {len(self._ranks)}"
        self._runs += 1
        used = self._ranks[: len(ranks)]
        for one, rank in zip(used, ranks, strict=True):
            one.connection.send((function, rank, self._runs, arguments))
        return Started(self, name, used)

    def replace(self, dead: Sequence[_Process]) -> None:
        """Others for ranks that are to be killed."""
        for one in dead:
            one.kill()
            self._ranks[self._ranks.index(one)] = self._fork()

    def close(self) -> None:
        """End all ranks."""
        for one in self._ranks:
            one.connection.close()
        for one in self._ranks:
            one.process.join(_GRACE_S)
            one.kill()
        self._ranks.clear()
        del self._store

    def _fork(self) -> _Process:
        here, there = multiprocessing.Pipe()
        descriptor, path = tempfile.mkstemp(prefix="fastload-rank-", suffix=".traces")
        os.close(descriptor)
        process = self._context.Process(target=serve, args=(there, path, self._store.port), daemon=False)
        process.start()
        there.close()
        assert here.recv() == "ready"
        return _Process(process, here, Path(path))


@dataclass(eq=False)
class _Process:
    process: Any
    connection: Connection
    traces: Path  # where it writes what its threads do, when asked

    def kill(self) -> None:
        """kill -9, and wait for that."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.traces.unlink(missing_ok=True)

    def whereabouts(self) -> str:
        """The stacks of all its threads."""
        if not self.process.is_alive():
            return f"it has ended with exit code {self.process.exitcode}"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)  # nobody says when it is written
        return self.traces.read_text()


class Started:
    """A function that runs in ranks."""

    def __init__(self, pool: RankPool, name: str, ranks: list[_Process]) -> None:
        self._pool, self._name, self._ranks = pool, name, ranks

    def answers(self, deadline_s: float = PATIENCE_S) -> list[Any]:
        """What each rank returned; see `RankPool.run`."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + deadline_s
        try:
            while len(found) < len(self._ranks):
                missing = {one.connection: i for i, one in enumerate(self._ranks) if i not in found}
                ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
                for connection in ready:
                    assert isinstance(connection, Connection)
                    found[missing[connection]] = answer = connection.recv()
                    if isinstance(answer, Failed):  # its peers may wait for it
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
                if not ready:
                    raise RankError("not done in time")
        except (RankError, EOFError, ConnectionError) as error:
            raise RankError(self._report(found, error)) from error
        left = {i: answer[1] for i, answer in found.items() if not isinstance(answer, Failed) and answer[1]}
        assert not left, f"{self._name}: ranks left threads behind: {left}"
        answers = (found[i] for i in range(len(self._ranks)))
        return [answer if isinstance(answer, Failed) else answer[0] for answer in answers]

    @property
    def pids(self) -> list[int]:
        """The processes of the ranks."""
        return [one.process.pid for one in self._ranks]

    def forget(self) -> None:
        """kill -9 all of them, if that has not been done; others take their places in the pool."""
        self._pool.replace(self._ranks)

    def _report(self, found: dict[int, Any], error: BaseException) -> str:
        lines = [f"{self._name}: {error!r}"]
        for i, one in enumerate(self._ranks):
            if i not in found:
                lines.append(f"rank {i} has not answered:\n{one.whereabouts()}")
            elif isinstance(found[i], Failed):
                lines.append(f"rank {i} failed:\n{found[i].trace}")
        self.forget()
        return "\n".join(lines)


def serve(connection: Connection, traces: str, port: int) -> None:
    """A rank: does what it is sent until nobody is there to send more."""
    multiprocessing.set_start_method(None, force=True)  # what it starts is started as by any other process
    with open(traces, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = distributed.TCPStore("127.0.0.1", port, is_master=False)
        connection.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                function, rank, run, arguments = connection.recv()
                connection.send(_done(function, rank, run, arguments, store))
    os.unlink(traces)


def _done(function: Callable[..., Any], rank: Rank, run: int, arguments: tuple[Any, ...], store: Any) -> Any:
    """What the function returned and the threads that it left behind, or how it failed."""
    before = set(threading.enumerate())
    try:
        with _in_place(rank, run, store):
            result = function(rank, *arguments)
    except Exception as error:
        return Failed(type(error).__name__, str(error), traceback.format_exc())
    return result, _left_behind(before)


@contextlib.contextmanager
def _in_place(rank: Rank, run: int, store: Any) -> Iterator[None]:
    """This process is that rank."""
    os.environ.update(rank.environment)
    if rank.meets is None:
        yield
        return
    meeting = distributed.PrefixStore(f"{run}/{rank.meets}", store)
    timeout = timedelta(seconds=PATIENCE_S)
    distributed.init_process_group("gloo", store=meeting, rank=rank.rank, world_size=rank.world_size, timeout=timeout)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _left_behind(before: set[threading.Thread]) -> list[str]:
    deadline = time.monotonic() + _ENDING_S
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [thread.name for thread in left]
