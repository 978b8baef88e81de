"""A core without sockets, and a consumer's side of it, over a store that a test holds back, counts and breaks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.service import stalls
from fastload.service.consumers import ConsumerState
from fastload.service.core import Core
from fastload.store.types import ObjectInfo
from tests.patience import PATIENCE_S
from tests.service.helpers import CHUNK_BYTES, FakeStore, random_bytes

Kind = TypeVar("Kind")


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

    @property
    def granted(self) -> list[int]:
        """The chunks granted, in order."""
        return [chunk for message in self.all(protocol.Grants) for chunk in message.chunks]

    @property
    def recalled(self) -> list[int]:
        """The chunks recalled, in order."""
        return [chunk for message in self.all(protocol.Recall) for chunk in message.chunks]


async def until(true: Callable[[], bool], what: str) -> None:
    """Let the loop run until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting until {what}"
        await asyncio.sleep(0.005)


async def settle() -> None:
    """Let everything that is under way come to rest: twenty looks in a row find each other thread of this process
    asleep, however long a busy machine keeps one from running.
    """
    looks = 0
    while looks < 20:
        await asyncio.sleep(0.002)
        looks = 0 if _others_run() else looks + 1


def _others_run() -> bool:
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            return True
        if state != "S" and int(task.name) != threading.get_native_id():
            return True
    return False


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

    def run(
        self, work: Callable[[Core], Coroutine[Any, Any, None]], disk_deadline_s: float = stalls.DISK_DEADLINE_S
    ) -> None:
        """Let `work` run with a core, which has to end well afterwards."""

        async def main() -> None:
            core = Core(
                self.directory,
                asyncio.get_running_loop(),
                opener=lambda url, options: self.store,
                disk_deadline_s=disk_deadline_s,
            )
            try:
                await work(core)
            finally:
                assert core.close(10)

        asyncio.run(main())

    @contextmanager
    def held_back(self) -> Iterator[threading.Event]:
        """Reads wait until the event is set, at the end of the block at the latest."""
        gate = threading.Event()
        self.store.before_read = lambda url, start: gate.wait(PATIENCE_S) and None  # type: ignore[assignment]
        try:
            yield gate
        finally:
            gate.set()
            self.store.before_read = lambda url, start: None
