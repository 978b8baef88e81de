"""How many samples shards hold, as the service says: without their indexes, over runs, and whatever became of files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload import protocol
from fastload.client import Handle as Cache
from fastload.errors import ServiceError
from fastload.formats import ShardIndex
from fastload.service.core import WRITE_AFTER_S, Core
from fastload.service.indexes import SampleCounts
from tests.conftest import Bucket
from tests.formats.archives import Member, index, write
from tests.service.helpers import eventually
from tests.service.world import Side, World, settle, sleep, until

DISK_BYTES = 8 << 20


def index_of(sample_count: int) -> bytes:
    """A stored index of so many samples."""
    found: ShardIndex = index(write([Member(f"{number}.x") for number in range(sample_count)]))
    return found.to_bytes()


async def counts(side: Side, *numbers: int) -> list[int]:
    """What the service answers."""
    before = len(side.all(protocol.Counts))
    side.say(protocol.GetCounts(9, list(numbers)))
    await until(lambda: len(side.all(protocol.Counts)) > before, "it is answered")
    return np.frombuffer(side.all(protocol.Counts)[-1].counts, "<i8").tolist()


@pytest.mark.parametrize("disk_bytes", [0, DISK_BYTES])
def test_counts_of_indexes_that_are_kept(tmp_path: Path, disk_bytes: int) -> None:
    world = World(tmp_path, 4, disk_bytes)
    world.add(1, 1, 1, 1)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        assert await counts(side, 0, 1) == [-1, -1]
        side.say(protocol.PutIndex(2, index_of(7)))
        side.say(protocol.PutIndex(0, b"no index"))
        side.say(protocol.PutIndex(3, index_of(0)))
        assert await counts(side, 3, 2, 0, 2) == [0, 7, -1, 7]
        assert await counts(side) == []
        side.say(protocol.PutIndex(2, index_of(5)))
        assert await counts(side, 2) == [5]

    world.run(work)


def test_counts_that_other_nodes_told_are_kept_over_runs(tmp_path: Path) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(1, 1, 1)

    async def hear(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.PutIndex(0, index_of(7)))
        side.say(protocol.PutCounts([1, 2], np.array([3, 0], "<i8").tobytes()))
        assert await counts(side, 0, 1, 2) == [7, 3, 0]
        with pytest.raises(ServiceError, match="counts of 1 objects in 16 bytes"):
            side.say(protocol.PutCounts([1], bytes(16)))
        with pytest.raises(ServiceError, match="a count of -1 samples"):
            side.say(protocol.PutCounts([1], np.array([-1], "<i8").tobytes()))

    async def know(core: Core) -> None:
        assert await counts(Side(core, world.objects), 0, 1, 2) == [7, 3, 0]

    world.run(hear)
    world.run(know)


def test_nothing_comes_into_the_directory_when_a_consumer_goes(tmp_path: Path) -> None:
    """A job that ends may remove it just then. What is left to write comes a second later, or when the service ends."""
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(1)
    table = tmp_path / "cache" / "index" / f"{SampleCounts.NAME}.blob"

    def files() -> set[Path]:
        return {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.PutIndex(0, index_of(7)))
        await until(lambda: core.disk.blob_names() != [], "the index is written")
        before = files()
        core.disconnect(side.state)
        await settle()
        assert files() == before
        await until(table.exists, "the counts are written")
        side = Side(core, world.objects)
        side.say(protocol.PutIndex(0, index_of(8)))
        core.disconnect(side.state)

    world.run(work)

    async def look(core: Core) -> None:
        assert await counts(Side(core, world.objects), 0) == [8]

    world.run(look)


@pytest.mark.parametrize("lost", ["nothing", "the table", "the indexes"])
def test_a_later_run_knows_them(tmp_path: Path, lost: str) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(*[1] * 40)

    async def fill(core: Core) -> None:
        for some in (range(25), range(25, 30)):
            side = Side(core, world.objects)
            for number in some:
                side.say(protocol.PutIndex(number, index_of(number)))
            core.disconnect(side.state)
        await until(lambda: len(core.disk.blob_names()) == 31, "all is written")

    async def ask(core: Core) -> None:
        side = Side(core, world.objects)
        reads = []
        get_head = core.disk.get_blob_head
        core.disk.get_blob_head = lambda *arguments: reads.append(arguments) or get_head(*arguments)  # type: ignore[func-returns-value]
        assert await counts(side, *range(40)) == [*range(30), *[-1] * 10]
        assert len(reads) == (30 if lost == "the table" else 0)
        assert await counts(side, *range(40)) == [*range(30), *[-1] * 10]
        assert len(reads) == (30 if lost == "the table" else 0), "they are remembered"

    world.run(fill)
    for path in (tmp_path / "cache" / "index").iterdir():
        if lost != "nothing" and (path.name == "counts.blob") == (lost == "the table"):
            path.unlink()
    world.run(ask)


def test_a_run_that_asks_for_nothing_loses_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(1, 1)

    async def put(core: Core, number: int) -> None:
        side = Side(core, world.objects)
        side.say(protocol.PutIndex(number, index_of(number + 1)))
        core.disconnect(side.state)
        await until(lambda: core.disk.has_blob(SampleCounts.NAME), "it is written")

    async def ask(core: Core) -> None:
        assert await counts(Side(core, world.objects), 0, 1) == [1, 2]

    for number in range(2):
        world.run(lambda core, number=number: put(core, number))  # type: ignore[misc]
    for path in (tmp_path / "cache" / "index").iterdir():
        if path.name != "counts.blob":
            path.unlink()
    world.run(ask)


def test_a_damaged_table_is_made_anew(tmp_path: Path) -> None:
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(1)

    async def fill(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.PutIndex(0, index_of(3)))
        core.disconnect(side.state)
        await until(lambda: core.disk.has_blob(SampleCounts.NAME), "it is written")

    async def ask(core: Core) -> None:
        assert await counts(Side(core, world.objects), 0) == [3]

    world.run(fill)
    table = tmp_path / "cache" / "index" / "counts.blob"
    os.truncate(table, table.stat().st_size - 1)
    world.run(ask)


@pytest.mark.parametrize("mode", ["auto", "inprocess"])
def test_a_consumer_asks_for_many(
    cache: Cache, s3: Bucket, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "COUNTS_PER_REQUEST", 4)
    with cache.consumer() as consumer:
        objects = consumer.resolve([f"{s3.url}/"], (".tar",))
        consumer.attach(objects)
        assert consumer.get_counts([]).tolist() == []
        assert consumer.get_counts(range(6)).tolist() == [-1] * 6
        for number in (1, 5):
            consumer.put_index(number, index_of(number))
        assert consumer.get_counts(range(6)).tolist() == [-1, 1, -1, -1, -1, 5]
    cache.close()
    eventually(lambda: not (cache.directory / "socket").exists(), "the service has ended")
    # The socket goes first, and what is known is written then.
    eventually(lambda: (cache.directory / "index" / "counts.blob").exists(), "the counts are written")
    with cache.consumer() as consumer:
        consumer.attach(objects)
        assert consumer.get_counts([5, 0, 1]).tolist() == [5, -1, 1]


@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**62))))
def test_the_table_is_what_was_added_last(added: list[tuple[bytes, int]]) -> None:
    table, again = SampleCounts(), SampleCounts()
    for object_id, count in added:
        table.add(object_id, count)
    again.add(b"x" * 16, 1)
    again.load(SampleCounts.added(table.to_bytes(), again.to_bytes()) + b"cut")
    expected = {**dict(added), b"x" * 16: 1}
    assert again.of(list(expected)) == list(expected.values())


def test_what_is_written_down_is_written_once(tmp_path: Path) -> None:
    """Where nobody asks for counts: the table grew by all that was known whenever a consumer went."""
    world = World(tmp_path, 4, DISK_BYTES)
    world.add(*[1] * 6)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        for number in range(6):
            side.say(protocol.PutIndex(number, index_of(number)))
            core.disconnect(Side(core, []).state)  # whatever goes, what is known is written
            await sleep(2 * WRITE_AFTER_S)

    world.run(work)

    async def look(core: Core) -> None:
        assert len(core.disk.get_blob(SampleCounts.NAME) or b"") == 6 * 24
        assert await counts(Side(core, world.objects), *range(6)) == [*range(6)]

    world.run(look)


def test_the_table_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.service.indexes._COUNTS_MAX", 32)
    table = SampleCounts()
    for number in range(100):
        table.add(number.to_bytes(16, "big"), number)
    assert len(table.take_unstored()) <= 32 * 24
    assert len(table.to_bytes()) <= 32 * 24
    assert table.of([(99).to_bytes(16, "big"), bytes(16)]) == [99, -1]
