"""A core that remembers: what an earlier run read is fetched ahead for one that reads alike, and what that costs."""

from __future__ import annotations

import errno
import random
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fastload import protocol
from fastload.cache import CacheDirectory, syscalls
from fastload.errors import AccessDeniedError, ObjectMissingError, StoreError, StoreUnavailableError
from fastload.history import runfile
from fastload.history.archive import Archive
from fastload.history.keys import object_key
from fastload.history.record import Recorder
from fastload.history.runfile import EndpointSummary, RunSummary
from fastload.service.core import Core
from fastload.service.recording import learnt_by_runs
from fastload.service.replay import ReplayPlan
from fastload.store.types import ObjectInfo
from tests.cache.faults import failing
from tests.service.helpers import CHUNK_BYTES, random_bytes
from tests.service.world import Gate, Side, World, settle, sleep, until

COUNT = 30


class Reader:
    """A consumer that opens objects one by one and reads each whole, as `fastload.open` has it."""

    def __init__(self, core: Core, world: World, group: int = 1) -> None:
        self.side = Side(core, [])
        core.disconnect(self.side.state)
        hello = protocol.Hello(protocol.VERSION, 1, "fastload.open", {}, group=group, program="train.py")
        self.side.state = core.connect(hello, self.side.sent.append)
        self._world, self._requests, self._chunks = world, 0, 0

    async def read(self, number: int) -> None:
        """Open, wait, read, give back."""
        self._requests += 1
        self.side.say(protocol.Open(self._requests, self._world.objects[number].url))
        opened = await self._answer(protocol.Opened)
        chunks = range(self._chunks, self._chunks - (-opened.size // CHUNK_BYTES))
        self._chunks = chunks.stop
        for chunk in chunks:
            self.side.want(chunk)
            await until(lambda chunk=chunk: chunk in self.side.granted, f"chunk {chunk} is granted")  # type: ignore[misc]
            self.side.release(chunk)

    async def _answer(self, kind: type[protocol.Opened]) -> protocol.Opened:
        def answers() -> list[protocol.Opened]:
            return [message for message in self.side.all(kind) if message.request == self._requests]

        await until(lambda: bool(answers()), "it is opened")
        return answers()[0]

    def attach(self) -> None:
        """Begin anew, with a whole list, which ends all that was."""
        self.side.say(protocol.Attach(True, True, protocol.ObjectRows.of(self._world.objects[:5])))
        self._chunks = 5

    def leave(self) -> None:
        """Go away."""
        self.side.core.disconnect(self.side.state)


def world(tmp_path: Path, buffer_count: int = 40, **limits: int) -> World:
    """Objects of a chunk each, but every tenth of three."""
    made = World(tmp_path, buffer_count)
    if limits:
        made.directory = CacheDirectory.open(tmp_path / "cache", **limits)
    made.add(*(3 if number % 10 == 9 else 1 for number in range(COUNT)))
    return made


def knows_history(core: Core) -> bool:
    """Whether the service has looked into it, which no message says: what it predicts then may be nothing."""
    return core._replay._library is not None


def give_up(core: Core) -> None:
    """Have the service find that history cannot be written; tests of a disk that is full have it find that out."""
    core._history._give_up(OSError("no room"))


def run(world: World, work: Callable[[Core], Coroutine[Any, Any, None]]) -> None:
    """A service's life, with nothing in its RAM at first."""
    world.store.reads.clear()
    world.run(work)


def read_all(world: World, order: list[int], settled: Callable[[Core, Reader], None] | None = None) -> None:
    """A run that reads in this order; `settled` looks at what there is after each read."""

    async def work(core: Core) -> None:
        reader = Reader(core, world)
        for number in order:
            await reader.read(number)
            if settled is not None:
                await settle()
                settled(core, reader)
        reader.leave()

    run(world, work)


def replayed(core: Core) -> int:
    """What the service counted of reads that came as predicted."""
    other = Side(core, [])
    found: int = other.node()["replayed_reads"]
    core.disconnect(other.state)
    return found


ORDER = [(7 * number + 3) % COUNT for number in range(COUNT)]


def test_the_next_reads_are_there_before_they_are_asked_for(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)
    ahead: list[int] = []

    def look(core: Core, reader: Reader) -> None:
        ahead.append(len(here.store.reads) - reader.side.state.granted.chunks[0] - len(ahead))

    read_all(here, ORDER, look)
    assert ahead[0] >= 1
    assert ahead[4] >= 8
    chunks = sum(info.size // CHUNK_BYTES for info in here.objects)
    assert len(here.store.reads) == chunks  # each once, whoever asked for it


def test_a_version_that_was_fetched_is_not_asked_for(tmp_path: Path) -> None:
    here = world(tmp_path)
    asked: list[str] = []
    head = here.store.head
    here.store.head = lambda url: asked.append(url) or head(url)  # type: ignore[method-assign,func-returns-value]
    read_all(here, ORDER)
    assert len(asked) == COUNT
    asked.clear()
    read_all(here, ORDER, lambda core, reader: None)
    assert len(asked) <= 2


def test_an_object_that_changed_is_read_in_its_new_version(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)
    changed = ORDER[10]
    here.objects[changed] = here.store.put(str(changed), random_bytes(999, CHUNK_BYTES))
    read_all(here, ORDER)
    assert [url for url, _ in here.store.reads].count(here.objects[changed].url) == 2  # in vain, and then as it is


def test_an_object_that_vanished_is_nobodys_error(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)
    url = here.objects[ORDER[10]].url
    here.store.errors[url] = ObjectMissingError(f"{url} is gone")
    failures: list[protocol.Message] = []

    def look(core: Core, reader: Reader) -> None:
        failures.extend([*reader.side.all(protocol.Failed), *reader.side.all(protocol.RequestFailed)])

    read_all(here, [number for number in ORDER if number != ORDER[10]], look)
    assert failures == []
    assert [each for each, _ in here.store.reads].count(url) == 1  # in vain, and once


@pytest.mark.parametrize("error", [StoreUnavailableError, AccessDeniedError])
def test_what_was_away_for_a_while_is_predicted_again(error: type[StoreError], tmp_path: Path) -> None:
    """Or was denied to somebody else, or asked for with credentials that had gone with their consumer."""
    here = world(tmp_path, buffer_count=8)
    read_all(here, ORDER)
    url = here.objects[ORDER[10]].url
    ahead: list[bool] = []

    async def work(core: Core) -> None:
        for is_away in (True, False):
            if is_away:
                here.store.errors[url] = error(f"{url} is not to be had")
            else:
                del here.store.errors[url]
            reader = Reader(core, here)
            for number in ORDER[:10]:
                await reader.read(number)
                await settle()
            ahead.append(url in [each for each, _ in here.store.reads])
            reader.leave()
            here.store.reads.clear()

    run(here, work)
    assert ahead == [True, True]


def test_switched_off_nothing_is_kept_or_used(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)
    here.directory = CacheDirectory.open(tmp_path / "cache", history_bytes=0)
    seen = []
    read_all(here, ORDER, lambda core, reader: seen.append(len(here.store.reads)))
    assert seen[:5] == [1, 2, 3, 4, 5]
    assert len(Archive(tmp_path / "cache").runs()) == 1


def test_epochs_of_one_run_in_the_same_order_are_known_too(tmp_path: Path) -> None:
    here = world(tmp_path, buffer_count=8)
    counts: list[int] = []

    async def work(core: Core) -> None:
        for _ in range(2):
            reader = Reader(core, here)
            for number in ORDER:
                await reader.read(number)
            reader.leave()
            await settle()
            counts.append(replayed(core))

    run(here, work)
    assert counts[0] == 0
    assert counts[1] >= COUNT - 5


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_reader_that_stays_is_known_from_its_third_epoch_on(is_shuffled: bool, tmp_path: Path) -> None:
    """As persistent workers do, or none."""
    here = world(tmp_path, buffer_count=8)
    counts: list[int] = []
    draw = random.Random(1)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for _ in range(3):
            for number in draw.sample(ORDER, COUNT) if is_shuffled else ORDER:
                await reader.read(number)
            await settle()
            counts.append(replayed(core))
        reader.leave()

    run(here, work)
    came = counts[2] - counts[1]
    assert came < COUNT // 4 if is_shuffled else came >= COUNT - 5


def test_a_reader_does_not_follow_itself(tmp_path: Path) -> None:
    """When the history is read, its own reads so far are in it, and what others read then followed on them."""
    here = world(tmp_path, buffer_count=4)

    async def work(core: Core) -> None:
        readers = [Reader(core, here) for _ in range(2)]
        for number in range(0, 16, 2):
            for reader in readers:
                await reader.read(number + readers.index(reader))
        late = Reader(core, here)
        await late.read(20)
        await until(lambda: knows_history(core), "the history is there")
        assert [reader.side.state.plan for reader in readers] == [None, None]
        for reader in [*readers, late]:
            reader.leave()

    run(here, work)


def test_a_history_is_not_looked_into_all_the_time(tmp_path: Path) -> None:
    """Most orders are drawn anew each epoch."""
    here = world(tmp_path, buffer_count=8)
    looks: list[float] = []

    async def work(core: Core) -> None:
        replay = core._replay  # not through messages: a hundred thousand of them take half a minute
        replay._recording.load = lambda done: looks.append(0.0)  # type: ignore[method-assign]
        reader = Reader(core, here)
        for key in range(100_000):
            replay.read(reader.side.state, key, 0)
        reader.leave()

    run(here, work)
    assert len(looks) == 1 + 12  # at first, and after 32, 64, ... 65,536


def test_jobs_side_by_side_are_runs_of_their_own(tmp_path: Path) -> None:
    here = world(tmp_path)

    async def work(core: Core) -> None:
        readers = [Reader(core, here, group) for group in (1, 2, 2)]
        for number in range(9):
            await readers[number % 3].read(number)
        for reader in readers:
            reader.leave()

    run(here, work)
    archive = Archive(tmp_path / "cache")
    found = {archive.read(each).summary.trace_count: archive.read(each) for each in archive.runs()}
    assert set(found) == {1, 2}
    assert [len(found[count].reads) for count in (1, 2)] == [3, 6]
    assert {each.summary.program for each in found.values()} == {"train.py"}


def test_it_is_there_when_the_service_was_killed(tmp_path: Path) -> None:
    """What was read until a consumer went is on disk then."""
    here = world(tmp_path)
    kept: list[int] = []

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in ORDER[:10]:
            await reader.read(number)
        reader.leave()
        archive = Archive(tmp_path / "cache")
        await until(lambda: bool(archive.runs()), "it is written")
        kept.extend(len(archive.read(each).reads) for each in archive.runs())

    run(here, work)
    assert kept == [sum(here.objects[number].size // CHUNK_BYTES for number in ORDER[:10])]


def test_a_directory_may_go_with_the_job_that_made_it(tmp_path: Path) -> None:
    """The service is still there then, and does not put anything into it."""
    here = world(tmp_path)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        await reader.read(0)
        reader.leave()
        await settle()
        shutil.rmtree(tmp_path / "cache")

    run(here, work)
    assert not (tmp_path / "cache").exists()


def test_nothing_is_written_into_a_directory_that_is_being_removed(tmp_path: Path) -> None:
    """The service ended as its lock was gone, and its history came in between what was removed and the directory."""
    here = world(tmp_path, disk_bytes=64 << 20)
    assert here.directory.try_lock()

    def files() -> set[Path]:
        return {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    async def work(core: Core) -> None:
        before = files()
        here.directory.lock_path.unlink()
        reader = Reader(core, here)
        for number in range(5):
            await reader.read(number)
        reader.side.say(protocol.PutIndex(0, b"index"))
        reader.leave()
        await settle()
        assert files() == before - {here.directory.lock_path}

    run(here, work)
    assert not list((tmp_path / "cache").glob("*/*"))
    here.directory.unlock()


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = world(tmp_path)
    (tmp_path / "cache" / "history").write_text("in the way")
    read_all(here, ORDER[:5])
    read_all(here, ORDER[:5])
    assert "no history is kept for 10 minutes" in caplog.text


def test_a_consumer_that_tells_its_plan_keeps_it(tmp_path: Path) -> None:
    """Also where it opens what an earlier run began with."""
    here = world(tmp_path)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        first = Reader(core, here)
        await first.read(ORDER[0])  # so that the history is there
        side = Side(core, here.objects)
        side.plan(20, 21, 22)
        told = side.state.plan
        side.say(protocol.Open(1, here.objects[ORDER[0]].url))
        await settle()
        assert side.state.plan is told
        core.disconnect(side.state)
        first.leave()

    run(here, work)


def test_what_is_said_of_a_plan_that_has_ended_moves_no_prediction(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in ORDER[:5]:
            await reader.read(number)
        plan = reader.side.state.plan
        assert isinstance(plan, ReplayPlan)
        before = plan.cursor
        reader.side.say(protocol.Advance(20))
        reader.side.say(protocol.Uses(0, (10**6).to_bytes(4, "little")))
        assert (plan.cursor, plan.uses) == (before, None)
        reader.leave()

    run(here, work)


def test_an_object_that_is_shorter_by_now_ends_no_prediction(tmp_path: Path) -> None:
    here = world(tmp_path, buffer_count=60)
    order = list(range(COUNT))
    read_all(here, order)
    here.objects[9] = here.store.put("9", random_bytes(999, CHUNK_BYTES))
    ahead: list[str] = []

    async def work(core: Core) -> None:
        knows = Reader(core, here)
        await knows.read(9)  # so that its version is known
        reader = Reader(core, here)
        for number in order[:9]:
            await reader.read(number)
        await settle()
        ahead.extend(url.rpartition("/")[2] for url, _ in here.store.reads)
        knows.leave()
        reader.leave()

    run(here, work)
    assert {"12", "14"} <= set(ahead)


def test_how_far_ahead_is_fetched_does_not_grow_with_what_is_read_again(tmp_path: Path) -> None:
    here = world(tmp_path, buffer_count=80)
    epoch = [number for number in range(COUNT) if number % 10 != 9]
    read_all(here, epoch * 3)
    seen: list[int] = []
    read_all(here, epoch[:4], lambda core, reader: seen.append(len(here.store.reads)))
    assert seen[2] <= 12


def test_credentials_that_change_leave_a_prediction_that_has_them(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in ORDER[:3]:
            await reader.read(number)
        reader.side.say(protocol.Credentials({"endpoint_url": "http://elsewhere"}))
        plan = reader.side.state.plan
        assert isinstance(plan, ReplayPlan)
        assert plan.options_key == reader.side.state.options_key
        reader.leave()

    run(here, work)


def test_what_is_forgotten_is_predicted_no_more(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in ORDER[:3]:
            await reader.read(number)
        assert reader.side.state.plan is not None
        reader.side.say(protocol.Clear(1, True))
        await until(lambda: bool(reader.side.all(protocol.Cleared)), "it is gone")
        other = Reader(core, here)
        for each in (reader, other):
            await each.read(ORDER[4])
            assert each.side.state.plan is None
            each.leave()

    run(here, work)


def test_history_that_nobody_can_have_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """URLs that are none, chunks that objects do not have."""
    here = world(tmp_path)
    recorder = Recorder("train.py", 1.8e9, CHUNK_BYTES)
    trace = recorder.begin_trace("fastload.open")
    odd = [
        ObjectInfo(url, 5 * CHUNK_BYTES, '"e"', -1) for url in ("s3:///x", "http://[x/y", "odd://x/y", "s3://fake/99")
    ]
    first = [here.objects[number] for number in ORDER[:3]]
    for info, index in [(first[0], 0), (odd[3], 9), (first[1], 7), *((each, 0) for each in [*first[1:], *odd])]:
        recorder.read(trace, object_key(info.url), info, index, 0.0)
    Archive(tmp_path / "cache").append("20270115-080000-00000000", recorder.take(1.0, {}).pieces())
    read_all(here, ORDER[:3] * 2 + ORDER[3:6])
    counts = Counter(url for url, _ in here.store.reads)
    assert all(counts[here.objects[number].url] == 1 for number in ORDER[:3])
    assert "Exception" not in caplog.text


@pytest.mark.parametrize(("seed", "buffer_count"), [(0, 6), (1, 6), (2, 2), (3, 2)])
def test_nothing_is_left_when_all_have_gone(seed: int, buffer_count: int, tmp_path: Path) -> None:
    """Whatever consumers do: read as before or not, open what has changed, tell plans, attach anew, go."""
    here = world(tmp_path, buffer_count)
    read_all(here, ORDER)
    here.objects[ORDER[5]] = here.store.put(str(ORDER[5]), random_bytes(999, CHUNK_BYTES))
    chance = random.Random(seed)

    async def work(core: Core) -> None:
        readers = [Reader(core, here) for _ in range(3)]
        at = [0, 0, 0]
        for _ in range(60):
            who = chance.randrange(3)
            reader = readers[who]
            match chance.choice(["read"] * 12 + ["other", "plan", "attach", "credentials", "leave", "clear"]):
                case "read":
                    await reader.read(ORDER[at[who] % COUNT])
                    at[who] += 1
                case "other":
                    await reader.read(chance.randrange(COUNT))
                case "plan":
                    reader.side.plan(*range(chance.randrange(len(reader.side.state.entries) + 1)))
                case "attach":
                    reader.attach()
                case "credentials":
                    reader.side.say(protocol.Credentials({"region": chance.choice(["a", "b"])}))
                case "clear":
                    reader.side.say(protocol.Clear(1, chance.random() < 0.2))
                case "leave":
                    reader.leave()
                    readers[who], at[who] = Reader(core, here), chance.randrange(COUNT)
        for reader in readers:
            reader.leave()
        await settle()
        core._residency.drop_idle()  # as ten seconds without a consumer do, and nothing else is done then
        # No message tells of records that were forgotten, which is what is looked for.
        assert core._objects._entries == {}
        assert core._table._positions == {}
        assert core._table._short_plans._buffers == {}
        assert core._table._short_plans._naming == {}
        assert core._table.free_count == core._table.count

    run(here, work)


def test_a_warming_consumer_is_one_run_in_the_order_of_its_plan(tmp_path: Path) -> None:
    """What it reads for its indexes adds nothing to it."""
    here = world(tmp_path, disk_bytes=64 << 20)

    async def work(core: Core) -> None:
        side = Side(core, here.objects)
        side.plan(0, 1, 2, warm=True)
        side.want(1)
        await until(lambda: any(each.finished for each in side.all(protocol.Progress)), "the cache is warm")
        core.disconnect(side.state)

    run(here, work)
    archive = Archive(tmp_path / "cache")
    (kept,) = map(archive.read, archive.runs())
    assert list(kept.reads.objects) == sorted(kept.reads.objects)
    assert len(kept.reads) == sum(-(-each.size // CHUNK_BYTES) for each in here.objects[:3])


@pytest.mark.parametrize("is_off", [True, False], ids=["off", "given up"])
def test_history_that_is_not_used_is_cleared_too(is_off: bool, tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER[:5])
    if is_off:
        here.directory = CacheDirectory.open(tmp_path / "cache", history_bytes=0)

    async def work(core: Core) -> None:
        give_up(core)
        reader = Reader(core, here)
        reader.side.say(protocol.Clear(1, True))
        await until(lambda: bool(reader.side.all(protocol.Cleared)), "it is gone")
        assert Archive(tmp_path / "cache").runs() == []
        reader.leave()

    run(here, work)


def test_a_full_disk_ends_the_keeping_and_not_the_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = world(tmp_path, buffer_count=8)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in ORDER[:5]:
            await reader.read(number)
        other = Reader(core, here)
        await other.read(1)
        with failing(0, errno.ENOSPC, frozenset({"pwritev"})):
            other.leave()
            await until(lambda: "no history is kept" in caplog.text, "the disk is full")
        for number in ORDER[5:20]:
            await reader.read(number)
        assert replayed(core) >= 15
        reader.leave()

    run(here, work)


def test_those_who_come_while_nothing_is_kept_are_served_from_what_was_read(tmp_path: Path) -> None:
    here = world(tmp_path, buffer_count=8)
    read_all(here, ORDER)

    async def work(core: Core) -> None:
        first = Reader(core, here)
        await first.read(ORDER[0])
        await until(lambda: knows_history(core), "the history is there")
        give_up(core)
        first.leave()
        reader = Reader(core, here, group=2)
        for number in ORDER[:20]:
            await reader.read(number)
        assert replayed(core) >= 15
        reader.leave()

    run(here, work)
    assert len(Archive(tmp_path / "cache").runs()) == 1


def test_a_daemon_keeps_history_again_when_there_is_room(tmp_path: Path) -> None:
    here = world(tmp_path)
    archive = Archive(tmp_path / "cache")

    async def work(core: Core) -> None:
        give_up(core)
        for group, later_s in enumerate((0.0, 599.0, 2.0)):
            await sleep(later_s)
            reader = Reader(core, here, group)
            await reader.read(0)
            reader.leave()

    run(here, work)
    assert [len(archive.read(each).reads) for each in archive.runs()] == [1]


def test_history_is_not_gathered_for_a_disk_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world(tmp_path)
    gate = Gate()
    monkeypatch.setattr("fastload.service.recording._HANGS_S", 0.02)
    monkeypatch.setattr(Archive, "append", lambda *arguments: gate.wait())

    async def work(core: Core) -> None:
        for number in range(3):
            reader = Reader(core, here)
            await reader.read(number)
            reader.leave()
            await settle()
        gate.set()

    run(here, work)
    assert "the disk has not answered" in caplog.text


def test_a_run_that_is_forgotten_as_it_goes_on_is_not_kept_on(tmp_path: Path) -> None:
    here = world(tmp_path)
    archive = Archive(tmp_path / "cache")

    async def work(core: Core) -> None:
        for number in range(3):
            reader = Reader(core, here)
            await reader.read(number)
            reader.leave()
            if number == 0:
                await until(lambda: bool(archive.runs()), "it is written")
                archive.remove(archive.find("latest"))
            await settle()

    run(here, work)
    assert archive.runs() == []


def test_what_is_cleared_does_not_come_back_damaged(tmp_path: Path) -> None:
    """Also where a piece was being written when somebody said so."""
    here = world(tmp_path)
    began, gate = list[bool](), Gate()

    async def work(core: Core) -> None:
        with pytest.MonkeyPatch.context() as patch:
            append = Archive.append
            patch.setattr(
                Archive,
                "append",
                lambda *args: (began.append(True), gate.wait(), append(*args))[-1],  # type: ignore[func-returns-value]
            )
            readers = [Reader(core, here), Reader(core, here)]
            await readers[0].read(0)
            readers[0].leave()
            await until(lambda: bool(began), "it is being written")
            readers[1].side.say(protocol.Clear(1, True))
            await settle()
            gate.set()
            await until(lambda: bool(readers[1].side.all(protocol.Cleared)), "it is gone")
            await settle()
            await readers[1].read(1)
            readers[1].leave()
        await settle()

    run(here, work)
    archive = Archive(tmp_path / "cache")
    assert [len(archive.read(each).reads) for each in archive.runs()] == []


def test_nothing_is_predicted_from_what_was_read_of_a_history_while_it_was_cleared(tmp_path: Path) -> None:
    """A large disk takes its time, and somebody begins to read meanwhile."""
    here = World(tmp_path, 40, disk_bytes=64 << 20)
    here.add(*[1] * COUNT)
    read_all(here, ORDER)
    gate = Gate()

    async def work(core: Core) -> None:
        blob_names = core.disk.blob_names
        core.disk.blob_names = lambda: (gate.wait(), blob_names())[-1]  # type: ignore[method-assign]
        clears = Side(core, [])
        clears.say(protocol.Clear(1, True))
        reader = Reader(core, here)
        await reader.read(ORDER[0])
        await until(lambda: knows_history(core), "it has been looked into")
        gate.set()
        await until(lambda: bool(clears.all(protocol.Cleared)), "it is gone")
        assert not knows_history(core)
        assert reader.side.state.plan is None
        reader.leave()

    run(here, work)


def test_history_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    """Such as another user's: the others serve."""
    here = world(tmp_path)
    read_all(here, ORDER)
    archive = Archive(tmp_path / "cache")
    archive.append(archive.new_name(4e9), [])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        opened = syscalls.open

        def refuse(path: Path | str, flags: int, mode: int = 0o600) -> int:
            if "20961002" in str(path):
                raise PermissionError(errno.EACCES, "no", str(path))
            return opened(path, flags, mode)

        patch.setattr(syscalls, "open", refuse)
        read_all(here, ORDER, lambda core, reader: seen.append(len(here.store.reads)))
    assert seen[4] >= 8
    assert len(archive.runs()) == 3


def test_a_run_that_measured_nothing_hides_no_earlier_one(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    measured, unmeasured = EndpointSummary(24, 4e8, 0.02, 8e7, 0, 100), EndpointSummary(8, 0.0, -1.0, 0.0, 0, 3)
    for began, learnt in ((1e9, measured), (2e9, unmeasured)):
        archive.append(archive.new_name(began), [runfile.summary_piece(RunSummary(endpoints={"s3://b": learnt}))])
    assert learnt_by_runs(archive) == {"s3://b": measured}


def test_damaged_history_stops_nothing(tmp_path: Path) -> None:
    here = world(tmp_path)
    read_all(here, ORDER)
    path = Archive(tmp_path / "cache").runs()[0].path
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 100)
    ahead: list[int] = []
    read_all(
        here, ORDER, lambda core, reader: ahead.append(len(here.store.reads) - reader.side.state.granted.chunks[2])
    )
    assert len(ahead) == COUNT  # all was read, and nothing was predicted
    assert set(ahead) == {0}
    assert {len(Archive(tmp_path / "cache").read(each).reads) for each in Archive(tmp_path / "cache").runs()} >= {0}


def test_clearing_empties_all_but_what_is_in_use(tmp_path: Path) -> None:
    here = World(tmp_path, 20, disk_bytes=50 * CHUNK_BYTES)
    here.add(*[1] * 10)
    kept = []

    async def work(core: Core) -> None:
        reader = Reader(core, here)
        for number in range(8):
            await reader.read(number)
        holder = Side(core, here.objects)
        holder.want(3)
        await until(lambda: holder.granted == [3], "it is granted")
        await settle()
        holder.say(protocol.PutIndex(0, b"index"))
        await settle()
        holder.say(protocol.Clear(1, False))
        await until(lambda: bool(holder.all(protocol.Cleared)), "it is empty")
        assert holder.all(protocol.Cleared)[0].byte_count >= 7 * CHUNK_BYTES
        holder.say(protocol.Stats(2))
        node = holder.all(protocol.StatsReply)[0].values["node"]
        kept.append((node["disk_used_bytes"], len(core.disk.blob_names())))
        reads = len(here.store.reads)
        await reader.read(3)  # in use, so it was there
        await reader.read(4)
        assert len(here.store.reads) == reads + 1
        reader.leave()
        holder.say(protocol.Clear(3, True))
        await until(lambda: len(holder.all(protocol.Cleared)) == 2, "the history is gone")
        assert Archive(tmp_path / "cache").runs() == []

    run(here, work)
    assert kept == [(0, 0)]
