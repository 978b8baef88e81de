"""What epochs leave behind: nothing, whoever works; and that it would be seen. `make chaos` has all ways of working."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench import endurance
from bench.endurance import MEMORY_SLACK_BYTES, Held, endure

EPOCHS = 18


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["inline", "thread", "process", "side", "torch"])
def test_nothing_grows_with_epochs(mode: str) -> None:
    # In a process of its own: workers that are forked from one that holds 800 MB of other tests' objects unshare its
    # pages for a long while, and that would count as growth.
    command = [sys.executable, "-m", "bench.endurance", "--here", "--epochs=30", "--mode", mode]
    environment = {**os.environ, "FASTLOAD_IDLE_S": "2"}  # torch's workers leave the service alone between epochs
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip().endswith(": flat")


def test_what_grows_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytearray] = []
    pipes: list[tuple[int, int]] = []
    ended = threading.Event()
    threads: list[threading.Thread] = []
    look = Held.look

    def leaking(held: Held, folder: Path) -> None:
        kept.append(bytearray(b"x" * (8 * MEMORY_SLACK_BYTES // EPOCHS * 3)))
        pipes.append(os.pipe())
        threads.append(threading.Thread(target=ended.wait))
        threads[-1].start()
        (folder / "cache" / f"{len(kept)}").touch()
        look(held, folder)

    monkeypatch.setattr(endurance.Held, "look", leaking)
    try:
        grown = endure("inline", EPOCHS, tmp_path).grown()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        for pipe in pipes:
            for end in pipe:
                os.close(end)
    assert [words.partition(" ")[0] for words in grown] == ["memory", "descriptors", "threads", "files"]
