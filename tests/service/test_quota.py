"""Another `disk_bytes` for a service that runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from fastload import protocol
from fastload.cache import DiskTier
from fastload.client import Handle as Cache
from fastload.service.core import Core
from tests.service.helpers import CHUNK_BYTES, eventually
from tests.service.world import Side, World, settle, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)


def say(core: Core, disk_bytes: int) -> None:
    """A consumer comes whose user has just set this."""
    core.connect(protocol.Hello(protocol.VERSION, 1, "", {}, {"disk_bytes": disk_bytes}), lambda message: None)


def test_less_then_more_then_none_then_some(tmp_path: Path) -> None:
    world = World(tmp_path, 16, disk_bytes=20 * FILE_BYTES)
    world.add(4, 4)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.plan(0, 1, warm=True)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "all is on disk")
        side.plan(1)
        say(core, 5 * FILE_BYTES)
        await until(lambda: core.disk.used_bytes == 5 * FILE_BYTES, "what is too much has gone")
        # What a live plan names stays longest.
        assert all(core.disk.contains(side.state.entry(1).key(index)) for index in range(4))
        say(core, 5 * FILE_BYTES)
        say(core, 20 * FILE_BYTES)
        await until(lambda: core.disk.quota_bytes == 20 * FILE_BYTES, "there is room again")
        await settle()
        side.plan(0, 1, warm=True)
        await until(lambda: core.disk.used_bytes == 8 * FILE_BYTES, "which is used")
        say(core, 0)
        await until(lambda: not core.disk.readable, "it is off")
        assert len(list(world.directory.path.rglob("*.chunk"))) == 8
        say(core, 2 * FILE_BYTES)
        say(core, 20 * FILE_BYTES)
        await until(lambda: core.disk.quota_bytes == 20 * FILE_BYTES and core.disk.readable, "it is on")
        await settle()
        assert 2 <= len(core.disk.keys()) <= 8
        # The order is seen by what it evicts only, and would be wrong for long before that shows.
        assert sorted(core._shared.disk_order.covered()) == sorted(core.disk.keys())

    world.run(work)


def test_switched_on_in_a_service_that_began_without(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(3)

    async def work(core: Core) -> None:
        say(core, 20 * FILE_BYTES)
        await until(lambda: core.disk.writable, "it is on")
        side = Side(core, world.objects)
        side.plan(0, warm=True)
        await until(lambda: core.disk.used_bytes == 3 * FILE_BYTES, "it is used")

    world.run(work)


def test_a_later_value_reaches_the_service_once(cache: Cache) -> None:
    with cache.consumer() as first:
        before = first.stats()["node"]["disk_quota_bytes"]
        assert before == cache.limits.disk_bytes
        with pytest.warns(RuntimeWarning, match="disk_bytes from '64MiB' to '1MiB'"):
            later = Cache(cache.directory, disk_bytes="1MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            later.consumer()
            eventually(lambda: first.stats()["node"]["disk_quota_bytes"] == 1 << 20, "it holds")
        with pytest.warns(RuntimeWarning, match="disk_bytes from '1MiB' to '2MiB'"):
            latest = Cache(cache.directory, disk_bytes="2MiB")
        latest.consumer()
        eventually(lambda: first.stats()["node"]["disk_quota_bytes"] == 2 << 20, "it holds")
        # Neither an older handle nor one that says nothing changes it back.
        for handle in (later, cache, Cache(cache.directory)):
            with handle.consumer() as consumer:
                assert consumer.stats()["node"]["disk_quota_bytes"] == 2 << 20
        later.close()
        latest.close()
