"""`fastload status` and `top`, of services in other processes, in pipes and in a terminal; and the views they show."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastload import protocol
from fastload.cache import CacheDirectory
from fastload.cli import exits
from fastload.cli.view import as_line, as_lines, bar, duration, rates_between
from fastload.client.cache import Handle
from fastload.snapshot import Consumer, Snapshot, Tier
from tests.patience import PATIENCE_S
from tests.processes import kill_service, service_pids, until
from tests.programs import Program, run, run_cli
from tests.snapshots import HOSTILE, example, make

FASTLOAD = Path(sys.executable).parent / "fastload"

# A job: it reads one file, and stays connected until it is told to end.
JOB = """
import sys
import fastload
with fastload.Cache(sys.argv[1], ram_bytes="32MiB", disk_bytes="64MiB") as cache:
    with fastload.open(sys.argv[2], cache) as file:
        print(len(file.read()), flush=True)
        sys.stdin.readline()
"""


@contextlib.contextmanager
def job(tmp_path: Path) -> Iterator[Path]:
    """The cache directory of one that runs."""
    (tmp_path / "data").write_bytes(bytes(100_000))
    with Program(JOB, tmp_path / "cache", tmp_path / "data") as program:
        assert program.stdout.readline() == "100000\n"
        yield tmp_path / "cache"
        program.stdin.write("\n")
    until(lambda: not service_pids(tmp_path / "cache"))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")
    with job(tmp_path) as found:
        yield found


@pytest.mark.parametrize("verb", [["status"], ["status", "--json"], ["top"], ["top", "--json"]])
def test_where_nothing_serves_that_is_said_and_nothing_made(tmp_path: Path, verb: list[str]) -> None:
    done = run_cli(*verb, "--cache", tmp_path / "nowhere", check=False)
    assert done.returncode == exits.PARTIAL
    assert done.stdout == ""
    assert f"no cache service runs for {tmp_path / 'nowhere'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["status", "top"])
def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path, verb: str) -> None:
    tmp_path.chmod(0o777)
    done = run_cli(verb, "--cache", tmp_path, check=False)
    assert done.returncode == exits.FAILED
    assert f"run chmod 700 {tmp_path}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_a_directory_of_another_user_names_both(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    done = run_cli("status", "--cache", tmp_path, check=False)
    assert done.returncode == exits.FAILED
    assert "belongs to user 12345, and this process runs as user 0" in done.stderr


def let_others_in(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)


AS_ANOTHER = """
import os
import fastload.cli, fastload.client.operator, zoneinfo  # before they cannot be read any more
import fastload.cli.cache, fastload.cli.checks
os.setgid(65534)
os.setuid(65534)
fastload.cli.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o700, 0o755])
@pytest.mark.parametrize("verb", ["status", "top", "doctor"])
def test_another_user_is_told_so_in_a_line(tmp_path: Path, verb: str, mode: int) -> None:
    let_others_in(tmp_path)
    cache = tmp_path / "cache"
    with Handle(cache, ram_bytes="32MiB", disk_bytes=0, service="inprocess") as handle, handle.consumer():
        cache.chmod(mode)
        done = run(AS_ANOTHER, verb, "--cache", cache, check=False)
        assert done.returncode == exits.FAILED, done.stderr
        said = done.stderr if verb != "doctor" else done.stdout
        assert "Traceback" not in done.stderr
        (line,) = (line for line in said.splitlines() if "user 0" in line)
        assert "65534" in line
        cache.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("verb", [["status"], ["doctor"], ["cache", "ls"]], ids=" ".join)
def test_a_folder_that_may_not_be_entered_is_said_in_a_line(tmp_path: Path, verb: list[str]) -> None:
    let_others_in(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o700)
    cache = tmp_path / "closed" / "cache"
    cache.mkdir()
    done = run(AS_ANOTHER, *verb, "--cache", cache, check=False)
    assert done.returncode == exits.FAILED, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Permission denied" in line]
    assert any(str(cache) in line for line in lines)
    assert "Traceback" not in done.stderr


@contextlib.contextmanager
def impostor(directory: Path, *replies: bytes) -> Iterator[None]:
    """A process of ours that listens in place of a service, answers each message with one of these, and hangs up."""
    directory.mkdir(mode=0o700)
    with CacheDirectory.open(directory, ram_bytes=32 << 20, disk_bytes=0).listen() as listening:
        listening.settimeout(PATIENCE_S)

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                for reply in replies or [b""]:
                    connection.recv(1 << 16)
                    connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


OBSERVED = protocol.frame(protocol.Observed(protocol.VERSION, b"id", 7))


@pytest.mark.parametrize(
    ("replies", "code"),
    [
        ([], exits.PARTIAL),  # it was just ending
        ([OBSERVED], exits.PARTIAL),
        ([b"\x00\x00\x00\x05\xff\xff\xff\xff\xff"], exits.FAILED),
        ([b"\xff" * 64], exits.FAILED),
        ([protocol.frame(protocol.Pong())], exits.FAILED),
        ([OBSERVED, b"\xff" * 64], exits.FAILED),
        ([protocol.frame(protocol.Refused("ServiceError", HOSTILE))], exits.FAILED),
        ([OBSERVED, protocol.frame(protocol.RequestFailed(1, "CacheError", HOSTILE))], exits.FAILED),
    ],
)
def test_a_service_that_makes_no_sense_costs_one_line(tmp_path: Path, replies: list[bytes], code: int) -> None:
    with impostor(tmp_path / "cache", *replies):
        done = run_cli("status", "--cache", tmp_path / "cache", check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastload: ")
    assert line.isprintable()


def test_status_of_a_service_in_use(directory: Path) -> None:
    shown = run_cli("status", "--cache", directory).stdout
    assert "service on demand" in shown
    assert str(directory) in shown
    assert "32.0 MiB" in shown
    assert "fastload.open" in shown
    assert not any(each in shown for each in ("\x1b", "\r"))
    by_variable = run_cli("status", "--json", env={**os.environ, "FASTLOAD_CACHE": str(directory)}).stdout
    snapshot = msgspec.json.decode(by_variable, type=Snapshot)
    assert snapshot.node.directory == str(directory)
    assert snapshot.node.pid in service_pids(directory)
    assert [each.remote_bytes + each.ram_bytes for each in snapshot.consumers] == [100_000]


def test_names_that_are_meant_to_harm_are_shown_as_text(tmp_path: Path) -> None:
    with (
        Handle(tmp_path, ram_bytes="32MiB", disk_bytes=0, service="inprocess") as handle,
        handle.consumer(name=HOSTILE),
    ):
        shown = run_cli("status", "--cache", tmp_path).stdout
        assert r"\x1b[31m\x9b2J<img onerror=alert(1)>\u202etxt.exe\r\n\x07xxx" in shown
        assert all(each.isprintable() for each in shown.splitlines())
        assert len(shown) < 10_000
        whole = json.loads(run_cli("status", "--json", "--cache", tmp_path).stdout)
        assert whole["consumers"][0]["name"] == HOSTILE


def test_top_in_a_pipe_is_a_line_a_second(directory: Path) -> None:
    lines = run_cli("top", "--count=2", "--cache", directory).stdout.splitlines()
    assert len(lines) == 2
    assert "ram -, disk -, store -; 1 consumer, 0 jobs" in lines[0]
    assert "ram 0 B/s, disk 0 B/s, store 0 B/s; 1 consumer, 0 jobs" in lines[1]
    snapshots = run_cli("top", "--count=2", "--json", "--cache", directory).stdout.splitlines()
    first, second = (msgspec.json.decode(each, type=Snapshot) for each in snapshots)
    assert second.at > first.at


def test_top_outlives_the_service(directory: Path) -> None:
    with Program("from fastload.cli import main; main()", "top", "--json", "--cache", directory) as program:
        first = msgspec.json.decode(program.stdout.readline(), type=Snapshot)
        kill_service(directory)
        seen = [json.loads(program.stdout.readline())]
        while "error" not in seen[-1]:
            seen.append(json.loads(program.stdout.readline()))
        assert "service" in seen[-1]["error"]
        while "error" in seen[-1]:  # the job starts another
            seen.append(json.loads(program.stdout.readline()))
        assert seen[-1]["node"]["pid"] != first.node.pid
        os.kill(program.pid, signal.SIGINT)
        program.wait()
        assert program.returncode == exits.INTERRUPTED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, exits.INTERRUPTED), (signal.SIGTERM, exits.TERMINATED)])
def test_top_leaves_the_terminal_as_it_was(directory: Path, number: int, code: int) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    command = [FASTLOAD, "top", "--cache", directory]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as program:
        try:
            drawn = _read_until(ours, b"32.0 MiB")
            assert drawn.count(b"\x1b[?1049h") == 1  # a screen of its own
            program.send_signal(number)
            assert program.wait(PATIENCE_S) == code
            drawn += _read_until(ours, b"\x1b[?25h")  # the cursor
            assert drawn.count(b"\x1b[?1049l") == 1
            assert termios.tcgetattr(theirs) == before
        finally:
            program.kill()
            os.close(ours)
            os.close(theirs)


def _read_until(terminal: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 1 << 16)
    return seen


def test_a_view_of_everything_holds_no_character_that_a_terminal_obeys() -> None:
    before, now = example(1000.0, HOSTILE), example(1001.0, HOSTILE)
    for line in [*as_lines(now, before), *as_lines(now), as_line(now, before)]:
        assert line.isprintable()
        assert len(line) < 1200


def test_a_screenful() -> None:
    many = example(data_sets=[make(type(example().data_sets[0]), name=f"set {number}") for number in range(1000)])
    lines = as_lines(many)
    assert "... and 992 more; --json has all" in lines
    assert len(lines) < 40
    empty = example(endpoints=[], data_sets=[], jobs=[], consumers=[], troubles=[])
    assert len(as_lines(empty)) < 10


def at(seconds: float, ram: int, pid: int = 7) -> Snapshot:
    found = example(
        seconds,
        tiers=[make(Tier, name="ram", served_bytes=ram)],
        consumers=[make(Consumer, number=1, ram_bytes=ram, report={"samples": ram // 10})],
    )
    return msgspec.structs.replace(found, node=msgspec.structs.replace(found.node, pid=pid))


def test_rates_are_what_has_grown_between_two_snapshots() -> None:
    rates = rates_between(at(10.0, 1000), at(12.0, 5000))
    assert rates.served_bytes == {"ram": 2000.0, "store": 0.0}
    assert rates.consumers == {1: {"ram": 2000.0, "disk": 0.0, "store": 0.0, "samples": 200.0}}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, at(10.0, 5000)),
        (at(10.0, 1000), at(12.0, 5000, pid=8)),  # another service
        (at(10.0, 1000), at(9.0, 5000)),  # the clock was set back
        (at(10.0, 1000), at(10.0, 1000)),  # the same snapshot twice
    ],
)
def test_there_is_no_rate_without_a_snapshot_of_the_same_service_before(before: Snapshot | None, now: Snapshot) -> None:
    assert rates_between(before, now).served_bytes == {}
    assert "ram -" in as_line(now, before)


def stalled(epoch: int, elapsed_s: float, rank: Any = 0, **stalls: Any) -> Snapshot:
    """At that time, with one rank and its waits so far."""
    report = {"rank": rank, "epoch": epoch, "elapsed_s": elapsed_s, "stalls": stalls, "bound_by": "fetch"}
    return example(elapsed_s, consumers=[make(Consumer, number=1, report={**report, "verdict": "fetch-bound: wait"})])


@pytest.mark.parametrize(
    ("before", "now", "waits"),
    [
        (None, stalled(1, 100.0, fetch=20.0, decode=5.0, map=0.1), "fetch 20 %, decode 5 %"),
        (stalled(1, 100.0, fetch=20.0), stalled(1, 102.0, fetch=21.0, disk=0.5), "fetch 50 %, disk 25 %"),
        # In another epoch, what was before does not count.
        (stalled(1, 100.0, fetch=20.0), stalled(2, 104.0, fetch=13.0), "fetch 12 %"),
        (None, stalled(1, 0.0, fetch=20.0), ""),
        (None, stalled(1, 10.0, fetch=float("nan"), disk=None, map="x"), ""),
        (None, stalled(1, 10.0, **{HOSTILE: 5.0}), r"\x1b[31m"),
    ],
)
def test_waits_are_shares_of_the_trainers_time(before: Snapshot | None, now: Snapshot, waits: str) -> None:
    (line,) = (line for line in as_lines(now, before) if line.lstrip().startswith("0 "))
    assert waits in line
    assert waits or "%" not in line
    assert f"rank 0 waits: {waits}" in as_line(now, before) or not waits


def test_what_holds_ranks_up_is_said_once_for_all_of_them() -> None:
    both = [stalled(1, 10.0, rank=rank).consumers[0] for rank in (0, "\x1b", 1)]
    lines = as_lines(example(consumers=both, troubles=["a disk " * 30]), width=60)
    assert "rank 0, -, 1: fetch-bound: wait" in lines
    start = lines.index(next(line for line in lines if line.startswith("trouble: ")))
    assert all(len(line) <= 60 for line in lines[start:])
    assert " ".join("".join(lines[start:]).split()).count("a disk") == 30


def test_bars_and_durations() -> None:
    assert bar(0, 0) == "[" + "." * 20 + "]"
    assert bar(5, 10) == "[" + "#" * 10 + "." * 10 + "]"
    assert bar(11, 10) == "[" + "#" * 20 + "]"
    assert [duration(each) for each in (-5, 59.6, 61, 3700, 90000)] == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 01 min",
        "1 d 1 h",
    ]
