"""A script that ends while something of ours is being done, or let go of, ends in order: nothing is cut off in it."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE_S

SCRIPT = """
import time
import torch
import fastload.engine.iteration
from fastload.engine.deferred import call_later
from fastload.engine.pool import DecodePool

class Slow:
    def __init__(self, name):
        self.name, self.tensor = name, torch.zeros(3)
    def __del__(self):
        time.sleep(0.3)
        del self.tensor
        print(self.name + "\\n", end="", flush=True)  # in one write: threads print side by side

def use(thing):
    time.sleep(0.1)

call_later(use, Slow("what was left for later"))
DecodePool(1).submit(lambda thing=Slow("a job of a pool that was dropped"): use(thing))
kept = DecodePool(1)
kept.submit(lambda thing=Slow("a job of a pool that is there"): use(thing))
"""


def test_what_threads_hold_is_let_go_of_before_the_interpreter_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert sorted(done.stdout.splitlines()) == [
        "a job of a pool that is there",
        "a job of a pool that was dropped",
        "what was left for later",
    ]
    assert not done.stderr
