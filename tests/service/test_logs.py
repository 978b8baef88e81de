"""The service's log is bounded, whoever gives reasons for lines."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastload.client import Handle
from fastload.service.host.logs import LINES_AT_ONCE, LineLimit, limited
from tests.service.helpers import CHUNK_BYTES


def _record(line: int = 1, message: str = "a store answers %d") -> logging.LogRecord:
    return logging.LogRecord("fastload.store", logging.WARNING, __file__, line, message, (503,), None)


def test_a_place_logs_ten_lines_and_then_ten_a_minute() -> None:
    now = 100.0
    limit = LineLimit(lambda: now)
    assert sum(limit.filter(_record()) for _ in range(1000)) == LINES_AT_ONCE
    assert limit.filter(_record(line=2))  # another place has lines of its own
    now += 6.0
    record = _record()
    assert limit.filter(record)
    assert record.getMessage() == "a store answers 503 [990 more like this were left out]"
    assert not limit.filter(_record())
    now += 6.0
    record = _record()
    assert limit.filter(record)
    assert record.getMessage() == "a store answers 503 [1 more like this were left out]"
    now += 3600.0
    assert sum(limit.filter(_record()) for _ in range(1000)) == LINES_AT_ONCE


def test_loggers_of_an_application_are_limited_for_as_long_as_we_serve_there() -> None:
    logger, seen = logging.getLogger("fastload.service"), logging.NullHandler()
    records: list[logging.LogRecord] = []
    seen.handle = lambda record: records.append(record) or True  # type: ignore[func-returns-value,method-assign]
    logger.addHandler(seen)
    try:
        with limited("fastload.service"):
            for _ in range(100):
                logger.error("the same again")
        assert len(records) == LINES_AT_ONCE
        logger.error("the same again")
        logger.error("the same again")
        assert len(records) == LINES_AT_ONCE + 2
    finally:
        logger.removeHandler(seen)


def test_a_service_in_threads_leaves_the_stores_logger_to_the_application(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"ram_bytes": 4 * CHUNK_BYTES, "disk_bytes": 0, "chunk_bytes": CHUNK_BYTES}
    with Handle(tmp_path / "cache", service="inprocess", **limits) as cache, cache.consumer():
        for _ in range(100):
            logging.getLogger("fastload.store").error("the same again")
            logging.getLogger("fastload.service").error("of the service")
    assert caplog.messages.count("the same again") == 100
    assert caplog.messages.count("of the service") == LINES_AT_ONCE


# A process whose standard error is the log, as that of a service is. Each record is of a place of its own.
_CHATTY = """
import logging, os, sys
from pathlib import Path
from fastload.service.host.logs import ServiceLog

handler, path = ServiceLog(bytes_max=10_000), Path(sys.argv[1])
handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
handler.keep_small(lambda: path if path.parent.exists() else None)
def log(number, text):
    handler.handle(logging.LogRecord("x", logging.ERROR, "a.py", number, text, None, None))
"""


def _run(tmp_path: Path, body: str) -> Path:
    log = tmp_path / "cache" / "service.log"
    log.parent.mkdir()
    with log.open("ab") as file:
        command = [sys.executable, "-c", _CHATTY + body, str(log)]
        subprocess.run(command, check=True, stderr=file, stdout=file, timeout=300)
    return log


def test_the_file_is_begun_anew_while_the_service_runs(tmp_path: Path) -> None:
    log = _run(tmp_path, "for number in range(2000): log(number, f'line {number} ' + 'x' * 80)\nprint('printed')")
    before = log.with_name("service.log.1")
    assert sorted(path.name for path in log.parent.iterdir()) == ["service.log", "service.log.1"]
    assert before.stat().st_size + log.stat().st_size < 2 * 10_200
    lines = (before.read_text() + log.read_text()).splitlines()
    assert lines[-1] == "printed"
    numbers = [int(found[1]) for line in lines[:-1] if (found := re.match(r"ERROR line (\d+) x{80}$", line))]
    assert numbers == list(range(2000 - len(numbers), 2000))
    assert len(numbers) == len(lines) - 1
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_line_has_a_length(tmp_path: Path) -> None:
    log = _run(tmp_path, "handler._bytes_max = 1 << 30\nlog(1, 'y' * (1 << 20))")
    assert log.stat().st_size < 20_000


def test_one_that_somebody_else_has_begun_is_gone_over_to(tmp_path: Path) -> None:
    """Whoever starts a service begins a new log where the old one is large, and the one that ends writes on."""
    log = _run(
        tmp_path,
        "os.replace(path, f'{path}.1'); path.write_text('of the next\\n')\n"
        "log(1, 'z' * 12_000)\nlog(2, 'seen')\nlog(3, 'seen, too')",
    )
    assert log.read_text() == "of the next\nERROR seen\nERROR seen, too\n"


def test_one_whose_directory_was_removed_grows_nowhere(tmp_path: Path) -> None:
    log = _run(
        tmp_path,
        "path.unlink(); path.parent.rmdir()\n"
        "for number in range(2000):\n    log(number, 'x' * 100)\n    assert os.fstat(2).st_size < 10_200",
    )
    assert not log.parent.exists()


def test_another_file_as_standard_error_is_left_alone(tmp_path: Path) -> None:
    log = _run(
        tmp_path,
        "fd = os.open(path.with_name('other'), os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.dup2(fd, 2)\n"
        "handler.keep_small(lambda: path)\nfor number in range(2000): log(number, 'x' * 100)",
    )
    assert log.with_name("other").stat().st_size == 2000 * len("ERROR \n" + "x" * 100)
    assert log.read_text() == ""


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """Nothing is written, and nothing raised."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        command = [sys.executable, "-c", _CHATTY + "log(1, 'x')\nos._exit(7)", str(tmp_path / "log")]
        assert subprocess.run(command, stderr=full, timeout=300, check=False).returncode == 7
    finally:
        os.close(full)
