"""How a job starts a service process: the command, its environment, its log, and how it reports that it serves.

`fastload.service.__main__` is the other end.

The environment says where programs, libraries and temporary files are; languages and time zones; numbers of threads;
and settings of Python, of memory and of fastload. Nothing in it says which store to ask, through which proxy, or with
which credentials: the service makes requests for other jobs, too, and each job brings its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import site
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastload import errors
from fastload.errors import ServiceError
from fastload.rendezvous import ServiceLocation, StandIn
from fastload.service.host.logs import FILE_BYTES_MAX
from fastload.timing import trace

_KEPT = {"PATH", "TMPDIR", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD"}
_KEPT |= {"GLIBC_TUNABLES", "OPENSSL_CONF", "OPENSSL_MODULES", "RUST_BACKTRACE", "TOKIO_WORKER_THREADS"}
_KEPT |= {"JAVA_HOME", "HADOOP_HOME", "CLASSPATH", "ARROW_LIBHDFS_DIR"}  # fsspec's hdfs
_KEPT_BEGIN = ("LC_", "PYTHON", "FASTLOAD_", "MALLOC_", "ASAN_", "COVERAGE_", "OMP_", "OPENBLAS_", "MKL_", "NUMBA_")
# Tools that look for credentials and settings in the home directory would find those of the first job's user.
_NO_HOME = "/nonexistent"
START_DEADLINE_S = 60.0
_END_S = 5.0
_LOG_TAIL_BYTES = 2000


class StartError(ServiceError):
    """No service process can be started, or it ends while starting without saying why."""


def kept_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a service keeps of an environment."""
    kept = {name: value for name, value in environ.items() if name in _KEPT or name.startswith(_KEPT_BEGIN)}
    return {**kept, "HOME": _NO_HOME}


def clean_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Drop the rest, in the service's own process, which may have been started by hand."""
    kept = kept_environment(environ)
    for name in [name for name in environ if name not in kept]:
        del environ[name]
    environ.update(kept)


def start_process(
    directory: ServiceLocation, idle_s: float, stop: threading.Event, deadline_s: float = START_DEADLINE_S
) -> None:
    """Start a service process; returns when it serves, when it found another one in its place, or at the deadline.

    Raises the error that kept it from serving.
    """
    report = _run(directory.renewed(), idle_s, stop, deadline_s)
    if report is None:
        raise StartError(
            f"the cache service for {directory.path} ended while starting; its log ({directory.log_path}) ends "
            f"with:\n{log_tail(directory.log_path)}"
        )
    if report.get("status") == "error":
        name, message = report["error"]
        raise errors.from_wire(str(name), str(message))


def _run(directory: ServiceLocation, idle_s: float, stop: threading.Event, deadline_s: float) -> dict[str, Any] | None:
    reading, writing = os.pipe()
    try:
        try:
            with directory.opened() as root, _open_log(root / directory.log_path.name) as log:
                command = [sys.executable, "-m", "fastload.service", "--detach", f"--ready-fd={writing}"]
                command += [f"--directory={directory.path}", f"--idle-s={idle_s}"]
                command += [f"--limits={json.dumps(asdict(directory.limits))}"]
                command += ["--stand-in"] * isinstance(directory, StandIn)
                process = _popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing,),
                    env=child_environment(os.environ),
                    cwd="/",
                )
        finally:
            os.close(writing)
        try:
            return _read_report(reading, stop, deadline_s)
        finally:
            _reap(process)
    finally:
        os.close(reading)


def _popen(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, **settings)
    except OSError as error:  # no memory, no process, or no program
        raise StartError(
            f"no process can be started for a cache service: {error}; look at the limits of this process (ulimit -a) "
            "and at its memory"
        ) from error


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Our child forks and ends; the service is not our child. A child that was stopped before that is killed."""
    for kills in (True, False):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return
        if kills:
            process.kill()


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The service's environment, in which it finds this very package; and that of the page."""
    environment = kept_environment(environ)
    package = str(Path(__file__).resolve().parents[2])
    if environment.get(trace.VARIABLE):  # the service works in another directory
        environment[trace.VARIABLE] = os.path.abspath(environment[trace.VARIABLE])
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package if not path else f"{package}{os.pathsep}{path}"
    if site.ENABLE_USER_SITE and site.USER_BASE:  # the user's packages are found by the home directory
        environment.setdefault("PYTHONUSERBASE", site.USER_BASE)
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy only sorts here
    return environment


def _open_log(path: Path) -> Any:
    if path.exists() and path.stat().st_size > FILE_BYTES_MAX:
        os.replace(path, path.with_name(path.name + ".1"))
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def _read_report(fd: int, stop: threading.Event, deadline_s: float) -> dict[str, Any] | None:
    """What the service reports; None where it ended without a report."""
    data = b""
    poll = select.poll()  # unlike select(), for any descriptor
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + deadline_s
    while not data.endswith(b"\n"):
        if stop.is_set() or time.monotonic() > deadline:
            return {"status": "taken"}  # the caller looks at `stop` and at its own deadline
        if poll.poll(100):
            piece = os.read(fd, 4096)
            if not piece:
                return None
            data += piece
    report = json.loads(data)
    assert isinstance(report, dict)
    return report


def log_tail(path: Path) -> str:
    """The end of a service's log, for an error."""
    try:
        return path.read_text(errors="replace")[-_LOG_TAIL_BYTES:] or "(nothing)"
    except OSError as error:  # none was written
        return f"({error})"
