"""That taking the GIL is counted exactly, for each thread, and in place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gil

# A thread that lets go of the GIL a known number of times: once for each call through ctypes, and to wait for its turn.
PROGRAM = """
import ctypes, gc, json, sys, threading
from bench import gil
counter = gil.Counter()
nothing = ctypes.CDLL(None).sched_yield

def work(times):
    for _ in range(times):
        nothing()

def taken():
    return {number: figures.taken for number, figures in counter.threads().items()}

found = {}
gc.disable()
for times in (0, 100, 1000):
    thread = threading.Thread(target=work, args=(times,))
    thread.start()
    thread.join()
    found[times] = taken()[thread.native_id]

places = []
if sys.version_info[:2] == (3, 11):
    with counter.watched() as seen:
        work(50)
    places = [(place.count, str(place)) for place in seen]
json.dump([found, places], sys.stdout)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_each_call_that_lets_go_is_one(tmp_path: Path) -> None:
    environment = gil.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, check=True)
    found, places = json.loads(done.stdout)
    # A thread takes it to begin, and again where the interpreter makes it wait for others: not for each of its calls.
    assert 100 <= found["100"] - found["0"] <= 110
    assert 1000 <= found["1000"] - found["0"] <= 1020
    if places:
        assert 50 <= sum(count for count, where in places if " work < " in where) <= 52
