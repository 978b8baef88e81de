"""What becomes of a job, with time passed in; and the file that keeps submitted ones, also where writing it fails."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.daemon.config import data_table
from fastload.daemon.jobs import (
    Figures,
    Job,
    Kept,
    Listing,
    Objects,
    job_id,
    of_kept,
    orphans,
    path_of,
    read_kept,
    to_forget,
    to_keep,
    write_kept,
)
from fastload.errors import CacheError
from fastload.store.types import ObjectInfo

ALL = Figures(done_bytes=10, total_bytes=10, held_bytes=10, fetched_bytes=10, shard_count=2)


def job(**more: object) -> Job:
    table = data_table({"name": "a", "urls": ["s3://b/a/"], **more}, None)
    return Job("a", table, is_submitted=True, since=1000.0)


def listing(**etags: str) -> Listing:
    return Listing.of(ObjectInfo(f"s3://b/a/{name}", 5, etag) for name, etag in etags.items())


def run(it: Job, figures: Figures, now: float) -> None:
    it.begun(now)
    it.came_to(figures, now)
    it.succeeded(now, 0.5)


def test_one_that_is_done_is_not_due_again() -> None:
    it = job(deadline="2h")
    assert (it.due_at, it.deadline_at) == (0.0, 1000.0 + 7200)
    run(it, ALL, 5.0)
    assert (it.state, it.due_at, it.watch_at, it.error) == ("done", math.inf, math.inf, "")
    it.retry(7.0, 2000.0)
    assert (it.state, it.due_at, it.deadline_at) == ("waiting", 7.0, 9200.0)


def test_what_failed_is_tried_again_after_growing_pauses() -> None:
    it = job()
    pauses = []
    for now in (0.0, 100.0, 200.0):
        it.begun(now)
        it.failed("StoreError: no", now, 0.5)
        assert (it.state, it.error) == ("failed", "StoreError: no")
        pauses.append(it.due_at - now)
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1]
    run(it, ALL, 300.0)
    it.begun(400.0)
    it.failed("again", 400.0, 0.5)
    assert it.due_at - 400.0 == pauses[0]


def test_a_shard_that_failed_is_named_and_tried_again() -> None:
    it = job()
    run(it, msgspec.structs.replace(ALL, held_bytes=5, failed={"s3://b/a/1": "it is not there"}), 5.0)
    assert it.state == "failed"
    assert it.error == "1 of 2 shards failed, the first: s3://b/a/1: it is not there"
    assert 5.0 < it.due_at < 15.0


def test_a_full_cache_is_said_and_not_tried_in_vain() -> None:
    it = job()
    run(it, msgspec.structs.replace(ALL, held_bytes=5), 5.0)
    assert (it.state, it.due_at) == ("failed", math.inf)
    assert it.error.startswith("the cache is full: 5 of 10 bytes are held; raise disk_bytes")


LOST = msgspec.structs.replace(ALL, held_bytes=4)


@pytest.mark.parametrize(
    ("table", "is_pinned", "state", "pause_least_s"),
    [
        ({}, False, "done", math.inf),
        ({"pin": True}, True, "waiting", 2.0),
        ({"pin": True, "when": "once"}, True, "waiting", 2.0),
        ({"pin": True, "ttl": "1d", "watch": "5s"}, False, "done", math.inf),  # the pin has ended, as it was to
        ({"watch": "5s"}, False, "waiting", 450.0),
    ],
)
def test_what_was_lost_of_what_is_done_is_warmed_again_where_it_is_kept(
    table: dict[str, object], is_pinned: bool, state: str, pause_least_s: float
) -> None:
    it = job(**table)
    run(it, ALL, 5.0)
    assert it.describe(5.0, 1005.0).is_ready
    assert not it.holds(10, is_pinned, 6.0, 0.5)
    assert it.holds(4, is_pinned, 10.0, 0.5)
    shown = it.describe(10.0, 1010.0)
    assert (shown.is_ready, it.state, shown.held_bytes) == (False, state, 4)
    assert shown.error.startswith("4 B of 10 B held: ")
    assert it.due_at - 10.0 >= pause_least_s
    if state == "done":
        assert not it.holds(3, is_pinned, 11.0, 0.5)  # that is no news
        it.holds(10, is_pinned, 12.0, 0.5)
        shown = it.describe(12.0, 1012.0)
        assert (shown.is_ready, shown.error) == (True, "")


def test_what_is_lost_again_and_again_is_fetched_ever_more_seldom() -> None:
    it, now, pauses = job(watch="5s"), 0.0, []
    for _ in range(12):
        run(it, ALL, now)
        it.holds(0, False, now + 1, 0.5)
        pauses.append(it.due_at - now - 1)
        now = it.due_at
    assert pauses == sorted(pauses)
    assert 7 * 3600 < pauses[-1] <= 12 * 3600
    run(it, ALL, now)
    it.holds(0, False, now + 7 * 24 * 3600, 0.5)  # it had lasted
    assert it.due_at - now - 7 * 24 * 3600 == pauses[0]


def test_after_a_restart_it_is_looked_up_what_is_held() -> None:
    it = job(when="22:00-22:01")
    run(it, ALL, 5.0)
    (kept,) = to_keep({"a": it}, []).jobs
    back = of_kept(kept)
    assert (back.state, back.is_check, back.due_at) == ("waiting", True, 0.0)
    assert back.contender.windows.is_open(0)  # it fetches nothing
    assert not back.describe(0.0, 1000.0).is_ready
    (again,) = to_keep({"a": back}, []).jobs
    assert again == kept
    back.begun(1.0)
    assert back.state == "listing"
    back.looked_up(LOST, False, 2.0, 0.5)
    assert (back.state, back.due_at) == ("done", math.inf)
    assert back.error.startswith("4 B of 10 B held: ")
    back.retry(3.0, 1003.0)
    back.begun(4.0)
    assert back.state == "warming"


def test_a_refused_pin_is_said_once_and_tried_again_when_something_changes() -> None:
    it, now, pauses, said = job(pin=True), 0.0, [], []
    for error in ("CacheError: too large", "CacheError: too large", "CacheError: larger", "CacheError: larger"):
        it.begun(now)
        said.append(it.refused(error, now, 0.5))
        assert (it.state, it.error) == ("failed", error)
        pauses.append(it.due_at - now)
        now = it.due_at
    assert said == [True, False, True, False]
    assert pauses == sorted(pauses)
    assert pauses[0] > 400
    it.room_changed(now)
    assert it.due_at == now
    run(it, ALL, now)
    it.room_changed(now)
    assert (it.state, it.due_at) == ("done", math.inf)


def test_a_full_cache_is_tried_again_when_there_may_be_room() -> None:
    it = job()
    run(it, LOST, 5.0)
    it.room_changed(7.0)
    assert (it.state, it.due_at) == ("failed", 7.0)


def test_pins_that_no_job_names_are_orphans() -> None:
    kept, not_pinned = job(pin=True), job()
    not_pinned.table = msgspec.structs.replace(not_pinned.table, name="b")
    assert orphans(["a", "b", "c"], {"1": kept, "2": not_pinned}) == ["b", "c"]


@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 1 << 60))))
def test_objects_are_what_was_packed(objects: list[tuple[bytes, int]]) -> None:
    assert list(Objects.of(objects)) == objects


def test_a_watched_store_that_changes_makes_it_due() -> None:
    it = job(watch="10s", deadline="1h")
    it.listed()
    it.watched(listing(x="1", y="1"), 0.0, 1000.0, 0.5)
    assert it.watch_at == 10.0
    it.state = "waiting"
    run(it, ALL, 5.0)
    it.watched(listing(y="1", x="1"), 15.0, 1015.0, 0.5)
    assert (it.state, it.due_at) == ("done", math.inf)
    it.watched(listing(x="1", y="2", z="1"), 25.0, 1025.0, 0.5)
    assert (it.state, it.due_at, it.deadline_at) == ("waiting", 25.0, 1025.0 + 3600)
    run(it, ALL, 30.0)
    it.watched(listing(x="1"), 40.0, 1040.0, 0.5)
    assert (it.state, it.due_at) == ("waiting", 40.0)


objects = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 2), st.none() | st.sampled_from("uv")))


@given(objects, objects)
def test_what_is_gone_by_a_later_listing(before: dict[str, tuple[int, str]], later: dict[str, tuple[int, str]]) -> None:
    first, second = (
        Listing.of(ObjectInfo(url, size, etag) for url, (size, etag) in each.items()) for each in (before, later)
    )
    assert first.gone_by(second) == sorted(url for url, version in before.items() if later.get(url) != version)
    assert (first == second) == (before == later)


def test_a_store_that_cannot_be_listed_later_leaves_what_is_done() -> None:
    it = job(watch="10s")
    it.listed()
    it.not_listed("AccessDeniedError: no", 0.0, 0.5)
    assert it.state == "failed"
    assert it.due_at > 0
    # It may be listed again before it is tried again.
    it.watched(listing(x="1"), 1.0, 1001.0, 0.5)
    assert (it.state, it.due_at) == ("waiting", 1.0)
    run(it, ALL, 5.0)
    it.not_listed("StoreUnavailableError: no", 20.0, 0.5)
    assert (it.state, it.due_at) == ("done", math.inf)
    assert it.describe(20.0, 1020.0).error == "StoreUnavailableError: no"
    assert it.watch_at == 30.0
    it.watched(listing(x="1"), 30.0, 1030.0, 0.5)
    assert (it.state, it.describe(30.0, 1030.0).error) == ("done", "")


def test_what_came_of_the_last_try_is_said_again_once_the_store_can_be_listed() -> None:
    it = job(watch="10s")
    it.watched(listing(x="1"), 0.0, 1000.0, 0.5)
    run(it, msgspec.structs.replace(ALL, held_bytes=5), 5.0)
    it.not_listed("StoreUnavailableError: no", 20.0, 0.5)
    it.watched(listing(x="1"), 30.0, 1030.0, 0.5)
    assert it.describe(30.0, 1030.0).error.startswith("the cache is full")


def test_one_that_was_stopped_goes_on_and_one_that_was_cancelled_does_not() -> None:
    it = job()
    it.begun(1.0)
    it.stopped()
    assert (it.state, it.due_at) == ("waiting", 0.0)
    it.cancel()
    it.stopped()
    assert (it.state, it.due_at) == ("cancelled", math.inf)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 1 << 30)), min_size=1, max_size=20))
def test_the_rate_is_between_the_slowest_and_the_fastest(steps: list[tuple[float, int]]) -> None:
    it, now, fetched = job(), 100.0, 0
    it.begun(now)
    rates = [0.0]
    for seconds, more in steps:
        now, fetched = now + seconds, fetched + more
        rates.append(more / seconds)
        it.came_to(Figures(total_bytes=1 << 40, fetched_bytes=fetched), now)
        assert min(rates) <= it.bytes_per_s <= max(rates) * 1.000001 + 1e-6
        shown = it.describe(now, 1e9)
        assert (shown.eta_s >= 0) == (it.bytes_per_s > 0)


# The file


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    assert read_kept(tmp_path) == Kept()
    waiting, done, cancelled, configured = job(), job(priority=1), job(priority=2, watch="5s"), job()
    run(done, ALL, 1.0)
    cancelled.cancel()
    waiting.begun(1.0)
    configured.is_submitted = False
    jobs = {str(number): each for number, each in enumerate([waiting, done, cancelled, configured])}
    for number, each in jobs.items():
        each.id = number
    write_kept(tmp_path, to_keep(jobs, ["once"], ["pin"]))
    assert path_of(tmp_path).stat().st_mode & 0o777 == 0o600
    kept = read_kept(tmp_path)
    assert (kept.once, kept.pins) == (["once"], ["pin"])
    back = [of_kept(each) for each in kept.jobs]
    assert [(each.id, each.state, each.due_at, each.is_check) for each in back] == [
        ("0", "waiting", 0.0, False),
        ("1", "waiting", 0.0, True),
        ("2", "cancelled", math.inf, False),
    ]
    assert [each.table for each in back] == [waiting.table, done.table, cancelled.table]
    assert back[1].figures == ALL


def test_a_watched_one_that_was_done_looks_again_after_a_restart() -> None:
    """What came while no daemon ran cannot be told from what was there: all of it is looked at."""
    it = job(watch="5s")
    run(it, ALL, 1.0)
    (kept,) = to_keep({"a": it}, []).jobs
    back = of_kept(kept)
    assert (back.state, back.due_at) == ("waiting", 0.0)


def test_of_those_that_are_over_the_oldest_are_forgotten() -> None:
    jobs = {}
    for number in range(250):
        jobs[str(number)] = each = job(priority=number)
        each.id = str(number)
        each.cancel()
    jobs["waits"] = job()
    assert to_forget(jobs) == [str(number) for number in range(150)]
    jobs["7"].table = msgspec.structs.replace(jobs["7"].table, pin=True)  # which would be nobody's then
    assert to_forget(jobs, {"a"}) == [str(number) for number in range(150) if number != 7]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_kept(tmp_path, Kept(once=["before"]))

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(OSError, match="No space left"):
            write_kept(tmp_path, Kept(once=["after"]))
    assert read_kept(tmp_path).once == ["before"]
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.json"]


BAD_TABLE = (
    b'{"jobs": [{"id": "a", "since": 1, "table": {"name": "a", "urls": ["/a"], "when": "?"}, "state": "done", '
    b'"figures": {}}]}'
)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"jobs": [{"id": 3}]}', b'{"jobs": 1}', b"\xff", BAD_TABLE])
def test_a_damaged_file_is_put_aside(tmp_path: Path, content: bytes) -> None:
    path_of(tmp_path).write_bytes(content)
    with pytest.raises(CacheError, match=r"put aside as jobs.json.damaged; submit them again"):
        read_kept(tmp_path)
    assert (tmp_path / "jobs.json.damaged").read_bytes() == content
    assert read_kept(tmp_path) == Kept()


def test_the_id_is_that_of_the_content() -> None:
    first, same, other = job(), job(), job(priority=1)
    assert job_id(first.table) == job_id(same.table) != job_id(other.table)
    assert len(job_id(first.table)) == 10
