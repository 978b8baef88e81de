"""Programs in processes of their own, which have torch and fastload from the start: importing torch takes seconds.

A program is forked by the tests' fork server (`conftest`), not by the test: it has nothing of the test's but its
arguments, its environment and its standard streams, and may be killed. It ends as an interpreter does: threads are
waited for, then what was registered for the exit is called. Where the start of an interpreter is what matters, or what
a program imports, tests start one with `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock

from tests.patience import PATIENCE_S


class Program:
    """`code` with `arguments`, in lines of text; as `subprocess.Popen`, of which it has what tests use."""

    def __init__(
        self,
        code: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        path: Path | None = None,
    ) -> None:
        """`path`: the file that holds the code, where it says so itself, or starts processes that import it."""
        (stdin, self_in), (self_out, stdout), (self_err, stderr) = os.pipe(), os.pipe(), os.pipe()
        ends = stdin, stdout, stderr
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_main,
            args=(
                code,
                [str(each) for each in arguments],
                dict(os.environ if env is None else env),
                cwd or Path.cwd(),
                path,
                _Ends(ends),
            ),
            daemon=False,
        )
        try:
            self._process.start()
        finally:
            for end in ends:
                os.close(end)
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.stdin, self.stdout, self.stderr = os.fdopen(self_in, "w"), os.fdopen(self_out), os.fdopen(self_err)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):  # it has ended before all was read that was said to it
                stream.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        """0 where it ended well, less than 0 where a signal ended it; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """How it ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the program did not end"
        return self._process.exitcode

    def communicate(self, said: str = "") -> tuple[str, str]:
        """Say the last, and read what it prints until it has ended."""
        with self.stdin, self.stdout, self.stderr:
            errors = list[str]()
            reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
            reader.start()
            with contextlib.suppress(BrokenPipeError):  # it has ended
                self.stdin.write(said)
                self.stdin.close()
            printed = self.stdout.read()
            reader.join()
            self.wait()
        return printed, errors[0]


def run(code: str, *arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program to its end, which is a good one if that is to be checked."""
    program = Program(code, *arguments, **options)
    printed, errors = program.communicate()
    assert program.returncode == 0 or not check, errors
    return subprocess.CompletedProcess(["-c", *map(str, arguments)], program.returncode or 0, printed, errors)


def run_cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`fastload` with these arguments, to its end."""
    return run("from fastload.cli import main; main()", *arguments, **options)


def run_cli_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, for what ends before there is anything to end: a mistake in the arguments."""
    from fastload.cli import main

    command, out, errors, code = ["fastload", *map(str, arguments)], io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())


class _Ends:
    """Descriptors, which become those of the process that this is sent to as it starts."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self._numbers: tuple[Any, ...] = numbers

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(DupFd(number) for number in self._numbers)

    def __setstate__(self, sent: tuple[Any, ...]) -> None:
        self._numbers = sent

    def become_standard(self) -> None:
        for number, end in enumerate(self._numbers):
            taken = end.detach()
            os.dup2(taken, number)
            os.close(taken)


def _main(
    code: str, arguments: list[str], environ: dict[str, str], folder: Path, path: Path | None, ends: _Ends
) -> None:
    ends.become_standard()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    name = "-c" if path is None else str(path)
    sys.argv = [name, *arguments]
    multiprocessing.set_start_method(None, force=True)  # the platform's, in place of that by which this was started
    main = types.ModuleType("__main__")
    if path is not None:
        main.__file__ = name
    sys.modules["__main__"] = main
    try:
        exec(compile(code, name, "exec"), main.__dict__)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        sys.stdout.flush()
        atexit._run_exitfuncs()
