"""Warm-ups in a core: beside consumers of jobs, under limits, in their order, and past shards that cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastload import protocol
from fastload.cache import DiskTier
from fastload.errors import AccessDeniedError, StoreUnavailableError
from fastload.service.core import Core
from fastload.service.deciding import plans
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Side, World, settle, sleep, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)


class WarmUp(Side):
    """The consumer of a warm-up."""

    def warm(self, *objects: int, **terms: Any) -> None:
        """Set its plan."""
        self.sent.clear()
        self.say(protocol.SetPlan(list(objects), 0, True, 0, protocol.WarmTerms(**terms)))

    @property
    def progress(self) -> protocol.Progress:
        """The latest."""
        return self.all(protocol.Progress)[-1]

    @property
    def is_finished(self) -> bool:
        return bool(self.all(protocol.Progress)) and self.progress.finished


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Four objects of eight chunks, of one endpoint, and a cache with room for them."""
    world = World(tmp_path, 64, disk_bytes=64 * FILE_BYTES)
    world.add(8, 8, 8, 8)
    return world


def reads_of(world: World, number: int) -> int:
    return sum(url == world.objects[number].url for url, _ in world.store.reads)


def test_while_a_thread_waits_one_request_is_begun_and_then_none_for_a_while(world: World) -> None:
    async def work(core: Core) -> None:
        with world.held_back():
            job, warm_up = Side(core, world.objects), WarmUp(core, world.objects)
            job.want(0)
            await settle()
            warm_up.warm(1)
            await sleep(20)
            assert (reads_of(world, 0), reads_of(world, 1)) == (1, 1)
        await until(lambda: warm_up.is_finished, "it goes on when nobody waits")

    world.run(work)


def test_what_a_job_wants_is_fetched_however_much_warming_holds_back(world: World) -> None:
    async def work(core: Core) -> None:
        core.warming.limit(1, 1)
        job, warm_up = Side(core, world.objects), WarmUp(core, world.objects)
        warm_up.warm(0, 1, 2, 3)
        await settle()
        job.want(*range(16, 32))
        await until(lambda: len(job.granted) == 16, "the job has its chunks")
        assert reads_of(world, 0) + reads_of(world, 1) <= 1
        core.warming.limit(0, 0)
        await until(lambda: warm_up.is_finished, "it goes on without a limit")
        assert warm_up.progress.held_bytes == warm_up.progress.total_bytes

    world.run(work)


def test_what_a_warm_up_wants_for_itself_is_within_its_limit(world: World) -> None:
    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, bytes_per_s=CHUNK_BYTES)
        warm_up.want(*range(8, 16))
        await sleep(4.5)
        assert 4 <= len(world.store.reads) <= 6

    world.run(work)


def test_the_core_wakes_by_itself_and_rests_in_between(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = list[float]()
    tick = Core._tick

    def counted(core: Core) -> None:
        ticks.append(core._loop.time())
        tick(core)

    monkeypatch.setattr(Core, "_tick", counted)

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, 1, bytes_per_s=CHUNK_BYTES // 10)  # a chunk each ten seconds
        await until(lambda: warm_up.is_finished, "it is through")
        assert 145 < core._loop.time() < 155
        assert len(ticks) < 200

    world.run(work)


def test_a_warm_up_that_stands_back_gives_signs_of_life(world: World) -> None:
    async def work(core: Core) -> None:
        first, second = WarmUp(core, world.objects), WarmUp(core, world.objects)
        first.warm(0, bytes_per_s=1)
        core.warming.limit(1, 0)
        second.warm(1)
        await sleep(60)
        assert 10 <= len(second.all(protocol.Progress)) <= 14
        assert second.progress.done_chunks == 0

    world.run(work)


def test_the_most_urgent_comes_first(world: World) -> None:
    async def work(core: Core) -> None:
        core.warming.limit(CHUNK_BYTES, 1)
        for number, terms in enumerate([{}, {"priority": 1}, {"deadline": 2e9, "priority": 1}, {"deadline": 2e9}]):
            WarmUp(core, world.objects).warm(number, **terms)
        await sleep(40)
        seen = list(dict.fromkeys(url for url, _ in world.store.reads))
        urls = [info.url for info in world.objects]
        # The first had begun when the others came.
        assert [urls.index(url) for url in seen if url != urls[0]] == [2, 3, 1]
        assert len(world.store.reads) == 32

    world.run(work)


def test_a_shard_that_cannot_be_had_ends_it(world: World) -> None:
    world.store.errors[world.objects[1].url] = StoreUnavailableError("away")

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, 1, 2, 3)
        await until(lambda: warm_up.is_finished, "it ends")
        assert (warm_up.progress.error_name, warm_up.progress.failed_objects) == ("StoreUnavailableError", 0)

    world.run(work)


def test_one_that_goes_on_says_which_shards_it_could_not_have(world: World) -> None:
    url = world.objects[1].url
    world.store.errors[url] = StoreUnavailableError("away")

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, 1, 2, 3, goes_on=True)
        await until(lambda: warm_up.is_finished, "it ends")
        progress = warm_up.progress
        assert progress.error_name == ""
        assert progress.held_bytes == 3 * 8 * CHUNK_BYTES
        assert progress.done_bytes == progress.total_bytes
        assert (progress.failed_objects, progress.failures) == (1, [(url, "StoreUnavailableError", "away")])
        assert reads_of(world, 1) <= 8
        del world.store.errors[url]
        warm_up.warm(0, 1, 2, 3, goes_on=True)
        await until(lambda: warm_up.is_finished, "it is complete")
        assert warm_up.progress.held_bytes == warm_up.progress.total_bytes
        assert warm_up.progress.fetched_bytes == 8 * CHUNK_BYTES

    world.run(work)


def test_an_object_that_is_denied_holds_up_no_others_and_other_credentials_are_tried(world: World) -> None:
    url = world.objects[1].url
    world.store.errors[url] = AccessDeniedError("expired")

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, 1, 2, 3, goes_on=True)
        await until(lambda: warm_up.is_finished, "it ends")
        progress = warm_up.progress
        assert (progress.error_name, progress.failures) == ("", [(url, "AccessDeniedError", "expired")])
        assert (progress.held_bytes, progress.done_chunks) == (24 * CHUNK_BYTES, 32)
        world.store.errors.clear()
        warm_up.say(protocol.Credentials({"anonymous": True}))
        await until(lambda: warm_up.progress.held_bytes == 32 * CHUNK_BYTES, "it goes on with others")
        assert (warm_up.progress.failed_objects, warm_up.progress.fetched_bytes) == (0, 32 * CHUNK_BYTES)

    world.run(work)


@pytest.mark.parametrize("goes_on", [True, False])
def test_denied_access_ends_one_to_which_all_is_denied(
    world: World, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    monkeypatch.setattr(plans, "_DENIED_MAX", 2)
    for info in world.objects:
        world.store.errors[info.url] = AccessDeniedError("no")

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(0, 1, 2, 3, goes_on=goes_on)
        await until(lambda: warm_up.is_finished, "it ends")
        assert warm_up.progress.error_name == "AccessDeniedError"

    world.run(work)


def test_a_full_cache_that_holds_a_long_plan_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks are looked at in one go, and however far behind others what is held lies."""
    monkeypatch.setattr(plans, "_LOOKED_AT_MAX", 4)
    world = World(tmp_path, 16, disk_bytes=24 * FILE_BYTES)
    world.add(8, 24)

    async def work(core: Core) -> None:
        warm_up = WarmUp(core, world.objects)
        warm_up.warm(1)
        await until(lambda: warm_up.is_finished, "the disk is full")
        warm_up.warm(1)
        await until(lambda: warm_up.is_finished, "all is held")
        assert (warm_up.progress.held_chunks, warm_up.progress.fetched_bytes) == (24, 0)
        warm_up.warm(0, 1)
        await until(lambda: warm_up.is_finished, "there is no room for the rest")
        assert warm_up.progress.held_chunks == 24
        assert warm_up.progress.done_chunks == 32

    world.run(work)


def test_what_a_slow_link_has_in_flight_is_given_up_when_a_job_waits_and_fetched_later(world: World) -> None:
    async def work(core: Core) -> None:
        with world.held_back() as gate:
            warm_up = WarmUp(core, world.objects)
            warm_up.warm(1)
            await sleep(2.0)
            assert reads_of(world, 1) == 8
            job = Side(core, world.objects)
            job.want(0)
            await settle()
            assert reads_of(world, 0) == 1
            assert len(core.warming._in_flight) == 1
            assert core._endpoints.in_flight == 2
            gate.set()
        await until(lambda: warm_up.is_finished, "it is fetched again")
        assert warm_up.progress.held_bytes == 8 * CHUNK_BYTES
        assert core._table.quarantined_count == 0
        assert reads_of(world, 1) == 8 + 7

    world.run(work)


def test_what_the_job_will_read_itself_is_not_given_up(world: World) -> None:
    async def work(core: Core) -> None:
        with world.held_back():
            warm_up = WarmUp(core, world.objects)
            warm_up.warm(1)
            await sleep(2.0)
            job = Side(core, world.objects)
            job.plan(0, 1)
            job.want(0)
            await sleep(2.0)
            assert (reads_of(world, 0), reads_of(world, 1)) == (1 + 3, 8), "the job's own come beside them"
        await until(lambda: warm_up.is_finished, "it is there")
        assert reads_of(world, 1) == 8

    world.run(work)


def test_uploads_hear_that_a_job_waits_for_a_store_and_of_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    async def work(core: Core) -> None:
        monkeypatch.setattr(type(core.savings), "is_sending", True)
        monkeypatch.setattr(core.savings, "loader_waits", lambda: heard.append(what))
        job, warm_up = Side(core, world.objects), WarmUp(core, world.objects)
        what = "warm-up"
        warm_up.warm(1)
        await until(lambda: warm_up.is_finished, "it is warm")
        what = "ahead"
        job.want(8)  # which is there
        await settle()
        what = "waits"
        job.want(0)
        await until(lambda: len(job.granted) == 2, "the job has both")

    world.run(work)
    assert set(heard) == {"waits"}
