"""Whatever consumers, the store and the disk do: counts are what a recount gives, and everything comes back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import AccessDeniedError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.service.fetching import warming_limit
from fastload.service.fetching.fetches import Fetches
from fastload.service.state import ConsumerState
from fastload.store.types import ObjectInfo
from tests.service.virtual_core import CHUNK_BYTES, VirtualCore

OPTIONS: list[dict[str, Any]] = [{}, {"region": "elsewhere"}, {"endpoint_url": "http://store:1"}]
OBJECTS = [ObjectInfo(f"s3://b/{size}", size, "etag") for size in range(3 * CHUNK_BYTES - 4, 3 * CHUNK_BYTES + 4)]

OPENED = 3 * CHUNK_BYTES + 5  # bytes of each object that is opened, and may be closed again before anyone looks


class Someone:
    """A consumer that does anything."""

    def __init__(self, world: VirtualCore, draw: random.Random, options: dict[str, Any]) -> None:
        self.world, self.draw = world, draw
        self.held: dict[int, None] = {}
        self.wanted: dict[int, None] = {}
        self.serial = self.position = 0
        self.has_left = False
        hello = protocol.Hello(protocol.VERSION, 1, "someone", options)
        self.state: ConsumerState = world.core.connect(hello, self.hear)
        self.say(protocol.Attach(True, True, protocol.ObjectRows.of(OBJECTS)))
        self.chunk_count = sum(-(-info.size // CHUNK_BYTES) for info in OBJECTS)

    def say(self, message: protocol.FromConsumer) -> None:
        if not self.has_left:
            self.world.core.receive(self.state, message)

    def hear(self, message: protocol.Message) -> None:
        match message:
            case protocol.Grants():
                for chunk in message.chunks:
                    if chunk in self.wanted:
                        del self.wanted[chunk]
                        self.held[chunk] = None
            case protocol.Failed():
                for chunk in message.chunks:
                    self.wanted.pop(chunk, None)
            case protocol.Recall():
                self.world.loop.call_later(self.draw.choice([0.0, 0.1, 1.0]), self.answer, message.chunks)

    def answer(self, recalled: list[int]) -> None:
        pinned = [chunk for chunk in recalled if self.draw.random() < 0.3]
        self.say(protocol.Pinned(pinned))
        self.release([chunk for chunk in recalled if chunk not in pinned])

    def release(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self.held.pop(chunk, None)
            self.wanted.pop(chunk, None)
        self.say(protocol.Release(chunks))

    def act(self) -> None:
        """Do something."""
        doings = [self.want, self.give_back, self.plan, self.go_on, self.keep, self.renew, self.open, self.clear]
        doings += [self.pin, self.unpin]
        self.draw.choices(doings, [35, 35, 8, 10, 3, 2, 2, 1, 3, 1])[0]()

    def some(self, numbers: list[int]) -> list[int]:
        return self.draw.sample(numbers, self.draw.randint(1, min(4, len(numbers)))) if numbers else []

    def want(self) -> None:
        self.serial += 1
        chunks = [chunk for chunk in self.some([*range(self.chunk_count)]) if chunk not in self.held]
        self.wanted |= dict.fromkeys(chunks)
        self.say(protocol.Want(chunks, self.serial, self.draw.random() < 0.6))

    def give_back(self) -> None:
        self.release(self.some([*self.held]) + self.some([*self.wanted])[:1])

    def plan(self) -> None:
        self.position = 0
        objects = self.draw.sample(range(len(OBJECTS)), self.draw.randint(0, len(OBJECTS)))
        terms = protocol.WarmTerms(
            self.draw.choice([0, 0, 10**6]), self.draw.randint(0, 2), 0.0, self.draw.random() < 0.5
        )
        is_warm_up = self.draw.random() < 0.7
        is_warm = self.draw.random() < 0.3
        self.say(protocol.SetPlan(objects, self.draw.randint(0, 3), is_warm, 0, terms if is_warm_up else None))

    def go_on(self) -> None:
        self.position += self.draw.randint(1, 5)
        self.say(protocol.Advance(self.position))

    def keep(self) -> None:
        policy = self.draw.choice(["pin", "lru", "sieve", "future"])
        self.say(protocol.Keep(self.some([*range(len(OBJECTS))]), policy))  # type: ignore[arg-type]

    def renew(self) -> None:
        self.say(protocol.Credentials(self.draw.choice(OPTIONS)))

    def open(self) -> None:
        self.say(protocol.Open(1, f"s3://b/{self.draw.randint(0, 50)}"))

    def clear(self) -> None:
        self.say(protocol.Clear(1, False))

    def pin(self) -> None:
        objects = self.some([*range(len(OBJECTS))])
        self.say(protocol.Pin(1, self.draw.choice("ab"), objects, self.draw.choice([0.0, 20.0]), 0))

    def unpin(self) -> None:
        self.say(protocol.Unpin(1, [self.draw.choice(["a", "s3://b/"])]))

    def leave(self) -> None:
        self.world.core.disconnect(self.state)
        self.has_left = True


def held_by_tier(world: VirtualCore) -> dict[str, int]:
    """As the service shows it, and what it makes its decisions by."""
    core = world.core
    rows = core.holdings.data_sets()
    return {
        "ram": sum(row.ram_bytes for row in rows),
        "disk": sum(row.disk_bytes for row in rows),
        "pinned": sum(row.pinned_bytes for row in rows),
        "pinned on disk": core.holdings.pinned_disk_bytes,
        "covered": core._shared.arcs._covered_bytes,
        "room for pins": core._shared.arcs.pinned_file_bytes,
    }


def recounted(world: VirtualCore, known: dict[bytes, int]) -> dict[str, int]:
    """The same from scratch; `known` are the sizes of objects that were there before."""
    shared = world.core._shared
    sizes = {object_id: size for pin in shared.pins for object_id, size in pin.sizes.items()}
    known |= sizes | {entry.id: entry.info.size for entry in shared.objects._entries.values()}
    on_disk = {
        object_id: sum(min(CHUNK_BYTES, known.get(object_id, OPENED) - index * CHUNK_BYTES) for index in indexes)
        for object_id, indexes in shared.disk_order._indexes.items()
    }
    covered = [entry for entry in shared.objects._entries.values() if entry.plan_count and entry.id not in sizes]
    return {
        "ram": sum(chunk.length for chunk in shared.table.chunks if chunk is not None),
        "disk": sum(on_disk.values()),
        "pinned": sum(sizes.values()),
        "pinned on disk": sum(on_disk.get(object_id, 0) for object_id in sizes),
        "covered": sum(entry.info.size for entry in covered),
        "room for pins": sum(map(shared.arcs.file_bytes, sizes.values())),
    }


def pinned_chunks(world: VirtualCore) -> tuple[dict[str, set[bytes]], set[ChunkKey]]:
    """What is pinned by which pin, and which chunks of that the disk holds."""
    pins = {pin.name: set(pin.sizes) for pin in world.core._shared.pins}
    return pins, {key for key in world.disk.keys() if any(key.object_id in ids for ids in pins.values())}  # noqa: SIM118


class WarmUp(Someone):
    """A warm-up of data that was never seen before, and now and then of others."""

    def act(self) -> None:
        if self.draw.random() < 0.3:
            name = self.draw.random()
            objects = [ObjectInfo(f"s3://b/{name}-{number}", 3 * CHUNK_BYTES, "etag") for number in range(8)]
            self.say(protocol.Attach(True, True, protocol.ObjectRows.of(objects)))
            terms = protocol.WarmTerms(self.draw.choice([0, 0, 10**6]), 0, 0.0, self.draw.random() < 0.5)
            self.say(protocol.SetPlan(list(range(8)), 0, True, 0, terms))
        elif self.draw.random() < 0.3:
            self.serial += 1
            self.say(protocol.Want([self.draw.randrange(8)], self.serial, True))


def test_what_is_given_up_of_warm_ups_comes_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little they have in flight when somebody waits, and however lately somebody did."""
    for name, seconds in (("_EXCESS_S", 0.02), ("_USED_S", 0.0), ("_WAITED_S", 0.001)):
        monkeypatch.setattr(warming_limit, name, seconds)
    given_up = list[object]()
    give_up = Fetches.give_up
    monkeypatch.setattr(Fetches, "give_up", lambda self, chunk: (given_up.append(chunk), give_up(self, chunk)))
    for seed in range(4):
        draw = random.Random(seed)
        world = VirtualCore(draw, draw.choice([4, 16, 32]), draw.choice([0, 40, 100]))
        world.stores.fail_share, world.disk.fail_share = draw.choice([0.0, 0.1]), draw.choice([0.0, 0.1])
        present = [WarmUp(world, draw, {}), Someone(world, draw, {}), WarmUp(world, draw, draw.choice(OPTIONS))]
        for _ in range(100):
            for each in present:
                if isinstance(each, WarmUp) or draw.random() < 0.3:
                    each.act()
            world.run(draw.choice([0.0, 0.01, 0.1, 1.0]))
        world.stores.fail_share = 0.0
        for each in present:
            each.leave()
        world.run(5000.0)
        assert world.core._table.quarantined_count == 0
        assert not world.core._residency.loading
    assert len(given_up) > 5


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_what_a_recount_gives_pinned_chunks_stay_and_everything_comes_back(seed: int) -> None:
    draw = random.Random(seed)
    world = VirtualCore(draw, draw.choice([2, 3, 4, 8, 16]), draw.choice([0, 2, 12, 40]), draw.choice([1e5, 1e8]))
    world.stores.fail_share, world.disk.fail_share = draw.choice([0.0, 0.1]), draw.choice([0.0, 0.1])
    present: list[Someone] = []
    known: dict[bytes, int] = {}
    pinned = pinned_chunks(world)
    for _ in range(250):
        if len(present) < 3 and draw.random() < 0.3:
            present.append(Someone(world, draw, draw.choice(OPTIONS)))
        if present and draw.random() < 0.02:
            present.pop(draw.randrange(len(present))).leave()
        for each in present:
            each.act()
        world.run(draw.choice([0.0, 0.01, 0.1, 1.0, 5.0]))
        assert held_by_tier(world) == recounted(world, known)
        before, pinned = pinned, pinned_chunks(world)
        if before[0] == pinned[0]:
            assert before[1] <= pinned[1]
    world.stores.fail_share = 0.0
    for each in present:
        each.leave()
    world.run(5000.0)
    core = world.core
    assert core._table.quarantined_count == core._writer._queued_bytes == 0
    assert not core._residency.loading
    assert not core._openings._waiting
    assert not core._openings._under_way
    assert not world.stores._options
    assert all(entry.user_count == entry.plan_count == 0 for entry in core._objects._entries.values())


@pytest.mark.parametrize("refusal", [AccessDeniedError("no"), StoreUnavailableError("away"), ObjectMissingError("no")])
def test_an_error_is_that_of_who_was_asked_for(refusal: StoreError) -> None:
    """One's endpoint is away; another's, which has the same object, is not."""
    world = VirtualCore(random.Random(0), 16, 0)
    refused, other = (Someone(world, random.Random(0), options) for options in OPTIONS[:2])
    world.stores.denied.add(refused.state.options_key)
    world.stores.refusal = refusal
    for someone in (refused, other):
        someone.wanted[1] = None
        someone.say(protocol.Want([1], 1, True))
        world.run(1e-4)  # it is on its way, for the first
    world.run(100.0)
    assert 1 not in refused.wanted
    assert 1 not in refused.held
    assert 1 in other.held


def test_what_others_were_denied_is_fetched_ahead_all_the_same() -> None:
    world = VirtualCore(random.Random(0), 16, 0)
    denied, planner = (Someone(world, random.Random(0), options) for options in OPTIONS[:2])
    world.stores.denied.add(denied.state.options_key)
    denied.say(protocol.Want([1], 1, True))
    world.run(1e-4)  # it is on its way
    planner.say(protocol.SetPlan([0], 0, False, 1))
    world.run(100.0)
    entry, _ = planner.state.locate(1)
    assert sorted(entry.chunks) == [1, 2]


def test_what_is_fetched_for_one_who_has_gone_is_fetched_again_for_who_still_waits() -> None:
    draw = random.Random(0)
    world = VirtualCore(draw, 8, 12)
    leaver, waiter = (Someone(world, draw, options) for options in OPTIONS[:2])
    waiter.say(protocol.Want([0], 1, True))
    world.run(100.0)
    waiter.release([0])
    world.core._residency.drop_idle()
    world.disk.fail_share = 1.0  # the chunk turns out to be damaged, once its reader has gone
    for someone in (leaver, waiter):
        someone.wanted[0] = None
        someone.say(protocol.Want([0], 2, True))
    world.run(0.0)
    leaver.leave()
    world.run(100.0)
    assert 0 in waiter.held


def test_what_cannot_be_read_from_disk_just_now_is_not_written_again() -> None:
    world = VirtualCore(random.Random(0), 8, 12)
    reader = Someone(world, random.Random(0), {})
    for serial in (1, 2):
        reader.wanted[0] = None
        reader.say(protocol.Want([0], serial, True))
        world.run(100.0)
        assert 0 in reader.held
        assert world.core._writer.counters["written_chunks"] == 1
        reader.release([0])
        world.core._residency.drop_idle()
        world.disk.read_into = lambda key, out: None  # type: ignore[method-assign]
    assert world.core._residency.counters["fetched_chunks"] == 2
