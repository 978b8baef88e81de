"""A part of a benchmark in a process of its own: settings in, an answer or one line of an error out, and a deadline.

Users' code runs there, which may do anything: print, fork, exit, hang, or leave processes behind. So the answer goes
through a file that only the process itself has (what it prints goes to standard error), the end is seen by a pidfd
rather than by the end of a pipe, and at the end its whole session is killed. fastload's cache service has a session of
its own and ends by itself once idle.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastload.bench import measure
from fastload.errors import ConfigError, FastloadError, WaitTimeoutError, WorkerError, from_wire, to_wire

_GRACE_S = 10.0  # from SIGTERM to SIGKILL

Settings = TypeVar("Settings", bound=msgspec.Struct)
Answer = TypeVar("Answer", bound=msgspec.Struct)


class _Reply(msgspec.Struct, kw_only=True):
    """`error` is a name and a message, where it failed."""

    error: list[str] = []
    answer: msgspec.Raw = msgspec.Raw(b"\xc0")  # nil


@dataclass(frozen=True, slots=True)
class Words:
    """What a process is called in errors, and the cures where it takes too long, or ends without an answer."""

    what: str
    late: str
    dead: str


class Asked:
    """A process that was given its settings."""

    def __init__(self, module: str, settings: msgspec.Struct, words: Words, environment: Mapping[str, str]) -> None:
        self.words = words
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 (until `end`)
        with tempfile.TemporaryFile() as given:
            given.write(msgspec.json.encode(settings))
            given.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=given,
                stdout=self._out,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)

    def has_ended(self, within_s: float) -> bool:
        """Wait until it ends, but no longer than that."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, 1e3 * within_s)))

    def answer(self, kind: type[Answer]) -> Answer:
        """What it said, once it has ended. Raises its error, WorkerError where it said nothing."""
        # Not reaped yet, so that its number stays that of its process group until `end`.
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        self._out.seek(0)
        try:
            reply = msgspec.msgpack.decode(self._out.read(), type=_Reply)
            if not reply.error:
                return msgspec.msgpack.decode(reply.answer, type=kind)
        except msgspec.MsgspecError:
            number = ended.si_status
            is_exit = ended.si_code == os.CLD_EXITED
            how = f"ended with status {number}" if is_exit else f"was ended by {signal.Signals(number).name}"
            raise WorkerError(f"{self.words.what} {how} before it gave its figures; {self.words.dead}") from None
        raise from_wire(reply.error[0], reply.error[1])

    def end(self) -> None:
        """End it with all that it started. To be called once."""
        try:
            if not self.has_ended(0):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
                self.has_ended(_GRACE_S)
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            os.close(self._pidfd)
            self._out.close()


@contextmanager
def asked(
    module: str, settings: msgspec.Struct, words: Words, environment: Mapping[str, str] | None = None
) -> Iterator[Asked]:
    """`python -m module` with these settings, which is ended at the end of the block."""
    process = Asked(module, settings, words, environment or {})
    try:
        yield process
    finally:
        process.end()


def answers(processes: Sequence[Asked], kind: type[Answer], timeout_s: float) -> list[Answer]:
    """What all of them say. Raises the first one's error, WaitTimeoutError at the deadline."""
    deadline = time.monotonic() + timeout_s
    found: dict[int, Answer] = {}
    while len(found) < len(processes):
        for number, each in enumerate(processes):
            # With several, none is waited for alone: each may fail, and the others then wait for it.
            if number not in found and each.has_ended(deadline - time.monotonic() if len(processes) == 1 else 0.05):
                found[number] = each.answer(kind)
        if len(found) < len(processes) and time.monotonic() >= deadline:
            words = processes[0].words
            raise WaitTimeoutError(f"{words.what} has not ended after {timeout_s:.0f} s; {words.late}")
    return [found[number] for number in range(len(processes))]


def serve(kind: type[Settings], work: Callable[[Settings], msgspec.Struct]) -> int:
    """The other side: do the work that standard input asks for, and answer. The exit status."""
    measure.die_with_parent()
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=kind)
    out, pid = os.dup(sys.stdout.fileno()), os.getpid()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where users' code prints
    reply = _Reply()
    try:
        reply.answer = msgspec.Raw(msgspec.msgpack.encode(work(settings)))
    except FastloadError as error:
        reply.error = list(to_wire(error))
    except BaseException as error:  # of users' code, SystemExit included
        reply.error = list(to_wire(WorkerError(described(error))))
    if os.getpid() != pid:  # users' code forked, and this is the copy: the other one answers
        os._exit(0)
    with os.fdopen(out, "wb") as file:
        file.write(msgspec.msgpack.encode(reply))
    return 0


def described(error: BaseException) -> str:
    """An error of users' code in one line, with the place at which it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if said else ''}{said}{place}"


def check_target(option: str, target: str) -> None:
    """ConfigError where `module:name` is not one, or there is no such module. Imports nothing of it."""
    module, _, name = target.partition(":")
    if not module or not all(each.isidentifier() for each in f"{module}.{name}".split(".")):
        raise ConfigError(f"{option} {target}: must be a module and what it has, such as my_train:make_loader")
    _search_here()
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ConfigError(
            f"{option} {target}: there is no module {module} here or in this environment; start it beside"
        )


def imported(option: str, target: str) -> Any:
    """What `module:name` is; ConfigError where the module has no such name."""
    module, _, name = target.partition(":")
    _search_here()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{option} {target}: {error}; install it, or start where it can be imported") from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = (
                ", ".join(each for each in vars(found) if not each.startswith("_"))
                if hasattr(found, "__dict__")
                else ""
            )
            raise ConfigError(f"{option} {target}: {module} has no {name}; there are {names or 'no names'}")
        found = getattr(found, part)
    return found


def _search_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
