"""The demo from end to end, small."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from fastload.demo import train
from tests.programs import Program


@pytest.fixture
def temp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo works, so that what it leaves there is seen."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_second_epoch_fetches_nothing_and_the_network_learns(temp_folder: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    rows = train.run(epochs=2, samples=320, console=console)
    assert [row["samples"] for row in rows] == [320, 320]
    assert rows[0]["remote_share"] == 1.0
    assert rows[1]["fetched_bytes"] == 0
    assert rows[1]["ram_share"] + rows[1]["disk_share"] == 1.0
    assert rows[1]["accuracy"] > rows[0]["accuracy"]
    assert list(temp_folder.glob("fastload-*")) == []  # torch keeps a cache folder of its own there
    text = console.export_text()
    assert "accuracy" in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


def test_no_epochs_are_no_demo() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "fastload", "demo", "--epochs=0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--epochs" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import tempfile; tempfile.tempdir = None\n"  # which the fork server may have looked for
        "from fastload.demo import train; train.run(samples=320, epochs=1000)\n"
    )
    with Program(code, env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "100"}) as demo:
        for line in demo.stdout:
            if "accuracy" in line:
                break
        os.kill(demo.pid, number)
        assert demo.wait() != 0
    assert list(tmp_path.glob("fastload-*")) == []
