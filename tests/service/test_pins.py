"""Pins: which objects are pinned, by whom and how long, against a plain model; and what stays on disk for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload import protocol, shares
from fastload.cache import DiskTier
from fastload.errors import CacheError
from fastload.service.core import Core
from fastload.service.holding.pins import Pin, Pins
from tests.service.helpers import CHUNK_BYTES
from tests.service.world import Side, World, settle, sleep, until

FILE_BYTES = DiskTier.file_bytes(CHUNK_BYTES)
CHUNKS = 4
DISK_BYTES = 1000

OBJECT = st.sampled_from([bytes([number]) * 16 for number in range(6)])
NAME = st.sampled_from(["a", "b", "c"])
STEP = st.one_of(
    st.tuples(st.just("put"), NAME, st.sets(OBJECT), st.sampled_from([0, 5, 50]), st.sampled_from([0, 60, 10**9])),
    st.tuples(st.just("remove"), NAME),
    st.tuples(st.just("use"), OBJECT),
    st.tuples(st.just("wait"), st.integers(0, 20)),
    st.tuples(st.just("expire")),
    st.tuples(st.just("without"), st.sets(OBJECT)),
)


def size_of(object_id: bytes) -> int:
    return 20 * (object_id[0] + 1)


def file_bytes(size: int) -> int:
    return size * 3


class Model:
    """Pins as a list of what each names, counted anew each time."""

    def __init__(self) -> None:
        self.pins: dict[str, tuple[frozenset[bytes], float, int]] = {}
        self.used: dict[str, float] = {}

    @property
    def pinned(self) -> set[bytes]:
        return {key for keys, _, _ in self.pins.values() for key in keys}

    @property
    def file_bytes(self) -> int:
        return sum(file_bytes(size_of(key)) for key in self.pinned)

    def fits(self, name: str, keys: set[bytes], quota: int) -> bool:
        others = {key for other, (named, _, _) in self.pins.items() if other != name for key in named}
        whole = sum(file_bytes(size_of(key)) for key in others | keys)
        return whole <= int(shares.DISK_CHUNKS * DISK_BYTES) and not (quota and sum(map(size_of, keys)) > quota)


@given(st.lists(STEP, max_size=40))
def test_pins_do_what_a_plain_model_does(steps: list[tuple[object, ...]]) -> None:
    pins, model, now = Pins(file_bytes), Model(), 0.0
    pinned: set[bytes] = set()  # by what each change says
    for step in steps:
        came: set[bytes] = set()
        gone: set[bytes] = set()
        match step:
            case ("put", str(name), set(keys), int(ttl), int(quota)):
                pin = Pin(name, {key: size_of(key) for key in keys}, ttl, quota)
                if model.fits(name, keys, quota):
                    pins.check(pin, DISK_BYTES)
                    came, gone = pins.put(pin, now)
                    model.pins[name], model.used[name] = (frozenset(keys), ttl, quota), now
                else:
                    with pytest.raises(CacheError, match=f"pin '{name}'"):
                        pins.check(pin, DISK_BYTES)
            case ("remove", str(name)):
                came, gone = pins.remove(name)
                model.pins.pop(name, None)
            case ("use", bytes(key)):
                pins.use(key, now)
                model.used |= {name: now for name, (keys, _, _) in model.pins.items() if key in keys}
            case ("wait", int(seconds)):
                now += seconds
            case ("expire",):
                old = [name for name, (_, ttl, _) in model.pins.items() if ttl and now - model.used[name] >= ttl]
                assert set(pins.expired(now)) == set(old)
                for name in old:
                    _, more = pins.remove(name)
                    gone |= more
                    del model.pins[name]
            case ("without", set(drop)):
                less = {pin.name: set(pin.sizes) for pin in pins.without(drop)}
                assert less == {name: keys - drop for name, (keys, _, _) in model.pins.items() if keys & drop}
        assert not came & pinned
        assert gone <= pinned
        pinned = (pinned | came) - gone
        assert pinned == model.pinned == {key for key in (bytes([n]) * 16 for n in range(6)) if key in pins}
        assert pins.file_bytes == model.file_bytes
        assert {pin.name for pin in pins} == set(model.pins)
        for key in pinned:
            assert set(pins.names_of(key)) == {name for name, (keys, _, _) in model.pins.items() if key in keys}


# In a core


def on_disk(core: Core, side: Side, number: int) -> int:
    entry = side.state.entry(number)
    return sum(core.disk.contains(entry.key(index)) for index in range(CHUNKS))


async def pin(side: Side, *objects: int, name: str = "pin", ttl_s: float = 0.0, quota: int = 0) -> protocol.Message:
    def answers() -> list[protocol.Message]:
        return [each for each in side.sent if isinstance(each, protocol.Done | protocol.RequestFailed)]

    before = len(answers())
    side.say(protocol.Pin(1, name, list(objects), ttl_s, quota))
    await until(lambda: len(answers()) > before, "it is answered")
    return answers()[-1]


async def read(side: Side, *order: int, epoch: int = 0) -> None:
    """One object after the other, with a plan."""
    side.say(protocol.SetPlan(list(order), epoch, False, 0))
    for number, each in enumerate(order):
        chunks = [each * CHUNKS + index for index in range(CHUNKS)]
        before = len(side.granted)
        side.want(*chunks)
        await until(lambda before=before: len(side.granted) >= before + CHUNKS, "all are granted")  # type: ignore[misc]
        await settle()
        side.release(*chunks)
        side.say(protocol.Advance((number + 1) * CHUNKS))


def small(tmp_path: Path, files: int, objects: int = 12) -> World:
    """A disk for so many chunks, a little more than what it is sure of, and an arena for two objects."""
    world = World(tmp_path, 2 * CHUNKS, disk_bytes=int(files * FILE_BYTES / shares.DISK_CHUNKS) + FILE_BYTES)
    world.add(*[CHUNKS] * objects)
    return world


@pytest.mark.parametrize("other_is", ["read", "warmed", "kept"])
def test_pinned_chunks_stay_while_others_would_fill_the_disk_twice(tmp_path: Path, other_is: str) -> None:
    world = small(tmp_path, 5 * CHUNKS)

    async def work(core: Core) -> None:
        first, other = Side(core, world.objects), Side(core, world.objects)
        assert isinstance(await pin(first, 0, 1), protocol.Done)
        await read(first, 0, 1)
        core.disconnect(first.state)
        if other_is == "kept":
            other.say(protocol.Keep(list(range(2, 12)), "pin"))
        for epoch in range(2):
            if other_is == "warmed":
                other.plan(*range(2, 12), warm=True)
                await until(lambda: bool(other.all(protocol.Progress)[-1:]), "it has progress")
                await settle()
            else:
                await read(other, *range(2, 12), epoch=epoch)
        assert sum(on_disk(core, other, number) for number in range(2, 12)) >= 2 * CHUNKS
        again = Side(core, world.objects)
        fetched = len(world.store.reads)
        await read(again, 0, 1, epoch=1)
        assert len(world.store.reads) == fetched

    world.run(work)


def test_what_is_pinned_takes_the_room_of_live_plans(tmp_path: Path) -> None:
    """Also of chunks that have yet to be read, and the arcs of others shrink by that."""
    world = small(tmp_path, 4 * CHUNKS)

    async def work(core: Core) -> None:
        other, warmer = Side(core, world.objects), Side(core, world.objects)
        other.say(protocol.Keep([2, 3, 4, 5], "pin"))
        await read(other, 2, 3, 4, 5)
        assert sum(on_disk(core, other, number) for number in (2, 3, 4, 5)) == 4 * CHUNKS
        share = core._shared.arcs.disk_share
        assert isinstance(await pin(warmer, 0, 1), protocol.Done)
        assert core._shared.arcs.disk_share == pytest.approx(share - 0.5, abs=0.1)
        warmer.plan(0, 1, warm=True)
        await until(lambda: any(each.finished for each in warmer.all(protocol.Progress)), "it is warm")
        assert warmer.all(protocol.Progress)[-1].held_chunks == 2 * CHUNKS
        assert (on_disk(core, warmer, 0), on_disk(core, warmer, 1)) == (CHUNKS, CHUNKS)
        warmer.plan()
        core.holdings.unpin(["pin"])
        assert core._shared.arcs.disk_share == pytest.approx(share)

    world.run(work)


def test_pins_that_do_not_fit_are_refused_with_both_sizes(tmp_path: Path) -> None:
    world = small(tmp_path, 4 * CHUNKS)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        answer = await pin(side, 0, 1, quota=CHUNKS * CHUNK_BYTES)
        assert isinstance(answer, protocol.RequestFailed)
        assert answer.message == "pin 'pin' names 512.0 KiB, and its quota is 256.0 KiB; raise the quota, or pin less"
        assert isinstance(await pin(side, 0, 1, 2), protocol.Done)
        assert isinstance(await pin(side, 1, 2, 3), protocol.Done)  # in place of the one before
        answer = await pin(side, 4, 5, name="second")
        assert isinstance(answer, protocol.RequestFailed)
        assert "second" in answer.message
        assert "beside" in answer.message
        assert "unpin something" in answer.message
        assert isinstance(await pin(side, 2, 3, name="second"), protocol.Done)  # what is pinned already takes no more

    world.run(work)


def test_without_a_disk_tier_pins_are_refused_in_a_sentence(tmp_path: Path) -> None:
    world = World(tmp_path, 4, disk_bytes=0)
    world.add(1)

    async def work(core: Core) -> None:
        answer = await pin(Side(core, world.objects), 0)
        assert isinstance(answer, protocol.RequestFailed)
        assert "keeps nothing on disk (disk_bytes=0)" in answer.message

    world.run(work)


def test_a_pin_ends_when_it_was_not_used_for_as_long_as_it_lives(tmp_path: Path) -> None:
    world = small(tmp_path, 4 * CHUNKS)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        await pin(side, 0, name="short", ttl_s=1000)
        await pin(side, 1, name="read", ttl_s=1000)
        await pin(side, 2, name="planned", ttl_s=1000)
        await pin(side, 3, name="for good")
        for _ in range(5):
            await sleep(400)
            side.want(CHUNKS)
            await until(lambda: CHUNKS in side.granted, "it is there")
            side.release(CHUNKS)
            side.plan(2)
        assert {each.name for each in core._shared.pins} == {"read", "planned", "for good"}
        await sleep(1400)
        assert {each.name for each in core._shared.pins} == {"for good"}
        assert core._shared.disk_order.is_pinned(side.state.entry(3).id)
        assert not core._shared.disk_order.is_pinned(side.state.entry(1).id)

    world.run(work)


def test_lowering_the_quota_takes_pinned_chunks_last(tmp_path: Path) -> None:
    world = small(tmp_path, 4 * CHUNKS)

    async def work(core: Core) -> None:
        side = Side(core, world.objects)
        side.say(protocol.Keep([0, 1, 2, 3], "pin"))
        await pin(side, 2)
        await read(side, 0, 1, 2, 3)
        core._quota.change(int(CHUNKS * FILE_BYTES / shares.DISK_CHUNKS) + 1)
        await settle()
        assert on_disk(core, side, 2) == CHUNKS
        assert sum(on_disk(core, side, number) for number in (0, 1, 3)) == 0
        core._quota.change(2 * FILE_BYTES)
        await settle()
        assert on_disk(core, side, 2) == 2

    world.run(work)


def test_how_much_is_held_of_what_is_attached(tmp_path: Path) -> None:
    world = small(tmp_path, 2 * CHUNKS)
    world.objects.append(world.store.put("short", b"x" * (CHUNK_BYTES + 10)))

    async def work(core: Core) -> None:
        side = Side(core, [world.objects[0], world.objects[1], world.objects[-1], world.objects[0]])
        last = 2 * CHUNKS + 1
        side.want(0, 1, last)
        await until(lambda: len(side.granted) == 3, "they are there")
        await settle()
        await pin(side, 1)
        side.say(protocol.Held(7))
        await settle()
        (answer,) = [each for each in side.all(protocol.Done) if each.request == 7]
        whole = 2 * CHUNKS * CHUNK_BYTES + CHUNK_BYTES + 10
        held = 2 * CHUNK_BYTES + 10
        assert answer.values == {
            "byte_count": whole,
            "ram_bytes": held,
            "disk_bytes": held,
            "held_bytes": held,
            "pinned_bytes": CHUNKS * CHUNK_BYTES,
        }

    world.run(work)
