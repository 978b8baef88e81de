"""Objects that consumers open one by one: asked for once, remembered, numbered."""

from __future__ import annotations

from pathlib import Path

from fastload import protocol
from fastload.errors import ObjectChangedError
from fastload.service.core import Core
from fastload.service.fetching.openings import FRESH_S, Versions
from fastload.store.types import ObjectInfo
from tests.service.helpers import CHUNK_BYTES, random_bytes
from tests.service.world import Gate, Side, World, settle, until


def test_versions_are_known_for_an_hour() -> None:
    now = 100.0
    versions = Versions(lambda: now)
    infos = [ObjectInfo("s3://b/a", 5, '"etag"', 7), ObjectInfo("s3://b/b", 0, None, -1), ObjectInfo("s3://b/c", 1, "")]
    for info in infos:
        versions.learn("options", info)
    assert [versions.get("options", info.url) for info in infos] == infos
    assert versions.get("another", "s3://b/a") is None
    now += FRESH_S
    assert versions.get("options", "s3://b/a") == infos[0]
    versions.forget("options", "s3://b/a")
    versions.forget("options", "s3://b/a")
    assert versions.get("options", "s3://b/a") is None
    now += 1
    assert versions.get("options", "s3://b/b") is None


def test_versions_are_bounded() -> None:
    versions = Versions(count_max=32)
    infos = [ObjectInfo(f"s3://b/{number}", number, "e") for number in range(100)]
    for info in infos:
        versions.learn("", info)
    known = [info for info in infos if versions.get("", info.url) is not None]
    assert 16 <= len(known) <= 32
    assert known == infos[-len(known) :]


class Heads:
    """Counts what a world's store is asked, and holds the answers back."""

    def __init__(self, world: World) -> None:
        self.asked: list[str] = []
        self.gate = Gate()
        head = world.store.head

        def held(url: str) -> ObjectInfo:
            self.asked.append(url)
            self.gate.wait()
            return head(url)

        world.store.head = held  # type: ignore[method-assign]


def test_one_question_for_all_who_open_it(tmp_path: Path) -> None:
    world = World(tmp_path, buffer_count=4)
    world.add(1, 2)
    heads = Heads(world)
    urls = [info.url for info in world.objects]

    async def work(core: Core) -> None:
        sides = [Side(core, []) for _ in range(3)]
        for side in sides:
            side.say(protocol.Open(1, urls[1]))
        core.disconnect(sides[2].state)  # before the answer is here
        heads.gate.set()
        await until(lambda: all(side.all(protocol.Opened) for side in sides[:2]), "both are told")
        assert heads.asked == [urls[1]]
        assert not sides[2].all(protocol.Opened)
        sides[0].say(protocol.Open(2, urls[1]))
        sides[0].say(protocol.Open(3, urls[0]))
        await until(lambda: len(sides[0].all(protocol.Opened)) == 3, "the third is there")
        assert [(each.request, each.object_no, each.url) for each in sides[0].all(protocol.Opened)] == [
            (1, 0, urls[1]),
            (2, 1, urls[1]),
            (3, 2, urls[0]),
        ]
        assert heads.asked == urls[::-1]
        sides[0].want(0, 3, 4)  # of two chunks each, the third of one
        await until(lambda: len(sides[0].granted) == 3, "they are granted")
        for side in sides[:2]:
            core.disconnect(side.state)
        await settle()
        # The arena may hold their chunks; no list does.
        assert all(entry.user_count == 0 for entry in core._objects._entries.values())

    world.run(work)


def test_what_changed_is_asked_for_again(tmp_path: Path) -> None:
    world = World(tmp_path, buffer_count=4)
    world.add(1)
    (info,) = world.objects
    heads = Heads(world)
    heads.gate.set()

    async def work(core: Core) -> None:
        side = Side(core, [])
        side.say(protocol.Open(1, info.url))
        await until(lambda: bool(side.all(protocol.Opened)), "it is opened")
        world.store.put("0", random_bytes(9, CHUNK_BYTES))
        world.store.errors[info.url] = ObjectChangedError("another")
        heads.asked.clear()
        side.want(0)
        await until(lambda: bool(side.all(protocol.Failed)), "it has failed")
        side.say(protocol.Open(2, info.url))
        await until(lambda: len(side.all(protocol.Opened)) == 2, "it is opened again")
        first, second = side.all(protocol.Opened)
        assert first.etag != second.etag
        assert len(heads.asked) == 1

    world.run(work)


def test_what_is_missing_is_said_and_not_remembered(tmp_path: Path) -> None:
    world = World(tmp_path, buffer_count=4)

    async def work(core: Core) -> None:
        side = Side(core, [])
        side.say(protocol.Open(1, "s3://fake/0"))
        await until(lambda: bool(side.all(protocol.RequestFailed)), "it has failed")
        world.add(1)
        side.say(protocol.Open(2, "s3://fake/0"))
        await until(lambda: bool(side.all(protocol.Opened)), "it is opened")
        (failed,), (opened,) = side.all(protocol.RequestFailed), side.all(protocol.Opened)
        assert (failed.request, failed.name) == (1, "ObjectMissingError")
        assert (opened.request, opened.url) == (2, "s3://fake/0")

    world.run(work)


def test_a_store_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    world.add(1)
    gate, head, hanging = Gate(), world.store.head, []

    def held(url: str) -> ObjectInfo:
        if url.startswith("s3://hangs/"):
            hanging.append(url)
            gate.wait()
        return head(url)

    world.store.head = held  # type: ignore[method-assign]

    async def work(core: Core) -> None:
        side, other = Side(core, []), Side(core, [])
        for number in range(200):
            side.say(protocol.Open(number, f"s3://hangs/{number}"))
        other.say(protocol.Open(1, world.objects[0].url))
        await until(lambda: bool(other.all(protocol.Opened)), "the other store has answered")
        assert len(hanging) <= 32
        core.disconnect(side.state)  # nobody waits for what was not asked yet
        gate.set()
        await settle()
        asked = len(hanging)
        other.say(protocol.Open(2, "s3://hangs/999"))
        await until(lambda: bool(other.all(protocol.RequestFailed)), "the question is answered")
        assert len(hanging) == asked + 1 <= 33

    world.run(work)


def test_what_is_queued_is_asked_with_credentials_that_came_meanwhile(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    heads = Heads(world)

    async def work(core: Core) -> None:
        side = Side(core, [])
        for number in range(40):
            side.say(protocol.Open(number, f"s3://b/{number}"))
        await until(lambda: len(heads.asked) == 32, "as many are asked for as may be")
        side.say(protocol.Credentials({"region": "elsewhere"}))
        heads.gate.set()
        await until(lambda: len(side.all(protocol.RequestFailed)) == 40, "all are answered")
        assert {answer.name for answer in side.all(protocol.RequestFailed)} == {"ObjectMissingError"}
        assert len(heads.asked) == 40

    world.run(work)
