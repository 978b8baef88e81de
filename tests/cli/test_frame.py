"""What all verbs have in common: help, examples, completion, exit codes, and what they print into a pipe."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.core import TyperGroup

from fastload.cli import app, exits
from fastload.cli.cache_options import progress_line, shown
from fastload.cli.printing import as_table, plain, print_json
from fastload.client.operator import NotServedError
from fastload.snapshot import DataSet
from tests.patience import PATIENCE_S
from tests.processes import until
from tests.programs import run, run_cli

FASTLOAD = Path(sys.executable).parent / "fastload"


def verbs(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """All that do something, each with its name."""
    if isinstance(command, TyperGroup):
        for verb, below in command.commands.items():
            yield from verbs(f"{name} {verb}", below)
    else:
        yield name, command


VERBS = dict(verbs("fastload", typer.main.get_command(app)))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_ends_with_examples_that_can_be_typed(verb: str) -> None:
    _, _, listed = (VERBS[verb].epilog or "").partition("Examples:\n")
    lines = [line.strip() for line in listed.splitlines()]
    assert lines
    for line in lines:
        for command in line.split(" | "):
            words = shlex.split(command)
            if words[0] == "fastload":
                shown = verb.removesuffix(" run")  # which may be left out
                assert command.startswith(shown), line
                arguments = words[len(shown.split()) :]
                VERBS[verb].make_context(verb, arguments, resilient_parsing=False).close()


def test_verbs_are_suggested_and_what_cannot_be_is_usage() -> None:
    done = run_cli("wram", check=False)
    assert done.returncode == exits.USAGE
    assert "Did you mean 'warm'?" in done.stderr
    assert run_cli("warm", "--node=-1", "x", check=False).returncode == exits.USAGE


def test_the_shell_completes_verbs_and_options() -> None:
    def completed(line: str) -> list[str]:
        environ = {
            **os.environ,
            "_FASTLOAD_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        return subprocess.run([FASTLOAD], env=environ, capture_output=True, text=True, check=True).stdout.split()

    assert completed("fastload his") == ["history"]
    assert "--from-history" in completed("fastload warm --fr")
    script = run_cli(
        "--show-completion", "bash", env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert "_FASTLOAD_COMPLETE=complete_bash" in script.stdout


def test_the_cache_can_be_named_by_the_environment(tmp_path: Path) -> None:
    named = run_cli("history", "ls", check=False, env={**os.environ, "FASTLOAD_CACHE": str(tmp_path / "there")})
    assert named.returncode == exits.FAILED
    assert f"FASTLOAD_CACHE={tmp_path / 'there'}: there is no cache" in named.stderr


INTERRUPTED = """
import sys, time, typer
from fastload import cli
def wait():
    print("waits", flush=True)
    time.sleep(600)
cli.app.command("wait")(wait)
sys.argv[1:] = ["wait"]
cli.main()
"""


def test_an_interrupted_verb_says_so_in_one_line() -> None:
    # Its own process group, as a terminal's: a shell's child in the background would ignore the signal.
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "waits\n"
        time.sleep(0.2)  # an interrupt that comes while a finalizer runs is lost
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == exits.INTERRUPTED
    assert errors == "fastload: interrupted\n"


ENDLESS = """
import sys
import time
from fastload import cli
def count():
    while True:
        print("one more line")
cli.app.command("count")(count)
sys.argv[1:] = ["count"]
cli.main()
"""


def test_a_reader_that_has_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "one more line\n"
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == exits.FAILED


def test_where_nothing_serves_is_another_code() -> None:
    code = """
from fastload import cli
from fastload.client.operator import NotServedError
def ask():
    raise NotServedError("no\\x1b[31m cache service\\nruns")
cli.app.command("ask")(ask)
import sys
import time
sys.argv[1:] = ["ask"]
cli.main()
"""
    done = run(code, check=False)
    assert done.returncode == exits.PARTIAL
    assert done.stderr == f"fastload: {NotServedError.__name__}: no\\x1b[31m cache service\\nruns\n"


def test_names_cannot_command_a_terminal() -> None:
    assert plain("as it is: [bold] é 雪") == "as it is: [bold] é 雪"
    assert plain("\x1b[31m\r\n\x9b\u202e\udc80") == r"\x1b[31m\r\n\x9b\u202e\udc80"


def test_a_table_is_aligned_and_cuts_nothing() -> None:
    long = "x" * 10_000
    lines = as_table(["name", ">size", "note"], [["a", "1", "n"], ["雪雪雪", "22", ""], [long, "333", "\x07"]])
    assert lines == [
        "name    size  note",
        "a          1  n",
        "雪雪雪    22",
        f"{long}   333  \\x07",
    ]


def test_json_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    held = DataSet(
        name="\u202e\x1b",
        object_count=1,
        byte_count=2,
        ram_bytes=3,
        disk_bytes=4,
        pinned_bytes=5,
        last_use_at=float("nan"),
    )
    print_json({"sets": [held], "most": float("inf")})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    found = json.loads(printed, parse_constant=lambda name: pytest.fail(name))
    assert found["most"] is None
    assert found["sets"][0]["name"] == "\u202e\x1b"
    assert found["sets"][0]["last_use_at"] is None


def test_progress_in_a_pipe_is_lines_also_while_nothing_moves() -> None:
    written = _Lines()
    with shown(Console(file=written, force_terminal=False, width=20), "warming", every_s=0.01) as work:
        written.wait_for("listing")
        work.show(3 << 20, 12 << 20)
        written.wait_for("3.0 MiB of 12.0 MiB (25 %)")
        before = written.getvalue().count("\n")
        written.wait_for_lines(before + 2)
    lines = written.getvalue().splitlines()
    assert lines[0] == "warming: begun"
    assert all(line.startswith("warming: ") for line in lines)
    assert "\x1b" not in written.getvalue()


class _Lines(io.StringIO):
    """What another thread writes, waited for."""

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.getvalue())

    def wait_for_lines(self, count: int) -> None:
        until(lambda: self.getvalue().count("\n") >= count)


@pytest.mark.parametrize(
    ("unit", "done", "total", "line"),
    [
        ("bytes", 0, -1, "warming: listing, after 20 s"),
        ("bytes", 50 << 20, 100 << 20, "warming: 50.0 MiB of 100.0 MiB (50 %), after 20 s, 2.5 MiB/s on average"),
        ("shards", 3, 4, "warming: 3 of 4 shards (75 %), after 20 s"),
        ("bytes", 0, 0, "warming: 0 B of 0 B (100 %), after 20 s, 0 B/s on average"),
    ],
)
def test_a_line_of_progress(unit: str, done: int, total: int, line: str) -> None:
    assert progress_line("warming", unit, done, total, 20.0) == line
