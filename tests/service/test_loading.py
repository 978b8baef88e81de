"""What the service reads of checkpoints for all processes of the node: each byte once, only for those who could read it
themselves, and in no more memory than there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from fastload import protocol
from fastload.checkpoint.segments import BLOCK_BYTES
from fastload.client import Handle
from fastload.errors import AccessDeniedError, ServiceError, StoreUnavailableError
from fastload.service.fetching.stores import StoreTable
from fastload.service.host.threads import Pools
from fastload.service.loading.loads import Loads
from fastload.store import StoreOptions
from fastload.store.types import ObjectInfo
from tests.patience import PATIENCE_S
from tests.service.helpers import FakeStore, random_bytes

MIB = 1 << 20
SIZE = 3 * MIB + 12345


class Store(FakeStore):
    """Which ranges are read, and by whom it may be."""

    def __init__(self, options: Any, of_all: SharedFakes) -> None:
        super().__init__(of_all.contents)
        self._options, self._of_all = options, of_all

    def head(self, url: str) -> ObjectInfo:
        self._of_all.heads += 1
        if self._options.access_key_id == "denied":
            raise AccessDeniedError(f"{url}: denied")
        return super().head(url)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        assert self._of_all.may_read.wait(PATIENCE_S)
        self._of_all.ranges.append((start, len(out)))
        if self._of_all.is_down:
            raise StoreUnavailableError(f"{info.url}: not there")
        out[:] = self.contents[info.url][start : start + len(out)]


class SharedFakes:
    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.ranges: list[tuple[int, int]] = []
        self.heads = 0
        self.may_read = threading.Event()
        self.may_read.set()
        self.is_down = False

    @property
    def read_bytes(self) -> int:
        return sum(length for _, length in self.ranges)


class Process:
    """A consumer, and what it has been sent."""

    def __init__(self, world: World, key: str = "owner", endpoint: str = "http://one") -> None:
        wire = {"endpoint_url": endpoint, "access_key_id": key, "secret_access_key": "s"}
        self._world, self.options_key = world, world.stores.add(wire)
        self.sent: list[Any] = []
        self.fds: list[int] = []
        self._requests = 0
        world.processes.append(self)

    def send(self, message: protocol.Message) -> None:
        self.sent.append(message)

    def send_with(self, message: protocol.Message, fds: Any) -> None:
        self.sent.append(message)
        self.fds += map(os.dup, fds)

    def load(self, url: str, size: int = SIZE, version: Any = None) -> int:
        self._requests += 1
        message = protocol.Load(self._requests, url, size, version)
        self._world.loads.load(self, message, self.send_with)  # type: ignore[arg-type]
        return self._requests

    def read(self, load: int, start: int, length: int) -> int:
        self._requests += 1
        message = protocol.LoadRange(self._requests, load, start, length)
        self._world.loads.read(self, message)  # type: ignore[arg-type]
        return self._requests

    async def answer(self, request: int) -> Any:
        while True:
            for message in self.sent:
                if message.request == request:
                    return message
            await asyncio.sleep(0.001)

    async def memory(self, url: str, size: int = SIZE) -> int:
        """The number of its load."""
        load = self.load(url, size)
        assert isinstance(await self.answer(load), protocol.LoadMemory)
        return load

    async def get(self, load: int, start: int, length: int) -> bytes:
        assert isinstance(await self.answer(self.read(load, start, length)), protocol.Loaded)
        return os.pread(self.fds[load - 1], length, start)

    def leave(self) -> None:
        self._world.loads.left(self)  # type: ignore[arg-type]
        self._world.stores.remove(self.options_key)


class World:
    def __init__(self, ram_bytes: int) -> None:
        self.fakes, self.image_bytes = SharedFakes(), 0
        self.processes: list[Process] = []
        self.stores = StoreTable(lambda url, options: Store(options, self.fakes))  # type: ignore[arg-type]
        self.pools = Pools(asyncio.get_running_loop())
        limits = SimpleNamespace(checkpoint_ram=lambda: ram_bytes)
        resources: Any = SimpleNamespace(stores=self.stores, pools=self.pools, limits=limits)
        self.loads = Loads(resources, lambda: self.image_bytes)

    def put(self, name: str, size: int = SIZE, seed: int = 1) -> str:
        url = f"s3://fake/{name}"
        self.fakes.contents[url] = random_bytes(seed, size)
        return url

    @property
    def held_bytes(self) -> int:
        return self.loads.stats()["checkpoint_shared_bytes"]

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            await asyncio.sleep(0.001)


def in_a_world(test: Callable[[World], Awaitable[None]], ram_bytes: int = 64 * MIB) -> None:
    async def main() -> None:
        world = World(ram_bytes)
        try:
            await asyncio.wait_for(test(world), PATIENCE_S)
        finally:
            world.fakes.may_read.set()
            world.loads.close()
            world.stores.close()
            assert world.pools.close(PATIENCE_S)
            for process in world.processes:
                for fd in process.fds:
                    os.close(fd)

    asyncio.run(main())


def test_each_block_is_fetched_once_whatever_is_asked_for() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        data = world.fakes.contents[url]
        one, two = Process(world), Process(world)
        loads = [await each.memory(url) for each in (one, two)]
        assert world.fakes.heads == 1
        ranges = [(0, 1), (5, 2 * MIB), (MIB, MIB + 7), (SIZE - 1, 1), (0, SIZE), (2 * MIB - 3, MIB)]
        for start, length in ranges:
            for process, load in zip((one, two), loads, strict=True):
                assert await process.get(load, start, length) == data[start : start + length]
        assert world.fakes.read_bytes == SIZE
        assert world.held_bytes == -(-SIZE // BLOCK_BYTES) * BLOCK_BYTES
        stats = world.loads.stats()
        assert stats["checkpoint_fetched_bytes"] == SIZE
        assert stats["checkpoint_given_bytes"] == 2 * sum(length for _, length in ranges)

    in_a_world(test)


def test_who_asks_for_what_is_on_its_way_waits_for_the_same_request() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        processes = [Process(world) for _ in range(8)]
        loads = [await each.memory(url) for each in processes]
        world.fakes.may_read.clear()
        asked = [
            (process, process.read(load, start * MIB // 2, MIB))
            for start in range(5)
            for process, load in zip(processes, loads, strict=True)
        ]
        processes[0].leave()  # for which some of it is being read
        world.fakes.may_read.set()
        for process, request in asked:
            if process is not processes[0]:
                assert isinstance(await process.answer(request), protocol.Loaded)
        assert world.fakes.read_bytes == 3 * MIB

    in_a_world(test)


def test_memory_cannot_be_written_by_those_who_get_it() -> None:
    async def test(world: World) -> None:
        process = Process(world)
        await process.memory(world.put("a"))
        with pytest.raises(PermissionError):
            os.pwrite(process.fds[0], b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(process.fds[0], 1)

    in_a_world(test)


def test_a_store_that_fails_is_said_so_once_and_asked_again_by_the_next() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        process = Process(world)
        load = await process.memory(url)
        world.fakes.is_down = True
        request = process.read(load, 0, 2 * MIB)
        again = process.read(load, MIB, MIB)
        for each in (request, again):
            failed = await process.answer(each)
            assert (type(failed), failed.name) == (protocol.RequestFailed, "StoreUnavailableError")
        assert world.held_bytes == 0
        world.fakes.is_down = False
        assert await process.get(load, 0, 2 * MIB) == world.fakes.contents[url][: 2 * MIB]
        assert [message.request for message in process.sent].count(request) == 1

    in_a_world(test)


def test_it_is_given_to_none_who_could_not_read_it() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        owner = Process(world)
        await owner.get(await owner.memory(url), 0, SIZE)
        denied = Process(world, "denied")
        failed = await denied.answer(denied.load(url))
        assert (type(failed), failed.name) == (protocol.RequestFailed, "AccessDeniedError")
        assert denied.fds == []
        # Another who may shares the memory; at another endpoint the same URL is another object.
        other, elsewhere = Process(world, "other"), Process(world, endpoint="http://two")
        await other.get(await other.memory(url), 0, SIZE)
        assert world.fakes.read_bytes == SIZE
        await elsewhere.get(await elsewhere.memory(url), 0, SIZE)
        assert world.fakes.read_bytes == 2 * SIZE

    in_a_world(test)


def test_another_version_is_not_given() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        process = Process(world)
        info = Store(SimpleNamespace(access_key_id=""), world.fakes).head(url)
        failed = await process.answer(process.load(url, SIZE, ('"other"', 0)))
        assert (type(failed), failed.name) == (protocol.RequestFailed, "ObjectChangedError")
        failed = await process.answer(process.load(url, SIZE + 1))
        assert (type(failed), failed.name) == (protocol.RequestFailed, "ObjectChangedError")
        meant = await process.answer(process.load(url, SIZE, (info.etag, info.mtime_ns)))
        assert isinstance(meant, protocol.LoadMemory)
        before = world.fakes.contents[url]
        assert world.put("a", seed=2) == url  # and who asks for what is there now gets that
        later = Store(SimpleNamespace(access_key_id=""), world.fakes).head(url)
        newer = await process.answer(process.load(url, SIZE, (later.etag, later.mtime_ns)))
        assert isinstance(newer, protocol.LoadMemory)
        assert world.fakes.contents[url] != before
        await process.answer(process.read(newer.request, 0, MIB))
        assert os.pread(process.fds[1], MIB, 0) == world.fakes.contents[url][:MIB]

    in_a_world(test)


def test_memory_goes_some_time_after_the_last_reader() -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        one, two = Process(world), Process(world)
        await one.get(await one.memory(url), 0, SIZE)
        await two.memory(url)
        one.leave()
        world.loads.idle_s = 0.0
        assert world.held_bytes
        late = Process(world)  # who comes before that finds it
        world.loads.idle_s = 3600.0
        two.leave()
        await late.get(await late.memory(url), 0, SIZE)
        assert world.fakes.read_bytes == SIZE
        world.loads.idle_s = 0.0
        late.leave()
        await world.until(lambda: world.held_bytes == 0)
        after = Process(world)
        await after.get(await after.memory(url), 0, SIZE)
        assert world.fakes.read_bytes == 2 * SIZE

    in_a_world(test)


def test_saves_come_first_and_what_is_idle_goes_for_others() -> None:
    async def test(world: World) -> None:
        first, second, third = (world.put(name, 3 * MIB, seed) for seed, name in enumerate("abc"))
        one, two = Process(world), Process(world)
        await one.get(await one.memory(first, 3 * MIB), 0, 3 * MIB)
        one.leave()
        load = await two.memory(second, 3 * MIB)
        await two.get(load, 0, 3 * MIB)
        assert world.held_bytes == 6 * MIB
        world.image_bytes = 3 * MIB
        world.loads.give_way()
        assert world.held_bytes == 3 * MIB
        # What is read stays, and nothing more is taken.
        world.image_bytes = 8 * MIB
        world.loads.give_way()
        assert world.held_bytes == 3 * MIB
        other = await two.memory(third, 3 * MIB)
        failed = await two.answer(two.read(other, 0, 1))
        assert failed.message.startswith("checkpoint_ram_bytes='8MiB' leaves no room for 64.0 KiB more")
        assert await two.get(load, 5, 7) == world.fakes.contents[second][5:12]
        two.leave()
        assert world.held_bytes == 0
        world.image_bytes = 5 * MIB
        three = Process(world)
        await three.get(await three.memory(third, 3 * MIB), 0, 3 * MIB)
        assert world.held_bytes == 3 * MIB

    in_a_world(test, ram_bytes=8 * MIB)


@pytest.mark.parametrize(
    "ask",
    [
        lambda process, load: process.read(load, SIZE - 1, 2),
        lambda process, load: process.read(load, 1 << 60, 1),
        lambda process, load: process.read(load + 1, 0, 1),
        lambda process, load: [process.read(load, 0, SIZE) for _ in range(5000)],
        lambda process, load: [process.load(f"s3://fake/{number}") for number in range(5000)],
    ],
    ids=["beyond the end", "far beyond it", "of no object", "without end", "of objects without end"],
)
def test_a_hostile_process_is_cut_off(ask: Callable[[Process, int], object]) -> None:
    async def test(world: World) -> None:
        url = world.put("a")
        process = Process(world)
        load = await process.memory(url)
        world.fakes.may_read.clear()
        with pytest.raises(ServiceError):
            ask(process, load)
        process.leave()
        world.fakes.may_read.set()
        other = Process(world)
        assert await other.get(await other.memory(url), 0, SIZE) == world.fakes.contents[url]

    in_a_world(test)


@pytest.mark.parametrize(
    "message",
    [
        ["load", 1, "s3://b/a", 0, None],
        ["load", 1, "s3://b/a", 1 << 50, None],
        ["load_range", 1, 0, -1, 5],
        ["load_range", 1, 0, 0, 0],
        ["load_range", 1, 0, 0, 1 << 30],
        ["load_range", 1, 0, 0, [[0, 1]] * 10**6],
    ],
)
def test_messages_that_make_no_sense(message: list[Any]) -> None:
    with pytest.raises(ServiceError, match="not a message of a consumer"):
        protocol.from_consumer(msgspec.msgpack.encode(message))


def test_answers_wait_with_their_descriptors_for_one_who_reads_late(cache: Handle, tmp_path: Path) -> None:
    """More of them than the socket takes; each answer has its own."""
    count = 600
    (tmp_path / "object").write_bytes(bytes(100))
    wire = StoreOptions.from_environment(None).to_wire()
    hello = protocol.Hello(protocol.VERSION, os.getpid(), "late", wire)
    welcomed = cache._connector.connect_to_own(hello, threading.Event())
    with contextlib.closing(welcomed) as late:
        late.sock.settimeout(PATIENCE_S)
        for number in range(count):
            late.sock.sendall(protocol.frame(protocol.Load(number, f"file://{tmp_path}/object", 100)))
        late.sock.sendall(protocol.frame(protocol.Ping()))
        with cache.consumer() as other:  # what was sent before has been taken when this is answered
            other.stats()
        messages: list[Any] = []
        sizes: list[int] = []
        while len(messages) <= count:
            data, fds, _, _ = socket.recv_fds(late.sock, 1 << 16, 8)
            for fd in fds:
                sizes.append(os.fstat(fd).st_size)
                os.close(fd)
            messages += map(protocol.from_service, late.frames.feed(data))
            loads = [each for each in messages if isinstance(each, protocol.LoadMemory)]
            assert len(sizes) >= len(loads)
    assert sorted(each.request for each in loads) == list(range(count))
    assert sizes == [100] * count
