"""Two who save to one URL, in every order, and what a crash leaves after each step; against a model of six lines."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from fastload.checkpoint import attempts, commit
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.commit import Current, Step, leftovers, next_step
from fastload.checkpoint.records import (
    MANIFEST_NAME,
    Manifest,
    Part,
    Plan,
    Reference,
    object_name,
    part_name,
    plan_name,
)
from fastload.checkpoint.segments import Piece
from fastload.errors import CheckpointError, CheckpointExistsError, FastloadError
from fastload.store import RequestOptions, Store, StoreOptions, open_store
from tests.checkpoint.saving import RANKS, SHAPE, MemoryStore, Stopped, load, save, save_rank
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.store.servers import Relay
from tests.store.test_writes import behind

URL = "s3://b/run/1200"
GRACE_S = 3600.0


def place_of(store: Store) -> Place:
    return Place.of(store, URL)


# Every order


class Model:
    """What is to happen: who finds what it has seen is the checkpoint, and another is not."""

    def __init__(self, there: int | None) -> None:
        self.version, self.content, self.seen = 0 if there is None else 1, there, dict[int, int]()

    def begins(self, who: int, overwrite: bool) -> bool:
        self.seen[who] = self.version
        return overwrite or self.version == 0

    def commits(self, who: int) -> bool:
        if self.seen[who] != self.version:
            return False
        self.version, self.content = self.version + 1, who
        return True


@dataclass
class Run:
    """Writers as threads of which one at a time makes a step: `choices` says which, and beyond them the first one that
    can. `taken` are the choices, and how many there were.
    """

    choices: list[int]
    stop_after: dict[int, int] = field(default_factory=dict)  # operations, of a writer that then ends for good
    taken: list[tuple[int, int]] = field(default_factory=list)
    ended: dict[int, object] = field(default_factory=dict)

    def run(
        self, store: MemoryStore, writers: dict[int, Callable[[], object]], after: Callable[[int, str], None]
    ) -> None:
        self._wake = {who: threading.Semaphore(0) for who in writers}
        self._idle, self._local = threading.Semaphore(0), threading.local()
        self._at: dict[int, str] = {}
        store.before = self._before
        threads = [threading.Thread(target=self._writer, args=each) for each in writers.items()]
        for thread in threads:
            thread.start()
            assert self._idle.acquire(timeout=PATIENCE_S)
        while waiting := sorted(self._at):
            number = self.choices[len(self.taken)] if len(self.taken) < len(self.choices) else 0
            self.taken.append((number, len(waiting)))
            who, operation = waiting[number], self._at.pop(waiting[number])
            self._wake[who].release()
            assert self._idle.acquire(timeout=PATIENCE_S)
            after(who, operation)
        for thread in threads:
            thread.join()
        store.before = lambda operation, url: None

    def _writer(self, who: int, write: Callable[[], object]) -> None:
        self._local.who, self._local.operations = who, 0
        try:
            self.ended[who] = write()
        except (FastloadError, Stopped) as error:
            self.ended[who] = type(error)
        self._idle.release()

    def _before(self, operation: str, url: str) -> None:
        """Waits before what others see; an operation below its own attempt changes nothing for them."""
        who = getattr(self._local, "who", None)
        if who is None:
            return
        if self._local.operations == self.stop_after.get(who):
            raise Stopped
        if url.endswith(MANIFEST_NAME):
            self._at[who] = operation
            self._idle.release()
            assert self._wake[who].acquire(timeout=PATIENCE_S)
        self._local.operations += 1


def every_order(one: Callable[[list[int]], Run]) -> int:
    """Runs `one` with all choices there are; how many."""
    count, choices = 0, list[int]()
    while True:
        taken = one(choices).taken
        count += 1
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return count
        choices = [number for number, _ in taken[:-1]] + [taken[-1][0] + 1]


@pytest.mark.parametrize("there", [None, 7])
@pytest.mark.parametrize("overwrite", [(False, False), (True, False), (True, True)])
def test_two_writers_in_every_order(there: int | None, overwrite: tuple[bool, bool]) -> None:
    def one(choices: list[int]) -> Run:
        store, model = MemoryStore(), Model(there)
        place = place_of(store)
        if there is not None:
            save(place, there)
        run, won, could_win = Run(choices), dict[int, bool](), dict[int, bool]()

        def after(who: int, operation: str) -> None:
            if who not in could_win:
                could_win[who] = model.begins(who, overwrite[who])
            elif operation.startswith("put"):
                won[who] = model.commits(who)
            else:  # at a look
                could_win[who] = model.seen[who] == model.version
            assert load(Place.of(Unwatched(store), URL)) == model.content  # after each step, whole

        run.run(store, {who: lambda who=who: save(place, who, overwrite=overwrite[who]) for who in (0, 1)}, after)  # type: ignore[misc]
        for who in (0, 1):
            assert run.ended[who] is (Step.COMMITTED if won.get(who) else CheckpointExistsError), choices
            assert won.get(who) or not could_win[who] or who in won, choices  # who has not tried would not have won
        check_nothing_is_left(place, model.content)
        return run

    # Where one is there, who is not to overwrite it looks once and ends.
    assert every_order(one) >= (10 if there is None or overwrite == (True, True) else 2)


class Unwatched:
    """The same objects, without waiting."""

    def __init__(self, store: MemoryStore) -> None:
        self.copy = MemoryStore()
        self.copy.objects = store.objects

    def __getattr__(self, name: str) -> object:
        return getattr(self.copy, name)


def check_nothing_is_left(place: Place, content: int | None) -> None:
    """Once the grace period is over, two sweeps leave the checkpoint and no more."""
    assert attempts.sweep(place, GRACE_S, 1000 + GRACE_S - 1) == {}
    for _ in range(2):
        attempts.sweep(place, GRACE_S, 1000 + GRACE_S + 1)
    assert load(place) == content
    there = attempts.current(place)
    names = set(place.names())
    if there is None:
        assert names == set()
    else:
        assert there.manifest is not None
        attempt = there.manifest.attempt
        objects = {
            name(attempt, rank, *more) for rank in range(RANKS) for name, more in ((object_name, (0,)), (part_name, ()))
        }  # type: ignore[operator]
        assert names - {plan_name(attempt)} == {MANIFEST_NAME, *objects}


OPERATIONS = 14  # of one save: the head, plan, two segments and parts, and the commit


@pytest.mark.parametrize("there", [None, 7])
def test_a_crash_after_each_step_beside_another_writer(there: int | None) -> None:
    """Writer 0 ends for good after so many operations; then another process repairs what it left."""
    outcomes = set()
    for stops in range(OPERATIONS + 4):

        def one(choices: list[int], stops: int = stops) -> Run:
            store = MemoryStore()
            place = place_of(store)
            if there is not None:
                save(place, there)
            run, model, begun = Run(choices, {0: stops}), Model(there), set[int]()

            def after(who: int, operation: str) -> None:
                if who not in begun:
                    begun.add(who)
                    model.begins(who, overwrite=True)
                elif operation.startswith("put"):
                    model.commits(who)
                assert load(Place.of(Unwatched(store), URL)) == model.content

            writers = {who: lambda who=who: save(place, who, overwrite=True) for who in (0, 1)}  # type: ignore[misc]
            run.run(store, writers, after)
            before, parts = load(place), [name for name in place.names() if name.endswith(".part")]
            assert before == model.content
            # An attempt of which all is there is committed if it would have won; there are parts of up to three.
            others = RANKS * (1 + (there is not None))
            may_win = model.content != 0 and model.seen.get(0) == model.version and len(parts) == RANKS + others
            assert (attempts.repair(place) is not None) == may_win
            now = load(place)
            assert now == (0 if may_win else before)
            outcomes.add((run.ended[0], now))
            check_nothing_is_left(place, now)
            return run

        every_order(one)
    assert {(Stopped, 0), (Stopped, 1), (Step.COMMITTED, 0)} <= outcomes


def test_what_a_crash_leaves_alone() -> None:
    """Without another writer: before its parts are there nothing, and from then on all of it, by any who looks."""
    seen = []
    for stops in range(OPERATIONS):
        store = MemoryStore()
        place = place_of(store)
        operations = iter(range(1000))

        def before(operation: str, url: str, stops: int = stops, operations: Iterator[int] = operations) -> None:
            if next(operations) == stops:
                raise Stopped

        store.before = before
        with contextlib.suppress(Stopped):
            save(place, 3)
        store.before = lambda operation, url: None
        parts = sum(name.endswith(".part") for name in place.names())
        attempts.repair(place)
        assert load(place) == (3 if parts == RANKS else None)
        seen.append(parts)
        check_nothing_is_left(place, 3 if parts == RANKS else None)
    assert sorted(seen) == seen
    assert set(seen) == {0, 1, 2}


def test_several_may_commit_one_attempt() -> None:
    def one(choices: list[int]) -> Run:
        store = MemoryStore()
        place = place_of(store)
        plan = attempts.begin(place, RANKS, overwrite=False, now_s=0)
        for rank in range(RANKS):
            save_rank(place, plan.attempt, rank, 5)
        run = Run(choices)
        committing = {0: lambda: attempts.commit(place, plan.attempt), 1: lambda: attempts.repair(place) or "had been"}
        run.run(store, committing, lambda *_: None)
        assert run.ended[0] is Step.COMMITTED
        assert run.ended[1] in (plan.attempt, "had been")
        assert load(place) == 5
        return run

    assert every_order(one) >= 6


# Decisions


def test_steps() -> None:
    attempt, other = "a" * 16, "b" * 16
    plan = Plan(attempt=attempt, ranks=2)
    again = Plan(attempt=attempt, ranks=2, replaces='"1"')
    mine, theirs = (Current(Manifest.of(each, [b"x"]), '"1"') for each in (attempt, other))
    assert next_step(attempt, None, plan, [0]) is Step.WAIT
    assert next_step(attempt, None, plan, [0, 1]) is Step.COMMIT
    assert next_step(attempt, None, None, [0, 1]) is Step.GONE
    assert next_step(attempt, None, again, [0, 1]) is Step.LOST
    assert next_step(attempt, theirs, plan, [0, 1]) is Step.LOST
    assert next_step(attempt, theirs, again, [0]) is Step.WAIT
    assert next_step(attempt, theirs, again, [0, 1]) is Step.COMMIT
    assert next_step(attempt, Current(theirs.manifest, '"2"'), again, [0, 1]) is Step.LOST
    assert next_step(attempt, Current(None, '"1"'), again, [0, 1]) is Step.COMMIT
    for each in (plan, again, None):
        assert next_step(attempt, mine, each, []) is Step.COMMITTED


def test_ranks_that_a_hostile_plan_counts_are_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(attempt="a" * 16, ranks=10**7)
    names = [part_name(plan.attempt, rank) for rank in (0, 99_999, 123_456, plan.ranks)]
    odd = [f"{plan.attempt}/r000001.part", f"{'b' * 16}/r00002.part", f"{plan.attempt}/r00003-0000.safetensors"]
    monkeypatch.setattr(commit, "range", lambda count: pytest.fail(f"a range of {count}"), raising=False)
    assert commit.ranks([*odd, *reversed(names)], plan) == [0, 99_999, 123_456]
    assert next_step(plan.attempt, None, plan, range(1000)) is Step.WAIT
    few = msgspec.structs.replace(plan, ranks=2)
    assert next_step(plan.attempt, None, few, [0, 2]) is Step.WAIT
    assert next_step(plan.attempt, None, few, [0, 1, 2]) is Step.COMMIT


def test_what_may_be_deleted() -> None:
    mine, dead, young, planless, unknown = (letter * 16 for letter in "abcde")
    objects = {
        MANIFEST_NAME: 100.0, f"{mine}/plan.json": 1, f"{mine}/r00000.part": 1, f"{mine}/.tmp-put-{mine}": 1,
        f"{dead}/plan.json": 1, f"{dead}/r00000-0000.safetensors": 1, f"{young}/r00000.part": 1,
        f"{young}/r00001.part": 500,
        f"{planless}/r00000.part": 1, f"{planless}/r00000-0000.safetensors": 1, f"{planless}/mine.txt": 1,
        f"{unknown}/plan.json": 0, f"{unknown}/r00000.part": 1, "notes.txt": 1, f"1300/{dead}/plan.json": 1,
        f".tmp-put-{mine}": 1, f".tmp-put-{dead}": 450,
    }  # fmt: skip
    assert set(leftovers(objects, mine, 100, 500)) == {
        f"{mine}/.tmp-put-{mine}", f".tmp-put-{mine}", f"{dead}/plan.json", f"{planless}/r00000.part",
        f"{planless}/r00000-0000.safetensors",
    }  # fmt: skip
    # What others refer to stays, and the plan goes all the same.
    referred = [f"{dead}/plan.json", f"{planless}/r00000-0000.safetensors"]
    assert set(leftovers(objects, mine, 100, 500, referred)) == {
        f"{mine}/.tmp-put-{mine}", f".tmp-put-{mine}", f"{dead}/plan.json", f"{planless}/r00000.part",
    }  # fmt: skip
    # Readers of what was replaced a moment ago may be on their way.
    assert set(leftovers({**objects, MANIFEST_NAME: 499.0}, mine, 100, 500)) == {
        f"{mine}/.tmp-put-{mine}",
        f".tmp-put-{mine}",
    }


# What is wrong


def test_a_checkpoint_is_there_already() -> None:
    place = place_of(MemoryStore())
    save(place, 1)
    with pytest.raises(
        CheckpointExistsError, match=r"s3://b/run/1200/ holds a checkpoint already; pass overwrite=True"
    ):
        save(place, 2)
    assert load(place) == 1
    save(place, 2, overwrite=True)
    assert load(place) == 2


def test_what_its_parts_say_must_be_there() -> None:
    """Else the manifest would promise what is not."""
    place = place_of(MemoryStore())
    plan = attempts.begin(place, RANKS, overwrite=False, now_s=0)
    save_rank(place, plan.attempt, 0, 1)
    assert attempts.commit(place, plan.attempt) is Step.WAIT
    save_rank(place, plan.attempt, 1, 1)
    segment = place.folder + object_name(plan.attempt, 1, 0)
    whole, _ = place.read(object_name(plan.attempt, 1, 0))
    for broken, said in ((None, "is missing"), (whole[:-1], "is of 4115 bytes")):
        place.store.put(segment, broken) if broken is not None else place.store.delete(segment)
        with pytest.raises(CheckpointError, match=f"r00001-0000.safetensors {said}, and rank 1 has saved 4116"):
            attempts.commit(place, plan.attempt)
        assert attempts.repair(place) is None
        assert load(place) is None
    place.store.put(segment, whole)
    assert attempts.repair(place) == plan.attempt


def test_what_it_refers_to_must_be_there_and_in_its_plan() -> None:
    store = MemoryStore()
    save(Place.of(store, "s3://b/run/1100"), 1)
    base = attempts.contents(Place.of(store, "s3://b/run/1100"))
    (held_in, *_) = (f"../1100/{each.name}" for each in base.objects)
    objects = [replace(each, name=f"../1100/{each.name}") for each in base.objects]
    pieces = [Piece("w", "F32", SHAPE, place.box) for place in base.places("w")]
    references = [Reference(*each, 4096) for each in zip(pieces, objects, strict=True)]

    def saved(step: int, refers: list[str]) -> Step:
        place = Place.of(store, f"s3://b/run/{step}")
        plan = attempts.begin(place, 1, overwrite=False, now_s=0, refers=refers)
        attempts.finish_rank(place, Part.of(plan.attempt, 0, [], (), references))
        return attempts.commit(place, plan.attempt)

    with pytest.raises(CheckpointError, match="refers to 1100, and its plan to nothing"):
        saved(1200, [])
    assert saved(1300, ["900", "1100"]) is Step.COMMITTED
    there = attempts.current(Place.of(store, "s3://b/run/1300"))
    assert there is not None
    assert there.manifest is not None
    assert there.manifest.refers == ("1100",)
    assert len(attempts.references(Place.of(store, "s3://b/run/1300"), there.manifest)) == RANKS
    store.delete(f"s3://b/run/{held_in.removeprefix('../')}")
    with pytest.raises(CheckpointError, match="is missing, and rank 0 has saved 4116"):
        saved(1400, ["1100"])


@pytest.mark.parametrize("name", ["manifest", "part", "plan"])
def test_records_that_are_damaged(name: str) -> None:
    place = place_of(MemoryStore())
    save(place, 1)
    there = attempts.current(place)
    assert there is not None
    assert there.manifest is not None
    attempt = there.manifest.attempt
    path = {"manifest": MANIFEST_NAME, "part": part_name(attempt, 1), "plan": plan_name(attempt)}[name]
    data, _ = place.read(path)
    place.store.put(place.folder + path, data[:-1])
    if name == "plan":  # of which a reader needs nothing
        assert load(place) == 1
        return
    with pytest.raises(CheckpointError, match="is damaged"):
        load(place)
    if name == "manifest":
        with pytest.raises(CheckpointError, match="nothing is deleted"):
            attempts.sweep(place, 0, 1e12)
    save(place, 2, overwrite=True)
    assert load(place) == 2


def test_records_that_are_missing() -> None:
    place = place_of(MemoryStore())
    save(place, 1)
    (part,) = [name for name in place.names() if name.endswith("r00001.part")]
    place.store.delete(place.folder + part)
    with pytest.raises(CheckpointError, match=r"is damaged: .*r00001\.part: no such object"):
        load(place)


def test_a_reader_of_what_is_replaced_meanwhile() -> None:
    """It has read the manifest, and then all of that attempt goes: it takes the new one."""
    store = MemoryStore()
    place = place_of(store)
    save(place, 1)

    def before(operation: str, url: str) -> None:
        if url.endswith(".part"):
            store.before = lambda operation, url: None
            save(place, 2, overwrite=True)
            for _ in range(2):
                attempts.sweep(place, GRACE_S, 1e9)

    store.before = before
    assert load(place) == 2


# Real stores


@pytest.fixture(params=["local", "s3"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        store, url = open_store(str(tmp_path), StoreOptions()), f"{tmp_path}/run/1200"
    else:
        bucket: Bucket = request.getfixturevalue("s3")
        store, url = open_store(bucket.url, bucket.options, RequestOptions()), f"{bucket.url}/run/1200"
    yield Place.of(store, url)
    store.close()


def winners(place: Place, *, overwrite: bool) -> list[int]:
    start = threading.Barrier(6)

    def one(content: int) -> object:
        start.wait(PATIENCE_S)
        try:
            return save(place, content, overwrite=overwrite)
        except CheckpointExistsError:
            return None

    with ThreadPoolExecutor(6) as pool:
        return [content for content, step in enumerate(pool.map(one, range(6))) if step is Step.COMMITTED]


def test_of_six_who_save_at_once_one_is_committed(real: Place) -> None:
    (winner,) = winners(real, overwrite=False)
    assert load(real) == winner
    # One may begin after another has committed, and replace that.
    won = winners(real, overwrite=True)
    assert load(real) in won
    for _ in range(2):
        attempts.sweep(real, 0.0, time.time() + 1000)
    assert len(real.names()) in (2 * RANKS + 1, 2 * RANKS + 2)  # with its plan


def test_a_lost_answer_is_no_lost_race(s3: Bucket) -> None:
    """Every second answer to a write is lost."""
    relay = Relay(s3.server.endpoint_url, ["lost", ""] * 20)
    with behind(relay, s3) as store:
        place = Place.of(store, f"{s3.url}/run/1200")
        assert save(place, 1) is Step.COMMITTED
        assert save(place, 2, overwrite=True) is Step.COMMITTED
        assert load(place) == 2
    assert relay.puts > 12


_SAVES = """
import itertools, sys
from fastload.checkpoint.attempts import Place
from fastload.store import StoreOptions, open_store
from tests.checkpoint.saving import save
place = Place.of(open_store(sys.argv[1], StoreOptions()), sys.argv[1])
for content in itertools.count(int(sys.argv[2])):
    save(place, content, overwrite=True)
    print(content, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    """What was said to be saved is there, or what was saved after it, and all else goes."""
    url = f"{tmp_path}/run/1200"
    place = Place.of(open_store(url, StoreOptions()), url)
    content, root = 0, str(Path(__file__).parent.parent.parent)
    for turn in range(8):
        command = [sys.executable, "-c", _SAVES, url, str(content)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(turn).uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines()]
        process.stdout.close()
        process.wait()
        promised = said[-1] if said else content
        attempts.repair(place)
        found = load(place)
        assert found is not None
        assert promised <= found <= promised + 1
        for _ in range(2):
            attempts.sweep(place, 0.0, time.time() + 1000)
        assert len(place.names()) in (2 * RANKS + 1, 2 * RANKS + 2)
        assert sum(name.startswith(".tmp") for _, _, names in os.walk(tmp_path) for name in names) == 0
        content = found + 1
    place.store.close()
