"""Queries in flight as controllers allow, and second requests for what is late, over a store that tests hold back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.client import Handle as Cache
from fastload.errors import ConfigError
from fastload.service.core import Core
from fastload.service.fetching.request_limit import AT_FIRST, AT_FIRST_WITH_OTHERS, SHARE_MAX, Hedger
from fastload.store.answers import ThrottledError
from fastload.store.watch import Attempt, Outcome
from tests.service.helpers import CHUNK_BYTES, random_bytes
from tests.service.world import Gate, Side, World, settle, sleep, until


@contextmanager
def first_read_hangs(world: World, *urls: str) -> Iterator[Gate]:
    """The first read of each of these objects waits until the event is set, at the end of the block at the latest."""
    gate, seen = Gate(), set[str]()

    def before_read(url: str, start: int) -> None:
        hangs = url in urls and url not in seen
        seen.add(url)
        if hangs:
            gate.wait()

    world.store.before_read = before_read
    try:
        yield gate
    finally:
        gate.set()


async def read(side: Side, *chunks: int) -> None:
    """Read chunks, one after the other."""
    for chunk in chunks:
        side.want(chunk)
        await until(lambda chunk=chunk: side.granted[-1:] == [chunk], "it is granted")  # type: ignore[misc]
        side.release(chunk)


def test_what_is_late_and_wanted_is_asked_for_again(tmp_path: Path) -> None:
    """The chunk gets the buffer of the quicker one, and the slower one's is free when its thread has left."""
    world = World(tmp_path, 8)
    world.add(*[1] * 30)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))
        with first_read_hangs(world, "s3://fake/29") as gate:
            side.want(29)
            await until(lambda: side.granted[-1:] == [29], "the second request has brought it")
            figures = side.node()
            assert (figures["hedged_requests"], figures["hedges_won"], figures["buffers_stranded"]) == (1, 1, 1)
            buffer = side.all(protocol.Grants)[-1].buffers[-1]
            gate.set()
            await until(lambda: side.node()["buffers_stranded"] == 0, "the first request has left")
        assert bytes(core.arena.buffer(buffer)) == random_bytes(29, CHUNK_BYTES)
        assert world.store.reads.count(("s3://fake/29", 0)) == 2
        assert side.node()["fetched_chunks"] == 30
        await read(side, *range(8))

    world.run(work)


def test_one_that_lost_and_hangs_keeps_no_other_from_being_sent(tmp_path: Path) -> None:
    """Not every store's reads can be ended from outside."""
    world = World(tmp_path, 8)
    world.directory = CacheDirectory.open(world.directory.path, requests_in_flight=1)
    world.add(*[1] * 31)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))
        with first_read_hangs(world, "s3://fake/29"):
            side.want(29)
            await until(lambda: side.granted[-1:] == [29], "the second request has brought it")
            side.want(30)
            await until(lambda: side.granted[-1:] == [30], "the only one that may be in flight is sent")
            assert side.node()["requests_in_flight"] == 0

    world.run(work)


def test_a_chunk_that_does_not_come_takes_no_more_than_three_requests(tmp_path: Path) -> None:
    """Also where more would be within the share of the requests."""
    world = World(tmp_path, 8)
    world.add(*[1] * 30)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))
        (endpoint,) = core._endpoints._endpoints.values()
        endpoint.hedger.request_count = 1000
        gate = Gate()
        world.store.before_read = lambda url, start: gate.wait()
        try:
            side.want(29)
            await until(lambda: side.node()["requests_in_flight"] == 3, "it is asked for twice more")
            await sleep(0.5)  # the third is late by now
            assert side.node()["requests_in_flight"] == 3
            assert endpoint.hedger.has_budget
        finally:
            gate.set()
        await until(lambda: side.granted[-1:] == [29], "it is here")

    world.run(work)


@pytest.mark.parametrize("buffer_count", [2, 3])
def test_the_last_buffer_is_for_another_chunk(tmp_path: Path, buffer_count: int) -> None:
    """A store that hangs on a chunk and on the second request for it keeps nobody from reading what another has."""
    world = World(tmp_path, buffer_count)
    world.add(*[1] * 30)
    world.store.contents["s3://other/0"] = random_bytes(7, CHUNK_BYTES)
    objects = [*world.objects, world.store.head("s3://other/0")]

    async def work(core: Core) -> None:
        side = Side(core, objects)
        await read(side, *range(29))
        gate = Gate()
        world.store.before_read = lambda url, start: gate.wait() if url == "s3://fake/29" else None
        try:
            side.want(29)
            await until(lambda: side.node()["requests_in_flight"] == buffer_count - 1, "what may be asked is")
            await sleep(0.3)  # late by now, also where there is no room
            side.want(30)
            await until(lambda: side.granted[-1:] == [30], "the other one's is here")
            assert side.node()["hedged_requests"] == buffer_count - 2
        finally:
            gate.set()

    world.run(work)


def test_what_nobody_wants_yet_is_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path, 40)
    world.add(*[1] * 30)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))
        with first_read_hangs(world, "s3://fake/29") as gate:
            side.plan(29)
            await settle()
            await settle()
            assert side.node()["hedged_requests"] == 0
            gate.set()
        await until(lambda: side.node()["fetched_chunks"] == 30, "it is here")

    world.run(work)


def test_a_second_request_that_fails_costs_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(*[1] * 30)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))
        with first_read_hangs(world, "s3://fake/29") as gate:
            held_back = world.store.before_read

            def before_read(url: str, start: int) -> None:
                if url == "s3://fake/29" and world.store.reads.count((url, start)) == 2:
                    raise ThrottledError("slow down")
                held_back(url, start)

            world.store.before_read = before_read
            side.want(29)
            await until(lambda: side.node()["hedged_requests"] == 1, "it is asked for again")
            await until(lambda: side.node()["requests_in_flight"] == 1, "that has failed")
            assert side.all(protocol.Failed) == []
            assert side.node()["throttled_requests"] == 1
            gate.set()
        await until(lambda: side.granted[-1:] == [29], "the first request has brought it")
        assert side.node()["buffers_stranded"] == 0

    world.run(work)


def test_the_first_one_may_fail_while_the_second_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(*[1] * 30)
    gates = [Gate(), Gate()]

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await read(side, *range(29))

        def before_read(url: str, start: int) -> None:
            number = world.store.reads.count((url, start)) - 1
            gates[number].wait()
            if number == 0:
                raise ThrottledError("slow down")

        world.store.before_read = before_read
        side.want(29)
        await until(lambda: side.node()["hedged_requests"] == 1, "it is asked for again")
        gates[0].set()
        await until(lambda: side.node()["requests_in_flight"] == 1, "the first has failed")
        assert side.node()["buffers_stranded"] == 0
        gates[1].set()
        await until(lambda: side.granted[-1:] == [29], "the second has brought it")
        buffer = side.all(protocol.Grants)[-1].buffers[-1]
        assert bytes(core.arena.buffer(buffer)) == random_bytes(29, CHUNK_BYTES)

    world.run(work)


def test_what_is_read_first_shares_its_link_with_little(tmp_path: Path) -> None:
    """The first shard came as late as the second: what was fetched ahead of need had most of the link."""
    world = World(tmp_path, 60)
    world.add(*[1] * 40)
    gates = {info.url: Gate() for info in world.objects}

    async def work(core: Core) -> None:
        world.store.before_read = lambda url, start: gates[url].wait()
        side = Side(core, world.objects)
        side.plan(*range(40))
        side.want(*range(AT_FIRST), urgent=False)
        await until(lambda: side.node()["requests_in_flight"] == AT_FIRST, "the first shard is on its way")
        urls = [info.url for info in world.objects]
        for url in urls[: AT_FIRST - 1]:
            gates[url].set()
        await until(lambda: len(side.granted) == AT_FIRST - 1, "all of it but one is here")
        await settle()
        assert side.node()["requests_in_flight"] == AT_FIRST_WITH_OTHERS
        assert side.node()["requests_allowed"] > AT_FIRST_WITH_OTHERS
        gates[urls[AT_FIRST - 1]].set()
        await until(lambda: side.node()["requests_in_flight"] == side.node()["requests_allowed"], "more is fetched")
        for gate in gates.values():
            gate.set()

    world.run(work)


def test_each_endpoint_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """One that hangs with all that it may be sent leaves the other free."""
    world = World(tmp_path, 60)
    world.add(20)
    other = world.store.head("s3://fake/0")
    world.store.contents["s3://other/0"] = random_bytes(7, CHUNK_BYTES)
    objects = [other, world.store.head("s3://other/0")]

    async def work(core: Core) -> None:
        side = Side(core, objects)
        gate = Gate()
        world.store.before_read = lambda url, start: gate.wait() if "fake" in url else None
        try:
            side.plan(0)
            side.want(20)
            await until(lambda: side.granted == [20], "the other one's is here")
            endpoints = side.node()["endpoints"]
            assert endpoints["s3://fake"]["requests_in_flight"] == AT_FIRST
            assert endpoints["s3://other"]["requests_in_flight"] == 0
        finally:
            gate.set()

    world.run(work)


def test_of_very_many_endpoints_those_used_last_are_known(tmp_path: Path) -> None:
    """Single objects may each come from a host of their own; what is in flight counts all the same."""
    world = World(tmp_path, 8)
    world.add(*[1] * 2)
    for number in range(100):
        world.store.contents[f"s3://host{number}/0"] = random_bytes(number, CHUNK_BYTES)
    objects = [*world.objects, *(world.store.head(f"s3://host{number}/0") for number in range(100))]

    async def work(core: Core) -> None:
        side = Side(core, objects)
        with first_read_hangs(world, "s3://fake/0") as gate:
            side.want(0)
            await until(lambda: side.node()["requests_in_flight"] == 1, "it is asked for")
            held_back, refused = world.store.before_read, threading.Event()

            def before_read(url: str, start: int) -> None:
                if url == "s3://host0/0" and not refused.is_set():
                    refused.set()
                    raise ThrottledError("slow down")
                held_back(url, start)

            world.store.before_read = before_read
            side.want(2)
            await until(lambda: bool(side.all(protocol.Failed)), "the first host refuses")
            await read(side, *range(2, 102))
            assert side.node()["throttled_requests"] == 1
            endpoints = side.node()["endpoints"]
            assert list(endpoints) == ["s3://fake", *(f"s3://host{number}" for number in range(37, 100))]
            gate.set()
            await until(lambda: side.granted[-1:] == [0], "it is here")

    world.run(work)


def test_late_is_what_takes_far_longer_than_its_peers() -> None:
    hedger = Hedger()
    assert hedger.late_after_s(1000) is None
    for number in range(100):
        hedger.ended(Attempt(0.0, 5.0 if number % 50 == 0 else 0.1, 1000))
        hedger.ended(Attempt(0.0, 0.001, outcome=Outcome.FAILED))
    late_after_s = hedger.late_after_s(1000)
    assert late_after_s is not None
    assert 0.29 < late_after_s < 0.31
    assert hedger.late_after_s(2000) == 2 * late_after_s
    assert hedger.late_after_s(10) == late_after_s


def test_the_peers_are_looked_through_once_for_all_that_is_in_flight() -> None:
    """Whoever serves all consumers of a node asks of each request in flight, again and again."""
    hedger = Hedger()
    for _ in range(10):
        hedger.ended(Attempt(0.0, 0.5, 1000))
    with mock.patch.object(hedger, "_usual_s", wraps=hedger._usual_s) as looked_through:
        assert {hedger.late_after_s(1000) for _ in range(256)} == {1.5}
        assert looked_through.call_count == 1
        for _ in range(200):
            hedger.ended(Attempt(0.0, 1.0, 1000))
        assert hedger.late_after_s(1000) == 3.0


def test_the_budget_is_a_share_of_the_requests() -> None:
    hedger = Hedger()
    assert not hedger.has_budget
    for count in range(1, 1000):
        hedger.request_count = count
        while hedger.has_budget:
            hedger.hedge_count += 1
        assert hedger.hedge_count < SHARE_MAX * count + 1


def test_a_fixed_number_belongs_to_the_directory(tmp_path: Path) -> None:
    with (
        Cache(tmp_path / "cache", ram_bytes=16 << 20, disk_bytes=0, requests_in_flight=3, service="inprocess") as cache,
        cache.consumer() as consumer,
    ):
        assert consumer.stats()["node"]["requests_allowed"] == 3
    with pytest.raises(ConfigError, match=r"requests_in_flight=2000 must be between 1 and 1024, or 0"):
        Cache(tmp_path / "cache", requests_in_flight=2000)
