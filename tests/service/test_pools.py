"""Pools where no thread can be started, as in a container that is full of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from fastload import protocol
from fastload.service.core import Core
from tests.service.world import Side, World, until


@contextmanager
def threads_at_most(count: int) -> Iterator[None]:
    """Of those that fetch, no more than so many can be started."""
    start = threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name.startswith("fastload-fetch-") and int(thread.name.rpartition("-")[2]) >= count:
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", start_or_not):
        yield


def test_the_threads_that_there_are_do_it_all(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(4)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        with threads_at_most(1):
            side.want(0, 1, 2, 3)
            await until(lambda: sorted(side.granted) == [0, 1, 2, 3], "all have come")
        assert side.node()["requests_in_flight"] == 0

    world.run_in_real_time(work)


def test_where_there_is_none_that_is_said_and_it_is_tried_again(tmp_path: Path) -> None:
    world = World(tmp_path, 8)
    world.add(4)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        with threads_at_most(0):
            side.want(0)
            await until(lambda: bool(side.all(protocol.Failed)), "it has failed")
        (failed,) = side.all(protocol.Failed)
        assert failed.name == "ServiceError"
        assert "cannot start a thread (fetch): can't start new thread" in failed.message
        side.want(0)
        await until(lambda: side.granted == [0], "there is a thread for it")

    world.run_in_real_time(work)
