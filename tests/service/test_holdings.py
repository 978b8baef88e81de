"""What a core remembers of what it holds, keeps and removes: catalog, pins, evict, verify, scrub."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastload import protocol
from fastload.cache import ChunkKey, DiskTier, catalog
from fastload.cache.catalog import UNKNOWN, Catalog, Changes
from fastload.cache.disk import path_in
from fastload.service.core import Core
from fastload.service.operators import Operator
from fastload.service.resources import Resources
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Gate, Side, World, settle, sleep, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)
CHUNKS = 3
_FLUSHED_S = 10.0


def a_world(tmp_path: Path, objects: int = 4) -> World:
    world = World(tmp_path, 2 * CHUNKS, disk_bytes=40 * FILE_BYTES)
    world.add(*[CHUNKS] * objects)
    return world


def an_operator(core: Core) -> tuple[Operator, Callable[[Any], None], list[Any]]:
    sent: list[Any] = []
    operator = core.operators.connect(protocol.Observe(protocol.VERSION, 1, "test"), sent.append)
    return operator, lambda message: core.operators.receive(operator, message), sent


async def fill(side: Side, *objects: int) -> None:
    for number in objects:
        chunks = [number * CHUNKS + index for index in range(CHUNKS)]
        before = len(side.granted)
        side.want(*chunks)
        await until(lambda before=before: len(side.granted) == before + CHUNKS, "all are granted")  # type: ignore[misc]
        await settle()
        side.release(*chunks)


async def pin(side: Side, *objects: int, name: str = "pin", ttl_s: float = 0.0) -> Any:
    before = len(side.sent)

    def answers() -> list[Any]:
        return [each for each in side.sent[before:] if isinstance(each, protocol.Done | protocol.RequestFailed)]

    side.say(protocol.Pin(1, name, list(objects), ttl_s, 0))
    await until(lambda: bool(answers()), "it is answered")
    return answers()[0]


def data_sets(core: Core) -> dict[str, tuple[int, int]]:
    return {row.name: (row.object_count, row.disk_bytes) for row in core.holdings.data_sets()}


def test_the_next_service_knows_what_is_held_and_pinned(tmp_path: Path) -> None:
    world = a_world(tmp_path)

    async def fill_it(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Label("mine", [2]))
        await fill(side, 0, 1, 2)
        await pin(side, 1, 3)

    async def look(core: Core) -> None:
        await settle()
        one = CHUNKS * CHUNK_BYTES
        assert data_sets(core) == {"s3://fake/": (1, one), "mine": (1, one), "pin": (2, one)}
        assert core.holdings.pinned_disk_bytes == one
        assert all(row.last_use_at > 0 for row in core.holdings.data_sets())

    world.run(fill_it)
    with_rows = Catalog(tmp_path / "cache", read_only=True)
    with_rows.open()
    assert {each.url for each in with_rows.objects()} == {f"s3://fake/{number}" for number in range(4)}
    with_rows.close()
    world.run(look)


def test_what_leaves_the_disk_leaves_the_catalog(tmp_path: Path) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1)
        await sleep(_FLUSHED_S)
        side.say(protocol.Clear(5, False))
        await until(lambda: bool(side.all(protocol.Cleared)), "it is cleared")
        await sleep(_FLUSHED_S)
        assert data_sets(core) == {}
        found = Catalog(tmp_path / "cache", read_only=True)
        found.open()
        assert found.objects() == []
        found.close()

    world.run(work)


def test_secrets_are_not_written_down(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    url = "s3://user:hunter2@fake/x.tar"
    world.store.contents[url] = b"x" * CHUNK_BYTES
    world.objects = [world.store.head(url)]

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.want(0)
        await until(lambda: 0 in side.granted, "it is there")
        await settle()
        await pin(side, 0)

    world.run(work)
    for path in (tmp_path / "cache").glob("catalog*"):
        assert b"hunter2" not in path.read_bytes()


# Whatever the file is


@pytest.mark.parametrize("damage", ["garbage", "newer", "a directory"])
def test_a_file_that_is_no_catalog_costs_names_and_pins_and_nothing_else(tmp_path: Path, damage: str) -> None:
    world = a_world(tmp_path)

    async def fill_it(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1)
        await pin(side, 0)

    async def look(core: Core) -> None:
        (trouble,) = core.warnings
        assert "catalog" in trouble
        await settle()
        assert data_sets(core) == {UNKNOWN: (2, 2 * CHUNKS * CHUNK_BYTES)}
        assert core.holdings.counters["catalog_set_aside"] + core.holdings.counters["catalog_errors"] >= 1
        side = Side(core, world.objects)
        reads = len(world.store.reads)
        await fill(side, 0, 1)
        assert len(world.store.reads) == reads
        assert data_sets(core) == {"s3://fake/": (2, 2 * CHUNKS * CHUNK_BYTES)}
        if damage == "a directory":
            return
        assert isinstance(await pin(side, 0), protocol.Done)

    async def look_again(core: Core) -> None:
        assert core.warnings == []
        assert [each.name for each in core._shared.pins] == ["pin"]

    world.run(fill_it)
    path = tmp_path / "cache" / catalog.NAME
    if damage == "garbage":
        path.write_bytes(os.urandom(20_000))
    elif damage == "newer":
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 7")
        db.close()
    else:
        path.unlink()
        path.mkdir()
    world.run(look)
    if damage != "a directory":
        world.run(look_again)
        assert (tmp_path / "cache" / catalog.ASIDE).exists()


def test_a_file_that_breaks_while_it_is_used_is_made_anew_with_all_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0)
        await pin(side, 0, name="first")
        with monkeypatch.context() as context:
            context.setattr(Catalog, "_write", _raise(sqlite3.SQLITE_CORRUPT))
            failed = await pin(side, 1, name="second")
            assert isinstance(failed, protocol.RequestFailed)
            assert "pin 'second' holds, but is lost with the service" in failed.message
        await sleep(60)
        assert core.holdings.counters["catalog_set_aside"] == 1
        assert len(core.warnings) == 1

    async def look(core: Core) -> None:
        assert {each.name for each in core._shared.pins} == {"first", "second"}

    world.run(work)
    world.run(look)


def _raise(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("as a test has it")
        error.sqlite_errorcode = code
        raise error

    return fail


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY])
def test_what_cannot_be_written_now_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        with monkeypatch.context() as context:
            context.setattr(Catalog, "_write", _raise(code))
            await fill(side, 0, 1)
            assert isinstance(await pin(side, 1), protocol.RequestFailed)
            await sleep(100)
            assert core.holdings.counters["catalog_errors"] >= 3
            assert len(core.warnings) == 1
        await sleep(100)

    async def look(core: Core) -> None:
        await settle()
        assert [each.name for each in core._shared.pins] == ["pin"]
        assert set(data_sets(core)) == {"pin", "s3://fake/"}

    world.run(work)
    world.run(look)


def test_pins_of_a_catalog_that_others_hold_at_the_start_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = a_world(tmp_path)
    monkeypatch.setattr(catalog, "_BUSY_S", 0.05)

    async def fill_it(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1)
        await pin(side, 0)

    async def look(core: Core) -> None:
        assert len(core._shared.pins) == 0
        await sleep(20)
        assert len(core._shared.pins) == 0
        other.close()
        await sleep(20)
        assert [each.name for each in core._shared.pins] == ["pin"]
        assert set(data_sets(core)) == {"pin", "s3://fake/"}

    world.run(fill_it)
    other = sqlite3.connect(tmp_path / "cache" / catalog.NAME, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    try:
        world.run(look)
    finally:
        other.close()


def test_a_disk_that_hangs_in_the_catalog_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, gate = a_world(tmp_path), Gate()
    write = Catalog.write

    def hang(self: Catalog, changes: Changes) -> None:
        gate.wait()
        write(self, changes)

    monkeypatch.setattr(Catalog, "write", hang)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Pin(1, "pin", [0], 0.0, 0))
        await fill(side, 0, 1, 2, 3)
        await until(lambda: core.disk_hangs, "the disk counts as one that hangs")
        (failed,) = side.all(protocol.RequestFailed)
        assert "the disk does not answer" in failed.message
        await fill(side, 0, 1, 2, 3)
        gate.set()
        await until(lambda: not core.disk_hangs, "it answers")
        await sleep(30)

    async def look(core: Core) -> None:
        assert [each.name for each in core._shared.pins] == ["pin"]

    world.run(work, disk_deadline_s=5)
    monkeypatch.undo()
    world.run(look)


def test_nothing_is_written_where_the_directory_is_lost(tmp_path: Path) -> None:
    world = a_world(tmp_path)
    lost = False
    parts = world._parts

    def with_loss(loop: Any) -> Resources:
        from dataclasses import replace

        return replace(parts(loop), is_lost=lambda: lost)

    world._parts = with_loss  # type: ignore[method-assign]

    async def work(core: Core) -> None:
        nonlocal lost
        side = Side(core, world.objects)
        lost = True
        await fill(side, 0)
        failed = await pin(side, 0)
        assert isinstance(failed, protocol.RequestFailed)
        assert "its directory was removed or emptied" in failed.message
        await sleep(30)

    world.run(work)
    assert not (tmp_path / "cache" / catalog.NAME).exists()


@pytest.mark.parametrize(("moved_s", "remains"), [(-10 * 86400, True), (3000, False), (500, True)])
def test_the_time_to_live_counts_over_restarts_also_where_the_clock_was_set_back(
    tmp_path: Path, moved_s: float, remains: bool
) -> None:
    world = a_world(tmp_path)
    at = 1.7e9
    parts = world._parts

    def with_clock(loop: Any) -> Resources:
        from dataclasses import replace

        return replace(parts(loop), wall=lambda: at)

    world._parts = with_clock  # type: ignore[method-assign]

    async def fill_it(core: Core) -> None:
        await pin(Side(core, world.objects), 0, ttl_s=1000)

    async def look(core: Core) -> None:
        assert (len(core._shared.pins) == 1) is remains
        await sleep(1200)
        assert len(core._shared.pins) == 0

    world.run(fill_it)
    at += moved_s
    world.run(look)


NAMES = ["'; DROP TABLE pins; --", "\x00", "%", "\u202etxt.exe", "s3://fake/", "x" * 500, "\x1b[31m", "/", "(unknown)"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    world = a_world(tmp_path)
    world.objects.append(world.store.put(name.strip("/") or "root", b"x" * CHUNK_BYTES))
    odd = len(world.objects) - 1

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Label(name, [1]))
        await fill(side, 0, 1)
        side.want(odd * CHUNKS)
        await until(lambda: odd * CHUNKS in side.granted, "it is there")
        side.release(odd * CHUNKS)
        await settle()
        assert isinstance(await pin(side, 2, name=name), protocol.Done)
        _, say, sent = an_operator(core)
        for what in ([], [""], [name], ["", name, "no such thing"]):
            say(protocol.Verify(1, what, True))
            await until(lambda: bool(sent) and isinstance(sent[-1], protocol.Verified) and sent[-1].finished, "it is")
            say(protocol.Evict(2, what))
            await until(lambda: isinstance(sent[-1], protocol.Done), "it is answered")
        assert core.warnings == []
        assert name in data_sets(core)

    async def look(core: Core) -> None:
        assert [each.name for each in core._shared.pins] == [name]
        assert core.warnings == []
        side = Side(core, world.objects)
        say = an_operator(core)[1]
        say(protocol.Unpin(1, [name]))
        await settle()
        assert len(core._shared.pins) == 0
        assert not core._shared.disk_order.is_pinned(side.state.entry(2).id)

    world.run(work)
    world.run(look)


# Removing and checking


def test_evicting_by_url_prefix_and_name_leaves_what_is_leased_or_pinned(tmp_path: Path) -> None:
    world = a_world(tmp_path, objects=6)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Label("named", [4, 5]))
        await fill(side, 0, 1, 2, 3, 4, 5)
        await pin(side, 2)
        side.want(CHUNKS)
        await until(lambda: CHUNKS in side.granted[-1:], "it is leased")
        _, say, sent = an_operator(core)

        def on_disk(number: int) -> int:
            entry = side.state.entry(number)
            return sum(core.disk.contains(entry.key(index)) for index in range(CHUNKS))

        one = CHUNKS * CHUNK_BYTES
        say(protocol.Evict(1, ["s3://fake/0"]))
        await until(lambda: len(sent) == 1, "it is evicted")
        assert [on_disk(number) for number in range(6)] == [0, 3, 3, 3, 3, 3]
        assert sent[0].values["freed_bytes"] >= one
        say(protocol.Evict(2, ["named"]))
        await until(lambda: len(sent) == 2, "it is evicted")
        assert [on_disk(number) for number in range(6)] == [0, 3, 3, 3, 0, 0]
        say(protocol.Evict(3, ["s3://fake/"]))
        await until(lambda: len(sent) == 3, "it is evicted")
        assert [on_disk(number) for number in range(6)] == [0, 1, 3, 0, 0, 0]
        assert sent[2].values["in_use_bytes"] == CHUNK_BYTES
        assert sent[2].values["pinned_bytes"] == one
        say(protocol.Evict(4, ["s3://nothing/"]))
        await until(lambda: len(sent) == 4, "it is answered")
        assert sent[3].values == {"freed_bytes": 0, "in_use_bytes": 0, "pinned_bytes": 0}

    world.run(work)


def test_unpinning_by_name_and_by_url(tmp_path: Path) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await pin(side, 0, 1, name="a")
        await pin(side, 1, 2, name="b")
        _, say, sent = an_operator(core)
        one = CHUNKS * CHUNK_BYTES
        say(protocol.Unpin(1, ["s3://fake/1"]))
        await until(lambda: len(sent) == 1, "it is answered")
        assert sent[0].values == {"byte_count": one, "names": ["a", "b"]}
        say(protocol.Unpin(2, ["b"]))
        await until(lambda: len(sent) == 2, "it is answered")
        assert sent[1].values == {"byte_count": one, "names": ["b"]}
        say(protocol.Unpin(3, ["nothing"]))
        await until(lambda: len(sent) == 3, "it is answered")
        assert sent[2].values == {"byte_count": 0, "names": []}
        assert [each.name for each in core._shared.pins] == ["a"]
        assert not core._shared.disk_order.is_pinned(side.state.entry(1).id)

    async def look(core: Core) -> None:
        assert [(each.name, len(each.sizes)) for each in core._shared.pins] == [("a", 1)]

    world.run(work)
    world.run(look)


@pytest.mark.parametrize("with_pins", [False, True])
def test_clearing_leaves_what_is_pinned_unless_pins_go_too(tmp_path: Path, with_pins: bool) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1)
        await pin(side, 1)
        side.say(protocol.Clear(1, False, with_pins))
        await until(lambda: bool(side.all(protocol.Cleared)), "it is cleared")
        reads = len(world.store.reads)
        await fill(side, 1)
        assert len(world.store.reads) == reads + (CHUNKS if with_pins else 0)
        assert len(core._shared.pins) == (0 if with_pins else 1)

    world.run(work)


def damage(world: World, core: Core, side: Side, number: int, index: int) -> str:
    key = side.state.entry(number).key(index)
    path = path_in(world.directory.path, key)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    return key.name


@pytest.mark.parametrize("repair", [False, True])
def test_verifying_finds_what_is_damaged_and_removes_it_where_asked_to(tmp_path: Path, repair: bool) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1, 2, 3)
        names = {damage(world, core, side, 1, 0), damage(world, core, side, 2, 1)}
        _, say, sent = an_operator(core)
        say(protocol.Verify(1, [], repair))
        await until(lambda: bool(sent) and sent[-1].finished, "it is verified")
        last = sent[-1]
        assert (last.done_chunks, last.total_chunks, last.skipped_chunks, last.damaged_chunks) == (12, 12, 0, 2)
        assert {name for each in sent for name in each.damaged} == names
        say(protocol.Verify(2, ["s3://fake/1"], repair))
        await until(lambda: sent[-1].request == 2 and sent[-1].finished, "it is verified")
        assert (sent[-1].total_chunks, sent[-1].damaged_chunks) == ((2, 0) if repair else (3, 1))
        reads = len(world.store.reads)
        await fill(side, 0, 3)  # so that the others leave RAM
        await fill(side, 1, 2)
        assert len(world.store.reads) == reads + 2  # what is damaged is found by who reads it in any case
        assert core.holdings.data_sets()[0].disk_bytes == 12 * CHUNK_BYTES

    world.run(work)


def test_verifying_ends_with_who_asked(tmp_path: Path) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1)
        operator, say, _ = an_operator(core)
        say(protocol.Verify(1, [], False))
        core.operators.disconnect(operator)
        await settle()
        assert core.verifying.counters["verified_chunks"] <= 1

    world.run(work)


@pytest.mark.parametrize("disk_files", [0, 40])
def test_how_much_of_some_objects_is_held_to_stay(tmp_path: Path, disk_files: int) -> None:
    world = World(tmp_path, 4 * CHUNKS, disk_bytes=disk_files * FILE_BYTES)
    world.add(*[CHUNKS] * 3)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        objects = [(entry.id, entry.info.size) for entry in side.state.entries]
        one = CHUNKS * CHUNK_BYTES
        assert core.holdings.held_bytes(objects) == 0
        await fill(side, 0, 1)
        await settle()
        assert core.holdings.held_bytes(objects) == 2 * one
        before = core.holdings.move_count
        if disk_files:  # a chunk that is damaged on disk does not count, although RAM has it for now
            damage(world, core, side, 1, 2)
            _, say, sent = an_operator(core)
            say(protocol.Verify(1, [], True))
            await until(lambda: bool(sent) and sent[-1].finished, "it is verified")
            assert core.holdings.held_bytes(objects) == 2 * one - CHUNK_BYTES
            assert core.holdings.move_count == before + 1
        _, say, sent = an_operator(core)
        say(protocol.Evict(2, ["s3://fake/1"]))
        await until(lambda: bool(sent), "it is evicted")
        assert core.holdings.held_bytes(objects) == one
        assert core.holdings.move_count > before

    world.run(work)


def test_a_check_that_hangs_has_the_buffer_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, gate = a_world(tmp_path), Gate()
    verify = DiskTier.verify
    using: list[ChunkKey] = []
    together: set[int] = set()

    def hang(self: DiskTier, key: ChunkKey, scratch: memoryview, *, repair: bool) -> bool | None:
        using.append(key)
        together.add(len(using))
        gate.wait()
        scratch[:8] = b"too late"
        together.add(len(using))
        using.remove(key)
        return verify(self, key, scratch, repair=repair)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1, 2, 3)
        monkeypatch.setattr(DiskTier, "verify", hang)
        asked = [an_operator(core) for _ in range(2)]
        for _, say, _ in asked:
            say(protocol.Verify(1, [], True))
        core.verifying.scrub(10.0)
        await until(lambda: core.disk_hangs, "the disk counts as one that hangs")
        for _, _, sent in asked:
            assert (sent[-1].finished, sent[-1].skipped_chunks) == (True, 12)
        asked[0][1](protocol.Verify(2, [], True))
        assert "does not answer" in asked[0][2][-1].message
        await sleep(30)
        gate.set()
        await until(lambda: not core.disk_hangs, "it answers")
        await until(lambda: core.verifying.counters["verified_chunks"] > 12, "it goes round again")
        assert core.verifying.counters["verify_damaged"] == 0
        assert together == {1}

    world.run(work, disk_deadline_s=5)


def test_scrubbing_goes_round_heals_and_waits_for_those_who_wait(tmp_path: Path) -> None:
    world = a_world(tmp_path)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await fill(side, 0, 1, 2)
        await pin(side, 1)
        damage(world, core, side, 1, 2)
        core.verifying.scrub(3600.0)
        await sleep(1700)
        assert 3 <= core.verifying.counters["verified_chunks"] <= 6  # evenly
        await sleep(1950)
        assert core.verifying.counters["verified_chunks"] >= 9
        assert core.verifying.counters["verify_damaged"] == 1
        assert any("damaged" in message for message in core.warnings)
        reads = len(world.store.reads)
        await fill(side, 0, 2)
        await fill(side, 1)
        assert len(world.store.reads) == reads + 1
        with world.held_back():
            side.want(3 * CHUNKS)
            await sleep(10)
            before = core.verifying.counters["verified_chunks"]
            core.verifying.scrub(10.0)
            await sleep(60)
            assert core.verifying.counters["verified_chunks"] == before
        await sleep(60)
        assert core.verifying.counters["verified_chunks"] > before
        core.verifying.scrub(0)
        await sleep(2)
        before = core.verifying.counters["verified_chunks"]
        await sleep(100)
        assert core.verifying.counters["verified_chunks"] == before

    world.run(work)
