"""Which consumer makes an index, who waits for it, and for how long: in virtual time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastload import protocol
from fastload.service.core import Core
from fastload.service.queries import PATIENCE_S, SILENT_S, SOME_AFTER_S
from tests.service.world import Side, World, settle, sleep

DISK_BYTES = 8 << 20
Answer = tuple[dict[int, bytes], list[int]]


class Asking(Side):
    """A consumer that asks for indexes."""

    def ask(self, *numbers: int) -> None:
        self.say(protocol.GetIndexes(7, list(numbers)))

    def give(self, *numbers: int) -> None:
        for number in numbers:
            self.say(protocol.PutIndex(number, b"index %d" % number))

    @property
    def answers(self) -> list[Answer]:
        """The indexes that it was sent and those that it is to make, for each question that was answered."""
        found: list[Answer] = []
        is_whole = True
        for piece in self.all(protocol.Indexes):
            if is_whole:
                found.append(({}, []))
            found[-1][0].update(zip(piece.objects, piece.data, strict=True))
            found[-1][1].extend(piece.make)
            is_whole = piece.last
        return found


def stored(*numbers: int) -> dict[int, bytes]:
    return {number: b"index %d" % number for number in numbers}


@pytest.fixture(params=[0, DISK_BYTES])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    world = World(tmp_path, 4, request.param)
    world.add(*[1] * 200)
    return world


def test_the_first_to_ask_makes_them_and_the_others_wait(world: World) -> None:
    async def work(core: Core) -> None:
        first, *others = (Asking(core, world.objects) for _ in range(8))
        first.ask(3, 1, 2)
        await settle()
        assert first.answers == [({}, [3, 1, 2])]
        for each in others:
            each.ask(1, 2)
        await settle()
        first.give(1)
        await settle()
        assert [each.answers for each in others] == [[]] * 7
        first.give(2)
        await settle()
        assert [each.answers for each in others] == [[(stored(1, 2), [])]] * 7
        others[0].ask(3)
        others[1].ask(3, 4)  # one that nobody makes
        await settle()
        assert [others[0].answers[1:], others[1].answers[1:]] == [[], [({}, [4])]]

    world.run(work)


def test_what_is_stored_is_answered_at_once(world: World) -> None:
    async def work(core: Core) -> None:
        first, second = (Asking(core, world.objects) for _ in range(2))
        first.give(5)
        first.ask(5, 6)
        second.ask(5, 6)
        second.ask(6)
        second.ask(5)
        await settle()
        assert first.answers == [(stored(5), [6])]
        assert second.answers == [(stored(5), []), (stored(5), [])], "the question for 6 alone waits"
        first.ask(6)
        await settle()
        assert first.answers[1:] == [({}, [6])], "it makes it itself"

    world.run(work)


def test_many_are_made_by_several(world: World) -> None:
    at_once = protocol.INDEXES_TO_MAKE

    async def work(core: Core) -> None:
        sides = [Asking(core, world.objects) for _ in range(4)]
        for side in sides:
            side.ask(*range(150))
            await settle()
        whole = list(range(150))
        parts = [whole[:at_once], whole[at_once : 2 * at_once], whole[2 * at_once :]]
        assert [side.answers for side in sides] == [*([({}, part)] for part in parts), []]
        sides[0].give(*parts[0])
        await settle()
        assert sides[3].answers == [(stored(*parts[0]), [])], "some are better than none"

    world.run(work)


@pytest.mark.parametrize("how", ["gives up", "goes", "attaches"])
def test_what_is_given_up_is_made_by_the_next(world: World, how: str) -> None:
    async def work(core: Core) -> None:
        first, second, third = (Asking(core, world.objects) for _ in range(3))
        for side in (first, second, third):
            side.ask(1, 2)
            await settle()
        if how == "gives up":
            second.say(protocol.GiveUpIndexes([1, 2]))  # which it does not make
            first.give(1)
            first.say(protocol.GiveUpIndexes([2]))
        elif how == "goes":
            first.give(1)
            core.disconnect(first.state)
        else:
            first.give(1)
            first.say(protocol.Attach(True, True, protocol.ObjectRows.of(world.objects)))
        await settle()
        assert [second.answers, third.answers] == [[(stored(1), [2])], [(stored(1), [])]]
        third.ask(2)
        await settle()
        second.give(2)
        await settle()
        assert third.answers[1:] == [(stored(2), [])]

    world.run(work)


def test_who_waits_may_go(world: World) -> None:
    async def work(core: Core) -> None:
        first, second, third = (Asking(core, world.objects) for _ in range(3))
        for side in (first, second, third):
            side.ask(1)
            await settle()
        core.disconnect(second.state)
        first.give(1)
        await settle()
        assert third.answers == [(stored(1), [])]
        await sleep(2 * PATIENCE_S)

    world.run(work)


def test_a_maker_that_says_nothing_is_not_waited_for(world: World) -> None:
    async def work(core: Core) -> None:
        first, second, third = (Asking(core, world.objects) for _ in range(3))
        for side in (first, second, third):
            side.ask(1, 2)
            await settle()
        await sleep(0.9 * SILENT_S)
        assert not second.answers
        await sleep(0.2 * SILENT_S)
        assert [second.answers, third.answers] == [[({}, [1, 2])], []], "one makes them in its place"
        second.give(1, 2)
        await settle()
        assert third.answers == [(stored(1, 2), [])]
        first.give(1, 2)

    world.run(work)


def test_a_maker_that_works_is_waited_for_but_not_for_ever(world: World) -> None:
    async def work(core: Core) -> None:
        first, second = (Asking(core, world.objects) for _ in range(2))
        first.ask(1, 2)
        second.ask(1, 2)
        for number in range(int(0.9 * PATIENCE_S / 5)):
            await sleep(5.0)
            first.want(number)
            first.release(number)
            assert not second.answers
        for _ in range(int(0.2 * PATIENCE_S / 5)):
            await sleep(5.0)
            first.say(protocol.Report({}))
        assert second.answers == [({}, [1, 2])]

    world.run(work)


def test_who_has_waited_long_is_sent_what_there_is(world: World) -> None:
    async def work(core: Core) -> None:
        first, second = (Asking(core, world.objects) for _ in range(2))
        first.ask(1, 2, 3)
        second.ask(1, 2, 3)
        await sleep(0.8 * SOME_AFTER_S)
        first.give(1)
        await settle()
        assert not second.answers
        await sleep(0.4 * SOME_AFTER_S)
        first.give(2)
        await settle()
        assert second.answers == [(stored(1, 2), [])]
        second.ask(3)
        first.give(3)
        await settle()
        assert second.answers[1:] == [(stored(3), [])]

    world.run(work)


def test_every_question_is_answered_whatever_happens(world: World) -> None:
    """Consumers that ask, make, give up, stand still and go at random: in the end each question has had its answer, and
    nothing is remembered of any.
    """

    async def work(core: Core) -> None:
        draw = random.Random(1)
        sides = [Asking(core, world.objects) for _ in range(6)]
        asked = dict.fromkeys(sides, 0)
        for _ in range(600):
            side = draw.choice(sides)
            to_make = [number for _, make in side.answers for number in make]
            action = draw.randrange(5)
            if action == 0 and to_make:
                side.give(draw.choice(to_make))
            elif action == 1 and to_make:
                side.say(protocol.GiveUpIndexes([draw.choice(to_make)]))
            elif action == 2 and draw.random() < 0.1:
                core.disconnect(side.state)
                sides[sides.index(side)] = side = Asking(core, world.objects)
                asked[side] = 0
            elif len(side.answers) == asked[side]:  # each asks for one thing at a time
                side.ask(*draw.sample(range(40), 5))
                asked[side] += 1
            await sleep(draw.choice([0.01, 0.1, 3.0]))
        await sleep(10 * SILENT_S)
        assert {side: len(side.answers) for side in sides} == {side: asked[side] for side in sides}
        for side in sides:
            core.disconnect(side.state)
        makers = core._queries._makers
        assert [len(each) for each in (makers._makers, makers._made_by, makers._waiting)] == [0, 0, 0]

    world.run(work)
