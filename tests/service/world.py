"""A core without sockets, and a consumer's side of it, over a store that a test holds back, counts and breaks.

Time is virtual: `until` lets events happen in their order and takes no longer than they do, and where nothing is due
any more it fails at once. The core, its directory, arena and disk are real. Jobs of its pools run one at a time: the
next event happens when a task has ended or waits at a `Gate`, so each run of a test is the same. Tests of what threads
do by themselves let a core run `in_real_time`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.service import disk_io
from fastload.service.core import Core
from fastload.service.host.threads import Task
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.pools import VirtualPools
from fastload.store.types import ObjectInfo
from tests.patience import PATIENCE_S
from tests.service.helpers import CHUNK_BYTES, FakeStore, random_bytes

Kind = TypeVar("Kind")
End = Callable[[Task, Any, BaseException | None], None]
Work = Callable[[Core], Coroutine[Any, Any, None]]

# What is due so soon belongs to what is under way; what the service does every second does not.
_SETTLED_S = 0.05


class Side:
    """A consumer's side of a core: what it was sent, and short ways of saying things."""

    def __init__(self, core: Core, objects: list[ObjectInfo], name: str = "") -> None:
        self.sent: list[protocol.Message] = []
        self.core = core
        self.state: ConsumerState = core.connect(protocol.Hello(protocol.VERSION, 1, name, {}), self.sent.append)
        self._serial = 0
        self.say(protocol.Attach(True, True, protocol.ObjectRows.of(objects)))

    def say(self, message: protocol.FromConsumer) -> None:
        """Send a message."""
        self.core.receive(self.state, message)

    def plan(self, *objects: int, warm: bool = False) -> None:
        """Set a plan."""
        self.say(protocol.SetPlan(list(objects), 0, warm, 0))

    def want(self, *chunks: int, urgent: bool = True) -> None:
        """Want chunks."""
        self._serial += 1
        self.say(protocol.Want(list(chunks), self._serial, urgent))

    def release(self, *chunks: int) -> None:
        """Give chunks back."""
        self.say(protocol.Release(list(chunks)))

    def all(self, kind: type[Kind]) -> list[Kind]:
        """The messages of one kind that it was sent."""
        return [message for message in self.sent if isinstance(message, kind)]

    def node(self) -> dict[str, Any]:
        """The service's figures."""
        # Not by a message, which is an event: a wait for a figure would bring about what it waits for, without end.
        figures = self.core._stats(self.state)["node"]
        assert isinstance(figures, dict)
        return figures

    @property
    def granted(self) -> list[int]:
        """The chunks granted, in order."""
        return [chunk for message in self.all(protocol.Grants) for chunk in message.chunks]

    @property
    def recalled(self) -> list[int]:
        """The chunks recalled, in order."""
        return [chunk for message in self.all(protocol.Recall) for chunk in message.chunks]


# Waiting: what a test awaits, it asks of whatever runs it.


@dataclass(frozen=True)
class _Wait:
    """Until `true()`, or so long; what does not come about in time is a failure if it is called something."""

    true: Callable[[], bool]
    seconds: float
    what: str


@types.coroutine
def _wait(wait: _Wait) -> Generator[_Wait, None, None]:
    yield wait


async def until(true: Callable[[], bool], what: str) -> None:
    """Let things happen until something holds."""
    await _wait(_Wait(true, PATIENCE_S, what))


async def settle() -> None:
    """Let everything that is under way come to rest."""
    await sleep(_SETTLED_S)


async def sleep(seconds: float) -> None:
    """Let time pass."""
    await _wait(_Wait(lambda: False, seconds, ""))


class Gate:
    """Holds the tasks of a core back that come to it, until it is open. Any other thread waits at it as at an event."""

    closed: ClassVar[weakref.WeakSet[Gate]] = weakref.WeakSet()

    def __init__(self, is_open: bool = False) -> None:
        self._open = threading.Event()
        self._waiting: list[_Thread] = []
        self.clear()
        if is_open:
            self.set()

    def set(self) -> None:
        """Open it. In virtual time, all that waited has gone on to its end, or to another gate, when this returns."""
        self._open.set()
        Gate.closed.discard(self)
        while self._waiting:
            self._waiting.pop(0).go_on()

    def clear(self) -> None:
        """Close it."""
        self._open.clear()
        Gate.closed.add(self)

    def wait(self) -> None:
        """Wait until it is open."""
        thread = threading.current_thread()
        while isinstance(thread, _Thread) and not self._open.is_set():
            self._waiting.append(thread)
            thread.stand_still()
        assert self._open.wait(PATIENCE_S), "the gate stayed closed"


class _Thread(threading.Thread):
    """Runs tasks one after the other, each while the loop's thread waits until it ends or stands still at a gate."""

    def __init__(self, idle: list[_Thread]) -> None:
        super().__init__(name="fastload-task", daemon=True)
        self._idle = idle
        self._go, self._still = threading.Semaphore(0), threading.Semaphore(0)
        self._work: tuple[Task, End] | None = None
        self._outcome: tuple[Any, BaseException | None] | None = None
        self.start()
        idle.append(self)

    def begin(self, task: Task, end: End) -> None:
        """Let it run a task. `end` is called by whoever lets it go on to the task's end."""
        self._work = task, end
        self.go_on()

    def end(self) -> None:
        """Let it end."""
        self._go.release()
        self.join()

    def go_on(self) -> None:
        """Let it run until it stands still."""
        self._go.release()
        self._still.acquire()
        if self._outcome is not None:
            assert self._work is not None
            (task, end), outcome = self._work, self._outcome
            self._work = self._outcome = None
            self._idle.append(self)
            end(task, *outcome)

    def stand_still(self) -> None:
        """Called by what it runs: let the others go on."""
        self._still.release()
        self._go.acquire()

    def run(self) -> None:
        self._go.acquire()
        while self._work is not None:
            self._outcome = _outcome(self._work[0])
            self.stand_still()


def _outcome(task: Task) -> tuple[Any, BaseException | None]:
    try:
        return task.function(*task.arguments), None
    except Exception as error:
        return None, error.with_traceback(None)  # which would keep the loop's own frames, and so the core


class _Jobs(VirtualPools):
    """Pools whose tasks do in threads what they do in the service's."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop)
        self._idle: list[_Thread] = []
        self._begun: list[tuple[Task, End]] = []
        self._begins = False
        self._threads: list[_Thread] = []

    def begin(self, task: Task, end: End) -> None:
        self._begun.append((task, end))
        if self._begins:  # by the end of another, which lets this one begin
            return
        self._begins = True
        try:
            while self._begun:
                self._let_begin(*self._begun.pop(0))
        finally:
            self._begins = False

    def _let_begin(self, task: Task, end: End) -> None:
        if not Gate.closed:  # so that it waits nowhere: without a thread, which takes ten times as long
            end(task, *_outcome(task))
            return
        if not self._idle:
            self._threads.append(_Thread(self._idle))
        self._idle.pop().begin(task, end)

    def close(self, deadline_s: float) -> bool:
        """Whether all tasks have ended: no test leaves its gates closed."""
        for pool in self._pools:
            pool.stop()
        has_ended = len(self._idle) == len(self._threads)
        for thread in self._idle:
            thread.end()
        return has_ended


class World:
    """A core of a few buffers over a fake store of objects of `chunk_count` chunks each."""

    def __init__(self, tmp_path: Path, buffer_count: int, disk_bytes: int = 0) -> None:
        self.store = FakeStore()
        self.directory = CacheDirectory.open(
            tmp_path / "cache", ram_bytes=buffer_count * CHUNK_BYTES, disk_bytes=disk_bytes, chunk_bytes=CHUNK_BYTES
        )
        self.objects: list[ObjectInfo] = []

    def add(self, *chunk_counts: int) -> None:
        """Objects of so many chunks."""
        for count in chunk_counts:
            number = len(self.objects)
            self.objects.append(self.store.put(str(number), random_bytes(number, count * CHUNK_BYTES)))

    def run(self, work: Work, disk_deadline_s: float = disk_io.DISK_DEADLINE_S) -> None:
        """Let `work` run with a core, which has to end well afterwards."""
        loop = VirtualLoop()
        _let_happen(loop, _Wait(lambda: False, 1.0, ""))  # a task that began at 0 would be one that has not begun
        parts = self._parts(loop.for_service)
        core = Core.of_resources(replace(parts, pools=_Jobs(loop), now=loop.time), disk_deadline_s)
        asks = work(core)
        try:
            with contextlib.suppress(StopIteration):
                wait = asks.send(None)
                while True:
                    try:
                        _let_happen(loop, wait)
                    except BaseException as error:
                        wait = asks.throw(error)
                    else:
                        wait = asks.send(None)
        finally:
            assert core.close(10)

    def run_in_real_time(self, work: Work) -> None:
        """The same with the service's own loop and threads."""

        async def main() -> None:
            core = Core.of_resources(self._parts(asyncio.get_running_loop()))
            asks = work(core)
            try:
                with contextlib.suppress(StopIteration):
                    while True:
                        await _wait_for(asks.send(None))
            finally:
                asks.close()
                assert core.close(10)

        asyncio.run(main())

    def _parts(self, loop: asyncio.AbstractEventLoop) -> Resources:
        return Resources.of_directory(self.directory, loop, lambda url, options: self.store)

    @contextmanager
    def held_back(self) -> Iterator[Gate]:
        """Reads wait until the gate is open, at the end of the block at the latest."""
        gate = Gate()
        self.store.before_read = lambda url, start: gate.wait()
        try:
            yield gate
        finally:
            gate.set()
            self.store.before_read = lambda url, start: None


def _let_happen(loop: VirtualLoop, wait: _Wait) -> None:
    is_over = list[bool]()
    limit = loop.call_later(wait.seconds, is_over.append, True)
    loop.run_until(lambda: wait.true() or bool(is_over))
    limit.cancel()
    assert not (is_over and wait.what), f"gave up waiting until {wait.what}"


async def _wait_for(wait: _Wait) -> None:
    deadline = time.monotonic() + wait.seconds
    while not wait.true() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert not wait.what or wait.true(), f"gave up waiting until {wait.what}"
