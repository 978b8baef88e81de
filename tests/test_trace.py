"""`FASTLOAD_TRACE`: files that Perfetto opens, whole at the end and readable up to a kill."""

from __future__ import annotations

import json
import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastload.timing.trace import Trace
from tests.processes import until
from tests.programs import Program, run
from tests.test_why_slow import tar

Event = dict[str, Any]

CODE = """
import sys, time, fastload
with fastload.Cache(sys.argv[2], ram_bytes="64MiB", disk_bytes="64MiB", chunk_bytes="256KiB") as cache:
    dataset = fastload.StreamingDataset(sys.argv[1], cache=cache).map(dict)
    with fastload.DataLoader(dataset, batch_size=8, num_workers=2, workers=sys.argv[3]) as loader:
        for _ in loader:
            print("a batch", flush=True)
            time.sleep(float(sys.argv[4]))
"""


def events_of(path: Path, *, whole: bool = True) -> list[Event]:
    """What a reader of Chrome's trace events finds; where it is not `whole`, up to the last line that is."""
    text = path.read_text()
    if not whole:
        text = text[: text.rindex("\n")].rstrip(",\n]") + "]"
    events: list[Event] = json.loads(text)
    for event in events:
        assert event["ph"] in ("X", "M", "b", "e", "i", "C"), event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    begun = [(event["cat"], event["id"]) for event in events if event["ph"] == "b"]
    ended = [(event["cat"], event["id"]) for event in events if event["ph"] == "e"]
    assert sorted(begun) == sorted(ended)
    return events


def names(events: list[Event], phase: str = "X") -> set[str]:
    return {event["name"] for event in events if event["ph"] == phase}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "0.tar"
    path.write_bytes(tar(0, 64))
    return path


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_what_each_thread_does(tmp_path: Path, shard: Path, workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_TRACE", str(tmp_path / "trace.json"))
    run(CODE, shard, tmp_path / "cache", workers, 0.001)
    events = events_of(tmp_path / "trace.json")
    assert {"startup", "index", "decode", "collate", "wait for a batch"} <= names(events)
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"fastload-feed", "fastload-decode-0", "MainThread"} <= set(threads.values())
    for event in events:
        if event["name"] == "wait for a batch":
            assert sum(event["args"].values()) * 1e6 == pytest.approx(event["dur"], abs=5)
    by_thread: dict[int, list[Event]] = {}
    for event in sorted((each for each in events if each["ph"] == "X"), key=lambda each: each["ts"]):
        if "args" not in event:  # not the waits and what worker processes did, which lie over others
            by_thread.setdefault(event["tid"], []).append(event)
    for spans in by_thread.values():  # a thread does one thing at a time
        for before, after in pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"] + 1.0
    (of_service,) = set(tmp_path.glob("trace.*.json"))

    def requests_of_service() -> list[Event]:
        return [event for event in events_of(of_service, whole=False) if event["ph"] == "b"]

    until(lambda: len(requests_of_service()) == 9)  # it may be ending still
    requests = requests_of_service()
    assert sum(event["args"]["bytes"] for event in requests) == shard.stat().st_size


def test_a_process_that_is_killed(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_TRACE", str(tmp_path / "trace.json"))
    with Program(CODE, shard, tmp_path / "cache", "thread", 0.3) as program:
        until(
            lambda: "collate" in (tmp_path / "trace.json").read_text() if (tmp_path / "trace.json").exists() else False
        )
        program.kill()
        program.wait()
    assert "collate" in names(events_of(tmp_path / "trace.json", whole=False))


def test_without_the_variable_there_is_none(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLOAD_TRACE", raising=False)
    run(CODE, shard, tmp_path / "cache", "thread", 0)
    assert not list(tmp_path.glob("*.json"))


def test_a_place_that_cannot_be_written_stops_nothing(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOAD_TRACE", str(tmp_path / "no" / "trace.json"))
    found = run(CODE, shard, tmp_path / "cache", "thread", 0)
    assert found.stdout.count("a batch") == 8
    assert "there will be no trace" in found.stderr


def test_it_ends_at_its_size(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "t.json", "test", bytes_max=60_000)
    for number in range(2000):
        trace.span(f"number {number}", float(number), number + 0.5)
    trace.close()
    assert (tmp_path / "t.json").stat().st_size < 61_000
    events = events_of(tmp_path / "t.json")
    assert events[-1]["name"] == "the trace is full"
    assert {"number 0", "number 9"} <= names(events)


def test_several_at_a_time_have_files_of_their_own(tmp_path: Path) -> None:
    one, other = (Trace(tmp_path / "t.json", "test") for _ in range(2))
    for trace in (one, other):
        trace.span("work", 1.0, 2.0)
        trace.request("s3", 1.0, 3.0, bytes=5)
        trace.close()
    assert names(events_of(tmp_path / "t.json")) == names(events_of(tmp_path / f"t.{os.getpid()}.json")) == {"work"}
    again = Trace(tmp_path / "t.json", "test")  # none has it now: it begins anew
    again.close()
    assert names(events_of(tmp_path / "t.json")) == set()


def test_what_an_idle_process_did_is_in_the_file(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "t.json", "test")
    for name in ("one", "other"):  # the second comes when the first was written
        trace.span(name, 1.0, 2.0)
        until(lambda name=name: name in names(events_of(tmp_path / "t.json", whole=False)))  # type: ignore[misc]
    trace.close()
    assert names(events_of(tmp_path / "t.json")) == {"one", "other"}


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "t.json", "test")

    def work() -> None:
        for number in range(500):
            trace.span("work", time.monotonic(), time.monotonic(), number=number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    assert sum(event["name"] == "work" for event in events_of(tmp_path / "t.json")) == 2000
